//! [`Chunk`]: the positions of 1024 consecutive oids, as the index keeps them. One thread writes at a time, any number
//! read, without a lock.
//!
//! Most files are smaller than 4 GiB, so a position is mostly kept in 4 bytes. A chunk that is made of positions
//! beyond has 8 bytes for each; one that gets them later has a second table for them, and the mark [`ELSEWHERE`] in the
//! first. The first table stays then, since somebody may be reading it: 12 bytes an object until the index is made
//! anew (by the next opening or pack).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

pub(super) const CHUNK: usize = 1024;
/// In a narrow table: the position is in the wide one.
const ELSEWHERE: u32 = u32::MAX;

type WideTable = Box<[AtomicU64]>;

/// In both tables 0 is: absent.
pub(super) enum Chunk {
    Narrow(Box<[AtomicU32]>, OnceLock<WideTable>),
    Wide(WideTable),
}

impl Chunk {
    /// For positions up to `greatest`. `positions` are those of [`CHUNK`] oids, 0 where there is none.
    pub(super) fn new(greatest: u64, positions: impl Iterator<Item = u64>) -> Self {
        match narrow(greatest) {
            // `greatest` fits, so do the others.
            Some(_) => {
                Self::Narrow(positions.map(|pos| AtomicU32::new(pos as u32)).collect(), OnceLock::new())
            }
            None => Self::Wide(positions.map(AtomicU64::new).collect()),
        }
    }

    /// Position of the oid at place `at`.
    pub(super) fn get(&self, at: usize) -> Option<u64> {
        let pos = match self {
            Self::Narrow(table, wide) => match table.get(at)?.load(Ordering::Acquire) {
                ELSEWHERE => wide.get()?.get(at)?.load(Ordering::Acquire),
                pos => u64::from(pos),
            },
            Self::Wide(table) => table.get(at)?.load(Ordering::Acquire),
        };
        (pos != 0).then_some(pos)
    }

    /// Sets the position at place `at`, 0: to none; answers the one before. A reader sees one or the other: a wide
    /// position is there before the mark that leads to it.
    pub(super) fn replace(&self, at: usize, pos: u64) -> Option<u64> {
        let old = match self {
            Self::Narrow(table, wide) => {
                let old = self.get(at);
                let in_narrow = narrow(pos).unwrap_or_else(|| {
                    let wide = wide.get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
                    if let Some(slot) = wide.get(at) {
                        slot.store(pos, Ordering::Release);
                    }
                    ELSEWHERE
                });
                table.get(at)?.store(in_narrow, Ordering::Release);
                return old;
            }
            Self::Wide(table) => table.get(at)?.swap(pos, Ordering::AcqRel),
        };
        (old != 0).then_some(old)
    }

    /// The greatest place that has a position.
    pub(super) fn last(&self) -> Option<usize> {
        (0..CHUNK).rev().find(|&at| self.get(at).is_some())
    }

    /// Bytes on the heap.
    pub(super) fn memory(&self) -> usize {
        match self {
            Self::Narrow(table, wide) => {
                size_of_val(&**table) + wide.get().map_or(0, |wide| size_of_val(&**wide))
            }
            Self::Wide(table) => size_of_val(&**table),
        }
    }
}

fn narrow(pos: u64) -> Option<u32> {
    u32::try_from(pos).ok().filter(|&pos| pos != ELSEWHERE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BORDER: u64 = u32::MAX as u64;

    #[test]
    fn positions_on_either_side_of_the_border() {
        for greatest in [5, BORDER - 1, BORDER, 1 << 40] {
            let chunk = Chunk::new(greatest, (0..CHUNK).map(|at| if at == 3 { greatest } else { 0 }));
            assert_eq!(matches!(chunk, Chunk::Wide(_)), greatest >= BORDER);
            assert_eq!((chunk.get(3), chunk.get(4), chunk.last()), (Some(greatest), None, Some(3)));
            let mut before = Some(greatest);
            for pos in [7, BORDER - 1, BORDER, BORDER + 1, 1 << 47, 9, 1 << 46, 0, BORDER, 0] {
                assert_eq!(chunk.replace(3, pos), before);
                before = (pos != 0).then_some(pos);
                assert_eq!((chunk.get(3), chunk.get(2)), (before, None));
            }
            assert_eq!((chunk.replace(CHUNK, 1), chunk.get(CHUNK), chunk.last()), (None, None, None));
        }
    }

    /// An object's position only grows; so must what a reader sees, also where it outgrows the narrow table.
    #[test]
    fn a_reader_sees_positions_in_order() {
        let chunk = Chunk::new(0, (0..CHUNK).map(|_| 0));
        let last = BORDER + 20_000;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for pos in BORDER - 20_000..=last {
                    chunk.replace(1, pos);
                }
            });
            let mut seen = 0;
            while seen < last {
                let pos = chunk.get(1).unwrap_or(0);
                assert!(pos >= seen, "{pos} after {seen}");
                seen = pos;
            }
        });
    }
}
