//! [`Pace`]: progress reports, cancellation and throttling of a pack or a check.

use std::time::{Duration, Instant};

use crate::storage::{PackProgress, Result, StorageError};

/// Between two reports at most so many bytes or objects are processed.
const STEP_BYTES: u64 = 4 << 20;
const STEP_OBJECTS: u64 = 1 << 16;
/// After so much the processor is offered to others: some 100 us. Whoever waits for it (a load) would else wait for a whole
/// time slice of some milliseconds.
const YIELD_BYTES: u64 = 256 << 10;
const YIELD_OBJECTS: u64 = 512;
/// Longest sleep of a throttled pack between two looks at cancellation.
const NAP: Duration = Duration::from_millis(100);

pub(super) struct Pace<'a> {
    report: &'a mut (dyn FnMut(&PackProgress) -> bool + Send),
    now: PackProgress,
    reported: (u64, u64),
    yielded: (u64, u64),
    /// Bytes read and written a second.
    throttle: Option<u64>,
    started: Instant,
    /// Bytes of all phases.
    bytes: u64,
    /// Writers wait for the pack: no reports, no sleep.
    silent: bool,
}

impl<'a> Pace<'a> {
    pub(super) fn new(
        report: &'a mut (dyn FnMut(&PackProgress) -> bool + Send),
        throttle: Option<u64>,
    ) -> Self {
        let now = PackProgress::default();
        Self {
            report,
            now,
            reported: (0, 0),
            yielded: (0, 0),
            throttle,
            started: Instant::now(),
            bytes: 0,
            silent: false,
        }
    }

    /// Begins a phase. Errors: `Cancelled`.
    pub(super) fn enter(&mut self, phase: &'static str, bytes: u64, objects: u64) -> Result<()> {
        self.now =
            PackProgress { phase, bytes_total: bytes, objects_total: objects, ..PackProgress::default() };
        self.report()
    }

    /// While the pack holds the whole storage it neither reports nor sleeps.
    pub(super) fn set_silent(&mut self, silent: bool) {
        self.silent = silent;
    }

    /// Accounts for work done; now and then reports it, and sleeps if it was done too fast. Errors: `Cancelled`.
    pub(super) fn advance(&mut self, bytes: u64, objects: u64) -> Result<()> {
        self.now.bytes_done += bytes;
        self.now.objects_done += objects;
        self.bytes += bytes;
        let (reported_bytes, reported_objects) = self.reported;
        if self.silent {
            return Ok(());
        }
        if self.now.bytes_done.abs_diff(self.yielded.0) >= YIELD_BYTES
            || self.now.objects_done.abs_diff(self.yielded.1) >= YIELD_OBJECTS
        {
            self.yielded = (self.now.bytes_done, self.now.objects_done);
            std::thread::yield_now();
        }
        if self.now.bytes_done - reported_bytes < STEP_BYTES
            && self.now.objects_done - reported_objects < STEP_OBJECTS
        {
            return Ok(());
        }
        self.report()?;
        if let Some(rate) = self.throttle {
            let due = Duration::from_secs_f64(self.bytes as f64 / rate.max(1) as f64);
            while let Some(early) = due.checked_sub(self.started.elapsed()).filter(|early| !early.is_zero()) {
                std::thread::sleep(early.min(NAP));
                self.report()?;
            }
        }
        Ok(())
    }

    fn report(&mut self) -> Result<()> {
        self.reported = (self.now.bytes_done, self.now.objects_done);
        if (self.report)(&self.now) { Ok(()) } else { Err(StorageError::Cancelled) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_now_and_then_and_cancels() {
        let mut seen = Vec::new();
        let mut report = |p: &PackProgress| {
            seen.push((p.phase, p.bytes_done, p.objects_done));
            p.phase != "copy"
        };
        let mut pace = Pace::new(&mut report, None);
        pace.enter("index", 10, 10).unwrap();
        pace.advance(1, 1).unwrap();
        pace.advance(0, STEP_OBJECTS).unwrap();
        assert!(matches!(pace.enter("copy", 0, 0), Err(StorageError::Cancelled)));
        assert_eq!(seen, [("index", 0, 0), ("index", 1, STEP_OBJECTS + 1), ("copy", 0, 0)]);
    }

    #[test]
    fn a_throttled_pack_takes_its_time() {
        let mut report = |_: &PackProgress| true;
        let mut pace = Pace::new(&mut report, Some(10 * STEP_BYTES));
        pace.enter("copy", 0, 0).unwrap();
        pace.advance(STEP_BYTES, 0).unwrap();
        pace.advance(STEP_BYTES, 0).unwrap();
        assert!(pace.started.elapsed() >= Duration::from_millis(200));
    }
}
