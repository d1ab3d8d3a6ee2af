//! [`ServedStorage`]: any Python ZODB storage behind the [`Storage`] trait, for the server.
//!
//! Every call takes the GIL once, on a thread that may block (`try_load_before` always answers `WouldBlock`, so the
//! server never enters Python from its event loop). The Python side is `zeo_rs/_served.py`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use super::convert::{data_arg, oid_arg, oid_bytes, tid_arg, tid_bytes};
use super::errors;
use crate::ids::{Oid, Tid};
use crate::storage::{
    Capabilities, Committed, Conflict, ConflictResolver, HistoryEntry, InvalidationSink, Loaded, NextRecord,
    Op, PackOptions, RecordInfo, RecordIterator, Result, StagedData, StagedTxn, Storage, StorageError,
    TxnInfo, TxnIterator, TxnMeta, UndoEntry, VoteOutcome, VotedTxn, WholeStorageLock,
};

/// A Python storage, served.
pub(crate) struct ServedStorage {
    served: Py<PyAny>,
    capabilities: Capabilities,
    closed: AtomicBool,
}

type Metadata = (Vec<u8>, Vec<u8>, Vec<u8>);

impl ServedStorage {
    /// Wraps `storage` (an `IStorage`). `clients_resolve`: conflicts go to the client instead of the storage's resolver.
    pub(crate) fn new(storage: &Bound<'_, PyAny>, clients_resolve: bool) -> PyResult<Self> {
        let served =
            storage.py().import("zeo_rs._served")?.getattr("Served")?.call1((storage, clients_resolve))?;
        let found = served.call_method0("capabilities")?;
        let flag = |name: &str| found.get_item(name)?.is_truthy();
        let capabilities = Capabilities {
            undo: flag("undo")?,
            record_iternext: flag("record_iternext")?,
            delete_object: flag("delete_object")?,
            restore: flag("restore")?,
            blobs: flag("blobs")?,
            concurrent_votes: false,
            slow_calls: true,
            interfaces: found.get_item("interfaces")?.extract()?,
        };
        Ok(Self { served: served.unbind(), capabilities, closed: AtomicBool::new(false) })
    }

    /// Runs `body` with the adapter object, the GIL held.
    fn with<T>(&self, body: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>) -> Result<T> {
        Python::attach(|py| body(self.served.bind(py)).map_err(|error| errors::from_python(py, error)))
    }

    /// Runs `body` with the Python storage itself.
    fn with_storage<T>(&self, body: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>) -> Result<T> {
        self.with(|served| body(&served.getattr("storage")?))
    }
}

impl Storage for ServedStorage {
    fn name(&self) -> String {
        self.with_storage(|s| s.call_method0("getName")?.extract()).unwrap_or_default()
    }

    fn is_read_only(&self) -> bool {
        self.with_storage(|s| s.call_method0("isReadOnly")?.is_truthy()).unwrap_or(true)
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    fn object_count(&self) -> u64 {
        self.with_storage(|s| Ok(s.len()? as u64)).unwrap_or(0)
    }

    fn size(&self) -> u64 {
        self.with_storage(|s| s.call_method0("getSize")?.extract()).unwrap_or(0)
    }

    fn last_tid(&self) -> Tid {
        self.with_storage(|s| tid_arg(&s.call_method0("lastTransaction")?)).unwrap_or(Tid::ZERO)
    }

    fn load_before(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>> {
        self.with_storage(|s| {
            let py = s.py();
            let found = s.call_method1("loadBefore", (oid_bytes(py, oid), tid_bytes(py, before)))?;
            if found.is_none() {
                return Ok(None);
            }
            let end = found.get_item(2)?;
            Ok(Some(Loaded {
                data: data_arg(&found.get_item(0)?)?,
                tid: tid_arg(&found.get_item(1)?)?,
                end_tid: if end.is_none() { None } else { Some(tid_arg(&end)?) },
            }))
        })
    }

    fn try_load_before(&self, _: Oid, _: Tid) -> Result<Option<Loaded>> {
        Err(StorageError::WouldBlock)
    }

    fn load_serial(&self, oid: Oid, serial: Tid) -> Result<Bytes> {
        self.with_storage(|s| {
            data_arg(&s.call_method1("loadSerial", (oid_bytes(s.py(), oid), tid_bytes(s.py(), serial)))?)
        })
    }

    fn current_tid(&self, oid: Oid) -> Result<Tid> {
        self.with_storage(|s| tid_arg(&s.call_method1("getTid", (oid_bytes(s.py(), oid),))?))
    }

    fn history(&self, oid: Oid, size: usize) -> Result<Vec<HistoryEntry>> {
        self.with(|served| {
            let found = served.call_method1("history", (oid_bytes(served.py(), oid), size))?;
            let entries = found.try_iter()?.map(|entry| {
                let (tid, size, meta) = described(&entry?)?;
                Ok(HistoryEntry { tid, size, meta })
            });
            entries.collect()
        })
    }

    fn record_iternext(&self, next: Option<Oid>) -> Result<Option<NextRecord>> {
        self.with(|served| {
            let py = served.py();
            let found = served.call_method1("record_iternext", (next.map(|oid| oid_bytes(py, oid)),))?;
            if found.is_none() {
                return Ok(None);
            }
            let next = found.get_item(3)?;
            Ok(Some(NextRecord {
                oid: oid_arg(&found.get_item(0)?)?,
                tid: tid_arg(&found.get_item(1)?)?,
                data: data_arg(&found.get_item(2)?)?,
                next: if next.is_none() { None } else { Some(oid_arg(&next)?) },
            }))
        })
    }

    fn iterate(&self, start: Option<Tid>, stop: Option<Tid>) -> Result<Box<dyn TxnIterator>> {
        self.with(|served| {
            let py = served.py();
            let bound = |tid: Option<Tid>| tid.map(|tid| tid_bytes(py, tid));
            let txns = served.call_method1("iterate", (bound(start), bound(stop)))?.try_iter()?;
            Ok(Box::new(Transactions(txns.into_any().unbind())) as Box<dyn TxnIterator>)
        })
    }

    fn last_invalidations(&self, count: usize) -> Result<Vec<(Tid, Vec<Oid>)>> {
        self.with(|served| {
            let found = served.call_method1("last_invalidations", (count,))?;
            if found.is_none() {
                return Ok(Vec::new());
            }
            found
                .try_iter()?
                .map(|entry| {
                    let entry = entry?;
                    Ok((tid_arg(&entry.get_item(0)?)?, oids_of(&entry.get_item(1)?)?))
                })
                .collect()
        })
    }

    /// `accept` is applied to what the storage lists without a filter, page by page.
    fn undo_log(
        &self,
        first: usize,
        last: usize,
        accept: &mut dyn FnMut(&UndoEntry) -> bool,
    ) -> Result<Vec<UndoEntry>> {
        const PAGE: usize = 100;
        let (mut from, mut accepted, mut answer) = (0, 0, Vec::new());
        while accepted < last {
            let page = self.with(|served| {
                let found = served.call_method1("undo_log", (from, from + PAGE))?;
                let entries = found.try_iter()?.map(|entry| {
                    let (tid, size, meta) = described(&entry?)?;
                    Ok(UndoEntry { tid, size, meta })
                });
                entries.collect::<PyResult<Vec<_>>>()
            })?;
            let full = page.len() == PAGE;
            for entry in page {
                if accepted < last && accept(&entry) {
                    if accepted >= first {
                        answer.push(entry);
                    }
                    accepted += 1;
                }
            }
            if !full {
                break;
            }
            from += PAGE;
        }
        Ok(answer)
    }

    fn new_oids(&self, count: usize) -> Result<Vec<Oid>> {
        self.with_storage(|s| (0..count).map(|_| oid_arg(&s.call_method0("new_oid")?)).collect())
    }

    fn vote(&self, txn: StagedTxn, resolver: &dyn ConflictResolver) -> Result<VoteOutcome> {
        let _ = resolver; // a Python storage resolves by itself, or reports (see `Served`)
        let ops = Arc::new(txn.ops);
        let voted = self.with(|served| {
            let py = served.py();
            let operations = Operations { ops: ops.clone(), next: AtomicUsize::new(0) };
            let status = char::from(txn.status).to_string();
            let answer = served.call_method1(
                "vote",
                (
                    PyBytes::new(py, &txn.meta.user),
                    PyBytes::new(py, &txn.meta.description),
                    PyBytes::new(py, &txn.meta.extension),
                    txn.tid.map(|tid| tid_bytes(py, tid)),
                    status,
                    operations,
                ),
            )?;
            if let Ok(conflicts) = answer.cast::<PyList>() {
                let conflicts = conflicts.iter().map(|conflict| {
                    Ok(Conflict {
                        oid: oid_arg(&conflict.get_item(0)?)?,
                        committed: tid_arg(&conflict.get_item(1)?)?,
                        read: tid_arg(&conflict.get_item(2)?)?,
                        data: data_arg(&conflict.get_item(3)?)?,
                    })
                });
                return Ok(VoteOutcome::Conflicts(conflicts.collect::<PyResult<_>>()?));
            }
            let handle = VotedHandle {
                served: self.served.clone_ref(py),
                transaction: Some(answer.get_item(0)?.unbind()),
            };
            Ok(VoteOutcome::Ready(VotedTxn {
                oids: oids_of(&answer.get_item(1)?)?,
                resolved: oids_of(&answer.get_item(2)?)?,
                state: Box::new(handle),
            }))
        });
        voted.map_err(|error| with_record(error, &ops))
    }

    /// The group has one member, because votes are not concurrent. What fails is aborted, as ZODB does, too.
    fn finish(&self, group: Vec<VotedTxn>, publish: &mut dyn FnMut(&Committed)) -> Result<()> {
        for (index, voted) in group.into_iter().enumerate() {
            let mut handle = VotedHandle::of(voted.state)?;
            let tid = self.with(|served| {
                let transaction =
                    handle.transaction.as_ref().map(|transaction| transaction.bind(served.py()));
                let tid = served.call_method1("finish", (transaction,))?;
                // Not before: a storage whose tpc_finish failed waits for tpc_abort, and until then lets nobody begin.
                handle.transaction = None;
                tid_arg(&tid)
            })?;
            publish(&Committed { index, tid, oids: voted.oids.into() });
        }
        Ok(())
    }

    fn abort(&self, txn: VotedTxn) {
        drop(txn);
    }

    fn pack(&self, options: PackOptions<'_>, _: &dyn WholeStorageLock) -> Result<()> {
        self.with(|served| served.call_method1("pack", (options.time, options.gc)).map(drop))
    }

    fn blob_path(&self, oid: Oid, serial: Tid) -> Result<PathBuf> {
        self.with(|served| {
            served
                .call_method1("blob_path", (oid_bytes(served.py(), oid), tid_bytes(served.py(), serial)))?
                .extract()
        })
    }

    fn write_failure(&self) -> Option<String> {
        let failure = self.with(|served| served.call_method0("failure")?.extract());
        failure.unwrap_or_else(|error| Some(error.to_string()))
    }

    fn temporary_directory(&self) -> Result<PathBuf> {
        self.with(|served| served.call_method0("temporary_directory")?.extract())
    }

    fn blob_oid_directory(&self, oid: Oid) -> Result<PathBuf> {
        self.with(|served| {
            served.call_method1("blob_oid_directory", (oid_bytes(served.py(), oid),))?.extract()
        })
    }

    fn subscribe(&self, sink: Arc<dyn InvalidationSink>) {
        let told = self.with(|served| served.call_method1("subscribe", (Sink(sink),)).map(drop));
        if let Err(error) = told {
            tracing::error!(storage = self.name(), %error, "registerDB failed: commits made below are not seen");
        }
    }

    fn checkpoint(&self) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.with_storage(|s| s.call_method0("close").map(drop))
    }
}

/// A voted transaction of the Python storage; dropped before its finish, it is aborted there.
struct VotedHandle {
    served: Py<PyAny>,
    transaction: Option<Py<PyAny>>,
}

impl VotedHandle {
    fn of(state: Box<dyn std::any::Any + Send>) -> Result<Box<Self>> {
        state
            .downcast()
            .map_err(|_| StorageError::Transaction("a voted transaction of another storage".into()))
    }
}

impl Drop for VotedHandle {
    fn drop(&mut self) {
        let Some(transaction) = self.transaction.take() else { return };
        Python::attach(|py| {
            if let Err(error) = self.served.bind(py).call_method1("abort", (transaction,)) {
                tracing::error!(%error, "tpc_abort of a served storage failed");
            }
        });
    }
}

/// The Python iterator behind `iterate`.
struct Transactions(Py<PyAny>);

impl TxnIterator for Transactions {
    fn next_txn(&mut self) -> Result<Option<(TxnInfo, Box<dyn RecordIterator>)>> {
        attached(|py| {
            let Some(txn) = self.0.bind(py).try_iter()?.next() else { return Ok(None) };
            let txn = txn?;
            let status: String = txn.get_item(1)?.extract()?;
            let (user, description, extension): Metadata =
                (txn.get_item(2)?.extract()?, txn.get_item(3)?.extract()?, txn.get_item(4)?.extract()?);
            let info = TxnInfo {
                tid: tid_arg(&txn.get_item(0)?)?,
                status: status.bytes().next().unwrap_or(b' '),
                meta: metadata(user, description, extension),
            };
            let records = Records(txn.get_item(5)?.try_iter()?.into_any().unbind());
            Ok(Some((info, Box::new(records) as Box<dyn RecordIterator>)))
        })
    }
}

struct Records(Py<PyAny>);

impl RecordIterator for Records {
    fn next_record(&mut self) -> Result<Option<RecordInfo>> {
        attached(|py| {
            let Some(record) = self.0.bind(py).try_iter()?.next() else { return Ok(None) };
            let record = record?;
            let (data, data_txn) = (record.get_item(2)?, record.get_item(3)?);
            Ok(Some(RecordInfo {
                oid: oid_arg(&record.get_item(0)?)?,
                tid: tid_arg(&record.get_item(1)?)?,
                data: if data.is_none() { None } else { Some(data_arg(&data)?) },
                data_txn: if data_txn.is_none() { None } else { Some(tid_arg(&data_txn)?) },
            }))
        })
    }
}

/// What `registerDB`'s object reports to.
#[pyclass(frozen, module = "zeo_rs._zeo", name = "_InvalidationSink")]
struct Sink(Arc<dyn InvalidationSink>);

#[pymethods]
impl Sink {
    fn invalidate(&self, py: Python<'_>, tid: &Bound<'_, PyAny>, oids: &Bound<'_, PyAny>) -> PyResult<()> {
        let (tid, oids) = (tid_arg(tid)?, oids_of(oids)?);
        py.detach(|| self.0.invalidate(tid, oids));
        Ok(())
    }

    fn invalidate_all(&self, py: Python<'_>) {
        py.detach(|| self.0.invalidate_all());
    }
}

/// A conflict with the record that was to be stored, which ZODB's exception does not have: its class is shown to the user.
fn with_record(mut error: StorageError, ops: &[Op]) -> StorageError {
    if let StorageError::Conflict(conflict) = &mut error {
        let stored = ops.iter().find_map(|op| match op {
            Op::Store { oid, data, .. } if *oid == conflict.oid => Some(data),
            _ => None,
        });
        if let Some(data) = stored {
            conflict.data = data.to_bytes().unwrap_or_default();
        }
    }
    error
}

fn attached<T>(body: impl FnOnce(Python<'_>) -> PyResult<T>) -> Result<T> {
    Python::attach(|py| body(py).map_err(|error| errors::from_python(py, error)))
}

/// What `Served.vote` iterates over: the tuple of an operation is made when it is asked for, so that the records of a
/// large transaction are not all in memory.
#[pyclass(frozen)]
struct Operations {
    ops: Arc<Vec<Op>>,
    next: AtomicUsize,
}

#[pymethods]
impl Operations {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        self.ops.get(at).map(|op| operation(py, op)).transpose()
    }
}

/// The tuple that `Served.vote` takes for `op`.
fn operation<'py>(py: Python<'py>, op: &Op) -> PyResult<Bound<'py, PyTuple>> {
    let path = |blob: &Option<PathBuf>| blob.as_ref().map(|path| path.as_os_str().to_owned());
    let staged = |data: &StagedData| match data.to_bytes() {
        Ok(data) => Ok(PyBytes::new(py, &data)),
        Err(error) => Err(errors::storage_error(py, &error)),
    };
    match op {
        Op::Store { oid, serial, data, blob } => {
            ("store", oid_bytes(py, *oid), tid_bytes(py, *serial), staged(data)?, path(blob))
                .into_pyobject(py)
        }
        Op::CheckCurrent { oid, serial } => {
            ("check", oid_bytes(py, *oid), tid_bytes(py, *serial)).into_pyobject(py)
        }
        Op::Delete { oid, serial } => {
            ("delete", oid_bytes(py, *oid), tid_bytes(py, *serial)).into_pyobject(py)
        }
        Op::Restore { oid, serial, data, prev_txn, blob } => (
            "restore",
            oid_bytes(py, *oid),
            tid_bytes(py, *serial),
            data.as_ref().map(staged).transpose()?,
            prev_txn.map(|tid| tid_bytes(py, tid)),
            path(blob),
        )
            .into_pyobject(py),
        Op::Undo { tid } => ("undo", tid_bytes(py, *tid)).into_pyobject(py),
    }
}

/// `(tid, size, user, description, extension)` of a history or undo entry.
fn described(entry: &Bound<'_, PyAny>) -> PyResult<(Tid, u64, TxnMeta)> {
    let (tid, size, user, description, extension): (Bound<'_, PyAny>, u64, Vec<u8>, Vec<u8>, Vec<u8>) =
        entry.extract()?;
    Ok((tid_arg(&tid)?, size, metadata(user, description, extension)))
}

fn metadata(user: Vec<u8>, description: Vec<u8>, extension: Vec<u8>) -> TxnMeta {
    TxnMeta { user: user.into(), description: description.into(), extension: extension.into() }
}

fn oids_of(value: &Bound<'_, PyAny>) -> PyResult<Vec<Oid>> {
    value.try_iter()?.map(|oid| oid_arg(&oid?)).collect()
}
