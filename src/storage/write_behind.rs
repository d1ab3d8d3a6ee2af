//! [`WriteBehind`]: what is written front to back goes to the disk meanwhile, and lets others have the processor.

use std::fs::File;
use std::num::NonZeroU64;

use rustix::fs::{Advice, fadvise};

/// How much to write at a time: the system lets a load that waits for the processor have it between two writes only.
pub const PIECE: usize = 256 << 10;
/// After so many bytes the system is told to begin with the writing, so that the sync at the end has little left to do.
const STEP: u64 = 1 << 20;

/// One for each file that is written. Costs a `sched_yield` a piece and a `fadvise` a megabyte.
#[derive(Debug)]
pub struct WriteBehind {
    /// Before it everything is on its way to the disk.
    begun: u64,
}

impl WriteBehind {
    /// For a file that is written from `start` on.
    pub fn new(start: u64) -> Self {
        Self { begun: start }
    }

    /// A piece has been written, up to `end`. `begin` has a range of the file on its way: [`begin_sync`].
    pub fn wrote(&mut self, end: u64, begin: impl FnOnce(u64, u64)) {
        std::thread::yield_now();
        if end - self.begun >= STEP {
            begin(self.begun, end);
            self.begun = end;
        }
    }
}

/// Has the bytes `from..to`, which were just written, on their way to the disk, without waiting for it. A hint: no matter if it is not
/// taken.
pub fn begin_sync(file: &File, from: u64, to: u64) {
    if let Some(len) = to.checked_sub(from).and_then(NonZeroU64::new) {
        // Of pages that are not on the disk yet this only begins the writing; they stay in the page cache.
        let _ = fadvise(file, from, Some(len), Advice::DontNeed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_megabyte_is_begun_once_and_in_order() {
        let mut behind = WriteBehind::new(100);
        let mut begun = Vec::new();
        for piece in 1..=9 {
            behind.wrote(100 + piece * PIECE as u64, |from, to| begun.push((from, to)));
        }
        assert_eq!(begun, [(100, 100 + STEP), (100 + STEP, 100 + 2 * STEP)]);
    }
}
