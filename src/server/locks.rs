//! [`LockTable`]: which voted transaction holds which objects of a storage.
//!
//! ZEO has one commit lock from vote to finish, a client's round trip away. Here a transaction locks what it touches:
//! stored, deleted and restored oids exclusively, checked ones (`checkCurrentSerialInTransaction`) shared, and the whole
//! storage where that cannot be told beforehand (undo), may not be shared (engines without concurrent votes), or must be
//! quiet (pack's switch).
//!
//! A request joins the queues of all its keys at once, under one mutex, and is granted when it is at the front of each.
//! So all queues agree on the order of arrival: no deadlock, and nobody is overtaken by a later arrival that wants one of
//! the same objects (no starvation). The whole storage is one more key, which everybody else shares.
//!
//! There is one exception. A request for the whole storage that waits for a transaction which has held its locks for more
//! than [`OLD`] (its client hangs, most likely) steps aside: it would stop all commits for as long as that one is given.
//! It returns to the queue when no such transaction is left, and for good after so long as a transaction may hold its
//! locks ([`LockTable::look`]).
//!
//! When a transaction was committed, all who wait for its objects are told: most of them have lost, and need not wait to
//! find that out one after the other.
//!
//! Cost: one mutex, one hash lookup per oid when asking and one when releasing; no allocation for an oid nobody else wants.

use std::collections::VecDeque;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use crate::ids::Oid;
use crate::storage::{Op, StagedTxn, WholeStorageLock};

/// A transaction that has held its locks for longer is not waited for by everybody: usually its client, a round trip away,
/// would have finished it.
pub(crate) const OLD: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Key {
    Storage,
    Object(Oid),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Shared,
    Exclusive,
}

/// What a transaction has to lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LockSet {
    /// `(oid, exclusive)`, each oid once.
    Objects(Vec<(Oid, bool)>),
    WholeStorage,
}

impl LockSet {
    pub(crate) fn of(txn: &StagedTxn, concurrent_votes: bool) -> Self {
        let mut modes: FxHashMap<Oid, bool> = FxHashMap::default();
        for op in &txn.ops {
            match op.oid() {
                Some(oid) => *modes.entry(oid).or_default() |= !matches!(op, Op::CheckCurrent { .. }),
                None => return Self::WholeStorage,
            }
        }
        // A transaction with a tid of its own may go back in time, which only the whole history can judge.
        if !concurrent_votes || txn.tid.is_some() {
            return Self::WholeStorage;
        }
        Self::Objects(modes.into_iter().collect())
    }

    fn keys(&self) -> Vec<(Key, Mode)> {
        match self {
            Self::WholeStorage => vec![(Key::Storage, Mode::Exclusive)],
            Self::Objects(oids) => std::iter::once((Key::Storage, Mode::Shared))
                .chain(oids.iter().map(|(oid, exclusive)| {
                    (Key::Object(*oid), if *exclusive { Mode::Exclusive } else { Mode::Shared })
                }))
                .collect(),
        }
    }
}

/// What a request that waits is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum News {
    /// It has its locks now. Comes once.
    Granted,
    /// A transaction that wrote one of its objects was committed, and it goes on waiting.
    Changed,
}

/// Called without the table's mutex held.
type Wake = Arc<dyn Fn(News) + Send + Sync>;

struct Request {
    keys: Vec<(Key, Mode)>,
    /// Keys at whose front it is not yet; 0: granted.
    blocked: usize,
    wake: Option<Wake>,
    holder: Arc<str>,
    since: Instant,
    /// For a request of the whole storage that waits.
    stand: Stand,
}

/// Where a request for the whole storage waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stand {
    Queued,
    /// It has stepped aside.
    Aside,
    /// It was aside for long enough, and keeps its place now.
    Firm,
}

/// Requests of one key in order of arrival. The first is apart, so that the usual queue of one allocates nothing.
struct Queue {
    first: (u64, Mode),
    rest: VecDeque<(u64, Mode)>,
    /// How many from the front on hold it: the first, or all of the leading shared ones.
    granted: usize,
}

impl Queue {
    fn get(&self, at: usize) -> Option<(u64, Mode)> {
        if at == 0 { Some(self.first) } else { self.rest.get(at - 1).copied() }
    }

    fn len(&self) -> usize {
        1 + self.rest.len()
    }

    /// Lets in who may come in now; tells `entered`.
    fn advance(&mut self, entered: &mut Vec<u64>) {
        while let Some((id, mode)) = self.get(self.granted) {
            let may = self.granted == 0 || (mode == Mode::Shared && self.first.1 == Mode::Shared);
            if !may {
                return;
            }
            self.granted += 1;
            entered.push(id);
        }
    }

    /// False if the queue is empty now.
    fn remove(&mut self, id: u64) -> bool {
        let Some(at) = (0..self.len()).find(|at| self.get(*at).is_some_and(|(other, _)| other == id)) else {
            return true;
        };
        if at < self.granted {
            self.granted -= 1;
        }
        if at > 0 {
            self.rest.remove(at - 1);
            return true;
        }
        match self.rest.pop_front() {
            Some(next) => {
                self.first = next;
                true
            }
            None => false,
        }
    }
}

#[derive(Default)]
struct Table {
    queues: FxHashMap<Key, Queue>,
    requests: FxHashMap<u64, Request>,
    next_id: u64,
    waiting: usize,
    /// Requests that have stepped aside, in order of arrival.
    aside: VecDeque<u64>,
}

impl Table {
    /// Joins the queue of `key`; true if it has it at once.
    fn join(&mut self, key: Key, id: u64, mode: Mode) -> bool {
        match self.queues.get_mut(&key) {
            None => {
                self.queues.insert(key, Queue { first: (id, mode), rest: VecDeque::new(), granted: 1 });
                true
            }
            Some(queue) => {
                queue.rest.push_back((id, mode));
                let mut entered = Vec::new();
                queue.advance(&mut entered);
                !entered.is_empty()
            }
        }
    }

    /// Each of `ids` has come to the front of one queue; appends who has all locks now to `wakes`.
    fn entered(&mut self, ids: Vec<u64>, wakes: &mut Vec<(Wake, News)>) {
        for id in ids {
            let Some(request) = self.requests.get_mut(&id) else { continue };
            request.blocked -= 1;
            if request.blocked == 0 {
                self.waiting -= 1;
                request.since = Instant::now();
                wakes.extend(request.wake.take().map(|wake| (wake, News::Granted)));
            }
        }
    }

    /// Whether a transaction has held locks since before `now - OLD`.
    fn has_old(&self, now: Instant) -> bool {
        let is_old =
            |request: &Request| request.blocked == 0 && now.saturating_duration_since(request.since) >= OLD;
        self.requests.values().any(is_old)
    }

    /// Leaves the queue of the whole storage to those behind it.
    fn step_aside(&mut self, id: u64, wakes: &mut Vec<(Wake, News)>) {
        let Some(queue) = self.queues.get_mut(&Key::Storage) else { return };
        let mut entered = Vec::new();
        // Somebody is in front of it.
        queue.remove(id);
        queue.advance(&mut entered);
        if let Some(request) = self.requests.get_mut(&id) {
            request.stand = Stand::Aside;
        }
        self.aside.push_back(id);
        self.entered(entered, wakes);
    }

    /// Joins the queue again, at its end.
    fn return_to_queue(&mut self, id: u64, stand: Stand, wakes: &mut Vec<(Wake, News)>) {
        self.aside.retain(|other| *other != id);
        if let Some(request) = self.requests.get_mut(&id) {
            request.stand = stand;
        }
        if self.join(Key::Storage, id, Mode::Exclusive) {
            self.entered(vec![id], wakes);
        }
    }
}

/// See the module documentation.
#[derive(Default)]
pub(crate) struct LockTable(Mutex<Table>);

/// A place in the queues; dropping it releases what it holds, or leaves the queues.
pub(crate) struct LockGuard {
    table: Arc<LockTable>,
    id: u64,
    changed: bool,
}

/// Somebody who holds or waits for locks, for the status page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockHolder {
    pub who: String,
    pub waiting: bool,
    /// Number of objects; `None`: the whole storage.
    pub objects: Option<usize>,
    /// When it asked (waiting) or was granted.
    pub since: Instant,
}

impl LockTable {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for `set`. True: granted at once, and `wake` is dropped; false: `wake` is called when it is, and before.
    pub(crate) fn request(
        self: &Arc<Self>,
        set: &LockSet,
        holder: Arc<str>,
        wake: impl Fn(News) + Send + Sync + 'static,
    ) -> (LockGuard, bool) {
        let keys = set.keys();
        let mut table = self.lock();
        let id = table.next_id;
        table.next_id += 1;
        let blocked = keys.iter().map(|&(key, mode)| usize::from(!table.join(key, id, mode))).sum();
        let granted = blocked == 0;
        let wake: Option<Wake> = if granted { None } else { Some(Arc::new(wake)) };
        table.waiting += usize::from(!granted);
        let stand = Stand::Queued;
        table.requests.insert(id, Request { keys, blocked, wake, holder, since: Instant::now(), stand });
        drop(table);
        (LockGuard { table: Arc::clone(self), id, changed: false }, granted)
    }

    fn release(&self, id: u64, changed: bool) {
        let mut wakes: Vec<(Wake, News)> = Vec::new();
        let mut guard = self.lock();
        let table = &mut *guard;
        let Some(request) = table.requests.remove(&id) else { return };
        table.waiting -= usize::from(request.blocked > 0);
        if request.stand == Stand::Aside {
            table.aside.retain(|other| *other != id);
            return;
        }
        let (mut entered, mut behind) = (Vec::new(), Vec::new());
        for &(key, mode) in &request.keys {
            let Some(queue) = table.queues.get_mut(&key) else { continue };
            if queue.remove(id) {
                queue.advance(&mut entered);
                if changed && mode == Mode::Exclusive {
                    behind.extend((0..queue.len()).filter_map(|at| queue.get(at)).map(|(id, _)| id));
                }
            } else {
                table.queues.remove(&key);
            }
        }
        table.entered(entered, &mut wakes);
        if !table.aside.is_empty() && !table.has_old(Instant::now()) {
            for id in table.aside.clone() {
                table.return_to_queue(id, Stand::Queued, &mut wakes);
            }
        }
        behind.sort_unstable();
        behind.dedup();
        for id in behind {
            let wake = table.requests.get(&id).and_then(|request| request.wake.clone());
            wakes.extend(wake.map(|wake| (wake, News::Changed)));
        }
        drop(guard);
        for (wake, news) in wakes {
            wake(news);
        }
    }

    /// Lets the request `id`, if it is one for the whole storage that waits, step aside or return at `now`. `patience`: how
    /// long it lets others pass; `None`: as long as it takes.
    ///
    /// Answers when to look again; `None`: it waits no longer, or keeps its place.
    fn look(&self, id: u64, now: Instant, patience: Option<Duration>) -> Option<Instant> {
        let mut wakes = Vec::new();
        let mut guard = self.lock();
        let table = &mut *guard;
        let request = table.requests.get(&id)?;
        let is_whole = matches!(request.keys.first(), Some((Key::Storage, Mode::Exclusive)));
        if !is_whole || request.blocked == 0 {
            return None;
        }
        let until = patience.map(|patience| request.since + patience);
        let again = Some(until.map_or(now + OLD, |until| until.min(now + OLD)));
        let again = match request.stand {
            Stand::Firm => None,
            Stand::Aside if until.is_some_and(|until| now >= until) => {
                table.return_to_queue(id, Stand::Firm, &mut wakes);
                None
            }
            Stand::Aside => again,
            Stand::Queued if until.is_some_and(|until| now >= until) => None,
            Stand::Queued => {
                // Behind another one for the whole storage there is nobody whom it keeps from anything.
                let shared =
                    table.queues.get(&Key::Storage).is_some_and(|queue| queue.first.1 == Mode::Shared);
                if shared && table.has_old(now) {
                    table.step_aside(id, &mut wakes);
                }
                again
            }
        };
        drop(guard);
        for (wake, news) in wakes {
            wake(news);
        }
        again
    }

    /// Number of requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().waiting
    }

    /// When the longest-held lock was granted.
    pub(crate) fn held_since(&self) -> Option<Instant> {
        self.lock()
            .requests
            .values()
            .filter(|request| request.blocked == 0)
            .map(|request| request.since)
            .min()
    }

    /// Everybody, in order of arrival.
    pub(crate) fn holders(&self) -> Vec<LockHolder> {
        let table = self.lock();
        let mut holders: Vec<_> = table.requests.iter().collect();
        holders.sort_by_key(|(id, _)| **id);
        let holder = |request: &Request| LockHolder {
            who: request.holder.to_string(),
            waiting: request.blocked > 0,
            objects: match request.keys.first() {
                Some((Key::Storage, Mode::Shared)) => Some(request.keys.len() - 1),
                _ => None,
            },
            since: request.since,
        };
        holders.into_iter().map(|(_, request)| holder(request)).collect()
    }
}

/// Somebody who looks after a request for the whole storage while it waits.
pub(crate) struct Watch {
    table: Arc<LockTable>,
    id: u64,
    patience: Option<Duration>,
}

impl Watch {
    /// See [`LockTable::look`]. To be called first [`OLD`] after the request.
    pub(crate) fn look(&self) -> Option<Instant> {
        self.table.look(self.id, Instant::now(), self.patience)
    }
}

impl LockGuard {
    /// `patience`: how long a transaction may hold its locks.
    pub(crate) fn watch(&self, patience: Option<Duration>) -> Watch {
        Watch { table: Arc::clone(&self.table), id: self.id, patience }
    }

    /// Its transaction was committed: whoever waits for an object that it wrote is to know when it is released.
    pub(crate) fn changed(&mut self) {
        self.changed = true;
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        self.table.release(self.id, self.changed);
    }
}

/// The port by which an engine's pack gets the storage to itself.
pub(crate) struct WholeStorage {
    pub(crate) locks: Arc<LockTable>,
    pub(crate) holder: Arc<str>,
    /// How long a transaction may hold its locks.
    pub(crate) patience: Option<Duration>,
}

impl WholeStorageLock for WholeStorage {
    fn with_whole_storage(&self, body: &mut dyn FnMut()) {
        let (granted, wait) = std::sync::mpsc::channel();
        let wake = move |news| {
            if news == News::Granted {
                let _ = granted.send(());
            }
        };
        let (guard, now) = self.locks.request(&LockSet::WholeStorage, Arc::clone(&self.holder), wake);
        let watch = guard.watch(self.patience);
        let mut look = (!now).then(|| Instant::now() + OLD);
        while let Some(at) = look {
            match wait.recv_timeout(at.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Timeout) => look = watch.look(),
                // The wake is dropped unsent only with the guard.
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return body(),
            }
        }
        if now || wait.recv().is_ok() {
            body();
        }
        drop(guard);
    }
}

#[cfg(test)]
#[path = "locks_tests.rs"]
mod tests;
