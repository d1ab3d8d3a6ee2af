//! [`Samples`]: where transactions begin, for some of them, to find a tid without walking the whole file.
//!
//! Filled while the file is scanned, appended to and walked; one sample for every [`SPACING`] bytes, 16 bytes each
//! (4 MiB for a file of 64 GiB).

use crate::ids::Tid;

/// Bytes between two samples.
const SPACING: u64 = 256 << 10;

#[derive(Debug, Default)]
pub(super) struct Samples {
    /// Ascending by tid and by position.
    list: Vec<(Tid, u64)>,
    /// Tids are known not to ascend everywhere: nothing can be concluded from an order.
    disordered: bool,
}

impl Samples {
    pub(super) fn set_disordered(&mut self) {
        self.disordered = true;
        self.list.clear();
    }

    pub(super) fn is_disordered(&self) -> bool {
        self.disordered
    }

    /// A transaction was seen at `pos`. Costs a binary search unless it is the last of the file.
    pub(super) fn note(&mut self, tid: Tid, pos: u64) {
        if self.disordered {
            return;
        }
        let at = match self.list.last() {
            Some(&(_, last)) if last > pos => self.list.partition_point(|&(_, p)| p <= pos),
            _ => self.list.len(),
        };
        let before = at.checked_sub(1).and_then(|i| self.list.get(i));
        let after = self.list.get(at);
        if before.is_some_and(|&(t, p)| p == pos && t == tid) {
            return;
        }
        if before.is_some_and(|&(t, _)| t >= tid) || after.is_some_and(|&(t, _)| t <= tid) {
            self.set_disordered();
            return;
        }
        let far = |a: u64, b: u64| b.saturating_sub(a) >= SPACING;
        if before.is_none_or(|&(_, p)| far(p, pos)) && after.is_none_or(|&(_, p)| far(pos, p)) {
            self.list.insert(at, (tid, pos));
        }
    }

    /// Positions of the nearest samples with a tid <= and > `tid`.
    pub(super) fn around(&self, tid: Tid) -> (Option<u64>, Option<u64>) {
        let at = self.list.partition_point(|&(t, _)| t <= tid);
        let pos = |i: usize| self.list.get(i).map(|&(_, pos)| pos);
        (at.checked_sub(1).and_then(pos), pos(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_spaced_and_found() {
        let mut samples = Samples::default();
        for i in (0..100).chain([50, 7]) {
            samples.note(Tid(i), 4 + i * SPACING / 2);
        }
        assert_eq!(samples.list.len(), 50);
        let (low, high) = samples.around(Tid(51));
        assert_eq!((low, high), (Some(4 + 25 * SPACING), Some(4 + 26 * SPACING)));
        assert_eq!(samples.around(Tid(1000)).1, None);
        samples.note(Tid(3), 1 << 40);
        assert!(samples.is_disordered());
        assert_eq!(samples.around(Tid(51)), (None, None));
    }
}
