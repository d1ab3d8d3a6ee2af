//! [`Samples`]: where transactions begin, for some of them, to find a tid without walking the whole file.
//!
//! Filled while the file is scanned, appended to and walked; one sample for every [`SPACING`] bytes, 16 bytes each
//! (4 MiB for a file of 64 GiB).
//!
//! A tid may be given by whoever commits (a copy, a merge of databases), so tids need not ascend. Whether they do is known
//! of what was scanned and appended; of what an index file covers, once somebody has walked over it ([`Order`]).

use crate::ids::Tid;

/// Bytes between two samples.
const SPACING: u64 = 256 << 10;

#[derive(Debug, Default)]
pub(super) struct Samples {
    /// Ascending by tid and by position.
    list: Vec<(Tid, u64)>,
    order: Order,
    /// The greatest tid appended.
    last: Tid,
}

/// What is known of the order of tids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Order {
    /// Each is greater than the one before.
    #[default]
    Ascending,
    /// As [`Self::Ascending`] from this position on; what is before has not been looked at.
    UnknownBelow(u64),
    /// Some are not: nothing can be concluded from an order.
    Broken,
}

impl Samples {
    /// Of a file whose transactions before `pos`, of which the last is `last`, have not been looked at.
    pub(super) fn after(pos: u64, last: Tid) -> Self {
        Self { list: Vec::new(), order: Order::UnknownBelow(pos), last }
    }

    pub(super) fn set_disordered(&mut self) {
        self.order = Order::Broken;
        self.list.clear();
    }

    /// Somebody has walked over what was not known, and tids ascend there.
    pub(super) fn set_ascending(&mut self) {
        if self.order != Order::Broken {
            self.order = Order::Ascending;
        }
    }

    pub(super) fn order(&self) -> Order {
        self.order
    }

    /// As [`Self::note`], of a transaction behind all before.
    pub(super) fn append(&mut self, tid: Tid, pos: u64) {
        if tid <= self.last {
            self.set_disordered();
        }
        self.last = self.last.max(tid);
        self.note(tid, pos);
    }

    /// A transaction was seen at `pos`. Costs a binary search unless it is the last of the file.
    pub(super) fn note(&mut self, tid: Tid, pos: u64) {
        if self.order == Order::Broken {
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
        assert_eq!(samples.order(), Order::Broken);
        assert_eq!(samples.around(Tid(51)), (None, None));
    }

    /// Between two samples, too.
    #[test]
    fn an_append_is_compared_with_the_one_before() {
        let mut samples = Samples::after(1000, Tid(7));
        samples.append(Tid(8), 1000);
        assert_eq!(samples.order(), Order::UnknownBelow(1000));
        samples.set_ascending();
        samples.append(Tid(10), 1100);
        assert_eq!(samples.order(), Order::Ascending);
        samples.append(Tid(9), 1200);
        samples.set_ascending();
        assert_eq!(samples.order(), Order::Broken);
    }
}
