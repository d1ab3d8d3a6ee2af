//! [`Frontier`]: records that are kept but not visited yet, in bounded memory.
//!
//! A record that refers to a million objects would make a list of a million positions. So the list has room for
//! a sixteenth of the objects; what does not fit is noted in a set of one bit a record, and found again by looking
//! through the index, when the list has been worked off. Each look ends with a full list or with nothing left, and there
//! is one only after a full list, so there are a few dozen of them at most, each of nanoseconds an object.

use super::super::index::Index;
use super::super::record_set::RecordSet;
use crate::ids::Oid;

/// Positions that the list has room for at least.
const LEAST_ROOM: u64 = 1 << 14;

pub(super) struct Frontier {
    list: Vec<u64>,
    room: usize,
    /// Current records that found no room; made when there is the first.
    waiting: Option<RecordSet>,
    count: u64,
    /// Where the look through the index goes on.
    next: Oid,
    pack_pos: u64,
}

impl Frontier {
    /// For records below `pack_pos`, `objects` of them current.
    pub(super) fn new(pack_pos: u64, objects: u64) -> Self {
        Self::with_room(pack_pos, (objects / 16).max(LEAST_ROOM) as usize)
    }

    fn with_room(pack_pos: u64, room: usize) -> Self {
        Self { list: Vec::new(), room, waiting: None, count: 0, next: Oid(0), pack_pos }
    }

    /// Adds the record at `pos`, which the index knows.
    pub(super) fn add(&mut self, pos: u64) {
        if self.list.len() < self.room {
            self.add_always(pos);
        } else if self.waiting.get_or_insert_with(|| RecordSet::below(self.pack_pos)).insert(pos) {
            self.count += 1;
        }
    }

    /// Adds the record at `pos` to the list, whether or not there is room: the index may know a later one of the object.
    pub(super) fn add_always(&mut self, pos: u64) {
        if self.list.len() == self.list.capacity() {
            // Not twice as much, as a vector grows by itself.
            self.list.reserve_exact((self.room / 8).max(1));
        }
        self.list.push(pos);
    }

    /// Adds the records, leaving `positions` empty.
    pub(super) fn extend(&mut self, positions: &mut Vec<u64>) {
        positions.drain(..).for_each(|pos| self.add(pos));
    }

    /// Takes the records to be visited next, ascending; empty when there are no more.
    pub(super) fn next_wave(&mut self, current: &Index) -> Vec<u64> {
        while self.list.is_empty() && self.count > 0 {
            self.look(current);
        }
        self.list.sort_unstable();
        std::mem::take(&mut self.list)
    }

    /// Fills the list with records that found no room, from where the last look ended.
    fn look(&mut self, current: &Index) {
        let Some(waiting) = &self.waiting else { return };
        let (list, room, count) = (&mut self.list, self.room, &mut self.count);
        list.reserve_exact(room.min(usize::try_from(*count).unwrap_or(room)));
        let mut stopped_at = Oid(0);
        current.for_each_from(self.next, &mut |oid, pos| {
            if waiting.remove(pos) {
                list.push(pos);
                *count -= 1;
            }
            stopped_at = oid;
            list.len() < room && *count > 0
        });
        // At the end of the index: from its beginning again.
        let ended = list.len() < room && *count > 0;
        self.next = if ended { Oid(0) } else { stopped_at };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every record comes out once, however they are added between the waves, and the list stays small.
    #[test]
    fn what_finds_no_room_is_found_again() {
        let (objects, room) = (1000u64, 10);
        let current = Index::new();
        // Positions in another order than the oids.
        let pos = |oid: u64| 50 + 60 * (oid * 7 % objects);
        (0..objects).for_each(|oid| {
            current.insert(Oid(oid * 3), pos(oid));
        });
        let mut frontier = Frontier::with_room(100 * objects, room);
        frontier.add_always(7);
        let (mut added, mut seen) = (0, Vec::new());
        loop {
            let mut portion: Vec<u64> = (added..objects.min(added + 35)).map(pos).collect();
            added += portion.len() as u64;
            frontier.extend(&mut portion);
            assert!(portion.is_empty());
            let wave = frontier.next_wave(&current);
            if wave.is_empty() {
                break;
            }
            assert!(wave.len() <= room && wave.is_sorted(), "{wave:?}");
            seen.extend(wave);
        }
        seen.sort_unstable();
        let mut expected: Vec<u64> = (0..objects).map(pos).chain([7]).collect();
        expected.sort_unstable();
        assert_eq!(seen, expected);
    }
}
