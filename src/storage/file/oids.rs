//! New oids, never handed out twice: neither across a restart nor across a crash.
//!
//! Clients keep a stock of oids that no transaction has used yet, so the largest oid in the file does not say what was
//! handed out. NAME.oid holds an upper bound of it, raised in blocks before oids are given, by an atomic rename:
//!
//! ```text
//! zeo-rs oids below 00000000000007d0 00000000000007d0
//! ```
//! Without the file (deleted, or never made: ZODB has none) new oids begin above the largest in the index, as ZODB's do.
//! The number is written twice; a file where the two differ is ignored. A clean close lowers the bound to what was
//! really given.
//!
//! Cost: two syncs for [`BLOCK`] oids; otherwise a mutex.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::index_file::beside;
use crate::ids::Oid;
use crate::storage::{Result, StorageError};

/// Oids reserved at a time. A crash skips at most so many (of 2⁶⁴).
const BLOCK: u64 = 4096;
const HEAD: &str = "zeo-rs oids below ";

pub(super) struct OidSupply {
    /// Next oid to give.
    next: u64,
    /// Oids below are reserved on disk.
    reserved: u64,
    /// NAME.oid.
    path: PathBuf,
}

impl OidSupply {
    /// `max_oid`: the largest in the index.
    pub(super) fn open(path: &Path, max_oid: Option<Oid>) -> Self {
        let path = beside(path, ".oid");
        let reserved = read(&path).unwrap_or(0);
        let above = max_oid.map_or(1, |oid| oid.0.saturating_add(1));
        Self { next: above.max(reserved).max(1), reserved, path }
    }

    /// A client chose `oid` itself (or a copy of a database brings it).
    pub(super) fn note_used(&mut self, oid: Oid) {
        self.next = self.next.max(oid.0.saturating_add(1));
    }

    /// The largest oid given or used.
    pub(super) fn last(&self) -> Oid {
        Oid(self.next - 1)
    }

    pub(super) fn take(&mut self, count: usize) -> Result<Vec<Oid>> {
        let spent = || StorageError::Invalid("there are no more oids".into());
        let end = self.next.checked_add(count as u64).ok_or_else(spent)?;
        if end > self.reserved {
            let bound = end.saturating_add(BLOCK);
            self.reserve(bound)?;
        }
        let first = std::mem::replace(&mut self.next, end);
        Ok((first..end).map(Oid).collect())
    }

    /// At a clean close: what was reserved and not given is free again.
    pub(super) fn close(&mut self) -> Result<()> {
        match self.reserved > self.next {
            true => self.reserve(self.next),
            false => Ok(()),
        }
    }

    fn reserve(&mut self, bound: u64) -> Result<()> {
        write(&self.path, bound)
            .map_err(|e| StorageError::io(format!("cannot reserve oids in {}", self.path.display()), e))?;
        self.reserved = bound;
        Ok(())
    }
}

fn read(path: &Path) -> Option<u64> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
        Err(e) => {
            tracing::warn!(
                "cannot read {}: {e}; new oids begin above the largest one stored",
                path.display()
            );
            return None;
        }
    };
    let numbers = text.trim_end().strip_prefix(HEAD).and_then(|rest| rest.split_once(' '));
    let bound = numbers.filter(|(a, b)| a == b).and_then(|(a, _)| u64::from_str_radix(a, 16).ok());
    if bound.is_none() {
        tracing::warn!("{} is damaged; new oids begin above the largest one stored", path.display());
    }
    bound
}

fn write(path: &Path, bound: u64) -> io::Result<()> {
    let temp = beside(path, ".tmp");
    let mut file = std::fs::File::create(&temp)?;
    writeln!(file, "{HEAD}{bound:016x} {bound:016x}")?;
    file.sync_data()?;
    std::fs::rename(&temp, path)?;
    sync_parent(path)
}

/// Makes names beside `path` durable.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => std::fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_gives_nothing_again_and_a_close_leaves_no_gap() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Data.fs");
        let mut first = OidSupply::open(&path, Some(Oid(9)));
        assert_eq!(first.take(2).unwrap(), [Oid(10), Oid(11)]);
        // Killed: nothing said goodbye.
        let mut second = OidSupply::open(&path, Some(Oid(9)));
        let given = second.take(1).unwrap();
        assert!(given > vec![Oid(11)], "{given:?}");
        second.close().unwrap();
        assert_eq!(OidSupply::open(&path, None).take(1).unwrap(), [Oid(given[0].0 + 1)]);
    }

    #[test]
    fn a_damaged_or_missing_file_is_as_zodb() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Data.fs");
        std::fs::write(beside(&path, ".oid"), format!("{HEAD}0000000000000fff 0000000000000ffe\n")).unwrap();
        let mut supply = OidSupply::open(&path, Some(Oid(4)));
        supply.note_used(Oid(6));
        assert_eq!(supply.take(1).unwrap(), [Oid(7)]);
        supply.note_used(Oid(u64::MAX));
        assert!(supply.take(1).is_err());
    }
}
