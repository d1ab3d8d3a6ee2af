//! [`Queue`]: finishes on their way to the committer, and how long it waits for more of them ([`Patience`]).
//!
//! Cost of a push: one mutex; one wake-up of the committer for a whole group, by the push that completes it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// See the module documentation.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    enough: Condvar,
}

struct State<T> {
    jobs: Vec<T>,
    /// What the committer sleeps for, if it does.
    awaited: Option<Awaited>,
    closed: bool,
}

enum Awaited {
    First,
    /// All of those that have voted but so many.
    AllBut(usize),
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        let state = State { jobs: Vec::new(), awaited: None, closed: false };
        Self { state: Mutex::new(state), enough: Condvar::new() }
    }
}

impl<T> Queue<T> {
    /// `held`: so many have voted, this one included. Gives the job back if the queue is closed.
    pub(super) fn push(&self, job: T, held: usize) -> Result<(), T> {
        let mut state = self.state();
        if state.closed {
            return Err(job);
        }
        state.jobs.push(job);
        let enough = match state.awaited {
            None => false,
            Some(Awaited::First) => true,
            Some(Awaited::AllBut(absent)) => state.jobs.len() + absent >= held,
        };
        if enough {
            // Once: who is on the way need not be woken.
            state.awaited = None;
            drop(state);
            self.enough.notify_one();
        }
        Ok(())
    }

    /// Waits for a job. False: the queue is closed, and there is none.
    pub(super) fn wait(&self) -> bool {
        let mut state = self.state();
        while state.jobs.is_empty() && !state.closed {
            state.awaited = Some(Awaited::First);
            state = self.enough.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.awaited = None;
        !state.jobs.is_empty()
    }

    /// Takes what is there, and what is to be expected at once of those that have voted.
    pub(super) fn gather(&self, patience: &mut Patience, held: &AtomicUsize) -> Vec<T> {
        let until = Instant::now() + patience.limit();
        let mut state = self.state();
        loop {
            let missing = held.load(Ordering::Relaxed).saturating_sub(state.jobs.len());
            patience.absent = patience.absent.min(missing);
            let left = until.saturating_duration_since(Instant::now());
            if missing == patience.absent || left.is_zero() || state.closed {
                patience.absent = missing;
                state.awaited = None;
                return std::mem::take(&mut state.jobs);
            }
            state.awaited = Some(Awaited::AllBut(patience.absent));
            (state, _) = self.enough.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes no more. What is there is still to be gathered.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.enough.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long the committer waits for transactions that have voted.
#[derive(Default)]
pub(super) struct Patience {
    /// Moving average of what a group takes.
    finish: Duration,
    /// So many voted transactions did not come in time, most likely because their clients hang.
    absent: usize,
}

impl Patience {
    /// Never longer than this, however slow the disk is.
    const MOST: Duration = Duration::from_millis(5);
    /// A finish that takes longer than a few loads is not waited for by a connection.
    const QUICK: Duration = Duration::from_millis(1);

    /// Whether a connection may wait for a finish itself: the requests of its other threads wait as long.
    pub(super) fn is_quick(&self) -> bool {
        !self.finish.is_zero() && self.finish <= Self::QUICK
    }

    pub(super) fn measure(&mut self, finish: impl FnOnce()) {
        let begin = Instant::now();
        finish();
        self.took(begin.elapsed());
    }

    fn took(&mut self, finish: Duration) {
        self.finish = (self.finish * 7 + finish) / 8;
    }

    fn limit(&self) -> Duration {
        self.finish.min(Self::MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(jobs: &[u8]) -> Queue<u8> {
        let queue = Queue::default();
        jobs.iter().for_each(|job| queue.push(*job, 1).unwrap());
        queue
    }

    #[test]
    fn a_group_takes_what_is_there_and_forgives_who_does_not_come() {
        let mut patience = Patience::default();
        patience.took(Duration::from_millis(8));
        let held = AtomicUsize::new(3);
        assert_eq!(queue(&[1, 2, 3]).gather(&mut patience, &held), [1, 2, 3]);
        assert_eq!(patience.absent, 0);
        // one has voted and hangs: waited for once
        held.store(2, Ordering::Relaxed);
        let begin = Instant::now();
        assert_eq!(queue(&[1]).gather(&mut patience, &held), [1]);
        assert!(begin.elapsed() >= patience.limit());
        assert_eq!(patience.absent, 1);
        // and not again
        patience.finish = Duration::from_secs(3600);
        assert_eq!(queue(&[1]).gather(&mut patience, &held), [1]);
        assert_eq!(patience.absent, 1);
        // it has gone: the next one that votes is waited for again
        held.store(1, Ordering::Relaxed);
        queue(&[1]).gather(&mut patience, &held);
        assert_eq!(patience.absent, 0);
    }

    #[test]
    fn only_whoever_completes_the_group_wakes_the_committer() {
        let queue = Queue::default();
        let awaits = |awaited| queue.state().awaited = Some(awaited);
        let sleeps = || queue.state().awaited.is_some();
        awaits(Awaited::First);
        queue.push(1, 4).unwrap();
        assert!(!sleeps());
        awaits(Awaited::AllBut(1));
        queue.push(2, 4).unwrap();
        assert!(sleeps(), "two of three that are expected");
        queue.push(3, 5).unwrap();
        assert!(sleeps(), "another one has voted");
        queue.push(4, 5).unwrap();
        assert!(!sleeps());
    }

    #[test]
    fn what_is_there_when_it_closes_is_still_taken() {
        let queue = queue(&[1]);
        queue.close();
        assert!(queue.wait());
        assert_eq!(queue.gather(&mut Patience::default(), &AtomicUsize::new(5)), [1]);
        assert!(!queue.wait());
    }
}
