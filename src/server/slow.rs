//! [`SlowLog`]: operations that took too long, a few lines a minute; [`Budget`] keeps any kind of log line to so many.
//!
//! When a disk hangs or a database is overloaded, everything is slow at once, and a scan of ports makes hundreds of failed
//! handshakes: the first lines say what there is to say, the rest are counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::ids::{Oid, Tid};

/// Lines of one kind in each [`PERIOD`].
const LINES: u32 = 10;
const PERIOD: Duration = Duration::from_secs(60);

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct Budget(Mutex<Spent>);

#[derive(Debug, Default)]
struct Spent {
    /// Beginning of the period.
    since: Option<Instant>,
    lines: u32,
    kept_back: u64,
}

impl Budget {
    /// Whether a line may be written at `now`; then, how many were not since the last one.
    pub(crate) fn spend(&self, now: Instant) -> Option<u64> {
        let mut spent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spent.since.is_none_or(|since| now.saturating_duration_since(since) >= PERIOD) {
            (spent.since, spent.lines) = (Some(now), 0);
        }
        if spent.lines == LINES {
            spent.kept_back += 1;
            return None;
        }
        spent.lines += 1;
        Some(std::mem::take(&mut spent.kept_back))
    }
}

/// An operation of a client, for the log.
pub(crate) struct Operation<'a> {
    pub(crate) client: &'a str,
    pub(crate) label: &'a str,
    pub(crate) storage: &'a str,
    pub(crate) call: &'static str,
    pub(crate) oid: Option<Oid>,
    pub(crate) tid: Option<Tid>,
}

/// Says which operations took longer than a threshold. Cost for one that did not: a comparison.
#[derive(Debug)]
pub(crate) struct SlowLog {
    /// `None`: it says nothing.
    threshold: Option<Duration>,
    budget: Budget,
}

impl SlowLog {
    pub(crate) fn new(threshold: Option<Duration>) -> Self {
        Self { threshold, budget: Budget::default() }
    }

    /// `took`: from the request read to the answer written, waiting for locks and for earlier requests included.
    /// `count` has the operations that were too slow, whether they are in the log or not.
    pub(crate) fn note(&self, took: Duration, count: &AtomicU64, operation: &Operation<'_>) {
        if self.threshold.is_none_or(|threshold| took < threshold) {
            return;
        }
        count.fetch_add(1, Ordering::Relaxed);
        let Some(not_logged) = self.budget.spend(Instant::now()) else { return };
        let Operation { client, label, storage, call, oid, tid } = operation;
        let (oid, tid) = (oid.map(tracing::field::display), tid.map(tracing::field::display));
        let not_logged = (not_logged > 0).then_some(not_logged);
        let seconds = took.as_secs_f64();
        tracing::warn!(client, label, storage, call, seconds, oid, tid, not_logged, "slow operation");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_that_of_its_period() {
        let budget = Budget::default();
        let start = Instant::now();
        for _ in 0..LINES {
            assert_eq!(budget.spend(start), Some(0));
        }
        for _ in 0..3 {
            assert_eq!(budget.spend(start + PERIOD / 2), None);
        }
        assert_eq!(budget.spend(start + PERIOD), Some(3));
        assert_eq!(budget.spend(start + PERIOD), Some(0));
        // a clock read earlier by another thread is no reason to panic
        assert_eq!(budget.spend(start), Some(0));
    }

    #[test]
    fn only_what_reaches_the_threshold_is_counted() {
        let operation =
            Operation { client: "c", label: "", storage: "1", call: "vote", oid: None, tid: None };
        let count = AtomicU64::new(0);
        let log = SlowLog::new(Some(Duration::from_secs(1)));
        log.note(Duration::from_millis(999), &count, &operation);
        assert_eq!(count.load(Ordering::Relaxed), 0);
        (0..100).for_each(|_| log.note(Duration::from_secs(1), &count, &operation));
        assert_eq!(count.load(Ordering::Relaxed), 100);
        SlowLog::new(None).note(Duration::from_secs(1000), &count, &operation);
        assert_eq!(count.load(Ordering::Relaxed), 100);
    }
}
