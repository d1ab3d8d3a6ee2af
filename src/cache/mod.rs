//! The client's object cache: several revisions of an object, each with the exact range of tids it covers.
//!
//! # What it promises
//! - [`Cache::load_before`] answers only from a revision that covers `before`: `tid < before`, and either the
//!   revision is current or its `end_tid >= before`. It answers truthfully for `before <= last_tid + 1`, which is
//!   all that ZODB asks for; the caller advances its last tid only after [`Cache::invalidate`] returned.
//! - All bytes count: [`Cache::bytes`] includes [`NODE_OVERHEAD`] for every revision and stays at or below the limit.
//! - Revisions read once are evicted before those read again (S3-FIFO, see `shard.rs`), so that a scan of the
//!   whole database does not wash out the working set.
//!
//! # What it costs
//! A hit takes one uncontended shard lock, one hash lookup, one reference count: no copy, no list to relink, no global
//! lock. The first hit of a revision that came from a file costs one `pread` and a checksum besides. A store copies the data once
//! (what it keeps must not pin a network buffer).

mod journal;
mod lock;
mod record;
mod shard;
mod simulate;
#[cfg(test)]
mod tests;
mod trace;
mod value;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use rustc_hash::FxHashSet;

use crate::ids::{Oid, Tid};
use crate::storage::Loaded;
use journal::{Event, Journal};
use shard::{Found, Revision, Shard};
use trace::Trace;
use value::{Filed, Value};

pub use journal::{FileStats, Opened, inspect};
pub use shard::NODE_OVERHEAD;
pub use simulate::{Policy, Simulated, simulate};
pub use trace::{TraceReader, TraceRecord};

/// Bytes of cache for which another shard is worth its lock.
const BYTES_PER_SHARD: usize = 2 << 20;
const MAX_SHARDS: usize = 64;

/// Counters since the cache was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    pub hits: u64,
    pub misses: u64,
    pub stores: u64,
    pub evictions: u64,
    pub invalidations: u64,
    pub revisions: u64,
    pub bytes: u64,
    pub max_bytes: u64,
}

/// See [`Cache::ticket`].
#[derive(Clone, Copy, Debug)]
pub struct Ticket(u64);

/// Shared by all threads of a client.
pub struct Cache {
    shards: Box<[Mutex<Shard>]>,
    bytes: AtomicUsize,
    max_bytes: usize,
    /// The file, if it has one.
    journal: OnceLock<Journal>,
    /// Where every use is written down, if anywhere.
    trace: OnceLock<Trace>,
}

impl Cache {
    /// A cache of at most `max_bytes`, overhead included. Zero keeps nothing.
    pub fn new(max_bytes: usize) -> Self {
        let count = (max_bytes / BYTES_PER_SHARD).clamp(1, MAX_SHARDS).next_power_of_two();
        Self {
            shards: (0..count).map(|_| Mutex::new(Shard::default())).collect(),
            bytes: AtomicUsize::new(0),
            max_bytes,
            journal: OnceLock::new(),
            trace: OnceLock::new(),
        }
    }

    /// A cache that goes on where the one of an earlier process ended, and is kept in the file `path`. If another process
    /// has the file, it is a temporary one.
    ///
    /// # Errors
    /// The directory or file cannot be used at all. What is in a file is never an error.
    pub fn open(path: &Path, max_bytes: usize) -> io::Result<(Arc<Self>, Opened)> {
        let cache = Arc::new(Self::new(max_bytes));
        let (journal, opened) = journal::open(&cache, path)?;
        if let Some(journal) = journal {
            let _ = cache.journal.set(journal);
        }
        Ok((cache, opened))
    }

    /// Appends every use to the file `path` from now on, in the format of ZEO's traces (see `trace.rs`).
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn trace_to(&self, path: &Path) -> io::Result<()> {
        let trace = Trace::open(path)?;
        trace.record(trace::RESTART, Oid(0), Tid::ZERO, Tid::ZERO, 0);
        let _ = self.trace.set(trace);
        Ok(())
    }

    /// Waits a moment until the file has everything.
    pub fn close(&self) {
        if let Some(journal) = self.journal.get() {
            journal.close();
        }
        if let Some(trace) = self.trace.get() {
            trace.flush();
        }
    }

    /// Whether it is kept in a file.
    pub fn is_persistent(&self) -> bool {
        self.journal.get().is_some()
    }

    /// Everything that the transactions up to `tid` changed has been invalidated. For the file.
    pub fn set_last_tid(&self, tid: Tid) {
        self.record(|| Event::LastTid(tid));
    }

    /// Forgets everything and keeps the file under another name: it belongs to another database, or to one newer than the
    /// server's.
    pub fn move_aside(&self) {
        self.record(|| Event::MoveAside);
        self.remove_all();
    }

    /// Of the current revisions the `most` with the greatest tids, greatest first; without those of the objects `but`.
    pub fn newest(&self, most: usize, but: &FxHashSet<Oid>) -> Vec<(Oid, Tid)> {
        let mut current = Vec::new();
        self.for_each(|oid, tid, end, _| {
            if end.is_none() && !but.contains(&oid) {
                current.push((oid, tid));
            }
        });
        let order = |&(oid, tid): &(Oid, Tid)| (std::cmp::Reverse(tid), oid);
        if most < current.len() {
            current.select_nth_unstable_by_key(most, order);
            current.truncate(most);
        }
        current.sort_unstable_by_key(order);
        current
    }

    /// Forgets every object of which it knows something that happened after `tid`: that may be another history's.
    pub fn forget_after(&self, tid: Tid) {
        let mut oids = Vec::new();
        self.for_each(|oid, start, end, _| {
            if end.unwrap_or(start) > tid {
                oids.push(oid);
            }
        });
        for oid in oids {
            self.forget(oid);
            self.record(|| Event::Forget { oid });
        }
    }

    fn forget(&self, oid: Oid) {
        let change = {
            let mut shard = self.shard(oid);
            let before = shard.bytes();
            shard.forget_all(oid);
            shard.bytes() as isize - before as isize
        };
        self.add(change);
    }

    /// The revision of `oid` that was current just before `before`, if the cache knows it for certain.
    pub fn load_before(&self, oid: Oid, before: Tid) -> Option<Loaded> {
        match self.load_from_memory(oid, before) {
            Some(loaded) => Some(loaded),
            None => self.load_from_file(oid, before),
        }
    }

    /// As [`Self::load_before`], if that needs no file to be read.
    pub fn load_from_memory(&self, oid: Oid, before: Tid) -> Option<Loaded> {
        let mut shard = self.shard(oid);
        match shard.load_before(oid, before) {
            Found::Memory(loaded) => {
                drop(shard);
                self.trace_hit(oid, &loaded);
                Some(loaded)
            }
            Found::Filed { .. } => None,
            Found::Nothing => {
                shard.count_miss();
                if let Some(trace) = self.trace.get() {
                    let old = shard.knows_newer(oid, before);
                    drop(shard);
                    let code = if old { trace::LOAD_OLD_MISS } else { trace::LOAD_MISS };
                    trace.record(code, oid, Tid::ZERO, if old { before } else { Tid::ZERO }, 0);
                }
                None
            }
        }
    }

    /// After [`Self::load_from_memory`]: the same from the file, which may have to be read for it. A damaged value is
    /// forgotten. Nothing, and no cost, for a cache without a file.
    pub fn load_from_file(&self, oid: Oid, before: Tid) -> Option<Loaded> {
        self.journal.get()?;
        let found = self.shard(oid).load_before(oid, before);
        let (place, tid, end_tid) = match found {
            Found::Memory(loaded) => return Some(loaded),
            Found::Nothing => return None,
            Found::Filed { place, tid, end_tid } => (place, tid, end_tid),
        };
        // Without the lock: it may have ended since, but the range it was found with is true for `before`.
        let data = place.read(oid, tid);
        let change = {
            let mut shard = self.shard(oid);
            let before = shard.bytes();
            shard.fill(oid, tid, data.clone());
            if data.is_none() {
                shard.count_miss();
            }
            shard.bytes() as isize - before as isize
        };
        self.add(change);
        let Some(data) = data else {
            tracing::warn!(%oid, %tid, "a damaged value in the cache file is not used");
            return None;
        };
        let loaded = Loaded { data, tid, end_tid };
        self.trace_hit(oid, &loaded);
        Some(loaded)
    }

    fn trace_hit(&self, oid: Oid, loaded: &Loaded) {
        if let Some(trace) = self.trace.get() {
            let code = if loaded.end_tid.is_none() { trace::LOAD_HIT } else { trace::LOAD_OLD_HIT };
            trace.record(code, oid, loaded.tid, loaded.end_tid.unwrap_or(Tid::ZERO), loaded.data.len());
        }
    }

    /// Whether [`Self::load_before`] would answer; does not count as a use.
    pub fn covers(&self, oid: Oid, before: Tid) -> bool {
        self.shard(oid).covers(oid, before)
    }

    /// Keeps a revision as a reply told it. A "current" one older than a revision already known is dropped: its end is
    /// unknown. Larger than the cache: not kept.
    pub fn store(&self, oid: Oid, tid: Tid, end_tid: Option<Tid>, data: &[u8]) {
        if !self.fits(tid, end_tid, data.len()) {
            return;
        }
        self.keep(None, oid, tid, end_tid, Bytes::copy_from_slice(data));
    }

    /// To be taken before somebody who does not speak in the order of invalidations is asked for the current revision of `oid`.
    pub fn ticket(&self, oid: Oid) -> Ticket {
        Ticket(self.shard(oid).changes())
    }

    /// As [`Self::store`], of a revision that was current after the ticket was taken. Not kept if an invalidation came since, which
    /// may have ended it.
    pub fn store_current(&self, ticket: Ticket, oid: Oid, tid: Tid, data: &Bytes) {
        self.keep(Some(ticket), oid, tid, None, data.clone());
    }

    fn keep(&self, ticket: Option<Ticket>, oid: Oid, tid: Tid, end_tid: Option<Tid>, data: Bytes) {
        let revision = || Event::Revision { oid, tid, end: end_tid, data: data.clone() };
        // Under the lock: the invalidation that ends it must not get into the file before it.
        let filed = || self.record(revision);
        let kept = self.insert_and(ticket, oid, tid, end_tid, Value::Memory(data.clone()), filed);
        if let (true, Some(trace)) = (kept, self.trace.get()) {
            let code = if end_tid.is_none() { trace::STORE } else { trace::STORE_OLD };
            trace.record(code, oid, tid, end_tid.unwrap_or(Tid::ZERO), data.len());
        }
    }

    /// The current revision of `oid` ended at `tid`; with `None` it is forgotten. Older revisions stay.
    ///
    /// An invalidation with the tid of the current revision itself (the reply that brought it overtook the
    /// invalidation) or an older one changes nothing.
    pub fn invalidate(&self, oid: Oid, tid: Option<Tid>) {
        let ended = self.end(oid, tid);
        if let Some(trace) = self.trace.get() {
            let code = match (ended, tid) {
                (false, _) => trace::INVALIDATE_MISS,
                (true, Some(_)) => trace::INVALIDATE_HIT,
                (true, None) => trace::FORGET_HIT,
            };
            trace.record(code, oid, tid.unwrap_or(Tid::ZERO), Tid::ZERO, 0);
        }
        // Always: the file may have a revision that memory has not.
        self.record(|| Event::Invalidate { oid, tid });
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.remove_all();
        self.record(|| Event::Clear);
    }

    /// True if it was new.
    fn insert(&self, oid: Oid, tid: Tid, end_tid: Option<Tid>, data: Value) -> bool {
        self.insert_and(None, oid, tid, end_tid, data, || ())
    }

    /// As [`Self::insert`]; if it was new `filed` is called under the lock. Nothing is done with a ticket that is out of date.
    fn insert_and(
        &self,
        ticket: Option<Ticket>,
        oid: Oid,
        tid: Tid,
        end_tid: Option<Tid>,
        data: Value,
        filed: impl FnOnce(),
    ) -> bool {
        if !self.fits(tid, end_tid, data.len()) {
            return false;
        }
        let (changed, change) = {
            let mut shard = self.shard(oid);
            if ticket.is_some_and(|ticket| ticket.0 != shard.changes()) {
                return false;
            }
            let before = shard.bytes();
            let changed = shard.store(oid, tid, end_tid, data);
            if changed {
                filed();
            }
            (changed, shard.bytes() as isize - before as isize)
        };
        self.add(change);
        self.shrink(self.index(oid));
        changed
    }

    fn end(&self, oid: Oid, tid: Option<Tid>) -> bool {
        let (ended, change) = {
            let mut shard = self.shard(oid);
            let before = shard.bytes();
            (shard.invalidate(oid, tid), shard.bytes() as isize - before as isize)
        };
        self.add(change);
        ended
    }

    /// The data of these revisions lies there now, if it has not been read since.
    fn move_to(&self, moved: Vec<(Oid, Tid, Filed)>) {
        for (oid, tid, place) in moved {
            self.shard(oid).move_to(oid, tid, place);
        }
    }

    /// Makes room for so many revisions, shared out evenly.
    fn reserve(&self, revisions: usize) {
        for shard in &self.shards {
            lock(shard).reserve(revisions / self.shards.len());
        }
    }

    fn remove_all(&self) {
        for shard in &self.shards {
            let freed = lock(shard).clear();
            self.add(-(freed as isize));
        }
    }

    fn fits(&self, tid: Tid, end_tid: Option<Tid>, length: usize) -> bool {
        length.saturating_add(NODE_OVERHEAD) <= self.max_bytes && end_tid.is_none_or(|end| end > tid)
    }

    fn record(&self, event: impl FnOnce() -> Event) {
        if let Some(journal) = self.journal.get() {
            journal.send(event());
        }
    }

    /// Number of revisions.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes used, overhead included.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    pub fn max_bytes(&self) -> usize {
        self.max_bytes
    }

    pub fn stats(&self) -> CacheStats {
        let mut sum = CacheStats { max_bytes: self.max_bytes as u64, ..CacheStats::default() };
        for shard in &self.shards {
            let shard = lock(shard);
            let one = shard.stats();
            sum.hits += one.hits;
            sum.misses += one.misses;
            sum.stores += one.stores;
            sum.evictions += one.evictions;
            sum.invalidations += one.invalidations;
            sum.revisions += shard.len() as u64;
            sum.bytes += shard.bytes() as u64;
        }
        sum
    }

    /// Every revision: `(oid, tid, end_tid, bytes of its data)`. Shard by shard; nothing is locked while `visit` runs.
    pub fn for_each(&self, mut visit: impl FnMut(Oid, Tid, Option<Tid>, usize)) {
        self.for_each_revision(|revision| {
            visit(revision.oid, revision.tid, revision.end, revision.value.len());
        });
    }

    fn for_each_revision(&self, mut visit: impl FnMut(Revision)) {
        for shard in &self.shards {
            let revisions = lock(shard).revisions();
            revisions.into_iter().for_each(&mut visit);
        }
    }

    /// Evicts until the limit holds, from the shard that grew first, then from the others.
    fn shrink(&self, start: usize) {
        let mut index = start;
        let mut visited = 0;
        while self.bytes.load(Relaxed) > self.max_bytes && visited < self.shards.len() {
            let freed = {
                let mut shard = lock(&self.shards[index % self.shards.len()]);
                let before = shard.bytes();
                let over = self.bytes.load(Relaxed).saturating_sub(self.max_bytes);
                shard.evict(over);
                before - shard.bytes()
            };
            self.add(-(freed as isize));
            index += 1;
            visited += 1;
        }
    }

    fn add(&self, change: isize) {
        if change == 0 {
            return;
        }
        if change >= 0 {
            self.bytes.fetch_add(change as usize, Relaxed);
        } else {
            self.bytes.fetch_sub(change.unsigned_abs(), Relaxed);
        }
    }

    fn index(&self, oid: Oid) -> usize {
        // oids are dense integers: Fibonacci hashing spreads neighbours.
        (oid.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize & (self.shards.len() - 1)
    }

    fn shard(&self, oid: Oid) -> MutexGuard<'_, Shard> {
        lock(&self.shards[self.index(oid)])
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("bytes", &self.bytes()).field("max_bytes", &self.max_bytes).finish()
    }
}

/// A shard whose holder panicked is still a shard of whole revisions: every change is complete before it is reachable.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
