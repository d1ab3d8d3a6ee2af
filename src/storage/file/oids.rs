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
//! Cost: a mutex for a moment. Before the stock runs out a thread of its own reserves the next [`BLOCK`] (two syncs), so
//! that only the first call after opening waits for the disk, or one that outruns it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::index_file::beside;
use super::lock;
use crate::ids::Oid;
use crate::storage::{Result, StorageError};

/// Oids reserved at a time. A crash skips at most twice so many (of 2⁶⁴).
const BLOCK: u64 = 4096;
const HEAD: &str = "zeo-rs oids below ";

pub(super) struct OidSupply(Arc<Supply>);

struct Supply {
    /// NAME.oid.
    path: PathBuf,
    numbers: Mutex<Numbers>,
    /// Held while NAME.oid is written; taken before `numbers`, which nobody holds during a sync.
    file: Mutex<()>,
}

struct Numbers {
    /// Next oid to give.
    next: u64,
    /// Oids below are reserved on disk.
    reserved: u64,
    /// A thread is reserving more.
    refilling: bool,
    closed: bool,
}

impl OidSupply {
    /// `max_oid`: the largest in the index.
    pub(super) fn open(path: &Path, max_oid: Option<Oid>) -> Self {
        let path = beside(path, ".oid");
        let reserved = read(&path).unwrap_or(0);
        let above = max_oid.map_or(1, |oid| oid.0.saturating_add(1));
        let next = above.max(reserved).max(1);
        let numbers = Mutex::new(Numbers { next, reserved, refilling: false, closed: false });
        Self(Arc::new(Supply { path, numbers, file: Mutex::new(()) }))
    }

    /// A client chose `oid` itself (or a copy of a database brings it).
    pub(super) fn note_used(&self, oid: Oid) {
        let mut numbers = lock(&self.0.numbers);
        numbers.next = numbers.next.max(oid.0.saturating_add(1));
    }

    /// The largest oid given or used.
    pub(super) fn last(&self) -> Oid {
        Oid(lock(&self.0.numbers).next - 1)
    }

    pub(super) fn take(&self, count: usize) -> Result<Vec<Oid>> {
        loop {
            let mut numbers = lock(&self.0.numbers);
            if numbers.closed {
                return Err(StorageError::Closed);
            }
            let end = numbers.end_of(count)?;
            if end <= numbers.reserved {
                let first = std::mem::replace(&mut numbers.next, end);
                if numbers.reserved - end < BLOCK / 2 && !numbers.refilling {
                    numbers.refilling = true;
                    drop(numbers);
                    self.refill();
                }
                return Ok((first..end).map(Oid).collect());
            }
            drop(numbers);
            self.0.reserve(count)?;
        }
    }

    /// Reserves the next oids in a thread of its own.
    fn refill(&self) {
        let supply = Arc::clone(&self.0);
        let work = move || {
            // Whatever remains of the stock may be taken meanwhile.
            let reserved = supply.reserve(BLOCK as usize);
            lock(&supply.numbers).refilling = false;
            if let Err(error) = reserved
                && !matches!(error, StorageError::Closed)
            {
                tracing::warn!("{error}; new oids wait for the next attempt");
            }
        };
        if std::thread::Builder::new().name("zeo oids".into()).spawn(work).is_err() {
            lock(&self.0.numbers).refilling = false;
        }
    }

    /// At a clean close: what was reserved and not given is free again.
    pub(super) fn close(&self) -> Result<()> {
        let _file = lock(&self.0.file);
        let mut numbers = lock(&self.0.numbers);
        numbers.closed = true;
        let (next, reserved) = (numbers.next, numbers.reserved);
        drop(numbers);
        if reserved > next { self.0.write(next) } else { Ok(()) }
    }
}

impl Numbers {
    fn end_of(&self, count: usize) -> Result<u64> {
        let spent = || StorageError::Invalid("there are no more oids".into());
        self.next.checked_add(count as u64).ok_or_else(spent)
    }
}

impl Supply {
    /// Makes sure that `count` oids are reserved. Waits for the disk.
    fn reserve(&self, count: usize) -> Result<()> {
        let _file = lock(&self.file);
        let numbers = lock(&self.numbers);
        if numbers.closed {
            return Err(StorageError::Closed);
        }
        let end = numbers.end_of(count)?;
        if end <= numbers.reserved {
            return Ok(());
        }
        drop(numbers);
        let bound = end.saturating_add(BLOCK);
        self.write(bound)?;
        lock(&self.numbers).reserved = bound;
        Ok(())
    }

    fn write(&self, bound: u64) -> Result<()> {
        write(&self.path, bound)
            .map_err(|e| StorageError::io(format!("cannot reserve oids in {}", self.path.display()), e))
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
    let make = || {
        let mut file = std::fs::File::create(&temp)?;
        writeln!(file, "{HEAD}{bound:016x} {bound:016x}")?;
        file.sync_data()?;
        std::fs::rename(&temp, path)
    };
    make().inspect_err(|_| drop(std::fs::remove_file(&temp)))?;
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
        let first = OidSupply::open(&path, Some(Oid(9)));
        assert_eq!(first.take(2).unwrap(), [Oid(10), Oid(11)]);
        // Killed: nothing said goodbye.
        let second = OidSupply::open(&path, Some(Oid(9)));
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
        let supply = OidSupply::open(&path, Some(Oid(4)));
        supply.note_used(Oid(6));
        assert_eq!(supply.take(1).unwrap(), [Oid(7)]);
        supply.note_used(Oid(u64::MAX));
        assert!(supply.take(1).is_err());
    }
    /// While more are being reserved (a slow disk), those of the stock are given, and a vote that brings its own oid goes on.
    #[test]
    fn nobody_waits_for_what_is_reserved_ahead() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Data.fs");
        let supply = OidSupply::open(&path, None);
        supply.take(1).unwrap();
        let bound = read(&beside(&path, ".oid")).unwrap();
        let disk = lock(&supply.0.file);
        let stock: Vec<Oid> = (0..BLOCK / 2 + 10).flat_map(|_| supply.take(1).unwrap()).collect();
        assert!(lock(&supply.0.numbers).refilling);
        assert!(
            stock.is_sorted()
                && stock.len() as u64 == BLOCK / 2 + 10
                && stock.iter().all(|oid| oid.0 < bound)
        );
        supply.note_used(Oid(5));
        assert!(supply.last().0 < bound);
        drop(disk);
        while lock(&supply.0.numbers).refilling {
            std::thread::yield_now();
        }
        assert!(read(&beside(&path, ".oid")).unwrap() > bound);
        // Killed: nothing of all this is given again.
        let again = OidSupply::open(&path, None).take(1).unwrap();
        assert!(again[0] > *stock.last().unwrap());
    }

    #[test]
    fn after_the_close_nothing_is_given_or_reserved() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Data.fs");
        let supply = OidSupply::open(&path, None);
        supply.take(3).unwrap();
        supply.close().unwrap();
        assert!(matches!(supply.take(1), Err(StorageError::Closed)));
        assert!(matches!(supply.0.reserve(1), Err(StorageError::Closed)));
        assert_eq!(read(&beside(&path, ".oid")), Some(4));
    }
}
