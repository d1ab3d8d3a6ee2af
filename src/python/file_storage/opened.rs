//! An open storage and the transaction that is being committed.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::super::convert::{OrRaise, data_arg, oid_bytes, tid_bytes};
use super::super::errors;
use super::courtesy::Courtesy;
use super::publishing::{Publishing, Seen};
use super::{FileStorageBase, locked};
use crate::ids::{Oid, Tid};
use crate::storage::file::{Applied, FileStorage, Pending};
use crate::storage::{Conflict, ConflictResolver, Loaded, Op, Resolution, Storage, StorageError, VotedTxn};

/// The transaction that holds the commit lock.
pub(super) struct Current {
    /// Compared by identity.
    pub(super) transaction: Py<PyAny>,
    pub(super) tid: Tid,
    pub(super) phase: Phase,
}

pub(super) enum Phase {
    Begun(Pending),
    Voted(VotedTxn),
    /// One of its calls is running, in this or another thread.
    Busy,
}

pub(super) struct Opened {
    pub(super) engine: Arc<FileStorage>,
    pub(super) publishing: Publishing,
    pub(super) courtesy: Courtesy,
    /// Newest tid given to a transaction, committed or not.
    pub(super) generated: Mutex<Tid>,
    pub(super) current: Mutex<Option<Current>>,
}

impl Opened {
    /// `make` of data, tid and end of the newest revision before `before`. A reader that may have learnt of a transaction
    /// from its callback waits until that transaction can be seen.
    ///
    /// Cost: three atomic loads beside the engine's; `make` gets the data in the engine's read buffer.
    pub(super) fn load_with<T>(
        &self,
        py: Python<'_>,
        oid: Oid,
        before: Tid,
        make: impl Fn(&[u8], Tid, Option<Tid>) -> PyResult<T>,
    ) -> PyResult<Option<T>> {
        self.courtesy.give_way(py);
        let read = || match self.engine.try_load_before_with(oid, before, &make) {
            Err(StorageError::WouldBlock) => py
                .detach(|| self.engine.load_before(oid, before))
                .map(|found| found.map(|Loaded { data, tid, end_tid }| make(&data, tid, end_tid))),
            answer => answer,
        };
        self.as_published(py, before, read).or_raise(py)?.transpose()
    }

    /// What `read` answers, of a state that all with a view `before` some tid may see.
    pub(super) fn as_published<T>(&self, py: Python<'_>, before: Tid, read: impl Fn() -> T) -> T {
        loop {
            let round = self.publishing.round();
            let answer = read();
            match self.publishing.seen(round, before) {
                Seen::Whole => return answer,
                Seen::Changed => {}
                Seen::Wait => py.detach(|| self.publishing.wait(round)),
            }
        }
    }

    /// Before a read of the whole storage's state: waits for a transaction whose callback another thread is calling.
    pub(super) fn settle(&self, py: Python<'_>) {
        self.as_published(py, Tid::MAX, || {});
    }

    /// Runs one call of the current transaction with its state taken out, so that Python code called from it (conflict
    /// resolution) never meets a lock.
    pub(super) fn with_pending<T>(
        &self,
        transaction: &Bound<'_, PyAny>,
        body: impl FnOnce(Pending, Tid) -> (Phase, PyResult<T>),
    ) -> PyResult<T> {
        let (pending, tid) = {
            let mut guard = locked(&self.current);
            let current = Self::check(guard.as_mut(), transaction)?;
            match std::mem::replace(&mut current.phase, Phase::Busy) {
                Phase::Begun(pending) => (pending, current.tid),
                other => {
                    current.phase = other;
                    return Err(errors::transaction_error("the transaction has been voted already"));
                }
            }
        };
        let (phase, answer) = body(pending, tid);
        if let Ok(current) = Self::check(locked(&self.current).as_mut(), transaction) {
            current.phase = phase;
            return answer;
        }
        // Another thread has aborted it meanwhile; what is current now, if anything, is not to be touched.
        match phase {
            Phase::Begun(pending) => self.engine.abort_pending(pending),
            Phase::Voted(voted) => self.engine.abort(voted),
            Phase::Busy => {}
        }
        answer.and_then(|_| Err(errors::transaction_error("the transaction was aborted by another thread")))
    }

    /// As ZODB, for calls of another transaction than the one that was begun: the storage and the transaction say which.
    pub(super) fn check_for(
        &self,
        slf: &Bound<'_, FileStorageBase>,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        match Self::check(locked(&self.current).as_mut(), transaction) {
            Ok(_) => Ok(()),
            Err(_) => Err(errors::wrong_transaction(Some(slf.clone().into_any().unbind()), transaction)),
        }
    }

    pub(super) fn check<'a>(
        current: Option<&'a mut Current>,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<&'a mut Current> {
        current
            .filter(|current| current.transaction.is(transaction))
            .ok_or_else(|| errors::transaction_error("not the transaction that was begun"))
    }

    /// Applies one operation; conflicts go to the Python object's `tryToResolveConflict`.
    pub(super) fn apply(
        &self,
        slf: &Bound<'_, FileStorageBase>,
        transaction: &Bound<'_, PyAny>,
        op: Op,
    ) -> PyResult<(Vec<Oid>, Tid)> {
        let py = slf.py();
        self.with_pending(transaction, |mut pending, tid| {
            let resolver = Resolver { storage: slf.clone().into_any().unbind(), raised: Mutex::new(None) };
            let mut applied = match op {
                Op::Undo { .. } | Op::Restore { prev_txn: Some(_), .. } => {
                    self.look_and_apply(py, &mut pending, op, &resolver)
                }
                _ => self.engine.apply(&mut pending, op, &resolver),
            };
            if self.engine.is_large(&pending) && applied.is_ok() {
                applied = self.spill(py, &mut pending).and(applied);
            }
            let raised = locked(&resolver.raised).take();
            let answer = match (applied, raised) {
                (Ok(applied), _) => Ok((applied.undone, tid)),
                (Err(StorageError::Conflict(_)), Some(error)) => Err(error),
                (Err(_), Some(error)) if !errors::is_conflict(py, &error) => Err(error),
                (Err(error), _) => Err(errors::storage_error(py, &error)),
            };
            (Phase::Begun(pending), answer)
        })
    }

    /// What looks for a transaction, which may take a walk over the file.
    #[cold]
    fn look_and_apply(
        &self,
        py: Python<'_>,
        pending: &mut Pending,
        op: Op,
        resolver: &Resolver,
    ) -> Result<Applied, StorageError> {
        py.detach(|| self.engine.apply(pending, op, resolver))
    }

    #[cold]
    fn spill(&self, py: Python<'_>, pending: &mut Pending) -> Result<(), StorageError> {
        py.detach(|| self.engine.spill(pending))
    }

    pub(super) fn writable(&self, py: Python<'_>) -> PyResult<()> {
        if self.engine.is_read_only() {
            return Err(errors::storage_error(py, &StorageError::ReadOnly));
        }
        Ok(())
    }
}

/// Conflict resolution by the Python object's `tryToResolveConflict`, which others may have replaced.
struct Resolver {
    storage: Py<PyAny>,
    /// What it raised, to be raised again unchanged.
    raised: Mutex<Option<PyErr>>,
}

impl ConflictResolver for Resolver {
    fn resolve(&self, _: &dyn Storage, conflict: &Conflict, committed_data: Option<Bytes>) -> Resolution {
        Python::attach(|py| {
            let answer = self
                .storage
                .bind(py)
                .call_method1(
                    "tryToResolveConflict",
                    (
                        oid_bytes(py, conflict.oid),
                        tid_bytes(py, conflict.committed),
                        tid_bytes(py, conflict.read),
                        PyBytes::new(py, &conflict.data),
                        PyBytes::new(py, &committed_data.unwrap_or_default()),
                    ),
                )
                .and_then(|data| data_arg(&data));
            match answer {
                Ok(data) => Resolution::Resolved(data),
                Err(error) => {
                    *locked(&self.raised) = Some(error);
                    Resolution::Unresolved
                }
            }
        })
    }
}
