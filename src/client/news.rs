//! [`News`]: invalidations of which the cache has been told, and the database has not yet.
//!
//! To tell it is Python code: it takes the GIL, and locks of the database. So it waits for its turn here, and reading goes on meanwhile as
//! far as nobody can tell the difference ([`News::holds_up`]). Who tells it?
//! - The background thread, which no caller waits for with a lock of the database in its hands.
//! - A caller that reads the socket and comes to a message that has to wait for it, with its own answer behind. It would sleep until
//!   the background thread has done it, with whatever locks it holds; doing it itself saves two thread switches. Not the main thread:
//!   Python runs signal handlers there, in the middle of any Python code, and a Ctrl-C inside `db.invalidate` would lose an invalidation.
//!
//! Cost: a push, one lock; telling, one lock, and one attachment to the interpreter for all that waits.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::core::Core;
use crate::ids::{Oid, Tid};
use crate::wire::{Notice, ServerMessage};

/// When what the database is still to be told takes so many bytes, nothing more is read.
const MAX_BYTES: usize = 16 << 20;

/// See the module documentation.
pub(super) struct News {
    core: Arc<Core>,
    /// By tid.
    queue: Mutex<VecDeque<(Tid, Vec<Oid>)>>,
    /// What is in the queue, and what is just being told. Raised by the reader only.
    bytes: AtomicUsize,
    /// The background thread has not been asked to tell it.
    unannounced: AtomicBool,
    /// Held while the database is told: one at a time, in order.
    telling: Mutex<()>,
    /// The database is closed.
    muted: AtomicBool,
}

impl News {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self {
            core,
            queue: Mutex::default(),
            bytes: AtomicUsize::new(0),
            unannounced: AtomicBool::new(false),
            telling: Mutex::default(),
            muted: AtomicBool::new(false),
        }
    }

    /// For the reader, which has told the cache.
    pub(super) fn push(&self, tid: Tid, oids: Vec<Oid>) {
        // First, or who tells it could subtract it before.
        self.bytes.fetch_add(weight(&oids), Ordering::SeqCst);
        self.queue().push_back((tid, oids));
        self.unannounced.store(true, Ordering::Release);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.load(Ordering::SeqCst) == 0
    }

    /// True, once, if there is something that the background thread has not been asked to tell.
    pub(super) fn wants_announcement(&self) -> bool {
        self.unannounced.load(Ordering::Relaxed)
            && self.unannounced.swap(false, Ordering::AcqRel)
            && !self.is_empty()
    }

    /// Whether a message must not be applied before the database has been told of the invalidations before it.
    pub(super) fn holds_up(&self, message: &ServerMessage) -> bool {
        let bytes = self.bytes.load(Ordering::Acquire);
        if bytes == 0 {
            return false;
        }
        match message {
            ServerMessage::Notice(Notice::InvalidateTransaction { .. }) => bytes >= MAX_BYTES,
            ServerMessage::Notice(_) => false,
            // Who has seen a transaction must not be told an older last tid.
            ServerMessage::Loaded { loaded: Some((_, tid, _)), .. } => *tid > self.core.last_tid_now(),
            _ => true,
        }
    }

    /// Tells all of it, for the background thread; when it returns, nobody else is at it either.
    pub(super) fn tell(&self) {
        // Poisoned: a caller's thread has panicked in it, which ends the connection. The next one would move the last tid over what
        // the database may not have heard of.
        if let Ok(telling) = self.telling.lock() {
            self.tell_all(&telling);
        }
    }

    /// As [`Self::tell`], on a caller's thread. False: not all of it, it is the background thread's.
    pub(super) fn tell_here(&self) -> bool {
        if !self.core.callbacks.may_be_told_here() {
            return false;
        }
        let Ok(telling) = self.telling.try_lock() else { return false };
        self.tell_all(&telling);
        self.is_empty()
    }

    fn tell_all(&self, _telling: &MutexGuard<'_, ()>) {
        if self.is_empty() {
            return;
        }
        self.core.callbacks.together(&mut || {
            while !self.is_empty() && !self.muted.load(Ordering::Relaxed) {
                let Some((tid, oids)) = self.queue().pop_front() else { return };
                self.core.tell(tid, &oids);
                self.bytes.fetch_sub(weight(&oids), Ordering::Release);
            }
        });
    }

    /// From now on the database is told nothing.
    pub(super) fn mute(&self) {
        self.muted.store(true, Ordering::Relaxed);
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<(Tid, Vec<Oid>)>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an invalidation takes until the database has been told.
fn weight(oids: &[Oid]) -> usize {
    size_of::<(Tid, Vec<Oid>)>() + size_of_val(oids)
}
