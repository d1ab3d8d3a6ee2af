//! [`Committer`]: finishes the transactions of a storage, one group at a time.
//!
//! A transaction that is alone (nobody else has voted) is finished by the task of its own connection, at once, where the
//! disk is quick. Otherwise the committer's thread takes every transaction that is ready. The group is given to the engine
//! (one sync for all), and each published in tid order: queue, invalidations of everybody else, then `info` and the reply
//! of its own connection. Then the locks are released, so that a queued voter reads the invalidation before its own vote is
//! answered; then the connections are woken, so that the next vote of a client does not wait for its own last locks.
//!
//! A sync costs the same for one transaction as for twenty, and each connection is woken once for a group, so the committer
//! waits for the finishes of transactions that have voted already, a client's round trip away. Not for longer than its
//! last finishes took, not for one that let it wait in vain before, and not at all for a committer that is alone.
//!
//! Cost of a finish beside the engine's: one put for each registered connection, and one wake-up of it a group. Alone: the
//! connection's thread hands its other tasks to another thread of the runtime (one futex wake), which is not waited for. In
//! company: one push into a queue, and a thread switch there and back a group.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::task::block_in_place;

use super::gather::{Patience, Queue};
use super::hub::{Hub, count};
use super::locks::LockGuard;
use super::mailbox::{Event, Mailbox};
use super::session::Session;
use crate::ids::Tid;
use crate::storage::{Committed, Result, StorageError, VotedTxn};

/// A voted transaction with the locks that protect it. Dropping it aborts, then releases.
pub(crate) struct Held {
    voted: Option<VotedTxn>,
    hub: Arc<Hub>,
    locks: LockGuard,
}

impl Held {
    pub(crate) fn new(hub: Arc<Hub>, locks: LockGuard, voted: VotedTxn) -> Self {
        hub.committer.held.fetch_add(1, Ordering::Relaxed);
        Self { voted: Some(voted), hub, locks }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.hub.committer.held.fetch_sub(1, Ordering::Relaxed);
        if let Some(voted) = self.voted.take() {
            self.hub.storage.abort(voted);
        }
    }
}

/// Writes the answer of a `tpc_finish`, in the connection's task.
pub(crate) type FinishReply = Box<dyn FnOnce(&mut Session, Result<Tid>) + Send>;

/// A `tpc_finish` on its way.
pub(crate) struct FinishJob {
    pub(crate) held: Held,
    /// The committing connection's id among the listeners.
    pub(crate) listener: u64,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) reply: FinishReply,
}

/// See the module documentation.
pub(crate) struct Committer {
    /// Transactions that have voted and are not finished or aborted.
    held: AtomicUsize,
    /// Held while a group is gathered and finished: whose turn it is to commit.
    turn: Mutex<Patience>,
    jobs: Queue<FinishJob>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Committer {
    /// To be started.
    pub(crate) fn new() -> Self {
        Self {
            held: AtomicUsize::new(0),
            turn: Mutex::default(),
            jobs: Queue::default(),
            thread: Mutex::new(None),
        }
    }

    /// Starts the thread of `hub`'s committer.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn start(hub: &Arc<Hub>) -> Result<()> {
        let name = format!("zeo commit {}", hub.id);
        let owner = Arc::clone(hub);
        let run = move || {
            let committer = &owner.committer;
            while committer.jobs.wait() {
                let mut patience = committer.turn.lock().unwrap_or_else(PoisonError::into_inner);
                let group = committer.jobs.gather(&mut patience, &committer.held);
                patience.measure(|| finish(&owner, group));
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(run);
        let thread = thread.map_err(|error| StorageError::io("cannot start the committer thread", error))?;
        *hub.committer.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    /// Finishes `job` here and now if nobody else is about to commit; gives it back otherwise. Blocks for the sync, either
    /// a thread that is the caller's own or a task of a runtime with several threads: its other tasks go on in another one meanwhile.
    pub(crate) fn finish_alone(
        &self,
        hub: &Arc<Hub>,
        job: FinishJob,
        owns_thread: bool,
    ) -> Option<FinishJob> {
        // Its own is the only one: nothing is queued, nothing to be waited for.
        if self.held.load(Ordering::Relaxed) != 1 || hub.capabilities.slow_calls {
            return Some(job);
        }
        let Ok(mut patience) = self.turn.try_lock() else { return Some(job) };
        if !patience.is_quick() {
            return Some(job);
        }
        let finish = || patience.measure(|| finish(hub, vec![job]));
        if owns_thread {
            finish()
        } else {
            block_in_place(finish)
        }
        None
    }

    /// Queues a finish; `reply` will be called whatever happens, unless the connection ends first.
    pub(crate) fn submit(&self, job: FinishJob) {
        if let Err(job) = self.jobs.push(job, self.held.load(Ordering::Relaxed)) {
            refuse(job, &StorageError::Closed);
        }
    }

    /// Finishes what was submitted and ends the thread.
    pub(crate) fn stop(&self) {
        self.jobs.close();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a committer thread panicked");
        }
    }
}

/// Commits one group. Nothing is left unanswered: what the engine did not publish gets its error.
fn finish(hub: &Arc<Hub>, mut group: Vec<FinishJob>) {
    let began = Instant::now();
    count(&hub.stats.groups);
    hub.stats.group_size.record(group.len());
    let voted: Vec<VotedTxn> = group.iter_mut().filter_map(|job| job.held.voted.take()).collect();
    let mut jobs: Vec<Option<FinishJob>> = group.into_iter().map(Some).collect();
    let mut finished = Vec::with_capacity(jobs.len());
    let mut publish = |committed: &Committed| {
        let Some(FinishJob { mut held, listener, mailbox, reply }) =
            jobs.get_mut(committed.index).and_then(Option::take)
        else {
            return;
        };
        let info = hub.info();
        let tid = committed.tid;
        let reply = Box::new(move |session: &mut Session| reply(session, Ok(tid)));
        let own = |publication| {
            // before the answer: whoever knows of the commit finds it counted
            count(&hub.stats.commits);
            mailbox.put(Event::Committed { publication, info, reply });
        };
        hub.publish(tid, Arc::clone(&committed.oids), listener, own);
        held.locks.changed();
        finished.push(held);
    };
    hub.finishing();
    let outcome = catch_unwind(AssertUnwindSafe(|| hub.storage.finish(voted, &mut publish)));
    // Before anybody is woken: the next vote of the same client must not meet these locks.
    drop(finished);
    hub.finished();
    let error = match outcome {
        Ok(Ok(())) => StorageError::Transaction("the storage did not commit the transaction".into()),
        Ok(Err(error)) => error,
        Err(_) => StorageError::PreviousIo("the storage panicked in finish".into()),
    };
    hub.stats.finish_seconds.record(began.elapsed());
    if let Some(sync) = hub.storage.last_sync() {
        hub.stats.sync_seconds.record(sync);
    }
    for job in jobs.into_iter().flatten() {
        tracing::error!(storage = %hub.id, %error, "a transaction could not be finished");
        refuse(job, &error);
    }
}

fn refuse(job: FinishJob, error: &StorageError) {
    let FinishJob { held, mailbox, reply, .. } = job;
    count(&held.hub.stats.aborts);
    let error = error.clone();
    mailbox.post(Event::Continue(Box::new(move |session| reply(session, Err(error)))));
    drop(held);
}
