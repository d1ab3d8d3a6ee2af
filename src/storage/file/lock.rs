//! One writer a file: `flock` on NAME.lock, as ZODB has it, and on the data file itself.
//!
//! NAME.lock keeps ZODB and this engine apart; it holds `" <pid>\n"` of its owner and stays when the storage is closed.
//! The lock on the data file makes that safe against a lock file deleted by hand. Read-only storages take neither.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::file::{StorageFile, try_flock};
use super::index_file::beside;
use crate::storage::{Owner, Result, StorageError};

/// The held NAME.lock; released when dropped by the process that took it.
pub(super) struct LockFile {
    file: File,
    owner: Owner,
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Explicitly: a child that lives on has the descriptor, too, and would keep the file locked.
        if self.owner.is_here() {
            let _ = rustix::fs::flock(&self.file, rustix::fs::FlockOperation::Unlock);
        }
    }
}

impl LockFile {
    /// Takes NAME.lock. Errors: `Locked`, naming the holder.
    pub(super) fn acquire(path: &Path) -> Result<Self> {
        let name = beside(path, ".lock");
        let failed = |e| StorageError::io(format!("cannot open {}", name.display()), e);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&name);
        let file = file.map_err(failed)?;
        if try_flock(&file).map_err(failed)? {
            return Ok(Self { file, owner: Owner::here() });
        }
        let mut text = String::new();
        let _ = (&file).take(64).read_to_string(&mut text);
        let holder = match text.trim() {
            "" => "another process".to_owned(),
            pid => format!("process {pid}"),
        };
        Err(StorageError::Locked(format!(
            "{} is in use by {holder} (lock file {})",
            path.display(),
            name.display()
        )))
    }

    /// Takes the lock of the data file, then says in the lock file who holds both.
    pub(super) fn lock_data(&self, path: &Path, data: &dyn StorageFile) -> Result<()> {
        let failed = |e| StorageError::io(format!("cannot lock {}", path.display()), e);
        if !data.try_lock().map_err(failed)? {
            let holder = holder_of(path).map_or("another process".to_owned(), |pid| format!("process {pid}"));
            let text =
                format!("{} is in use by {holder}, although nobody holds its lock file", path.display());
            return Err(StorageError::Locked(text));
        }
        let text = format!(" {}\n", std::process::id());
        let written = self.file.set_len(0).and_then(|()| self.file.write_all_at(text.as_bytes(), 0));
        written.map_err(failed)
    }
}

/// Who holds a `flock` of the file, as far as the system says.
fn holder_of(path: &Path) -> Option<u32> {
    let inode = path.metadata().ok()?.ino();
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    // 1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (kind, pid, place) = (fields.next()?, fields.nth(2)?, fields.next()?);
        let same = kind == "FLOCK" && place.rsplit(':').next()?.parse() == Ok(inode);
        pid.parse().ok().filter(|_| same)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::file::file::OsFile;

    #[test]
    fn the_second_is_told_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Data.fs");
        let open = || {
            OsFile(File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap())
        };
        let first = open();
        let held = LockFile::acquire(&path).unwrap();
        held.lock_data(&path, &first).unwrap();
        let pid = std::process::id().to_string();
        // Again for the file that takes the place of an existing one.
        held.lock_data(&path, &OsFile(tempfile::tempfile().unwrap())).unwrap();
        assert_eq!(std::fs::read_to_string(beside(&path, ".lock")).unwrap(), format!(" {pid}\n"));
        let error = LockFile::acquire(&path).err().unwrap().to_string();
        assert!(error.contains(&format!("process {pid} ")), "{error}");
        std::fs::remove_file(beside(&path, ".lock")).unwrap();
        let other = LockFile::acquire(&path).unwrap();
        let error = other.lock_data(&path, &open()).err().unwrap().to_string();
        assert!(error.contains("in use by"), "{error}");
        drop((held, first));
        other.lock_data(&path, &open()).unwrap();
    }
}
