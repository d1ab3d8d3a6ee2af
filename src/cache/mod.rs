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
//! lock. A store copies the data once (what it keeps must not pin a network buffer).

mod journal;
mod shard;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;

use crate::ids::{Oid, Tid};
use crate::storage::Loaded;
use journal::{Event, Journal};
use shard::Shard;

pub use journal::{FileStats, Opened, inspect};
pub use shard::NODE_OVERHEAD;

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

/// Shared by all threads of a client.
pub struct Cache {
    shards: Box<[Mutex<Shard>]>,
    bytes: AtomicUsize,
    max_bytes: usize,
    /// The file, if it has one.
    journal: OnceLock<Journal>,
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

    /// Waits a moment until the file has everything.
    pub fn close(&self) {
        if let Some(journal) = self.journal.get() {
            journal.close();
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

    /// The current revision with the greatest tid.
    pub fn newest(&self) -> Option<(Oid, Tid)> {
        let mut newest = None;
        self.for_each(|oid, tid, end, _| {
            if end.is_none() && newest.is_none_or(|(_, greatest)| tid > greatest) {
                newest = Some((oid, tid));
            }
        });
        newest
    }

    /// The revision of `oid` that was current just before `before`, if the cache knows it for certain.
    pub fn load_before(&self, oid: Oid, before: Tid) -> Option<Loaded> {
        self.shard(oid).load_before(oid, before)
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
        let data = Bytes::copy_from_slice(data);
        if self.insert(oid, tid, end_tid, data.clone()) {
            self.record(|| Event::Revision { oid, tid, end: end_tid, data });
        }
    }

    /// The current revision of `oid` ended at `tid`; with `None` it is forgotten. Older revisions stay.
    ///
    /// An invalidation with the tid of the current revision itself (the reply that brought it overtook the
    /// invalidation) or an older one changes nothing.
    pub fn invalidate(&self, oid: Oid, tid: Option<Tid>) {
        self.end(oid, tid);
        // Always: the file may have a revision that memory has not.
        self.record(|| Event::Invalidate { oid, tid });
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.remove_all();
        self.record(|| Event::Clear);
    }

    /// True if it was new.
    fn insert(&self, oid: Oid, tid: Tid, end_tid: Option<Tid>, data: Bytes) -> bool {
        if !self.fits(tid, end_tid, data.len()) {
            return false;
        }
        let (changed, change) = {
            let mut shard = self.shard(oid);
            let before = shard.bytes();
            (shard.store(oid, tid, end_tid, data), shard.bytes() as isize - before as isize)
        };
        self.add(change);
        self.shrink(self.index(oid));
        changed
    }

    fn end(&self, oid: Oid, tid: Option<Tid>) {
        let change = {
            let mut shard = self.shard(oid);
            let before = shard.bytes();
            shard.invalidate(oid, tid);
            shard.bytes() as isize - before as isize
        };
        self.add(change);
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

    /// Every revision: `(oid, tid, end_tid, data)`. Shard by shard; nothing is locked while `visit` runs.
    pub fn for_each(&self, mut visit: impl FnMut(Oid, Tid, Option<Tid>, &Bytes)) {
        for shard in &self.shards {
            let revisions = lock(shard).revisions();
            for (oid, tid, end_tid, data) in revisions {
                visit(oid, tid, end_tid, &data);
            }
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
