//! One process at a time has a cache's files.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::fs::FlockOperation;

use crate::storage::Owner;

/// A lock, held while it lives.
pub(super) struct Lock(File, Owner);

impl Drop for Lock {
    /// Said, not left to the closing of the file: forked children have it open too, and would go on holding the lock.
    fn drop(&mut self) {
        if self.1.is_here() {
            let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
        }
    }
}

/// Holds `<path>.lock` while it lives; `None` if another process does.
pub(super) fn lock(path: &Path) -> io::Result<Option<Lock>> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(name)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(Lock(file, Owner::here()))),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
