//! One shard: revisions of some objects, and which of them to forget first.
//!
//! Eviction is S3-FIFO (Yang et al., SOSP 2023): new revisions enter a *small* queue (a tenth of the bytes); one that
//! was read again before it reaches the end moves to the *main* queue, others leave, and only their oid is
//! remembered for a while (*ghosts*): loaded again soon, the object enters the main queue at once. The main queue gives a
//! read revision another round. A hit only raises a counter, so it needs no list surgery.

use std::collections::VecDeque;

use bytes::Bytes;
use rustc_hash::{FxHashMap, FxHashSet};

use super::CacheStats;
use super::value::{Filed, Value};
use crate::ids::{Oid, Tid};
use crate::storage::Loaded;

/// What a revision costs besides its data: node (64), entry in the map and its spill (40), queue and ghost entries
/// (24), allocation headers of the data and its counter (32).
pub const NODE_OVERHEAD: usize = 160;

/// Share of the bytes that the small queue may hold.
const SMALL_SHARE: usize = 10;
/// Reads of a revision that count.
const MAX_USES: u8 = 3;
const CURRENT: Tid = Tid(u64::MAX);

type NodeId = u32;

// What is said of [`NODE_OVERHEAD`] is true.
const _: () = assert!(size_of::<Node>() <= 64);

struct Node {
    oid: Oid,
    tid: Tid,
    /// [`CURRENT`], or where the revision ended.
    end: Tid,
    data: Value,
    uses: u8,
    in_main: bool,
    /// Forgotten, but still in its queue.
    dead: bool,
}

impl Node {
    fn cost(&self) -> usize {
        self.data.len() + NODE_OVERHEAD
    }
}

/// Revisions of one object, newest first.
enum Revisions {
    One(NodeId),
    Many(Vec<NodeId>),
}

impl Revisions {
    fn as_slice(&self) -> &[NodeId] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

/// What a shard says to a load.
pub(super) enum Found {
    Memory(Loaded),
    /// Its data has not been read yet; see [`Shard::fill`].
    Filed {
        place: Filed,
        tid: Tid,
        end_tid: Option<Tid>,
    },
    Nothing,
}

pub(super) struct Revision {
    pub(super) oid: Oid,
    pub(super) tid: Tid,
    pub(super) end: Option<Tid>,
    pub(super) value: Value,
}

#[derive(Default)]
pub(super) struct Shard {
    objects: FxHashMap<u64, Revisions>,
    nodes: Vec<Node>,
    free: Vec<NodeId>,
    small: VecDeque<NodeId>,
    main: VecDeque<NodeId>,
    ghosts: VecDeque<u64>,
    ghost_set: FxHashSet<u64>,
    small_bytes: usize,
    bytes: usize,
    live: usize,
    /// Invalidations, and whatever else revisions can have ended by.
    changes: u64,
    stats: CacheStats,
}

impl Shard {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.live
    }

    /// The same as before: nothing has ended in between.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    pub(super) fn stats(&self) -> &CacheStats {
        &self.stats
    }

    /// Counts a use, if there is one.
    pub(super) fn load_before(&mut self, oid: Oid, before: Tid) -> Found {
        let Some(id) = self.find(oid, before) else { return Found::Nothing };
        let node = &mut self.nodes[id as usize];
        let end_tid = (node.end != CURRENT).then_some(node.end);
        match &node.data {
            Value::Memory(data) => {
                self.stats.hits += 1;
                node.uses = (node.uses + 1).min(MAX_USES);
                Found::Memory(Loaded { data: data.clone(), tid: node.tid, end_tid })
            }
            Value::Filed(place) => Found::Filed { place: place.clone(), tid: node.tid, end_tid },
        }
    }

    pub(super) fn count_miss(&mut self) {
        self.stats.misses += 1;
    }

    /// The data of a revision that was [`Found::Filed`] is known now; `None`: its data is damaged, so it goes.
    pub(super) fn fill(&mut self, oid: Oid, tid: Tid, data: Option<Bytes>) {
        let Some(id) = self.revision(oid, tid) else { return };
        let node = &mut self.nodes[id as usize];
        if let (Value::Filed(_), Some(data)) = (&node.data, &data) {
            self.stats.hits += 1;
            node.uses = (node.uses + 1).min(MAX_USES);
            node.data = Value::Memory(data.clone());
        } else if let (Value::Filed(_), None) = (&node.data, &data) {
            self.forget(id);
        }
    }

    /// The data of a revision lies in another file now.
    pub(super) fn move_to(&mut self, oid: Oid, tid: Tid, place: Filed) {
        if let Some(id) = self.revision(oid, tid)
            && let node = &mut self.nodes[id as usize]
            && matches!(node.data, Value::Filed(_))
        {
            node.data = Value::Filed(place);
        }
    }

    /// Whether a revision newer than the one at `before` is known.
    pub(super) fn knows_newer(&self, oid: Oid, before: Tid) -> bool {
        let newest = self.objects.get(&oid.0).and_then(|revisions| revisions.as_slice().first());
        newest.is_some_and(|&id| self.nodes[id as usize].tid >= before)
    }

    pub(super) fn reserve(&mut self, revisions: usize) {
        self.objects.reserve(revisions);
        self.nodes.reserve(revisions);
        self.small.reserve(revisions);
    }

    pub(super) fn covers(&self, oid: Oid, before: Tid) -> bool {
        self.find(oid, before).is_some()
    }

    /// True if anything changed.
    pub(super) fn store(&mut self, oid: Oid, tid: Tid, end_tid: Option<Tid>, data: Value) -> bool {
        let end = end_tid.unwrap_or(CURRENT);
        let mut uses = 0;
        if let Some(newest) =
            self.objects.get(&oid.0).and_then(|revisions| revisions.as_slice().first().copied())
        {
            let node = &self.nodes[newest as usize];
            if end == CURRENT {
                if tid < node.tid || (tid == node.tid && node.end != CURRENT) {
                    return false;
                }
                if tid > node.tid {
                    uses = node.uses;
                    if node.end == CURRENT {
                        // It ended somewhere up to `tid`, where exactly nobody told.
                        self.forget(newest);
                    }
                }
            }
        }
        if let Some(id) = self.revision(oid, tid) {
            let node = &mut self.nodes[id as usize];
            let ends = node.end == CURRENT && end != CURRENT;
            if ends {
                node.end = end;
            }
            return ends;
        }
        self.stats.stores += 1;
        let in_main = uses > 0 || self.ghost_set.contains(&oid.0);
        self.insert(Node { oid, tid, end, data, uses: 0, in_main, dead: false });
        true
    }

    /// True if a revision ended or was forgotten.
    pub(super) fn invalidate(&mut self, oid: Oid, tid: Option<Tid>) -> bool {
        self.changes += 1;
        let Some(newest) =
            self.objects.get(&oid.0).and_then(|revisions| revisions.as_slice().first().copied())
        else {
            return false;
        };
        let node = &mut self.nodes[newest as usize];
        if node.end != CURRENT {
            return false;
        }
        match tid {
            None => self.forget(newest),
            Some(tid) if tid > node.tid => node.end = tid,
            Some(_) => return false,
        }
        self.stats.invalidations += 1;
        true
    }

    /// Forgets everything of an object.
    pub(super) fn forget_all(&mut self, oid: Oid) {
        self.changes += 1;
        while let Some(newest) =
            self.objects.get(&oid.0).and_then(|revisions| revisions.as_slice().first().copied())
        {
            self.forget(newest);
        }
    }

    /// Frees at least `wanted` bytes if it has them.
    pub(super) fn evict(&mut self, wanted: usize) {
        let target = self.bytes.saturating_sub(wanted);
        while self.bytes > target {
            if !self.evict_one() {
                return;
            }
        }
    }

    /// Returns the bytes freed.
    pub(super) fn clear(&mut self) -> usize {
        let freed = self.bytes;
        let (stats, changes) = (self.stats, self.changes + 1);
        *self = Self { stats, changes, ..Self::default() };
        freed
    }

    /// Those that would leave first come first.
    pub(super) fn revisions(&self) -> Vec<Revision> {
        let queued = self.small.iter().chain(&self.main).map(|&id| &self.nodes[id as usize]);
        queued
            .filter(|node| !node.dead)
            .map(|node| Revision {
                oid: node.oid,
                tid: node.tid,
                end: (node.end != CURRENT).then_some(node.end),
                value: node.data.clone(),
            })
            .collect()
    }

    /// The newest revision older than `before`, if it lasted until `before`.
    fn find(&self, oid: Oid, before: Tid) -> Option<NodeId> {
        let revisions = self.objects.get(&oid.0)?.as_slice();
        let id = *revisions.iter().find(|&&id| self.nodes[id as usize].tid < before)?;
        (self.nodes[id as usize].end >= before).then_some(id)
    }

    fn revision(&self, oid: Oid, tid: Tid) -> Option<NodeId> {
        let revisions = self.objects.get(&oid.0)?.as_slice();
        revisions.iter().copied().find(|&id| self.nodes[id as usize].tid == tid)
    }

    fn insert(&mut self, node: Node) {
        let (oid, tid, in_main, cost) = (node.oid, node.tid, node.in_main, node.cost());
        let id = match self.free.pop() {
            Some(id) => {
                self.nodes[id as usize] = node;
                id
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as NodeId
            }
        };
        self.bytes += cost;
        self.live += 1;
        if in_main {
            self.main.push_back(id);
        } else {
            self.small_bytes += cost;
            self.small.push_back(id);
        }
        match self.objects.entry(oid.0) {
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Revisions::One(id));
            }
            std::collections::hash_map::Entry::Occupied(mut entry) => {
                let mut ids = entry.get().as_slice().to_vec();
                let at = ids.partition_point(|&other| self.nodes[other as usize].tid > tid);
                ids.insert(at, id);
                entry.insert(Revisions::Many(ids));
            }
        }
    }

    /// Takes a revision out of the index and drops its data. The node itself, and its overhead, go when its
    /// queue comes to it.
    fn forget(&mut self, id: NodeId) {
        let node = &mut self.nodes[id as usize];
        let freed = node.data.len();
        node.dead = true;
        node.data = Value::Memory(Bytes::new());
        self.bytes -= freed;
        if !node.in_main {
            self.small_bytes -= freed;
        }
        self.live -= 1;
        let oid = node.oid.0;
        if let Some(revisions) = self.objects.get_mut(&oid) {
            let mut rest: Vec<NodeId> =
                revisions.as_slice().iter().copied().filter(|&other| other != id).collect();
            match rest.len() {
                0 => {
                    self.objects.remove(&oid);
                }
                1 => *revisions = Revisions::One(rest.remove(0)),
                _ => *revisions = Revisions::Many(rest),
            }
        }
    }

    /// One step of S3-FIFO. False: nothing left.
    fn evict_one(&mut self) -> bool {
        if self.small_bytes > self.bytes / SMALL_SHARE || self.main.is_empty() {
            let Some(id) = self.small.pop_front() else { return false };
            let node = &mut self.nodes[id as usize];
            self.small_bytes -= node.cost();
            if node.uses > 0 && !node.dead {
                node.uses = 0;
                node.in_main = true;
                self.main.push_back(id);
            } else {
                self.remove(id, true);
            }
            return true;
        }
        let Some(id) = self.main.pop_front() else { return false };
        let node = &mut self.nodes[id as usize];
        // A revision that has ended is read by old views only: no second round.
        if node.uses > 0 && !node.dead && node.end == CURRENT {
            node.uses -= 1;
            self.main.push_back(id);
        } else {
            self.remove(id, false);
        }
        true
    }

    /// Recycles a node that is in no queue any more.
    fn remove(&mut self, id: NodeId, remember: bool) {
        let (oid, dead) = (self.nodes[id as usize].oid, self.nodes[id as usize].dead);
        if !dead {
            self.stats.evictions += 1;
            // `forget` counts the data of a small node down; its whole cost is gone already.
            self.nodes[id as usize].in_main = true;
            self.forget(id);
            if remember {
                self.remember(oid);
            }
        }
        self.bytes -= NODE_OVERHEAD;
        self.free.push(id);
    }

    fn remember(&mut self, oid: Oid) {
        if self.ghost_set.insert(oid.0) {
            self.ghosts.push_back(oid.0);
        }
        while self.ghosts.len() > self.live.max(16) {
            if let Some(old) = self.ghosts.pop_front() {
                self.ghost_set.remove(&old);
            }
        }
    }
}
