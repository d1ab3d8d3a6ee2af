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
//! company: one channel send, and a thread switch there and back a group.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::task::block_in_place;

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
    jobs: Mutex<Option<Sender<FinishJob>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The committer's thread, before it is started (it needs the hub that owns its [`Committer`]).
pub(crate) struct CommitterThread(Receiver<FinishJob>);

impl Committer {
    pub(crate) fn new() -> (Self, CommitterThread) {
        let (sender, receiver) = channel();
        (
            Self {
                held: AtomicUsize::new(0),
                turn: Mutex::default(),
                jobs: Mutex::new(Some(sender)),
                thread: Mutex::new(None),
            },
            CommitterThread(receiver),
        )
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
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = match &*jobs {
            Some(sender) => sender.send(job).err().map(|error| error.0),
            None => Some(job),
        };
        drop(jobs);
        if let Some(job) = refused {
            refuse(job, &StorageError::Closed);
        }
    }

    /// Finishes what was submitted and ends the thread.
    pub(crate) fn stop(&self) {
        drop(self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a committer thread panicked");
        }
    }
}

impl CommitterThread {
    pub(crate) fn start(self, hub: Arc<Hub>) -> Result<()> {
        let name = format!("zeo commit {}", hub.id);
        let owner = Arc::clone(&hub);
        let run = move || {
            while let Ok(first) = self.0.recv() {
                let mut group = vec![first];
                let mut patience = hub.committer.turn.lock().unwrap_or_else(PoisonError::into_inner);
                patience.gather(&self.0, &hub.committer.held, &mut group);
                patience.measure(|| finish(&hub, group));
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(run);
        let thread = thread.map_err(|error| StorageError::io("cannot start the committer thread", error))?;
        *owner.committer.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }
}

/// How long the committer waits for transactions that have voted.
#[derive(Default)]
struct Patience {
    /// Moving average of what a group takes.
    finish: Duration,
    /// So many voted transactions did not come in time, most likely because their clients hang.
    absent: usize,
}

impl Patience {
    /// Never longer than this, however slow the disk is.
    const MOST: Duration = Duration::from_millis(5);
    /// A finish that takes longer than a few loads is not waited for by a connection.
    const QUICK: Duration = Duration::from_millis(1);

    /// Whether a connection may wait for a finish itself: the requests of its other threads wait as long.
    fn is_quick(&self) -> bool {
        !self.finish.is_zero() && self.finish <= Self::QUICK
    }

    fn measure(&mut self, finish: impl FnOnce()) {
        let begin = Instant::now();
        finish();
        self.took(begin.elapsed());
    }

    fn took(&mut self, finish: Duration) {
        self.finish = (self.finish * 7 + finish) / 8;
    }

    /// Fills `group` with what is there and with what is to be expected at once.
    fn gather<T>(&mut self, jobs: &Receiver<T>, held: &AtomicUsize, group: &mut Vec<T>) {
        let until = Instant::now() + self.finish.min(Self::MOST);
        loop {
            group.extend(jobs.try_iter());
            let missing = held.load(Ordering::Relaxed).saturating_sub(group.len());
            self.absent = self.absent.min(missing);
            if missing == self.absent {
                return;
            }
            match jobs.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(job) => group.push(job),
                Err(_) => {
                    self.absent = missing;
                    return;
                }
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_takes_what_is_there_and_forgives_who_does_not_come() {
        let (sender, jobs) = channel();
        let mut patience = Patience::default();
        patience.took(Duration::from_millis(8));
        let held = AtomicUsize::new(3);
        sender.send(2).unwrap();
        sender.send(3).unwrap();
        let mut group = vec![1];
        patience.gather(&jobs, &held, &mut group);
        assert_eq!((group.len(), patience.absent), (3, 0));
        // one has voted and hangs: waited for once
        held.store(2, Ordering::Relaxed);
        let mut group = vec![1];
        patience.gather(&jobs, &held, &mut group);
        assert_eq!((group.len(), patience.absent), (1, 1));
        // and not again

        let mut group = vec![1];
        patience.gather(&jobs, &held, &mut group);
        assert_eq!((group.len(), patience.absent), (1, 1));
        // it has gone: the next one that votes is waited for again
        held.store(1, Ordering::Relaxed);
        patience.gather(&jobs, &held, &mut vec![1]);
        assert_eq!(patience.absent, 0);
    }
}
