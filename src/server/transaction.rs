//! `tpc_begin` … `tpc_abort`: the transaction of a connection.
//!
//! ```text
//!           tpc_begin          vote: locks granted          vote succeeded
//!   (none) ──────────► Begun ───────────────────► Voting ──────────────────► Voted ──tpc_finish──► (none)
//!                        └─ vote: locks busy ─► Waiting ─┘
//! ```
//! A failed vote, `tpc_abort` and the end of the connection lead back to (none) from every state: dropping the
//! [`Transaction`] aborts what was voted, then releases or leaves the locks, then removes temporary files.
//! Nothing touches the storage before the vote.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::RuntimeFlavor;

use super::commit::{FinishJob, Held};
use super::fault;
use super::hub::{Hub, count};
use super::locks::{LockGuard, LockSet, News, OLD};
use super::mailbox::Event;
use super::session::{Outcome, ReplyTo, Served, Session, own};
use super::staging::Staging;
use super::undo::decode_trans_id;
use super::verdict::{AskClient, Verdict, beyond_bounds, for_client, judge, lost};
use crate::ids::{Oid, Tid};
use crate::pickle::{Value, encode_extension};
use crate::storage::{ConflictResolver, NoResolution, Op, StagedTxn, StorageError, TxnMeta};
use crate::wire::{Fault, TxnKey};

/// A vote of at most this many operations and bytes is made by the connection's own task.
const SMALL_OPS: usize = 16;
const SMALL_BYTES: usize = 1 << 20;

/// A file of a transaction in progress; removed with it, unless the engine has moved it into place.
#[derive(Debug)]
pub(crate) struct TemporaryFile(pub(crate) PathBuf);

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // Not being there is the usual case: it was committed.
        let _ = std::fs::remove_file(&self.0);
    }
}

enum Phase {
    Begun,
    Waiting { locks: LockGuard, to: ReplyTo, asked: Instant },
    Voting { since: Instant },
    Voted { held: Held, since: Instant },
}

/// See the module documentation. Fields are dropped in order.
pub(crate) struct Transaction {
    key: TxnKey,
    phase: Phase,
    /// Number of its last vote, by which late news of an aborted one is recognised.
    vote: u64,
    pub(super) staging: Staging,
    files: Vec<TemporaryFile>,
    timeout: Option<Duration>,
}

impl Transaction {
    fn since(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Voting { since } | Phase::Voted { since, .. } => Some(*since),
            Phase::Begun | Phase::Waiting { .. } => None,
        }
    }

    pub(crate) fn holds_locks(&self) -> bool {
        self.since().is_some()
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        Some(self.since()? + self.timeout?)
    }

    fn is_small(&self) -> bool {
        let ops = &self.staging.txn.ops;
        ops.len() <= SMALL_OPS
            && self.staging.bytes() <= SMALL_BYTES
            && self.files.is_empty()
            && !ops.iter().any(|op| matches!(op, Op::Undo { .. } | Op::Restore { .. }))
    }
}

impl Session {
    #[expect(clippy::too_many_arguments, reason = "the arguments of the call")]
    pub(crate) fn tpc_begin(
        &mut self,
        hub: &Arc<Hub>,
        key: TxnKey,
        user: Bytes,
        description: Bytes,
        extension: &Value,
        tid: Option<Tid>,
        status: u8,
    ) -> Served {
        self.may_write()?;
        if let Some(open) = &self.txn {
            if open.key == key {
                if let Some(not_logged) = self.chatter.spend(Instant::now()) {
                    tracing::info!(client = %self.who(), not_logged, "duplicate tpc_begin ignored");
                }
                return Ok(Outcome::Reply(Value::None));
            }
            let text = "Multiple simultaneous tpc_begin requests from one client.";
            return Err(Fault::storage_transaction(vec![text.into()]));
        }
        let extension = encode_extension(extension).map_err(|error| Fault::value_error(error.to_string()))?;
        // Begun by a client that gave up in the middle of an upload.
        self.abort_upload();
        let meta = TxnMeta { user: own(user), description: own(description), extension };
        self.txn = Some(Transaction {
            key,
            phase: Phase::Begun,
            vote: 0,
            staging: Staging::new(
                StagedTxn { meta, tid, status, ops: Vec::new() },
                &self.server.staged_memory,
            ),
            files: Vec::new(),
            timeout: hub.options.transaction_timeout,
        });
        count(&hub.stats.active_txns);
        Ok(Outcome::Reply(Value::None))
    }

    pub(crate) fn may_write(&self) -> Result<(), Fault> {
        if self.read_only { Err(Fault::read_only()) } else { Ok(()) }
    }

    /// The open transaction, if it is the one meant.
    fn transaction(&mut self, key: &TxnKey) -> Result<&mut Transaction, Fault> {
        self.may_write()?;
        let open = self.txn.as_ref().map_or(Value::None, |txn| txn.key.clone());
        self.txn
            .as_mut()
            .filter(|txn| txn.key == *key)
            .ok_or_else(|| Fault::storage_transaction(vec![open, key.clone()]))
    }

    /// Checks the transaction, then stages what `add` adds. After the vote nothing more is taken in (silently, as ZEO).
    fn stage(&mut self, key: &TxnKey, add: impl FnOnce(&mut Transaction)) -> Served {
        let limit = self.server.config.max_staged;
        let txn = self.transaction(key)?;
        if matches!(txn.phase, Phase::Begun) {
            add(txn);
        }
        if txn.staging.bytes() > limit {
            self.close(format!("its transaction exceeds the limit of {limit} bytes (max-transaction-size)"));
        }
        self.spill_if_large();
        Ok(Outcome::Reply(Value::None))
    }

    pub(crate) fn storea(&mut self, hub: &Hub, oid: Oid, serial: Tid, data: Bytes, key: &TxnKey) -> Served {
        count(&hub.stats.stores);
        self.stage(key, |txn| txn.staging.store(oid, serial, own(data), None))
    }

    pub(crate) fn check_current(&mut self, oid: Oid, serial: Tid, key: &TxnKey) -> Served {
        self.stage(key, |txn| txn.staging.push(Op::CheckCurrent { oid, serial }))
    }

    pub(crate) fn delete_object(&mut self, hub: &Hub, oid: Oid, serial: Tid, key: &TxnKey) -> Served {
        count(&hub.stats.stores);
        if !hub.capabilities.delete_object {
            return Err(fault::of(&StorageError::Unsupported("deleteObject")));
        }
        self.stage(key, |txn| txn.staging.push(Op::Delete { oid, serial }))
    }

    pub(crate) fn restorea(
        &mut self,
        hub: &Hub,
        oid: Oid,
        serial: Tid,
        data: Option<Bytes>,
        prev_txn: Option<Tid>,
        key: &TxnKey,
    ) -> Served {
        count(&hub.stats.stores);
        if !hub.capabilities.restore {
            return Err(fault::of(&StorageError::Unsupported("restore")));
        }
        self.stage(key, |txn| {
            let data = data.map(|data| own(data).into());
            txn.staging.push(Op::Restore { oid, serial, data, prev_txn, blob: None });
        })
    }

    pub(crate) fn undoa(&mut self, hub: &Hub, trans_id: &[u8], key: &TxnKey) -> Served {
        if !hub.capabilities.undo {
            return Err(fault::of(&StorageError::Unsupported("undo")));
        }
        let tid = decode_trans_id(trans_id);
        self.stage(key, |txn| {
            // An unknown id fails in the vote, as the client waits for that.
            txn.staging.push(Op::Undo { tid: tid.unwrap_or(Tid::MAX) });
        })
    }

    /// What was to be part of the transaction is lost: its vote will fail.
    pub(crate) fn fail_transaction(&mut self, key: &TxnKey, error: StorageError) -> Served {
        self.stage(key, |txn| txn.staging.fail(error))
    }

    /// A complete blob, uploaded or in the shared directory.
    pub(crate) fn stage_blob(
        &mut self,
        oid: Oid,
        serial: Tid,
        data: Bytes,
        file: TemporaryFile,
        key: &TxnKey,
    ) -> Served {
        self.stage(key, |txn| {
            txn.staging.store(oid, serial, own(data), Some(file.0.clone()));
            txn.files.push(file);
        })
    }

    pub(crate) fn vote(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, key: &TxnKey) -> Served {
        let who = self.who();
        let vote = self.votes + 1;
        let mailbox = Arc::clone(&self.mailbox);
        let txn = self.transaction(key)?;
        let already = match &txn.phase {
            Phase::Begun => None,
            Phase::Waiting { .. } => Some("Already voting (waiting)"),
            Phase::Voting { .. } | Phase::Voted { .. } => Some("Already voting (locked)"),
        };
        if let Some(text) = already {
            return Err(Fault::storage_transaction(vec![text.into()]));
        }
        if let Some(error) = txn.staging.failure() {
            drop(self.end_transaction(hub));
            return Err(Fault::new("ZODB.POSException.StorageError", error.to_string()));
        }
        if let Some(text) = beyond_bounds(&txn.staging.txn) {
            drop(self.end_transaction(hub));
            return Err(Fault::new("ZODB.POSException.StorageError", text));
        }
        let set = LockSet::of(&txn.staging.txn, hub.capabilities.concurrent_votes);
        txn.vote = vote;
        self.votes = vote;
        let wake = move |news| {
            mailbox.post(Event::Continue(Box::new(move |session: &mut Self| match news {
                News::Granted => session.granted(vote),
                News::Changed => session.give_up_if_lost(vote),
            })));
        };
        let (locks, now) = hub.locks.request(&set, who.into(), wake);
        if !now && set == LockSet::WholeStorage {
            let watch = locks.watch(hub.options.transaction_timeout);
            self.runtime.spawn(async move {
                tokio::time::sleep(OLD).await;
                while let Some(at) = watch.look() {
                    tokio::time::sleep_until(at.into()).await;
                }
            });
        }
        let to = to.take();
        if now {
            hub.stats.lock_wait_seconds.record(Duration::ZERO);
            self.start_vote(hub, locks, to);
        } else if let Some(txn) = &mut self.txn {
            txn.phase = Phase::Waiting { locks, to, asked: Instant::now() };
            let waiting = hub.locks.waiting();
            if waiting > 9
                && let Some(not_logged) = self.server.crowds.spend(Instant::now())
            {
                tracing::warn!(storage = %hub.id, client = %self.who(), waiting, not_logged, "many transactions wait for locks");
            }
            self.give_up_if_lost(vote);
        }
        Ok(Outcome::Later)
    }

    /// Ends a vote that waits for locks if it is bound to fail when it gets them, so that its client can try again, and
    /// so that those behind it need not wait until it has failed.
    fn give_up_if_lost(&mut self, vote: u64) {
        let Some(hub) = self.registration.as_ref().map(|registration| Arc::clone(&registration.hub)) else {
            return;
        };
        let Some(txn) = self.txn.as_mut().filter(|txn| txn.vote == vote && txn.is_small()) else { return };
        if hub.capabilities.slow_calls || hub.options.client_conflict_resolution {
            return;
        }
        let Some(error) = lost(&hub, &txn.staging.txn) else { return };
        match std::mem::replace(&mut txn.phase, Phase::Voting { since: Instant::now() }) {
            Phase::Waiting { locks, to, asked } => {
                hub.stats.lock_wait_seconds.record(asked.elapsed());
                let verdict = Verdict::Failed(error, locks);
                let then = move |session: &mut Self| session.voted(&hub, vote, to, verdict);
                self.mailbox.post(Event::Continue(Box::new(then)));
            }
            other => txn.phase = other,
        }
    }

    /// The locks that a vote waited for are there.
    fn granted(&mut self, vote: u64) {
        let Some(hub) = self.registration.as_ref().map(|registration| Arc::clone(&registration.hub)) else {
            return;
        };
        let Some(txn) = self.txn.as_mut().filter(|txn| txn.vote == vote) else { return };
        match std::mem::replace(&mut txn.phase, Phase::Begun) {
            Phase::Waiting { locks, to, asked } => {
                hub.stats.lock_wait_seconds.record(asked.elapsed());
                self.start_vote(&hub, locks, to);
            }
            other => txn.phase = other,
        }
    }

    /// Votes: here if that is short and there is no conflict that may be resolved, else on a worker thread. The answer comes through
    /// the mailbox in either case, behind everything that was published before the locks were granted.
    fn start_vote(&mut self, hub: &Arc<Hub>, locks: LockGuard, to: ReplyTo) {
        let Some(txn) = &mut self.txn else { return };
        let vote = txn.vote;
        txn.phase = Phase::Voting { since: Instant::now() };
        let asks_client = hub.options.client_conflict_resolution;
        let mut locks = locks;
        if txn.is_small() && !hub.capabilities.slow_calls {
            let resolver: &dyn ConflictResolver = if asks_client { &AskClient } else { &NoResolution };
            let verdict = judge(hub, txn.staging.txn.clone(), resolver, locks);
            locks = match verdict {
                Verdict::Failed(StorageError::Conflict(ref conflict), locks)
                    if !asks_client && hub.options.resolver.may_resolve(&conflict.data) =>
                {
                    locks
                }
                verdict => {
                    let hub = Arc::clone(hub);
                    let then = move |session: &mut Self| session.voted(&hub, vote, to, verdict);
                    return self.mailbox.post(Event::Continue(Box::new(then)));
                }
            };
        }
        let staged = if asks_client { txn.staging.txn.clone() } else { txn.staging.take() };
        let (worker_hub, hub) = (Arc::clone(hub), Arc::clone(hub));
        let work = move || {
            let resolver: &dyn ConflictResolver =
                if asks_client { &AskClient } else { &*worker_hub.options.resolver };
            judge(&worker_hub, staged, resolver, locks)
        };
        self.background(work, move |session, verdict| session.voted(&hub, vote, to, verdict));
    }

    fn voted(&mut self, hub: &Arc<Hub>, vote: u64, to: ReplyTo, verdict: Verdict) {
        let Some(txn) = self.txn.as_mut().filter(|txn| txn.vote == vote) else {
            // Aborted meanwhile.
            if hub.capabilities.slow_calls {
                self.discard(verdict);
            }
            return self.answer(to, Err(Fault::storage_transaction(vec![Value::None])));
        };
        let served = match verdict {
            Verdict::Ready(held, resolved) => {
                let since = txn.since().unwrap_or_else(Instant::now);
                txn.phase = Phase::Voted { held, since };
                drop(txn.staging.take());
                Ok(Outcome::Reply(Value::oids(&resolved)))
            }
            Verdict::Conflicts(conflicts) => {
                txn.phase = Phase::Begun;
                Ok(Outcome::Reply(Value::List(conflicts.iter().map(for_client).collect())))
            }
            Verdict::Failed(error, locks) => {
                if matches!(error, StorageError::Conflict(_) | StorageError::ReadConflict { .. }) {
                    count(&hub.stats.conflicts);
                }
                let files = self.end_transaction(hub).map(|txn| txn.files);
                drop(locks);
                if let Some(files) = files.filter(|files| !files.is_empty()) {
                    self.discard(files);
                }
                Err(fault::of(&error))
            }
        };
        self.answer(to, served);
    }

    fn end_transaction(&mut self, hub: &Hub) -> Option<Transaction> {
        let txn = self.txn.take()?;
        hub.stats.active_txns.fetch_sub(1, Ordering::Relaxed);
        Some(txn)
    }

    pub(crate) fn tpc_finish(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, key: &TxnKey) -> Served {
        self.may_write()?;
        if self.txn.as_ref().is_none_or(|txn| txn.key != *key) {
            return Ok(Outcome::Reply(Value::None));
        }
        if !self.txn.as_ref().is_some_and(|txn| matches!(txn.phase, Phase::Voted { .. })) {
            return Err(Fault::new("builtins.AssertionError", "finished called wo lock"));
        }
        let Some(Transaction { phase: Phase::Voted { held, .. }, files, .. }) = self.end_transaction(hub)
        else {
            return Ok(Outcome::Reply(Value::None));
        };
        let to = to.take();
        self.committer_busy += 1;
        let reply = Box::new(move |session: &mut Self, finished: Result<Tid, StorageError>| {
            session.committer_busy -= 1;
            // The engine has moved them into place.
            drop(files);
            session.answer(
                to,
                finished.map(|tid| Outcome::Reply(tid.into())).map_err(|error| fault::of(&error)),
            );
        });
        let listener = self.registration.as_ref().map_or(u64::MAX, |registration| registration.id);
        let job = FinishJob { held, listener, mailbox: Arc::clone(&self.mailbox), reply };
        let may_block = self.runtime.runtime_flavor() == RuntimeFlavor::MultiThread;
        let job = if may_block { hub.committer.finish_alone(hub, job, self.owns_thread) } else { Some(job) };
        if let Some(job) = job {
            hub.committer.submit(job);
        }
        Ok(Outcome::Later)
    }

    pub(crate) fn tpc_abort(&mut self, hub: &Arc<Hub>, key: &TxnKey) -> Served {
        self.may_write()?;
        self.abort_upload();
        if self.txn.as_ref().is_some_and(|txn| txn.key == *key) {
            count(&hub.stats.aborts);
            let txn = self.end_transaction(hub);
            if hub.capabilities.slow_calls || txn.as_ref().is_some_and(|txn| !txn.files.is_empty()) {
                self.discard(txn);
            }
        }
        Ok(Outcome::Reply(Value::None))
    }

    /// Closes the connection if its transaction has held its locks for too long.
    pub(crate) fn look_at_deadline(&mut self) {
        let Some(txn) = &self.txn else { return };
        if txn.deadline().is_none_or(|deadline| Instant::now() < deadline) {
            return;
        }
        if let Some(registration) = &self.registration {
            count(&registration.hub.stats.timeouts);
        }
        let age = txn.since().map_or(Duration::ZERO, |since| since.elapsed());
        let storage = self.registration.as_ref().map_or("", |registration| &registration.hub.id);
        let critical = true;
        tracing::error!(critical, client = %self.peer, label = %self.label, storage, age = ?age, "transaction timeout: aborted, client dropped");
        self.close(format!("its transaction held locks of storage {storage} for {age:.1?}"));
    }
}
