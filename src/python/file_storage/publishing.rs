//! [`Publishing`]: nobody sees a transaction before its callback has returned, and whoever learns of it from the callback
//! finds it.
//!
//! The callback that ZODB's databases pass to `tpc_finish` tells their connections what changed. It runs when the
//! transaction is durable and in nobody's view, so that it can still be taken back. A connection that has been told asks for
//! revisions that are not there yet for some microseconds: it waits. One with an older view, which is any other, does not;
//! so nobody waits for a sync. A read by the callback itself gets the state before.
//!
//! A round counter tells readers that nothing was being published while they read: even between two publications, odd
//! during one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use super::locked;
use crate::ids::Tid;

#[derive(Default)]
pub(super) struct Publishing {
    round: AtomicU64,
    by: Mutex<Option<(ThreadId, Tid)>>,
    done: Condvar,
}

/// What a reader saw.
pub(super) enum Seen {
    /// All of each transaction that it may know of.
    Whole,
    /// Perhaps not: it is to read again.
    Changed,
    /// Perhaps not: it is to wait, then to read again.
    Wait,
}

impl Publishing {
    pub(super) fn round(&self) -> u64 {
        self.round.load(Ordering::Acquire)
    }

    /// This thread is about to tell others of the transaction `tid`. One at a time.
    pub(super) fn begin(&self, tid: Tid) {
        let mut by = locked(&self.by);
        *by = Some((thread::current().id(), tid));
        self.round.fetch_add(1, Ordering::SeqCst);
    }

    /// The transaction can be seen, or was taken back. Without `begin` it does nothing.
    pub(super) fn end(&self) {
        let mut by = locked(&self.by);
        if by.take().is_some() {
            self.round.fetch_add(1, Ordering::SeqCst);
            self.done.notify_all();
        }
    }

    /// About a read of what was before a tid, that began in a round.
    pub(super) fn seen(&self, round: u64, before: Tid) -> Seen {
        if round.is_multiple_of(2) && self.round() == round {
            return Seen::Whole;
        }
        let by = locked(&self.by);
        match *by {
            _ if self.round() != round => Seen::Changed,
            Some((thread, tid)) if before > tid && thread != thread::current().id() => Seen::Wait,
            _ => Seen::Whole,
        }
    }

    /// Waits for the end of a round.
    pub(super) fn wait(&self, round: u64) {
        let by = locked(&self.by);
        let waited = self.done.wait_while(by, |_| self.round() == round);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}
