//! [`Courtesy`]: loads that never give up the GIL let a thread that has committed have it first.
//!
//! Beside threads that load without pause, a thread whose commit is on the disk would otherwise wait for Python's switch
//! interval (5 ms), several times when there are several of them. So it says that it waits, and the next call of each
//! loading thread gives the GIL up until it has it. Nobody waits for a sync: it says so after that.
//!
//! Cost: one relaxed atomic load for a load; for a commit that meets loads, one thread switch for each loading thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use pyo3::Python;

use super::locked;

/// Longest wait of a load, should a thread that loads nothing keep the GIL from the one that waits for it.
const PATIENCE: Duration = Duration::from_millis(5);

#[derive(Default)]
pub(super) struct Courtesy {
    /// Threads that wait for the GIL.
    waiting: AtomicUsize,
    lock: Mutex<()>,
    served: Condvar,
}

/// One of the threads that wait, until it is dropped.
pub(super) struct Waiting<'a>(&'a Courtesy);

impl Courtesy {
    /// The calling thread, which does not have the GIL, is about to wait for it.
    pub(super) fn wait_for_gil(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(self)
    }

    /// Runs `body` without the GIL, and does not queue for it behind loads afterwards.
    pub(super) fn detach<T: Send>(&self, py: Python<'_>, body: impl FnOnce() -> T + Send) -> T {
        let (done, waiting) = py.detach(|| {
            let done = body();
            (done, self.wait_for_gil())
        });
        drop(waiting);
        done
    }

    /// Before a load: gives the GIL to a thread that waits for it.
    pub(super) fn give_way(&self, py: Python<'_>) {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            py.detach(|| {
                let still = |(): &mut ()| self.waiting.load(Ordering::Relaxed) > 0;
                drop(
                    self.served
                        .wait_timeout_while(locked(&self.lock), PATIENCE, still)
                        .unwrap_or_else(PoisonError::into_inner),
                );
            });
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // Under the lock, so that no load misses it between looking and sleeping.
        let _looking = locked(&self.0.lock);
        if self.0.waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.served.notify_all();
        }
    }
}
