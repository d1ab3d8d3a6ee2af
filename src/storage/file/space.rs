//! [`Space`]: disk space for voted transactions, reserved beyond the end of the file without changing its size, so that
//! a full disk is an error of `vote`, not of `finish`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::pending::Reservation;
use super::snapshot::Snapshot;
use crate::storage::{Result, StorageError};

/// Reserved beyond what is needed, so that most votes need no system call.
const STEP: u64 = 1 << 20;

#[derive(Default)]
pub(super) struct Space {
    /// Sum of the lengths of voted transactions.
    outstanding: Arc<AtomicU64>,
    /// Position up to which the file system has promised space.
    reserved_to: Mutex<u64>,
}

impl Space {
    pub(super) fn outstanding(&self) -> u64 {
        self.outstanding.load(Ordering::SeqCst)
    }

    /// Cost: a mutex; one `fallocate` for each [`STEP`] of growth.
    pub(super) fn reserve(&self, snapshot: &Snapshot, len: u64) -> Result<Reservation> {
        let reservation = Reservation::new(len, &self.outstanding);
        let mut reserved_to = self.reserved_to.lock().unwrap_or_else(PoisonError::into_inner);
        // A transaction that finishes meanwhile moves the end by what it stops being outstanding, or less: then a
        // little too much is reserved.
        let end = snapshot.end();
        let need = end + self.outstanding();
        if need > *reserved_to {
            let from = end.max(*reserved_to);
            let reserved = snapshot.file.reserve(from, need + STEP).map(|()| need + STEP);
            // Nearly full: what is needed may still be there.
            let reserved = reserved.or_else(|_| snapshot.file.reserve(from, need).map(|()| need));
            let failed = |e| StorageError::io(format!("no space for a transaction of {len} bytes"), e);
            *reserved_to = reserved.map_err(failed)?;
        }
        Ok(reservation)
    }

    /// Whether `reserve` would find space promised already. Waits for nothing.
    pub(super) fn has_room(&self, end: u64, len: u64) -> bool {
        self.reserved_to.try_lock().is_ok_and(|reserved_to| end + self.outstanding() + len <= *reserved_to)
    }

    /// What was reserved has been given back, or is of another file.
    pub(super) fn forget(&self) {
        *self.reserved_to.lock().unwrap_or_else(PoisonError::into_inner) = 0;
    }

    pub(super) fn is_reserved_beyond(&self, end: u64) -> bool {
        *self.reserved_to.lock().unwrap_or_else(PoisonError::into_inner) > end
    }
}
