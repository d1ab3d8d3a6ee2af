//! The index: oid → position of its newest record. Compact, read by many threads while one writes.
//!
//! Two places, an object is in one of them:
//!
//! - *chunks*: 1024 consecutive oids below 2³², a table of atomic positions made when at least half of it is used.
//!   4 bytes an object when full, 8 in files of 4 GiB and more ([`super::chunk`]); lookups take no lock (two pointer
//!   loads and the position).
//! - *leaves*: sorted runs of up to 1024 (oid, position), 14 bytes an object and up to 12 % slack, behind a
//!   read-write lock that lookups hold for two binary searches.
//!
//! Sequential oids therefore need about 4 bytes each (8 in a large file), random ones about 16. When a full leaf holds half a chunk's
//! oids, they move into a chunk; nothing moves back.
//!
//! More than 500 lines with its tests: what moves an object from one place to the other has to know both.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::chunk::{CHUNK, Chunk};
use crate::ids::Oid;

const MIDS: usize = 4096;
/// Oids from here on have no chunks.
const CHUNKED: u64 = (MIDS * CHUNK * CHUNK) as u64;
/// A chunk is made when so many of its oids exist.
const CHUNK_MIN: usize = CHUNK / 2;
const LEAF_MAX: usize = 1024;
/// Leaves grow by this many entries at a time.
const LEAF_STEP: usize = 64;

/// 1024 chunks: about a million oids.
type Mid = Box<[OnceLock<Chunk>]>;

/// See the module documentation. A position is never 0 and below [`super::format::MAX_POS`].
pub struct Index {
    top: Box<[OnceLock<Mid>]>,
    sparse: RwLock<Sparse>,
    count: AtomicU64,
}

impl Default for Index {
    fn default() -> Self {
        let top = (0..MIDS).map(|_| OnceLock::new()).collect();
        Self { top, sparse: RwLock::default(), count: AtomicU64::new(0) }
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Index {
    pub fn new() -> Self {
        Self::default()
    }

    /// Position of the newest record of `oid`.
    pub fn get(&self, oid: Oid) -> Option<u64> {
        if let Some((chunk, at)) = self.chunk(oid.0) {
            return chunk.get(at);
        }
        if let Some(pos) = self.read().get(oid.0) {
            return Some(pos);
        }
        // It may have moved into a chunk between the two looks.
        let (chunk, at) = self.chunk(oid.0)?;
        chunk.get(at)
    }

    /// Sets the position of `oid`; returns the previous one. By one thread at a time.
    pub fn insert(&self, oid: Oid, pos: u64) -> Option<u64> {
        debug_assert!(pos != 0 && pos < super::format::MAX_POS);
        let old = match self.chunk(oid.0) {
            Some((chunk, at)) => chunk.replace(at, pos),
            None => self.insert_sparse(oid.0, pos),
        };
        if old.is_none() {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        old
    }

    /// Forgets `oid`; returns its position. As [`Self::insert`].
    pub fn remove(&self, oid: Oid) -> Option<u64> {
        let mut sparse = self.write();
        let old = match self.chunk(oid.0) {
            Some((chunk, at)) => chunk.replace(at, 0),
            None => sparse.remove(oid.0),
        };
        if old.is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        old
    }

    pub fn len(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The smallest oid >= `from`, with its position.
    pub fn first_from(&self, from: Oid) -> Option<(Oid, u64)> {
        let mut found = None;
        self.scan(from.0, &mut |oid, pos| {
            found = Some((Oid(oid), pos));
            false
        });
        found
    }

    pub fn max_oid(&self) -> Option<Oid> {
        let sparse = self.read().last();
        let chunked = self.top.iter().enumerate().rev().find_map(|(m, mid)| {
            mid.get()?.iter().enumerate().rev().find_map(|(c, chunk)| {
                let used = chunk.get()?.last()?;
                Some(((m * CHUNK + c) * CHUNK + used) as u64)
            })
        });
        chunked.max(sparse).map(Oid)
    }

    /// All objects with oid >= `from`, ascending, until `visit` answers false. Objects inserted meanwhile may or may
    /// not be seen. `visit` must not call back into the index.
    pub fn for_each_from(&self, from: Oid, visit: &mut dyn FnMut(Oid, u64) -> bool) {
        self.scan(from.0, &mut |oid, pos| visit(Oid(oid), pos));
    }

    /// Adds a block of an index file: objects with the oids `prefix` and suffixes of two bytes, ascending, and their
    /// positions. `false` if a position is not `possible`; then the index is of no use any more.
    ///
    /// Cost of a full chunk: one pass that decodes the positions into its table.
    pub(super) fn extend_block(
        &self,
        prefix: u64,
        mut suffixes: &[[u8; 2]],
        mut positions: &[[u8; 6]],
        possible: Range<u64>,
    ) -> bool {
        let mut ok = true;
        while let Some([first, _]) = suffixes.first() {
            let len = suffixes.partition_point(|[high, _]| high >> 2 == first >> 2);
            let (Some((group, rest)), Some((places, others))) =
                (suffixes.split_at_checked(len), positions.split_at_checked(len))
            else {
                return false;
            };
            ok &= self.extend_chunk(prefix << 16, group, places, &possible);
            (suffixes, positions) = (rest, others);
        }
        ok
    }

    /// Bytes of memory held.
    pub fn memory(&self) -> usize {
        let mids = self.top.iter().filter_map(OnceLock::get);
        let chunked: usize = mids
            .map(|mid| {
                size_of_val(&**mid) + mid.iter().filter_map(OnceLock::get).map(Chunk::memory).sum::<usize>()
            })
            .sum();
        size_of_val(&*self.top) + chunked + self.read().memory()
    }

    /// The part of a block that belongs to one chunk. Half a chunk or more makes it a chunk at once.
    fn extend_chunk(&self, base: u64, group: &[[u8; 2]], places: &[[u8; 6]], possible: &Range<u64>) -> bool {
        let suffix = |bytes: &[u8; 2]| u16::from_be_bytes(*bytes);
        let positions = || places.iter().map(|place| unpack(*place));
        // Two passes over what is in the processor's cache: which table, and a look at each, come first.
        let (low, high) = positions().fold((u64::MAX, 0), |(low, high), pos| (low.min(pos), high.max(pos)));
        // Of an empty group they are the end of all numbers and its beginning: not possible, and never given.
        if !possible.contains(&low) || !possible.contains(&high) {
            return false;
        }
        let first = base | group.first().map_or(0, |bytes| u64::from(suffix(bytes)) & !(CHUNK as u64 - 1));
        let sparse = self.write();
        let is_new = self.chunk(first).is_none() && !sparse.has_any(first, first + (CHUNK as u64 - 1));
        match self.place(first).filter(|_| is_new && group.len() >= CHUNK_MIN) {
            Some((mid, at)) => {
                let chunk = if group.len() == CHUNK {
                    Chunk::new(high, positions())
                } else {
                    let chunk = Chunk::new(high, (0..CHUNK).map(|_| 0));
                    for (bytes, pos) in group.iter().zip(positions()) {
                        chunk.replace(usize::from(suffix(bytes)) % CHUNK, pos);
                    }
                    chunk
                };
                let mid = mid.get_or_init(|| (0..CHUNK).map(|_| OnceLock::new()).collect());
                if mid.get(at).is_some_and(|cell| cell.set(chunk).is_ok()) {
                    self.count.fetch_add(group.len() as u64, Ordering::Relaxed);
                }
            }
            None => {
                drop(sparse);
                for (bytes, pos) in group.iter().zip(positions()) {
                    self.insert(Oid(base | u64::from(suffix(bytes))), pos);
                }
            }
        }
        true
    }

    fn insert_sparse(&self, oid: u64, pos: u64) -> Option<u64> {
        let mut sparse = self.write();
        if let Some((chunk, at)) = self.chunk(oid) {
            return chunk.replace(at, pos);
        }
        let (old, full) = sparse.insert(oid, pos);
        if let Some(leaf) = full {
            // Chunks made here take their oids out of the leaf, and out of its neighbours.
            let ranges = sparse.crowded(leaf);
            if ranges.is_empty() {
                sparse.split(leaf);
            }
            for first in ranges {
                self.make_chunk(&mut sparse, first);
            }
        }
        old
    }

    /// Makes the chunk of `oid` and moves its objects there. Readers find an object at every moment: it is in the chunk
    /// before the chunk is visible, and leaves the leaves afterwards, under the lock.
    fn make_chunk(&self, sparse: &mut Sparse, oid: u64) {
        let first = oid & !(CHUNK as u64 - 1);
        let Some((mid, at)) = self.place(oid) else { return };
        let end = first + CHUNK as u64;
        let mut greatest = 0;
        sparse.visit_range(first, end, &mut |_, pos| greatest = greatest.max(pos));
        let chunk = Chunk::new(greatest, (0..CHUNK).map(|_| 0));
        sparse.visit_range(first, end, &mut |oid, pos| {
            chunk.replace((oid - first) as usize, pos);
        });
        let mid = mid.get_or_init(|| (0..CHUNK).map(|_| OnceLock::new()).collect());
        if mid.get(at).is_some_and(|cell| cell.set(chunk).is_ok()) {
            sparse.remove_range(first, end);
        }
    }

    fn place(&self, oid: u64) -> Option<(&OnceLock<Mid>, usize)> {
        let chunk = usize::try_from(oid).ok()? / CHUNK;
        Some((self.top.get(chunk / CHUNK)?, chunk % CHUNK))
    }

    /// The chunk of `oid`, if it has been made, and the place in it.
    fn chunk(&self, oid: u64) -> Option<(&Chunk, usize)> {
        let (mid, at) = self.place(oid)?;
        Some((mid.get()?.get(at)?.get()?, oid as usize % CHUNK))
    }

    /// Merges the chunks and the leaves in oid order. Leaves are copied out one at a time, so that the lock is not
    /// held while visiting.
    fn scan(&self, from: u64, visit: &mut dyn FnMut(u64, u64) -> bool) {
        let mut from = Some(from);
        let mut run = Vec::new();
        while let Some(start) = from {
            // Sparse objects up to `until` (the end of the next run), then the chunks in between.
            run.clear();
            let until = self.read().run_from(start, &mut run);
            let mut sparse = run.iter().copied().peekable();
            let go_on = self.scan_chunks(start, until, &mut |oid, pos| {
                while let Some((o, p)) = sparse.next_if(|&(o, _)| o <= oid) {
                    // An object that moved between the two looks is reported once, from its chunk.
                    if o != oid && !visit(o, p) {
                        return false;
                    }
                }
                visit(oid, pos)
            });
            if !go_on || !sparse.all(|(oid, pos)| visit(oid, pos)) {
                return;
            }
            from = until.and_then(|last| last.checked_add(1));
        }
    }

    /// Chunked objects of `from..=until`; `until` `None`: to the end.
    fn scan_chunks(&self, from: u64, until: Option<u64>, visit: &mut dyn FnMut(u64, u64) -> bool) -> bool {
        let end = until.map_or(CHUNKED, |last| last.saturating_add(1)).min(CHUNKED);
        let mut oid = from;
        while oid < end {
            let Some((mid, at)) = self.place(oid) else { break };
            let Some(mid) = mid.get() else {
                oid = (oid | (CHUNK * CHUNK - 1) as u64) + 1;
                continue;
            };
            let next = (oid | (CHUNK as u64 - 1)) + 1;
            if let Some(chunk) = mid.get(at).and_then(OnceLock::get) {
                for oid in oid..next.min(end) {
                    if let Some(pos) = chunk.get(oid as usize % CHUNK)
                        && !visit(oid, pos)
                    {
                        return false;
                    }
                }
            }
            oid = next;
        }
        true
    }

    fn read(&self) -> RwLockReadGuard<'_, Sparse> {
        self.sparse.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Sparse> {
        self.sparse.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The leaves, ascending, none empty.
#[derive(Default)]
struct Sparse {
    leaves: Vec<Leaf>,
}

/// Sorted oids with their positions (6 bytes, big-endian as in the index file).
#[derive(Default)]
struct Leaf {
    oids: Vec<u64>,
    positions: Vec<[u8; 6]>,
}

impl Leaf {
    fn first(&self) -> u64 {
        self.oids.first().copied().unwrap_or(u64::MAX)
    }

    fn last(&self) -> u64 {
        self.oids.last().copied().unwrap_or(0)
    }

    fn at(&self, i: usize) -> Option<(u64, u64)> {
        Some((*self.oids.get(i)?, unpack(*self.positions.get(i)?)))
    }

    fn grow(&mut self) {
        if self.oids.len() == self.oids.capacity() {
            self.oids.reserve_exact(LEAF_STEP);
            self.positions.reserve_exact(LEAF_STEP);
        }
    }
}

impl Sparse {
    /// The leaf that holds `oid`, or would hold it.
    fn leaf_of(&self, oid: u64) -> usize {
        self.leaves.partition_point(|leaf| leaf.first() <= oid).saturating_sub(1)
    }

    fn get(&self, oid: u64) -> Option<u64> {
        let leaf = self.leaves.get(self.leaf_of(oid))?;
        let i = leaf.oids.binary_search(&oid).ok()?;
        leaf.positions.get(i).copied().map(unpack)
    }

    /// The previous position, and the leaf if it is full now.
    fn insert(&mut self, oid: u64, pos: u64) -> (Option<u64>, Option<usize>) {
        let at = self.leaf_of(oid);
        let Some(leaf) = self.leaves.get_mut(at) else {
            self.leaves.push(Leaf { oids: vec![oid], positions: vec![pack(pos)] });
            return (None, None);
        };
        match leaf.oids.binary_search(&oid) {
            Ok(i) => (leaf.positions.get_mut(i).map(|p| unpack(std::mem::replace(p, pack(pos)))), None),
            Err(i) => {
                leaf.grow();
                leaf.oids.insert(i, oid);
                leaf.positions.insert(i, pack(pos));
                (None, (leaf.oids.len() >= LEAF_MAX).then_some(at))
            }
        }
    }

    fn remove(&mut self, oid: u64) -> Option<u64> {
        let at = self.leaf_of(oid);
        let leaf = self.leaves.get_mut(at)?;
        let i = leaf.oids.binary_search(&oid).ok()?;
        leaf.oids.remove(i);
        let old = unpack(leaf.positions.remove(i));
        if leaf.oids.is_empty() {
            self.leaves.remove(at);
        }
        Some(old)
    }

    /// First oids of the chunks that have at least [`CHUNK_MIN`] oids in this leaf.
    fn crowded(&self, leaf: usize) -> Vec<u64> {
        let Some(leaf) = self.leaves.get(leaf) else { return Vec::new() };
        let same_chunk = |a: &u64, b: &u64| a / CHUNK as u64 == b / CHUNK as u64;
        let groups = leaf.oids.chunk_by(same_chunk).filter(|group| group.len() >= CHUNK_MIN);
        groups.filter_map(|group| group.first().copied()).filter(|&oid| oid < CHUNKED).collect()
    }

    /// Halves a full leaf. At the right edge only its last entry goes, so that ascending oids leave full leaves.
    fn split(&mut self, at: usize) {
        let rightmost = at + 1 == self.leaves.len();
        let Some(leaf) = self.leaves.get_mut(at) else { return };
        let keep = if rightmost { leaf.oids.len() - 1 } else { leaf.oids.len() / 2 };
        let right = Leaf { oids: leaf.oids.split_off(keep), positions: leaf.positions.split_off(keep) };
        leaf.oids.shrink_to(keep + LEAF_STEP);
        leaf.positions.shrink_to(keep + LEAF_STEP);
        self.leaves.insert(at + 1, right);
    }

    /// Whether there are objects in `first..=last`.
    fn has_any(&self, first: u64, last: u64) -> bool {
        let at = self.leaf_of(first);
        self.leaves.get(at..).unwrap_or_default().iter().take(2).any(|leaf| {
            let next = leaf.oids.partition_point(|&oid| oid < first);
            leaf.oids.get(next).is_some_and(|&oid| oid <= last)
        })
    }

    fn visit_range(&self, from: u64, to: u64, visit: &mut dyn FnMut(u64, u64)) {
        for leaf in self.leaves.iter().skip(self.leaf_of(from)).take_while(|leaf| leaf.first() < to) {
            let start = leaf.oids.partition_point(|&oid| oid < from);
            let entries = (start..).map_while(|i| leaf.at(i)).take_while(|&(oid, _)| oid < to);
            entries.for_each(|(oid, pos)| visit(oid, pos));
        }
    }

    fn remove_range(&mut self, from: u64, to: u64) {
        let mut at = self.leaf_of(from);
        while let Some(leaf) = self.leaves.get_mut(at).filter(|leaf| leaf.first() < to) {
            let (start, end) =
                (leaf.oids.partition_point(|&oid| oid < from), leaf.oids.partition_point(|&oid| oid < to));
            leaf.oids.drain(start..end);
            leaf.positions.drain(start..end);
            leaf.oids.shrink_to(leaf.oids.len() + LEAF_STEP);
            leaf.positions.shrink_to(leaf.positions.len() + LEAF_STEP);
            if leaf.oids.is_empty() {
                self.leaves.remove(at);
            } else {
                at += 1;
            }
        }
    }

    /// Copies the entries >= `from` of the leaf that holds them; its last oid, `None` when there are none.
    fn run_from(&self, from: u64, out: &mut Vec<(u64, u64)>) -> Option<u64> {
        let at = self.leaf_of(from);
        let leaf =
            [at, at + 1].into_iter().find_map(|i| self.leaves.get(i).filter(|leaf| leaf.last() >= from))?;
        let start = leaf.oids.partition_point(|&oid| oid < from);
        out.extend((start..).map_while(|i| leaf.at(i)));
        Some(leaf.last())
    }

    fn last(&self) -> Option<u64> {
        self.leaves.last().map(Leaf::last)
    }

    fn memory(&self) -> usize {
        let entries: usize =
            self.leaves.iter().map(|leaf| leaf.oids.capacity() * 8 + leaf.positions.capacity() * 6).sum();
        entries + self.leaves.capacity() * size_of::<Leaf>()
    }
}

fn pack(pos: u64) -> [u8; 6] {
    let [_, _, low @ ..] = pos.to_be_bytes();
    low
}

fn unpack(bytes: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = bytes;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn contents(index: &Index) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        index.for_each_from(Oid(0), &mut |oid, pos| {
            all.push((oid.0, pos));
            true
        });
        all
    }

    /// Oids that crowd chunks, straddle the end of the chunked range, and lie far apart.
    fn oids() -> impl Strategy<Value = u64> {
        prop_oneof![6 => 0..2600u64, 3 => 0..1024u64, 1 => CHUNKED - 700..CHUNKED + 700, 1 => any::<u64>(), 1 => Just(u64::MAX)]
    }

    /// Mostly of a small file, some around 4 GiB, some of a large one.
    fn positions() -> impl Strategy<Value = u64> {
        let border = u64::from(u32::MAX);
        prop_oneof![6 => 0..1u64 << 30, 1 => border - 40..border + 40, 1 => 0..1u64 << 40]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn behaves_as_a_sorted_map(
            changes in proptest::collection::vec((oids(), positions()), 0..6000),
            probes in proptest::collection::vec(oids(), 50),
            sorted in any::<bool>(),
        ) {
            let (index, mut model) = (Index::new(), BTreeMap::new());
            if sorted {
                model.extend(changes.iter().map(|&(oid, pos)| (oid, pos + 1)));
                let all: Vec<_> = model.iter().map(|(&oid, &pos)| (oid, pos)).collect();
                for block in all.chunk_by(|a, b| a.0 >> 16 == b.0 >> 16) {
                    let suffixes: Vec<_> = block.iter().map(|&(oid, _)| (oid as u16).to_be_bytes()).collect();
                    let positions: Vec<_> = block.iter().map(|&(_, pos)| pack(pos)).collect();
                    prop_assert!(index.extend_block(block[0].0 >> 16, &suffixes, &positions, 1..u64::MAX));
                }
            } else {
                for (oid, pos) in changes {
                    // Position 0 stands for a removal.
                    let (a, b) = match pos % 17 {
                        0 => (index.remove(Oid(oid)), model.remove(&oid)),
                        _ => (index.insert(Oid(oid), pos), model.insert(oid, pos)),
                    };
                    prop_assert_eq!(a, b);
                }
            }
            prop_assert_eq!(index.len(), model.len() as u64);
            prop_assert_eq!(index.max_oid().map(|o| o.0), model.keys().next_back().copied());
            prop_assert_eq!(contents(&index), model.iter().map(|(&o, &p)| (o, p)).collect::<Vec<_>>());
            for probe in probes {
                prop_assert_eq!(index.get(Oid(probe)), model.get(&probe).copied());
                let next = model.range(probe..).next().map(|(&o, &p)| (Oid(o), p));
                prop_assert_eq!(index.first_from(Oid(probe)), next);
            }
        }
    }

    #[test]
    fn memory_of_sequential_and_random_oids() {
        let n = 1_000_000u64;
        let index = Index::new();
        for i in 0..n {
            index.insert(Oid(i), i + 1);
        }
        assert!(index.memory() as f64 / n as f64 <= 5.0, "{} bytes for {n}", index.memory());
        let large = Index::new();
        for i in 0..n {
            large.insert(Oid(i), (5 << 30) + i);
        }
        assert!(large.memory() as f64 / n as f64 <= 10.0, "{} bytes for {n}", large.memory());
        let (index, n) = (Index::new(), 300_000u64);
        let mut x = 1u64;
        for i in 0..n {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            index.insert(Oid(x >> 2), i + 1);
        }
        assert!(index.memory() as f64 / n as f64 <= 24.0, "{} bytes for {n}", index.memory());
    }

    #[test]
    fn readers_always_find_what_was_inserted() {
        let index = Index::new();
        let done = AtomicU64::new(0);
        std::thread::scope(|s| {
            s.spawn(|| {
                for oid in 0..50_000 {
                    index.insert(Oid(oid), oid + 1);
                    done.store(oid + 1, Ordering::Release);
                }
            });
            let mut seen = 0;
            while seen < 50_000 {
                seen = done.load(Ordering::Acquire);
                let probe = seen.saturating_sub(1);
                if seen > 0 {
                    assert_eq!(index.get(Oid(probe)), Some(probe + 1));
                    assert_eq!(index.get(Oid(probe / 2)), Some(probe / 2 + 1));
                }
            }
        });
    }
}
