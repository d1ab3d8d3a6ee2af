//! The client: one storage of a server, shared by any number of threads.
//!
//! Plain threads and blocking sockets, no runtime (`docs/decisions/0002-client-io.md`); nothing here knows of Python.
//!
//! This file is long because it is the whole interface but for commits; what it does is below.
//!
//! | file | what it is |
//! | --- | --- |
//! | this, `commit.rs` | [`Client`]: calls, loads; two-phase commit |
//! | `connection.rs` | one connection: who waits, who writes, who reads |
//! | `news.rs` | what the database is still to be told, and by whom |
//! | `core.rs` | what outlives connections: cache, last tid, callbacks |
//! | `keeper.rs`, `dial.rs`, `race.rs`, `verify.rs` | the background thread: connect, verify, reconnect |
//! | `stream.rs`, `inbox.rs`, `slot.rs` | socket, received bytes, one caller's wait |
//! | `transaction.rs`, `blob.rs` | what a commit will put in the cache; blobs on their way |

mod blob;
mod commit;
mod connection;
mod core;
mod dial;
mod error;
mod inbox;
mod keeper;
mod news;
mod options;
mod race;
mod slot;
mod stream;
mod transaction;
mod verify;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cache::{Cache, Opened};
use crate::ids::{Oid, Tid};
use crate::limits::MAX_NEW_OIDS;
use crate::net::Address;
use crate::pickle::Value;
use crate::storage::{Loaded, Owner};
use crate::wire::Call;
use connection::Connection;
use core::{Core, is_in_callback};
use keeper::{Event, Keeper};
use stream::Wake;
use transaction::Place;

pub use blob::{BlobProgress, BlobStats};
pub use core::{DatabaseCallbacks, Session};
pub use error::{CallbackError, ClientError, Result};
pub use options::{Access, Options, Timers};
pub use transaction::FinishCallback;

/// How long `close` waits for the background thread; the cache's file may take the rest of a second.
const CLOSE: Duration = Duration::from_millis(400);
/// How often a waiting caller looks whether it is to give up.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Reads are repeated so often when the connection breaks under them.
const REPEATS: usize = 3;

/// A storage of a server. Closed by [`Client::close`], not by dropping it: its background thread holds it too.
pub struct Client {
    options: Options,
    core: Arc<Core>,
    wake: Arc<Wake>,
    closing: AtomicBool,
    process: Owner,
    state: Mutex<State>,
    changed: Condvar,
    events: Mutex<Sender<Event>>,
    /// Until there is a background thread to take them.
    unconnected: Mutex<Option<Receiver<Event>>>,
    /// oids given by the current connection, to be handed out in ascending order.
    oids: Mutex<(u64, VecDeque<Oid>)>,
    txn: Mutex<Option<Place>>,
    txn_ended: Condvar,
}

struct State {
    phase: Phase,
    /// True once a connection has been ready.
    was_ready: bool,
    read_only: bool,
    /// Why there is no connection, as far as known.
    last_failure: Option<String>,
    addresses: Vec<Address>,
    addresses_changed: bool,
}

#[derive(Clone)]
enum Phase {
    Connecting,
    Operational(Arc<Connection>, Session),
    Closed,
    /// The background thread has ended.
    Ended,
}

impl Client {
    /// A client that is not connected; [`Self::connect`] starts that.
    ///
    /// # Errors
    /// [`ClientError::Io`]: the cache file cannot be used, or there is no socket to be had.
    pub fn new(options: Options, callbacks: Arc<dyn DatabaseCallbacks>) -> Result<Arc<Self>> {
        let (cache, last_tid) = open_cache(&options)?;
        if let Some(path) = &options.cache_trace {
            cache
                .trace_to(path)
                .map_err(|error| ClientError::io(format!("cache trace {}", path.display()), error))?;
        }
        Self::make(options, callbacks, cache, last_tid, false)
    }

    /// Starts the background thread, once; it connects and tells the callbacks. [`Self::wait_connected`] waits for it.
    ///
    /// # Errors
    /// [`ClientError::Io`]: there is no thread to be had.
    pub fn connect(self: &Arc<Self>) -> Result<()> {
        let Some(events) = self.unconnected.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        let sender = self.events().clone();
        Keeper::start(self.clone(), sender, events).map_err(|error| {
            self.end();
            ClientError::io("cannot start the client's thread", error)
        })
    }

    /// After a fork, in the child: a client like this one, with a connection, a thread and a cache of its own, that goes
    /// on from the same last tid, not connected yet. Touches nothing of the parent's but what never changes: its locks may be held by
    /// threads that this process does not have. So `addresses` must be given if they have been set since it was made.
    pub fn reopen(&self, addresses: Option<Vec<Address>>) -> Result<Arc<Self>> {
        let mut options = self.options.clone();
        options.addresses = addresses.unwrap_or(options.addresses);
        options.cache_path = None;
        options.cache_trace = None;
        let cache = Arc::new(Cache::new(options.cache_size));
        Self::make(options, self.core.callbacks.clone(), cache, self.core.last_tid_now(), true)
    }

    fn make(
        options: Options,
        callbacks: Arc<dyn DatabaseCallbacks>,
        cache: Arc<Cache>,
        last_tid: Tid,
        was_ready: bool,
    ) -> Result<Arc<Self>> {
        let wake = Wake::new().map_err(|error| ClientError::io("cannot make a client", error))?;
        let (sender, events) = channel();
        Ok(Arc::new(Self {
            core: Arc::new(Core::new(cache, last_tid, callbacks)),
            wake: Arc::new(wake),
            closing: AtomicBool::new(false),
            process: Owner::here(),
            state: Mutex::new(State {
                phase: Phase::Connecting,
                was_ready,
                read_only: options.access == Access::ReadOnly,
                last_failure: None,
                addresses: options.addresses.clone(),
                addresses_changed: false,
            }),
            changed: Condvar::new(),
            events: Mutex::new(sender),
            unconnected: Mutex::new(Some(events)),
            oids: Mutex::default(),
            txn: Mutex::new(None),
            txn_ended: Condvar::new(),
            options,
        }))
    }

    /// Ends everything: waiting calls fail, the background thread leaves. Returns within a second whatever it was doing.
    pub fn close(&self) {
        self.start_close();
        self.core.cache.close();
        if self.unconnected.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return;
        }
        if !is_in_callback() {
            let _ = self
                .changed
                .wait_timeout_while(self.state(), CLOSE, |state| !matches!(state.phase, Phase::Ended));
        }
    }

    /// [`Self::close`] without waiting for the background thread to leave.
    pub fn start_close(&self) {
        self.closing.store(true, Ordering::Release);
        {
            let mut state = self.state();
            if let Phase::Operational(connection, _) = &state.phase {
                connection.fail(ClientError::disconnected("closed"));
                connection.mute();
            }
            if !matches!(state.phase, Phase::Ended) {
                state.phase = Phase::Closed;
            }
        }
        self.changed.notify_all();
        self.txn_ended.notify_all();
        let _ = self.events().send(Event::Look);
        self.wake.wake();
    }

    // ---- state

    pub fn options(&self) -> &Options {
        &self.options
    }

    pub fn is_connected(&self) -> bool {
        self.session().is_some()
    }

    pub fn session(&self) -> Option<Session> {
        match &self.state().phase {
            Phase::Operational(connection, session) if !connection.is_dead() => Some(session.clone()),
            _ => None,
        }
    }

    /// As of the last connection.
    pub fn is_read_only(&self) -> bool {
        self.state().read_only
    }

    /// The last transaction that the database has been told of. Waits while it is about to move, for a callback:
    /// not to be called with a lock that callbacks want. Otherwise one atomic read.
    pub fn last_tid(&self) -> Tid {
        self.core.last_tid()
    }

    /// [`Self::last_tid`] for who must not wait; `None` if it would.
    pub fn try_last_tid(&self) -> Option<Tid> {
        self.core.try_last_tid()
    }

    pub fn cache(&self) -> &Cache {
        &self.core.cache
    }

    /// Loads that the shelf of a server on this machine has answered.
    pub fn shelf_hits(&self) -> u64 {
        self.core.shelf_hits.load(Ordering::Relaxed)
    }

    /// The value of a key of `get_info`.
    pub fn info(&self, key: &str) -> Option<Value> {
        let info = self.core.info();
        info.iter()
            .find(|(known, _)| matches!(known, Value::Str(text) if text == key))
            .map(|(_, value)| value.clone())
    }

    /// Why the client is not connected, as far as it knows.
    pub fn last_failure(&self) -> Option<String> {
        self.state().last_failure.clone()
    }

    /// Takes effect at the next connection; now, if there is none.
    pub fn set_addresses(&self, addresses: Vec<Address>) {
        let mut state = self.state();
        state.addresses = addresses;
        state.addresses_changed = true;
        drop(state);
        let _ = self.events().send(Event::Look);
        self.wake.wake();
    }

    /// Waits for a usable connection.
    ///
    /// # Errors
    /// [`ClientError::Disconnected`], saying what the last attempt died of.
    pub fn wait_connected(&self, timeout: Duration) -> Result<()> {
        self.operational(Some(timeout), true).map(drop)
    }

    // ---- calls

    /// Any call that is answered. Waits for a connection if there is none, then for the answer, however long it takes.
    ///
    /// # Errors
    /// [`ClientError::Fault`] as the server answered; [`ClientError::Disconnected`]: it is unknown whether the server
    /// carried it out.
    pub fn call(&self, name: &'static str, call: &Call) -> Result<Value> {
        self.call_within(name, call, self.options.wait_timeout)
    }

    /// As [`Self::call`], with another time to wait for a connection.
    pub fn call_within(&self, name: &'static str, call: &Call, timeout: Duration) -> Result<Value> {
        self.may_wait(name)?;
        self.operational(Some(timeout), false)?.call(call)
    }

    /// A call that only reads: repeated if the connection breaks under it.
    pub fn read(&self, name: &'static str, call: &Call) -> Result<Value> {
        self.may_wait(name)?;
        self.repeated(|connection| connection.call(call))
    }

    /// A call bound to one connection (iterators live in it).
    pub fn call_on(&self, generation: u64, name: &'static str, call: &Call) -> Result<Value> {
        self.may_wait(name)?;
        let connection = self.operational(None, false)?;
        if connection.generation != generation {
            return Err(ClientError::disconnected("the connection that this belongs to is gone"));
        }
        connection.call(call)
    }

    /// A one-way call outside any transaction; silently dropped without a connection.
    ///
    /// # Errors
    /// A signal that ended the waiting behind another writer, only.
    pub fn notify(&self, call: &Call) -> Result<()> {
        let sent = self.operational(None, false).and_then(|connection| connection.send_async(call));
        unless_interrupted(sent, "notification not sent")
    }

    /// The revision of `oid` current just before `before`: from the cache, or from the server.
    ///
    /// Cost of a hit: see [`Cache`]. Of a miss on one thread: three short locks, one `send`, one blocking `recv`, one
    /// copy into the cache; no thread switch. Of a miss of an object that lies on the shelf of a server on this machine: three short locks, two `pread`.
    ///
    /// # Errors
    /// [`ClientError::Fault`] `POSKeyError` for an unknown oid.
    pub fn load_before(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>> {
        match self.load_cached(oid, before) {
            Some(loaded) => Ok(Some(loaded)),
            None => self.load_missed(oid, before),
        }
    }

    /// The cache's answer. Not yet for a revision newer than the last tid, which it has while its `tpc_finish` runs the
    /// callback: who has seen a revision must not be told an older last tid. The server's answer comes after.
    /// Reads no file.
    pub fn load_cached(&self, oid: Oid, before: Tid) -> Option<Loaded> {
        self.may_show(self.core.cache.load_from_memory(oid, before)?)
    }

    fn may_show(&self, loaded: Loaded) -> Option<Loaded> {
        (loaded.tid <= self.core.last_tid_now()).then(|| self.core.as_shown(loaded))
    }

    /// After [`Self::load_cached`]: the answer of the cache's file, or the server's.
    pub fn load_missed(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>> {
        self.may_wait("loadBefore")?;
        let filed = self.core.cache.load_from_file(oid, before);
        if let Some(loaded) = filed.and_then(|loaded| self.may_show(loaded)) {
            return Ok(Some(loaded));
        }
        self.repeated(|connection| match connection.load_from_shelf(oid, before) {
            Some(loaded) => Ok(Some(loaded)),
            None => connection.load_before(oid, before),
        })
    }

    /// Starts loading what the cache does not have. Waits for nothing but the socket; errors show when the objects are loaded.
    ///
    /// # Errors
    /// A signal that ended the waiting for a server which does not read, only.
    pub fn prefetch(&self, oids: &[Oid], before: Tid) -> Result<()> {
        let missing: Vec<Oid> =
            oids.iter().copied().filter(|&oid| !self.core.cache.covers(oid, before)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let sent = self.operational(None, false).and_then(|connection| connection.prefetch(&missing, before));
        unless_interrupted(sent, "prefetch not sent")
    }

    /// A new oid from the stock of this connection. A restarted server may give the same ones to others, so the stock
    /// is dropped at every reconnect.
    pub fn new_oid(&self) -> Result<Oid> {
        loop {
            let mut stock = self.oids.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(oid) = stock.1.pop_front() {
                return Ok(oid);
            }
            if self.is_read_only() {
                return Err(ClientError::ReadOnly);
            }
            let generation = stock.0;
            drop(stock);
            let answer = self.call("new_oids", &Call::NewOids { count: MAX_NEW_OIDS as i64 })?;
            let oids = oids_of(&answer).ok_or(ClientError::UnexpectedAnswer {
                call: "new_oids",
                problem: "no list of oids".into(),
            })?;
            let mut stock = self.oids.lock().unwrap_or_else(PoisonError::into_inner);
            if stock.0 == generation {
                stock.1.extend(oids);
                stock.1.make_contiguous().sort_unstable();
            }
        }
    }

    /// An oid from the stock, if one is there and nobody else is at it: for callers that must not wait.
    pub fn try_new_oid(&self) -> Option<Oid> {
        self.oids.try_lock().ok()?.1.pop_front()
    }

    // ---- blobs

    /// Blobs on their way, and what has gone either way.
    pub fn blob_stats(&self) -> BlobStats {
        self.core.downloads.stats(&self.core.uploads)
    }

    /// Downloads a blob to `target` (its partial file beside it). The caller holds the directory's lock. `None`: the
    /// server sent nothing.
    pub fn download_blob(&self, oid: Oid, serial: Tid, target: &Path) -> Result<Option<u64>> {
        self.core.downloads.expect(oid, serial, target);
        let answer = self.call("sendBlob", &Call::SendBlob { oid, serial });
        let ended = self.core.downloads.take(oid, serial);
        answer?;
        ended.map_err(|error| ClientError::io(format!("blob {}", target.display()), error))
    }

    // ---- inside

    /// A usable connection. Without a `timeout` now or never; before the first one ever it is not waited for, unless
    /// the client is being made (`opening`).
    fn operational(&self, timeout: Option<Duration>, opening: bool) -> Result<Arc<Connection>> {
        if !self.process.is_here() {
            return Err(ClientError::Forked(self.process.pid()));
        }
        let mut deadline = None;
        let mut state = self.state();
        loop {
            match &state.phase {
                Phase::Operational(connection, _) if !connection.is_dead() => return Ok(connection.clone()),
                Phase::Closed | Phase::Ended => {
                    return Err(ClientError::disconnected(match &state.last_failure {
                        Some(reason) if reason.contains("internal error") => reason.clone(),
                        _ => "closed".into(),
                    }));
                }
                _ => {}
            }
            let because = match &state.last_failure {
                Some(reason) => format!(" ({reason})"),
                None => String::new(),
            };
            if !state.was_ready && !opening {
                return Err(ClientError::disconnected(format!("never connected{because}")));
            }
            let Some(timeout) = timeout else {
                return Err(ClientError::disconnected(format!("not connected{because}")));
            };
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + timeout);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::disconnected(format!("timed out waiting for connection{because}")));
            }
            (state, _) = self
                .changed
                .wait_timeout(state, left.min(LOOK_AGAIN))
                .unwrap_or_else(PoisonError::into_inner);
            if matches!(state.phase, Phase::Connecting) {
                drop(state);
                self.core.check_interrupt()?;
                state = self.state();
            }
        }
    }

    fn repeated<T>(&self, ask: impl Fn(&Connection) -> Result<T>) -> Result<T> {
        let mut left = REPEATS;
        loop {
            let connection = self.operational(Some(self.options.wait_timeout), false)?;
            match ask(&connection) {
                Err(error) if error.is_disconnected() && left > 0 && !self.is_closing() => left -= 1,
                other => return other,
            }
        }
    }

    fn may_wait(&self, name: &'static str) -> Result<()> {
        if is_in_callback() { Err(ClientError::InCallback(name)) } else { Ok(()) }
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn events(&self) -> MutexGuard<'_, Sender<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- for the background thread

    fn install(&self, connection: &Arc<Connection>, session: Session) {
        let mut state = self.state();
        if matches!(state.phase, Phase::Closed) {
            connection.fail(ClientError::disconnected("closed"));
            return;
        }
        state.was_ready = true;
        state.read_only = session.read_only;
        state.last_failure = None;
        state.phase = Phase::Operational(connection.clone(), session);
        self.changed.notify_all();
    }

    fn uninstall(&self) {
        let mut state = self.state();
        if matches!(state.phase, Phase::Operational(..)) {
            state.phase = Phase::Connecting;
        }
    }

    /// The thread has ended; returns what there was.
    fn end(&self) -> Phase {
        let phase = std::mem::replace(&mut self.state().phase, Phase::Ended);
        self.changed.notify_all();
        self.txn_ended.notify_all();
        phase
    }

    fn note_failure(&self, reason: String) {
        let mut state = self.state();
        // The same failure again is no news.
        if state.last_failure.as_ref() != Some(&reason) {
            tracing::warn!(name = self.options.name, reason, "not connected");
        }
        state.last_failure = Some(reason);
    }

    /// Whether there was a connection before.
    fn was_ready(&self) -> bool {
        self.state().was_ready
    }

    fn addresses_changed(&self) -> bool {
        self.state().addresses_changed
    }

    fn take_addresses(&self) -> Vec<Address> {
        let mut state = self.state();
        state.addresses_changed = false;
        state.addresses.clone()
    }

    fn drop_oids(&self) {
        let mut stock = self.oids.lock().unwrap_or_else(PoisonError::into_inner);
        stock.0 += 1;
        stock.1.clear();
    }
}

/// The cache, and the tid that it is right as of.
fn open_cache(options: &Options) -> Result<(Arc<Cache>, Tid)> {
    let Some(path) = &options.cache_path else {
        return Ok((Arc::new(Cache::new(options.cache_size)), Tid::ZERO));
    };
    let (cache, opened) = Cache::open(path, options.cache_size)
        .map_err(|error| ClientError::io(format!("cache file {}", path.display()), error))?;
    let last_tid = match opened {
        Opened::Warm(tid) => {
            tracing::info!(path = %path.display(), %tid, revisions = cache.len(), "cache file opened");
            tid
        }
        Opened::Empty => Tid::ZERO,
        Opened::InUse(path) => {
            tracing::warn!(path = %path.display(), "the cache file is in use by another process: this cache is temporary");
            Tid::ZERO
        }
    };
    Ok((cache, last_tid))
}

/// What a signal handler raised must not be lost; other errors of a call without an answer are for the log.
fn unless_interrupted(sent: Result<()>, what: &'static str) -> Result<()> {
    match sent {
        Err(ClientError::Callback(error)) => Err(ClientError::Callback(error)),
        Err(error) => {
            tracing::debug!(%error, "{what}");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn oid_of(value: &Value) -> Option<Oid> {
    match value {
        Value::Bytes(bytes) => Oid::from_slice(bytes),
        _ => None,
    }
}

fn oids_of(value: &Value) -> Option<Vec<Oid>> {
    match value {
        Value::Tuple(items) | Value::List(items) => items.iter().map(oid_of).collect(),
        _ => None,
    }
}
