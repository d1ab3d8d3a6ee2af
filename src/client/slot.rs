//! Where one caller waits for one answer.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use super::error::Result;
use crate::pickle::Value;
use crate::storage::Loaded;

/// An answer. Cloned to every waiter of a merged load: reference counts only.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Loaded(Option<Loaded>),
    Value(Value),
}

const WAITING: u8 = 0;
const DONE: u8 = 1;
/// Asked to read the socket, since whoever did has left.
const PROMOTED: u8 = 2;

/// Longest sleep without looking whether the caller is to give up.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Slot {
    state: AtomicU8,
    answer: Mutex<Option<Result<Answer>>>,
    thread: Thread,
}

impl Slot {
    /// For the calling thread.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: AtomicU8::new(WAITING),
            answer: Mutex::new(None),
            thread: std::thread::current(),
        })
    }

    pub(super) fn is_done(&self) -> bool {
        self.state.load(Ordering::Acquire) == DONE
    }

    /// The first answer counts.
    pub(super) fn complete(&self, answer: Result<Answer>) {
        {
            let mut place = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
            if place.is_some() || self.is_done() {
                return;
            }
            *place = Some(answer);
            self.state.store(DONE, Ordering::Release);
        }
        self.unpark();
    }

    /// Asks its thread to take over reading.
    pub(super) fn promote(&self) {
        if self.state.compare_exchange(WAITING, PROMOTED, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.unpark();
        }
    }

    /// Sleeps until there is an answer or a promotion. True: neither, but a while has passed.
    pub(super) fn sleep(&self) -> bool {
        if self.state.load(Ordering::Acquire) == WAITING {
            std::thread::park_timeout(LOOK_AGAIN);
        }
        let nothing = self.state.load(Ordering::Acquire) == WAITING;
        let _ = self.state.compare_exchange(PROMOTED, WAITING, Ordering::AcqRel, Ordering::Relaxed);
        nothing
    }

    pub(super) fn take(&self) -> Option<Result<Answer>> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn unpark(&self) {
        if self.thread.id() != std::thread::current().id() {
            self.thread.unpark();
        }
    }
}
