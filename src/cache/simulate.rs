//! Plays a trace against a cache of another size, or against ZEO's way of forgetting.
//!
//! What the traced cache did (hit or miss) matters only for what the trace does not say: after a miss the data's length
//! comes with the store that follows.

use std::collections::VecDeque;

use bytes::Bytes;
use rustc_hash::FxHashMap;

use super::Cache;
use super::trace::{self, TraceRecord};
use super::value::Value;
use crate::ids::{Oid, Tid};

/// Whose way of forgetting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// [`Cache`] itself.
    Ours,
    /// The ring of ZEO's cache file: what is found far behind the write position is written again.
    Zeo,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Simulated {
    pub loads: u64,
    pub hits: u64,
    pub stores: u64,
    pub invalidations: u64,
}

impl Simulated {
    /// Hits of a hundred loads.
    pub fn hit_rate(&self) -> f64 {
        if self.loads == 0 { 0.0 } else { 100.0 * self.hits as f64 / self.loads as f64 }
    }
}

/// What a cache of `max_bytes` would have made of `records`.
pub fn simulate(
    records: impl IntoIterator<Item = TraceRecord>,
    policy: Policy,
    max_bytes: usize,
) -> Simulated {
    match policy {
        Policy::Ours => {
            let zeros = Bytes::from(vec![0; LONGEST.min(max_bytes)]);
            play(records, &mut Ours { cache: Cache::new(max_bytes), zeros })
        }
        Policy::Zeo => play(records, &mut Ring::new(max_bytes)),
    }
}

/// The longest data that a trace can tell of.
const LONGEST: usize = 1 << 23;

trait Simulation {
    /// Whether it is there.
    fn load(&mut self, oid: Oid, before: Tid) -> bool;
    fn store(&mut self, oid: Oid, tid: Tid, end: Option<Tid>, length: usize);
    fn invalidate(&mut self, oid: Oid, tid: Option<Tid>) -> bool;
}

fn play(records: impl IntoIterator<Item = TraceRecord>, cache: &mut impl Simulation) -> Simulated {
    let mut seen = Simulated::default();
    for TraceRecord { code, length, oid, tid, end, .. } in records {
        let length = length as usize;
        let end_tid = (end != Tid::ZERO).then_some(end);
        match code {
            trace::LOAD_MISS | trace::LOAD_HIT => {
                seen.loads += 1;
                if cache.load(oid, Tid::MAX) {
                    seen.hits += 1;
                } else if code == trace::LOAD_HIT {
                    seen.stores += 1;
                    cache.store(oid, tid, None, length);
                }
            }
            trace::LOAD_OLD_MISS | trace::LOAD_OLD_HIT => {
                seen.loads += 1;
                let before = if code == trace::LOAD_OLD_HIT { Tid(tid.0.saturating_add(1)) } else { end };
                if cache.load(oid, before) {
                    seen.hits += 1;
                } else if code == trace::LOAD_OLD_HIT && end_tid.is_some() {
                    seen.stores += 1;
                    cache.store(oid, tid, end_tid, length);
                }
            }
            trace::STORE | trace::STORE_OLD => {
                seen.stores += 1;
                cache.store(oid, tid, end_tid, length);
            }
            code if code & 0x70 == 0x10 => {
                let tid = (tid != Tid::ZERO).then_some(tid);
                seen.invalidations += u64::from(cache.invalidate(oid, tid));
            }
            _ => {}
        }
    }
    seen
}

struct Ours {
    cache: Cache,
    /// Data of every revision, shared.
    zeros: Bytes,
}

impl Simulation for Ours {
    fn load(&mut self, oid: Oid, before: Tid) -> bool {
        self.cache.load_before(oid, before).is_some()
    }

    fn store(&mut self, oid: Oid, tid: Tid, end: Option<Tid>, length: usize) {
        if length <= self.zeros.len() {
            self.cache.insert(oid, tid, end, Value::Memory(self.zeros.slice(..length)));
        }
    }

    fn invalidate(&mut self, oid: Oid, tid: Option<Tid>) -> bool {
        self.cache.end(oid, tid)
    }
}

/// ZEO counts so much for each record, and nothing for its index in memory.
const RING_OVERHEAD: usize = 43;
/// Share of the file that may lie between a record and the write position before a use writes it again.
const RING_REARRANGE: f64 = 0.8;

/// Places count up for ever; what lies further back than the file is large has been overwritten.
struct Ring {
    size: u64,
    written: u64,
    current: FxHashMap<Oid, Slot>,
    old: FxHashMap<Oid, Vec<(Tid, Slot)>>,
    order: VecDeque<(Oid, u64)>,
}

#[derive(Clone, Copy)]
struct Slot {
    tid: Tid,
    place: u64,
    length: usize,
}

impl Ring {
    fn new(max_bytes: usize) -> Self {
        Self {
            size: max_bytes as u64,
            written: 0,
            current: FxHashMap::default(),
            old: FxHashMap::default(),
            order: VecDeque::new(),
        }
    }

    /// A place for a record of that length; forgets what is overwritten.
    fn write(&mut self, oid: Oid, length: usize) -> u64 {
        let place = self.written;
        self.written += (length + RING_OVERHEAD) as u64;
        self.order.push_back((oid, place));
        while let Some(&(oid, place)) = self.order.front()
            && place + self.size < self.written
        {
            self.order.pop_front();
            if self.current.get(&oid).is_some_and(|slot| slot.place == place) {
                self.current.remove(&oid);
            }
            if let Some(old) = self.old.get_mut(&oid) {
                old.retain(|(_, slot)| slot.place != place);
                if old.is_empty() {
                    self.old.remove(&oid);
                }
            }
        }
        place
    }
}

impl Simulation for Ring {
    fn load(&mut self, oid: Oid, before: Tid) -> bool {
        if let Some(&slot) = self.current.get(&oid)
            && slot.tid < before
        {
            let far = (self.written - slot.place) as f64 > self.size as f64 * RING_REARRANGE;
            if far && self.size > 10 * slot.length as u64 {
                self.current.remove(&oid);
                let place = self.write(oid, slot.length);
                self.current.insert(oid, Slot { place, ..slot });
            }
            return true;
        }
        let old = self.old.get(&oid);
        old.is_some_and(|old| old.iter().any(|(end, slot)| slot.tid < before && before <= *end))
    }

    fn store(&mut self, oid: Oid, tid: Tid, end: Option<Tid>, length: usize) {
        if (length + RING_OVERHEAD) as u64 >= self.size {
            return;
        }
        match end {
            None if self.current.get(&oid).is_some_and(|slot| slot.tid >= tid) => {}
            None => {
                let place = self.write(oid, length);
                self.current.insert(oid, Slot { tid, place, length });
            }
            Some(end) => {
                let known = self.old.get(&oid).is_some_and(|old| old.iter().any(|(_, slot)| slot.tid == tid));
                if !known {
                    let place = self.write(oid, length);
                    self.old.entry(oid).or_default().push((end, Slot { tid, place, length }));
                }
            }
        }
    }

    fn invalidate(&mut self, oid: Oid, tid: Option<Tid>) -> bool {
        match (self.current.get(&oid).copied(), tid) {
            (None, _) => false,
            (Some(slot), Some(tid)) if tid <= slot.tid => false,
            (Some(slot), tid) => {
                self.current.remove(&oid);
                if let Some(tid) = tid {
                    self.old.entry(oid).or_default().push((tid, slot));
                }
                true
            }
        }
    }
}
