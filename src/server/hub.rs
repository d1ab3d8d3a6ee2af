//! [`Hub`]: one served storage, and what all its connections share.
//!
//! Publishing a transaction is one critical section of the [`Registry`]: the invalidation queue, the last published tid
//! and the mailboxes of all connections advance together. `register` enters the list and takes its first view in the same
//! section, so that no transaction falls between the two, and none comes twice.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::Semaphore;

use super::admin::histogram::{Histogram, Sizes};
use super::admin::rates::Rates;
use super::commit::Committer;
use super::locks::LockTable;
use super::mailbox::{Event, Mailbox, Publication, StorageInfo};
use super::pack_watch::PackWatch;
use crate::ids::{Oid, Tid};
use crate::shelf::{Shelf, Ticket};
use crate::storage::{Capabilities, ConflictResolver, InvalidationSink, Loaded, References, Result, Storage};

/// Counters of one storage since the server's start.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) loads: AtomicU64,
    /// Loads that had to wait for the disk (or for Python).
    pub(crate) disk_loads: AtomicU64,
    pub(crate) stores: AtomicU64,
    pub(crate) commits: AtomicU64,
    pub(crate) aborts: AtomicU64,
    /// Aborted because they held their locks for too long.
    pub(crate) timeouts: AtomicU64,
    pub(crate) conflicts: AtomicU64,
    pub(crate) conflicts_resolved: AtomicU64,
    pub(crate) active_txns: AtomicU64,
    /// Of blobs, received and read to be sent.
    pub(crate) blob_bytes_received: AtomicU64,
    pub(crate) blob_bytes_sent: AtomicU64,
    /// Blobs on their way.
    pub(crate) uploads: Arc<AtomicU64>,
    pub(crate) downloads: Arc<AtomicU64>,
    /// Of registered connections, as sent and received by the sockets (TLS: before encryption).
    pub(crate) bytes_received: AtomicU64,
    pub(crate) bytes_sent: AtomicU64,
    /// Operations that took longer than the threshold of the log.
    pub(crate) slow: AtomicU64,
    /// Groups of finishes; `commits / groups` is what one sync carries.
    pub(crate) groups: AtomicU64,
    pub(crate) load_seconds: Histogram,
    pub(crate) lock_wait_seconds: Histogram,
    pub(crate) finish_seconds: Histogram,
    /// What of a finish was waiting for the disk.
    pub(crate) sync_seconds: Histogram,
    /// Transactions of a group.
    pub(crate) group_size: Sizes,
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Who listens, and what was published last.
pub(crate) struct Registry {
    listeners: FxHashMap<u64, Arc<Mailbox>>,
    last_tid: Tid,
    /// `(tid, oids)`, newest first. The oids of the oldest are never needed.
    queue: VecDeque<(Tid, Arc<[Oid]>)>,
    queue_size: usize,
    shelf: Option<Arc<Shelf>>,
    /// Commits below the storage that wait for the end of one above.
    held_back: Option<Vec<(Tid, Arc<[Oid]>)>>,
}

impl Registry {
    pub(crate) fn last_tid(&self) -> Tid {
        self.last_tid
    }

    pub(crate) fn queue_len(&self) -> usize {
        self.queue.len()
    }

    fn start_at(&mut self, last_tid: Tid) {
        self.last_tid = last_tid;
        self.queue.clear();
        self.queue.push_back((last_tid, Arc::new([])));
    }

    fn announce(&mut self, publication: &Arc<Publication>, except: Option<u64>) {
        // The storage has it, and nobody is told yet.
        if let Some(shelf) = &self.shelf {
            shelf.remove(&publication.oids);
        }
        // Only a copy of another database, which brings its own tids, can go back.
        self.last_tid = self.last_tid.max(publication.tid);
        while self.queue.len() >= self.queue_size {
            self.queue.pop_back();
        }
        self.queue.push_front((publication.tid, Arc::clone(&publication.oids)));
        for (id, mailbox) in &self.listeners {
            if Some(*id) != except {
                mailbox.put(Event::Published(Arc::clone(publication)));
            }
        }
    }

    /// Wakes every connection that was told something.
    fn ring(&self) {
        for mailbox in self.listeners.values() {
            mailbox.ring();
        }
    }

    /// A commit below, unless it is known already (some storages report their own commits too).
    fn announce_below(&mut self, tid: Tid, oids: Arc<[Oid]>) {
        if !self.queue.iter().any(|(known, _)| *known == tid) {
            self.announce(&Arc::new(Publication::new(tid, oids)), None);
        }
    }

    /// Announces what was held back: what comes before `before`, or all, and then nothing is held back any more.
    fn let_through(&mut self, before: Option<Tid>) {
        let Some(mut held_back) = self.held_back.take() else { return };
        let count =
            before.map_or(held_back.len(), |before| held_back.partition_point(|(tid, _)| *tid < before));
        let rest = held_back.split_off(count);
        for (tid, oids) in held_back {
            self.announce_below(tid, oids);
        }
        self.held_back = before.map(|_| rest);
    }

    /// Oids changed after `since` and up to `view`, if the queue reaches back that far.
    pub(crate) fn invalidations(&self, since: Tid, view: Tid) -> Option<Vec<Oid>> {
        let (oldest, _) = self.queue.back()?;
        if *oldest > since {
            return None;
        }
        let missed = self.queue.iter().skip_while(|(tid, _)| *tid > view).take_while(|(tid, _)| *tid > since);
        let mut seen = FxHashSet::default();
        Some(missed.flat_map(|(_, oids)| oids.iter().copied()).filter(|oid| seen.insert(*oid)).collect())
    }
}

/// How a storage is served, beside the storage itself.
pub(crate) struct HubOptions {
    pub(crate) invalidation_queue_size: usize,
    pub(crate) invalidation_age: Option<Duration>,
    pub(crate) transaction_timeout: Option<Duration>,
    pub(crate) client_conflict_resolution: bool,
    pub(crate) resolver: Arc<dyn ConflictResolver>,
    pub(crate) references: Arc<dyn References>,
    /// Bytes of the cache that clients of this machine share; zero: none.
    pub(crate) shelf: u64,
}

/// Worker threads that a storage with slow calls may keep busy at a time: one that hangs (a database or a server below that does
/// not answer) leaves the rest of the runtime's threads to the other storages.
pub(crate) const MAX_SLOW_JOBS: usize = 64;

/// See the module documentation.
pub(crate) struct Hub {
    pub(crate) id: String,
    /// The storage's own.
    pub(crate) name: String,
    /// Places on worker threads, if the storage's calls are slow.
    pub(crate) slow_jobs: Option<Arc<Semaphore>>,
    known: Known,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) capabilities: Capabilities,
    pub(crate) is_read_only: bool,
    pub(crate) locks: Arc<LockTable>,
    pub(crate) committer: Committer,
    pub(crate) stats: Stats,
    pub(crate) rates: Rates,
    pub(crate) pack: PackWatch,
    pub(crate) options: HubOptions,
    pub(crate) started: SystemTime,
    /// What clients of this machine read without asking.
    pub(crate) shelf: Option<Arc<Shelf>>,
    registry: Mutex<Registry>,
    next_listener: AtomicUsize,
}

impl Hub {
    /// Reads the last transactions of `storage` into the invalidation queue and starts its committer thread.
    pub(crate) fn start(id: String, storage: Arc<dyn Storage>, options: HubOptions) -> Result<Arc<Self>> {
        let capabilities = storage.capabilities();
        let shelf = shelf(&options, &capabilities);
        let registry = Registry {
            listeners: FxHashMap::default(),
            last_tid: Tid::ZERO,
            queue: VecDeque::new(),
            queue_size: options.invalidation_queue_size.max(1),
            shelf: shelf.clone(),
            held_back: Some(Vec::new()),
        };
        let hub = Arc::new(Self {
            name: storage.name(),
            slow_jobs: capabilities.slow_calls.then(|| Arc::new(Semaphore::new(MAX_SLOW_JOBS))),
            known: Known::default(),
            capabilities,
            is_read_only: storage.is_read_only(),
            id,
            storage,
            locks: Arc::default(),
            committer: Committer::new(),
            stats: Stats::default(),
            rates: Rates::default(),
            pack: PackWatch::default(),
            options,
            started: SystemTime::now(),
            shelf,
            registry: Mutex::new(registry),
            next_listener: AtomicUsize::new(0),
        });
        Committer::start(&hub)?;
        // What is committed below from now on is held back until the tid is known that it comes after.
        hub.storage.subscribe(Arc::new(Below(Arc::downgrade(&hub))));
        let last_tid = hub.storage.last_tid();
        let recent = hub.storage.last_invalidations(hub.options.invalidation_queue_size)?;
        let mut registry = hub.registry();
        registry.start_at(last_tid);
        let recent = recent.into_iter().rev().filter(|(tid, _)| *tid <= last_tid);
        let recent: VecDeque<(Tid, Arc<[Oid]>)> = recent.map(|(tid, oids)| (tid, oids.into())).collect();
        if !recent.is_empty() {
            registry.queue = recent;
        }
        if let Some(held_back) = &mut registry.held_back {
            held_back.retain(|(tid, _)| *tid > last_tid);
        }
        registry.let_through(None);
        drop(registry);
        if hub.capabilities.slow_calls {
            hub.look();
        }
        Ok(hub)
    }

    pub(crate) fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the storage, which may take its time.
    pub(crate) fn info(&self) -> StorageInfo {
        let info = StorageInfo { length: self.storage.object_count(), size: self.storage.size() };
        if self.capabilities.slow_calls {
            self.known.facts().info = info;
        }
        info
    }

    /// As [`Self::info`], without waiting: of a storage with slow calls, what it said last.
    pub(crate) fn known_info(&self) -> StorageInfo {
        if self.capabilities.slow_calls { self.known.facts().info } else { self.info() }
    }

    /// Why the storage takes no writes, without waiting: of a storage with slow calls, what it said last, or that it says nothing.
    pub(crate) fn known_failure(&self) -> Option<String> {
        if !self.capabilities.slow_calls {
            return self.storage.write_failure();
        }
        let facts = self.known.facts();
        match facts.looking_since.map(|since| since.elapsed()) {
            Some(age) if age >= SILENCE => Some(format!("it has not answered for {} s", age.as_secs())),
            _ => facts.failure.clone(),
        }
    }

    /// Asks the storage what [`Self::known_info`] and [`Self::known_failure`] tell, unless somebody does already; may block.
    pub(crate) fn look(&self) {
        if self.known.looking.swap(true, Ordering::AcqRel) {
            return;
        }
        let _looked = Looked(&self.known);
        self.known.facts().looking_since = Some(Instant::now());
        self.info();
        let failure = self.storage.write_failure();
        self.known.facts().failure = failure;
    }

    /// Where clients of this machine find it, if it is current and has not changed since the ticket was taken.
    pub(crate) fn shelve(&self, ticket: Option<Ticket>, oid: Oid, loaded: &Result<Option<Loaded>>) {
        if let (Some(shelf), Some(ticket)) = (&self.shelf, ticket)
            && let Ok(Some(Loaded { data, tid, end_tid: None })) = loaded
        {
            shelf.put(ticket, oid, *tid, data);
        }
    }

    /// Joins the listeners. The tid is the connection's first view: exactly what comes after it will be posted.
    pub(crate) fn register(self: &Arc<Self>, mailbox: &Arc<Mailbox>) -> (Registration, Tid) {
        let id = self.next_listener.fetch_add(1, Ordering::Relaxed) as u64;
        let mut registry = self.registry();
        registry.listeners.insert(id, Arc::clone(mailbox));
        (Registration { hub: Arc::clone(self), id }, registry.last_tid)
    }

    /// Who is registered, in order of arrival.
    pub(crate) fn clients(&self) -> Vec<ClientInfo> {
        let registry = self.registry();
        let mut clients: Vec<_> = registry.listeners.iter().collect();
        clients.sort_by_key(|(id, _)| **id);
        clients.into_iter().map(|(_, mailbox)| mailbox.client()).collect()
    }

    /// Bytes of invalidations that clients have not read: of all together, and of the slowest.
    pub(crate) fn unread(&self) -> (usize, usize) {
        let registry = self.registry();
        let unread = registry.listeners.values().map(|mailbox| mailbox.unread());
        unread.fold((0, 0), |(sum, most), unread| (sum + unread, most.max(unread)))
    }

    pub(crate) fn connections(&self) -> usize {
        self.registry().listeners.len()
    }

    /// A group is being finished: until [`Self::finished`], commits below the storage are held back, because the tids of
    /// the group may be smaller than theirs.
    pub(crate) fn finishing(&self) {
        self.registry().held_back.get_or_insert_default();
    }

    /// The group is finished: every connection is woken for what [`Self::publish`] put into its mailbox.
    pub(crate) fn finished(&self) {
        let mut registry = self.registry();
        registry.let_through(None);
        registry.ring();
    }

    /// Announces a committed transaction to everybody but its own connection, `committer`, for which `put` does it. Nobody
    /// is woken before [`Self::finished`].
    ///
    /// That comes last, so that whoever hears of the commit from its committer finds it in every mailbox; and in the same
    /// critical section, so that the next transaction comes after it.
    pub(crate) fn publish(
        &self,
        tid: Tid,
        oids: Arc<[Oid]>,
        committer: u64,
        put: impl FnOnce(Arc<Publication>),
    ) {
        let mut registry = self.registry();
        registry.let_through(Some(tid));
        let publication = Arc::new(Publication::new(tid, oids));
        registry.announce(&publication, Some(committer));
        put(publication);
    }

    /// After a pack. What it has dropped is nowhere to be found any more.
    pub(crate) fn broadcast_info(&self) {
        if let Some(shelf) = &self.shelf {
            shelf.clear();
        }
        let info = self.info();
        for mailbox in self.registry().listeners.values() {
            mailbox.post(Event::Info(info));
        }
    }

    /// The storage says that anything may have changed: the queue starts anew, and every client has to verify.
    pub(crate) fn invalidate_all(&self) {
        let last_tid = self.storage.last_tid();
        let mut registry = self.registry();
        registry.start_at(last_tid);
        if let Some(shelf) = &self.shelf {
            shelf.clear();
        }
        if let Some(held_back) = &mut registry.held_back {
            held_back.clear();
        }
        for mailbox in registry.listeners.values() {
            mailbox.condemn("the storage was exchanged below; clients have to verify their caches".into());
        }
    }
}

/// For a storage whose `load_before` shows what it has published: one that others write to, below, may answer with less.
fn shelf(options: &HubOptions, capabilities: &Capabilities) -> Option<Arc<Shelf>> {
    if options.shelf == 0 || capabilities.slow_calls {
        return None;
    }
    match Shelf::new(options.shelf) {
        Ok(shelf) => Some(Arc::new(shelf)),
        Err(error) => {
            tracing::info!(%error, "clients of this machine share no cache");
            None
        }
    }
}

/// A storage that has been asked how it is, and has not answered for so long, is not ready.
const SILENCE: Duration = Duration::from_secs(10);

/// What a storage with slow calls said last: those who watch the server do not wait for it, and do not add to its load.
#[derive(Default)]
struct Known {
    looking: AtomicBool,
    facts: Mutex<Facts>,
}

#[derive(Default)]
struct Facts {
    info: StorageInfo,
    failure: Option<String>,
    looking_since: Option<Instant>,
}

impl Known {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a look, also one that panics.
struct Looked<'a>(&'a Known);

impl Drop for Looked<'_> {
    fn drop(&mut self) {
        self.0.facts().looking_since = None;
        self.0.looking.store(false, Ordering::Release);
    }
}

/// One registered client, for people.
#[derive(Clone, Debug)]
pub(crate) struct ClientInfo {
    pub(crate) peer: String,
    pub(crate) label: String,
    pub(crate) read_only: bool,
    pub(crate) connected: Duration,
    /// Bytes of invalidations it has not read.
    pub(crate) unread: usize,
}

/// Membership in a hub's list of listeners, until dropped.
pub(crate) struct Registration {
    pub(crate) hub: Arc<Hub>,
    pub(crate) id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.hub.registry().listeners.remove(&self.id);
    }
}

/// Commits below the storage, on their way to the clients. (Weak: the storage keeps it, and the hub the storage.)
struct Below(Weak<Hub>);

impl InvalidationSink for Below {
    fn invalidate(&self, tid: Tid, oids: Vec<Oid>) {
        if let Some(hub) = self.0.upgrade() {
            let mut registry = hub.registry();
            match &mut registry.held_back {
                Some(held_back) => held_back.push((tid, oids.into())),
                None => {
                    registry.announce_below(tid, oids.into());
                    registry.ring();
                }
            }
        }
    }

    fn invalidate_all(&self) {
        if let Some(hub) = self.0.upgrade() {
            hub.invalidate_all();
        }
    }
}

#[cfg(test)]
#[path = "schedule.rs"]
mod schedule;
