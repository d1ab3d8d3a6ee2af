//! What outlives a connection: the cache, the last tid, what is told to the database.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::blob::{Downloads, Uploads};
use super::error::{CallbackError, ClientError, Result};
use super::transaction::Finish;
use crate::cache::Cache;
use crate::ids::{Oid, Tid};
use crate::pickle::Value;
use crate::storage::Loaded;
use crate::wire::{Encoding, Notice};

/// What a storage tells its owner. Called on the client's background thread, [`Self::invalidate`] also on that of a caller that waits for
/// an answer behind it; one at a time, with no lock held that a caller waits for.
pub trait DatabaseCallbacks: Send + Sync {
    /// Runs the background thread, with whatever the calls below need set up once instead of for each of them.
    fn enter(&self, run: Box<dyn FnOnce() + Send>) {
        run();
    }
    /// `db.invalidate(tid, oids)`.
    fn invalidate(&self, tid: Tid, oids: &[Oid]);
    /// Runs what calls [`Self::invalidate`] several times, with whatever that needs set up once.
    fn together(&self, run: &mut dyn FnMut()) {
        run();
    }
    /// Whether [`Self::invalidate`] may be called on this thread, which is a caller's.
    fn may_be_told_here(&self) -> bool {
        true
    }
    /// `db.invalidateCache()`: anything may have changed.
    fn invalidate_cache(&self);
    /// A connection is ready; calls wait until this returns.
    fn connected(&self, session: &Session);
    fn disconnected(&self);
    /// The cache missed too much and is about to be dropped; it is still full.
    fn stale_cache(&self);
    /// Asked now and then by a caller that waits, on its own thread: whether it is to give up (Ctrl-C).
    fn interrupted(&self) -> Result<(), CallbackError> {
        Ok(())
    }
}

/// A connection as its owner sees it.
#[derive(Clone, Debug)]
pub struct Session {
    /// Host (numeric) and port, or `None` and the path of the socket.
    pub host: String,
    pub port: Option<u16>,
    pub encoding: Encoding,
    pub read_only: bool,
    pub generation: u64,
}

/// `lastTransaction()` waits at most so long for a callback that belongs to the next tid.
const GATE: Duration = Duration::from_secs(5);

pub(super) struct Core {
    pub(super) cache: Arc<Cache>,
    pub(super) callbacks: Arc<dyn DatabaseCallbacks>,
    pub(super) downloads: Downloads,
    pub(super) uploads: Uploads,
    /// Loads that the server's shelf has answered.
    pub(super) shelf_hits: AtomicU64,
    last_tid: AtomicU64,
    /// True while the last tid is about to move together with something else.
    gate: AtomicBool,
    gate_lock: Mutex<()>,
    gate_opened: Condvar,
    /// Pairs of `get_info`, kept up to date by `info` notices.
    info: Mutex<Vec<(Value, Value)>>,
}

thread_local! {
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

impl Core {
    pub(super) fn new(cache: Arc<Cache>, last_tid: Tid, callbacks: Arc<dyn DatabaseCallbacks>) -> Self {
        Self {
            cache,
            callbacks,
            downloads: Downloads::default(),
            uploads: Uploads::default(),
            shelf_hits: AtomicU64::new(0),
            last_tid: AtomicU64::new(last_tid.0),
            gate: AtomicBool::new(false),
            gate_lock: Mutex::new(()),
            gate_opened: Condvar::new(),
            info: Mutex::default(),
        }
    }

    /// One atomic read, unless the tid is just about to move (own commit, reconnect): then waits for that.
    pub(super) fn last_tid(&self) -> Tid {
        if self.gate.load(Ordering::Acquire) {
            self.wait_for_gate();
        }
        self.last_tid_now()
    }

    /// As [`Self::last_tid`], but `None` instead of waiting.
    ///
    /// The gate may close between the two reads. The tid is then either the one from before, as if it had been read a
    /// moment earlier, or the next one, which moves only when everything that belongs to it is done.
    pub(super) fn try_last_tid(&self) -> Option<Tid> {
        let may_wait = self.gate.load(Ordering::Acquire) && !is_in_callback();
        (!may_wait).then(|| self.last_tid_now())
    }

    pub(super) fn last_tid_now(&self) -> Tid {
        Tid(self.last_tid.load(Ordering::Acquire))
    }

    /// A revision as callers may see it: an end that is younger than the last tid is none yet.
    pub(super) fn as_shown(&self, mut loaded: Loaded) -> Loaded {
        loaded.end_tid = loaded.end_tid.filter(|end| *end <= self.last_tid_now());
        loaded
    }

    /// Never goes back.
    fn advance(&self, tid: Tid) {
        self.last_tid.fetch_max(tid.0, Ordering::AcqRel);
        self.cache.set_last_tid(tid);
    }

    /// Before anybody was told of a tid: that of a cache file which does not belong to the server.
    pub(super) fn forget_last_tid(&self) {
        self.last_tid.store(0, Ordering::Release);
    }

    /// C2: cache, then ([`Self::tell`]) database, then the last tid.
    pub(super) fn invalidate(&self, tid: Tid, oids: &[Oid]) {
        for &oid in oids {
            self.cache.invalidate(oid, Some(tid));
        }
    }

    /// The second half of an invalidation.
    pub(super) fn tell(&self, tid: Tid, oids: &[Oid]) {
        in_callback(|| self.callbacks.invalidate(tid, oids));
        self.advance(tid);
    }

    pub(super) fn apply_notice(&self, notice: Notice) {
        match notice {
            Notice::InvalidateTransaction { tid, oids } => {
                self.invalidate(tid, &oids);
                self.tell(tid, &oids);
            }
            Notice::Info(Value::Dict(pairs)) => self.merge_info(pairs),
            Notice::Info(_) => tracing::error!("the server sent info that is no dict"),
            Notice::ReceiveBlobStart { oid, serial } => self.downloads.start(oid, serial),
            Notice::ReceiveBlobChunk { oid, serial, chunk } => self.downloads.chunk(oid, serial, &chunk),
            Notice::ReceiveBlobStop { oid, serial } => self.downloads.stop(oid, serial),
        }
    }

    /// C3: the answer to `tpc_finish`. Applied by whoever reads it, before the next message.
    pub(super) fn apply_finish(&self, finish: Finish, answer: Value) -> Result<Value> {
        let tid = match &answer {
            Value::Bytes(bytes) => Tid::from_slice(bytes),
            _ => None,
        };
        let Some(tid) = tid else {
            return Err(ClientError::UnexpectedAnswer {
                call: "tpc_finish",
                problem: "no tid: the server does not know the transaction".into(),
            });
        };
        let _gate = Gate::close(self);
        finish.store_in(&self.cache, tid);
        in_callback(|| (finish.callback)(tid)).map_err(|error| ClientError::Callback(Arc::new(error)))?;
        self.advance(tid);
        Ok(answer)
    }

    /// The last tid jumps to `tid` at a reconnect; `oids` are known to have changed, others may have.
    ///
    /// A ZODB connection that begins a transaction meanwhile reads the last tid first and takes its pending
    /// invalidations later. So that it ends up with either the old tid (and is told to reset again) or the new one with
    /// nothing stale: reads of the last tid wait, the database forgets everything, learns `tid`, and forgets again
    /// what was loaded in between.
    pub(super) fn jump(&self, tid: Tid, oids: &[Oid]) {
        let _gate = Gate::close(self);
        in_callback(|| {
            self.callbacks.invalidate_cache();
            self.callbacks.invalidate(tid, oids);
            self.callbacks.invalidate_cache();
        });
        self.advance(tid);
    }

    /// An error if the waiting caller is to give up.
    pub(super) fn check_interrupt(&self) -> Result<()> {
        self.callbacks.interrupted().map_err(|error| ClientError::Callback(Arc::new(error)))
    }

    fn wait_for_gate(&self) {
        if is_in_callback() {
            return;
        }
        let guard = self.gate_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.gate_opened.wait_timeout_while(guard, GATE, |()| self.gate.load(Ordering::Acquire));
    }

    pub(super) fn info(&self) -> MutexGuard<'_, Vec<(Value, Value)>> {
        self.info.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn merge_info(&self, pairs: Vec<(Value, Value)>) {
        let mut info = self.info();
        for (key, value) in pairs {
            match info.iter_mut().find(|(known, _)| *known == key) {
                Some((_, place)) => *place = value,
                None => info.push((key, value)),
            }
        }
    }
}

/// While it lives, reads of the last tid wait.
struct Gate<'a>(&'a Core);

impl<'a> Gate<'a> {
    fn close(core: &'a Core) -> Self {
        core.gate.store(true, Ordering::Release);
        Self(core)
    }
}

impl Drop for Gate<'_> {
    fn drop(&mut self) {
        self.0.gate.store(false, Ordering::Release);
        drop(self.0.gate_lock.lock());
        self.0.gate_opened.notify_all();
    }
}

/// Runs code of the layer above, marked so that calls which would wait for themselves are refused.
pub(super) fn in_callback<T>(run: impl FnOnce() -> T) -> T {
    struct Reset(bool);
    impl Drop for Reset {
        fn drop(&mut self) {
            IN_CALLBACK.set(self.0);
        }
    }
    let _reset = Reset(IN_CALLBACK.replace(true));
    run()
}

pub(super) fn is_in_callback() -> bool {
    IN_CALLBACK.get()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) struct Nobody;

    impl DatabaseCallbacks for Nobody {
        fn invalidate(&self, _: Tid, _: &[Oid]) {}
        fn invalidate_cache(&self) {}
        fn connected(&self, _: &Session) {}
        fn disconnected(&self) {}
        fn stale_cache(&self) {}
    }

    #[test]
    fn a_gate_that_closes_is_never_waited_for_by_who_must_not() {
        let core = Core::new(Arc::new(Cache::new(1 << 20)), Tid(7), Arc::new(Nobody));
        assert_eq!(core.try_last_tid(), Some(Tid(7)));
        let gate = Gate::close(&core);
        assert_eq!(core.try_last_tid(), None, "it has to wait, where it may");
        assert_eq!(in_callback(|| core.try_last_tid()), Some(Tid(7)), "a callback is what is waited for");
        core.advance(Tid(8));
        drop(gate);
        assert_eq!(core.try_last_tid(), Some(Tid(8)));
        assert_eq!(core.last_tid(), Tid(8));
    }
}
