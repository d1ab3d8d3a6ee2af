//! `_zeo.FileStorageBase`: the FileStorage engine as the native half of `zeo_rs.FileStorage`.
//!
//! One commit at a time, as ZODB's FileStorage: `zeo_rs/filestorage.py` takes the commit lock in `tpc_begin` and gives it
//! back after `_finish` or `_abort`; the transaction's state in between is in [`opened`]. [`publishing`] keeps readers from
//! seeing half of a commit.
//!
//! A long list of short methods: one for each of ZODB's that is not Python. pyo3 wants them in one place.
//!
//! # Cost
//! A load that the page cache can answer keeps the GIL: it takes less time than giving it up and getting it back. One
//! that must wait for the disk gives it up. Answered from the page cache: one `preadv2`, one copy of the data into the
//! `bytes` object, no lock. A vote keeps the GIL, too, when it makes no system call; a commit then gives it up once, for
//! the append and its sync. Threads that load without pause then let it have the GIL first ([`courtesy`]).

mod courtesy;
mod opened;
mod publishing;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use self::courtesy::Courtesy;
use self::opened::{Current, Opened, Phase};
use self::publishing::Publishing;
use super::convert::{
    OrRaise, count_arg, data_arg, metadata_arg, oid_arg, oid_bytes, optional_tid_arg, serial_arg, tid_arg,
    tid_bytes,
};
use super::{errors, logging, records};
use crate::ids::Tid;
use crate::storage::file::{FileStorage, FileStorageOptions};
use crate::storage::{HistoryEntry, Op, Storage, StorageError, TxnMeta, UndoEntry};

/// Empty until `_open`: so that a Python subclass may have a constructor of its own.
#[pyclass(subclass, frozen, weakref, module = "zeo_rs._zeo")]
pub(crate) struct FileStorageBase(OnceLock<Opened>);

/// The lock may be taken with the GIL held: nothing waits for the GIL while holding it.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FileStorageBase {
    /// The engine, for a server in the same process.
    pub(crate) fn engine(&self) -> PyResult<&Arc<FileStorage>> {
        Ok(&self.opened()?.engine)
    }

    /// For a call that writes: errors before any that the other arguments may give.
    fn for_write<'a>(slf: &'a Bound<'_, Self>, transaction: &Bound<'_, PyAny>) -> PyResult<&'a Opened> {
        let this = slf.get().opened()?;
        this.writable(transaction.py())?;
        this.check_for(slf, transaction)?;
        Ok(this)
    }

    fn opened(&self) -> PyResult<&Opened> {
        self.0.get().ok_or_else(|| PyValueError::new_err("the storage is not open: its __init__ has not run"))
    }
}

#[pymethods]
impl FileStorageBase {
    #[new]
    #[pyo3(signature = (*_args, **_keywords))]
    fn new(_args: &Bound<'_, PyTuple>, _keywords: Option<&Bound<'_, PyAny>>) -> Self {
        Self(OnceLock::new())
    }

    #[pyo3(signature = (file_name, create, read_only, stop, quota, pack_gc, pack_keep_old, blob_dir))]
    #[allow(clippy::too_many_arguments)]
    fn _open(
        &self,
        py: Python<'_>,
        file_name: PathBuf,
        create: bool,
        read_only: bool,
        stop: Option<&Bound<'_, PyAny>>,
        quota: Option<u64>,
        pack_gc: bool,
        pack_keep_old: bool,
        blob_dir: Option<PathBuf>,
    ) -> PyResult<()> {
        logging::refresh(py);
        let stop = stop.map(tid_arg).transpose()?;
        let options = FileStorageOptions { create, read_only, stop, quota, pack_gc, pack_keep_old, blob_dir };
        let engine = py.detach(|| FileStorage::open(&file_name, options)).map_err(|error| {
            let raised = errors::storage_error(py, &error);
            match error {
                StorageError::Io { .. } => errors::about_file(py, raised, &file_name),
                _ => raised,
            }
        })?;
        let last = engine.last_tid();
        let opened = Opened {
            engine: Arc::new(engine),
            publishing: Publishing::default(),
            courtesy: Courtesy::default(),
            generated: Mutex::new(last),
            current: Mutex::new(None),
        };
        self.0.set(opened).map_err(|_| PyValueError::new_err("the storage is open already"))
    }

    // -- reading

    /// `(data, tid, end_tid or None)` of the newest revision before `tid`, or None if the object is younger.
    #[pyo3(name = "loadBefore")]
    fn load_before<'py>(
        &self,
        py: Python<'py>,
        oid: &Bound<'py, PyAny>,
        tid: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let this = self.opened()?;
        this.load_with(py, oid_arg(oid)?, tid_arg(tid)?, |data, tid, end| {
            let end = end.map(|end| tid_bytes(py, end));
            (PyBytes::new(py, data), tid_bytes(py, tid), end).into_pyobject(py)
        })
    }

    /// `(data, tid)` of the current revision.
    #[pyo3(signature = (oid, version=None))]
    fn load<'py>(
        &self,
        py: Python<'py>,
        oid: &Bound<'py, PyAny>,
        version: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let this = self.opened()?;
        no_version(version)?;
        let oid = oid_arg(oid)?;
        let make = |data: &[u8], tid, _| (PyBytes::new(py, data), tid_bytes(py, tid)).into_pyobject(py);
        this.load_with(py, oid, Tid(u64::MAX), make)?.ok_or_else(|| errors::key_error(py, oid))
    }

    #[pyo3(name = "loadSerial")]
    fn load_serial<'py>(
        &self,
        py: Python<'py>,
        oid: &Bound<'py, PyAny>,
        serial: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let this = self.opened()?;
        let (oid, serial) = (oid_arg(oid)?, serial_arg(serial)?);
        let load = || py.detach(|| this.engine.load_serial(oid, serial));
        let data = this.as_published(py, serial.next(), load).or_raise(py)?;
        Ok(PyBytes::new(py, &data))
    }

    #[pyo3(name = "getTid")]
    fn current_tid<'py>(&self, py: Python<'py>, oid: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let this = self.opened()?;
        let oid = oid_arg(oid)?;
        let tid = this.as_published(py, Tid::MAX, || this.engine.current_tid(oid)).or_raise(py)?;
        Ok(tid_bytes(py, tid))
    }

    #[pyo3(name = "lastTransaction")]
    fn last_transaction<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(tid_bytes(py, self.opened()?.engine.last_tid()))
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.opened()?.engine.object_count() as usize)
    }

    #[pyo3(name = "getSize")]
    fn size(&self) -> PyResult<u64> {
        Ok(self.opened()?.engine.size())
    }

    #[pyo3(name = "isReadOnly")]
    fn is_read_only(&self) -> PyResult<bool> {
        Ok(self.opened()?.engine.is_read_only())
    }

    /// `(oid, tid, data, next oid or None)`; ValueError if there is no object from `next` on.
    #[pyo3(signature = (next=None))]
    fn record_iternext<'py>(
        &self,
        py: Python<'py>,
        next: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let this = self.opened()?;
        this.settle(py);
        let next = next.map(oid_arg).transpose()?;
        match py.detach(|| this.engine.record_iternext(next)).or_raise(py)? {
            Some(found) => (
                oid_bytes(py, found.oid),
                tid_bytes(py, found.tid),
                PyBytes::new(py, &found.data),
                found.next.map(|oid| oid_bytes(py, oid)),
            )
                .into_pyobject(py),
            None => Err(PyValueError::new_err("no more objects")),
        }
    }

    /// The last `count` transactions as `(tid, [oid, …])`, oldest first.
    #[pyo3(name = "lastInvalidations")]
    fn last_invalidations<'py>(
        &self,
        py: Python<'py>,
        count: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyList>> {
        let this = self.opened()?;
        let count = count_arg(count)?;
        this.settle(py);
        let found = py.detach(|| this.engine.last_invalidations(count)).or_raise(py)?;
        let found = found.into_iter().map(|(tid, oids)| {
            (tid_bytes(py, tid), oids.into_iter().map(|oid| oid_bytes(py, oid)).collect::<Vec<_>>())
        });
        PyList::new(py, found.collect::<Vec<_>>())
    }

    /// The transactions from `start` to `stop`, both included: `(tid, status, user, description, extension, records)`.
    #[pyo3(signature = (start=None, stop=None))]
    fn _iterate(
        &self,
        py: Python<'_>,
        start: Option<&Bound<'_, PyAny>>,
        stop: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<records::Transactions> {
        let this = self.opened()?;
        let (start, stop) = (optional_tid_arg(start)?, optional_tid_arg(stop)?);
        let transactions = py.detach(|| this.engine.iterate(start, stop)).or_raise(py)?;
        Ok(records::Transactions::new(transactions))
    }

    /// `(tid, size, user, description, extension)` of the newest `size` revisions, newest first.
    fn _history<'py>(
        &self,
        py: Python<'py>,
        oid: &Bound<'py, PyAny>,
        size: &Bound<'py, PyAny>,
    ) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let this = self.opened()?;
        let (oid, size) = (oid_arg(oid)?, count_arg(size)?);
        this.settle(py);
        let entries = py.detach(|| this.engine.history(oid, size)).or_raise(py)?;
        entries.iter().map(|HistoryEntry { tid, size, meta }| described(py, *tid, *size, meta)).collect()
    }

    /// As `_history`, of the transactions `first..last` that `accept` is true for.
    #[pyo3(signature = (first, last, accept=None))]
    fn _undo_log<'py>(
        &self,
        py: Python<'py>,
        first: &Bound<'py, PyAny>,
        last: &Bound<'py, PyAny>,
        accept: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let this = self.opened()?;
        let (first, last) = (count_arg(first)?, count_arg(last)?);
        this.settle(py);
        let mut raised = None;
        let entries = py.detach(|| {
            this.engine.undo_log(first, last, &mut |UndoEntry { tid, size, meta }| {
                let Some(accept) = &accept else { return true };
                Python::attach(|py| {
                    let accepted = described(py, *tid, *size, meta)
                        .and_then(|entry| accept.bind(py).call1(entry)?.is_truthy());
                    accepted.unwrap_or_else(|error| {
                        raised.get_or_insert(error);
                        false
                    })
                })
            })
        });
        match raised {
            Some(error) => Err(error),
            None => {
                let entries = entries.or_raise(py)?;
                entries.iter().map(|UndoEntry { tid, size, meta }| described(py, *tid, *size, meta)).collect()
            }
        }
    }

    // -- two-phase commit

    fn new_oid<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let this = self.opened()?;
        let oids = py.detach(|| this.engine.new_oids(1)).or_raise(py)?;
        match oids.first() {
            Some(oid) => Ok(oid_bytes(py, *oid)),
            None => Err(errors::file_storage_error("there are no more oids")),
        }
    }

    /// `oid` is in use: new ones are greater.
    fn _raise_oid(&self, oid: &Bound<'_, PyAny>) -> PyResult<()> {
        self.opened()?.engine.note_oid(oid_arg(oid)?);
        Ok(())
    }

    /// Raises what every write would: read-only, closed, failed, or of another process.
    fn _check_writable(&self, py: Python<'_>) -> PyResult<()> {
        self.opened()?.engine.check_writable().or_raise(py)
    }

    /// Begins; the caller holds the commit lock. Answers the transaction's tid, made of the Unix time `now` if not given.
    #[pyo3(signature = (transaction, tid, status, now))]
    fn _begin<'py>(
        &self,
        transaction: &Bound<'py, PyAny>,
        tid: Option<&Bound<'py, PyAny>>,
        status: &str,
        now: f64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let this = self.opened()?;
        let py = transaction.py();
        let status = match status.as_bytes() {
            [status] => *status,
            _ => return Err(PyValueError::new_err("a status is one ASCII character")),
        };
        let given = optional_tid_arg(tid)?;
        let meta = metadata_arg(transaction)?;
        let tid = {
            let mut generated = locked(&this.generated);
            let tid = given.unwrap_or_else(|| Tid::from_unix(now).unwrap_or_default().later_than(*generated));
            *generated = tid.max(*generated);
            tid
        };
        let pending = this.engine.begin(meta, Some(tid), status).or_raise(py)?;
        *locked(&this.current) =
            Some(Current { transaction: transaction.clone().unbind(), tid, phase: Phase::Begun(pending) });
        Ok(tid_bytes(py, tid))
    }

    #[pyo3(name = "store")]
    fn store(
        slf: &Bound<'_, Self>,
        oid: &Bound<'_, PyAny>,
        oldserial: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
        version: &Bound<'_, PyAny>,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let this = Self::for_write(slf, transaction)?;
        no_version(Some(version))?;
        let op = Op::Store {
            oid: oid_arg(oid)?,
            serial: serial_arg(oldserial)?,
            data: data_arg(data)?.into(),
            blob: None,
        };
        this.apply(slf, transaction, op).map(drop)
    }

    /// `blobfilename`: a file in the temporary directory; it need not be there before the vote.
    fn _store_blob(
        slf: &Bound<'_, Self>,
        oid: &Bound<'_, PyAny>,
        oldserial: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
        blobfilename: PathBuf,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let this = Self::for_write(slf, transaction)?;
        let op = Op::Store {
            oid: oid_arg(oid)?,
            serial: serial_arg(oldserial)?,
            data: data_arg(data)?.into(),
            blob: Some(blobfilename),
        };
        this.apply(slf, transaction, op).map(drop)
    }

    fn restore(
        slf: &Bound<'_, Self>,
        oid: &Bound<'_, PyAny>,
        serial: &Bound<'_, PyAny>,
        data: Option<&Bound<'_, PyAny>>,
        version: &Bound<'_, PyAny>,
        prev_txn: Option<&Bound<'_, PyAny>>,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let this = Self::for_write(slf, transaction)?;
        no_version(Some(version))?;
        let op = Op::Restore {
            oid: oid_arg(oid)?,
            serial: tid_arg(serial)?,
            data: data.map(data_arg).transpose()?.map(Into::into),
            prev_txn: prev_txn.map(tid_arg).transpose()?,
            blob: None,
        };
        this.apply(slf, transaction, op).map(drop)
    }

    /// See `_store_blob`.
    fn _restore_blob(
        slf: &Bound<'_, Self>,
        oid: &Bound<'_, PyAny>,
        serial: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
        blobfilename: PathBuf,
        prev_txn: Option<&Bound<'_, PyAny>>,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let this = Self::for_write(slf, transaction)?;
        let op = Op::Restore {
            oid: oid_arg(oid)?,
            serial: tid_arg(serial)?,
            data: Some(data_arg(data)?.into()),
            prev_txn: prev_txn.map(tid_arg).transpose()?,
            blob: Some(blobfilename),
        };
        this.apply(slf, transaction, op).map(drop)
    }

    #[pyo3(name = "deleteObject")]
    fn delete_object(
        slf: &Bound<'_, Self>,
        oid: &Bound<'_, PyAny>,
        oldserial: &Bound<'_, PyAny>,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let this = Self::for_write(slf, transaction)?;
        let op = Op::Delete { oid: oid_arg(oid)?, serial: serial_arg(oldserial)? };
        this.apply(slf, transaction, op).map(drop)
    }

    #[pyo3(name = "checkCurrentSerialInTransaction")]
    fn check_current(
        slf: &Bound<'_, Self>,
        oid: &Bound<'_, PyAny>,
        serial: &Bound<'_, PyAny>,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let this = slf.get().opened()?;
        this.check_for(slf, transaction)?;
        let op = Op::CheckCurrent { oid: oid_arg(oid)?, serial: serial_arg(serial)? };
        this.apply(slf, transaction, op).map(drop)
    }

    /// Undoes the transaction `undone`; answers the current transaction's tid and the oids written.
    fn _undo<'py>(
        slf: &Bound<'py, Self>,
        undone: &Bound<'py, PyAny>,
        transaction: &Bound<'py, PyAny>,
    ) -> PyResult<(Bound<'py, PyBytes>, Vec<Bound<'py, PyBytes>>)> {
        let py = slf.py();
        let this = Self::for_write(slf, transaction)?;
        let (oids, tid) = this.apply(slf, transaction, Op::Undo { tid: tid_arg(undone)? })?;
        Ok((tid_bytes(py, tid), oids.into_iter().map(|oid| oid_bytes(py, oid)).collect()))
    }

    /// Votes; answers the oids whose conflicts were resolved.
    fn tpc_vote<'py>(&self, transaction: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let this = self.opened()?;
        let py = transaction.py();
        this.writable(py)?;
        this.with_pending(transaction, |pending, _| {
            let files = pending.blob_files();
            let outcome = match this.engine.votes_at_once(&pending) {
                true => this.engine.vote_pending(pending),
                false => py.detach(|| this.engine.vote_pending(pending)),
            };
            match outcome {
                Ok(voted) => {
                    let resolved = voted.resolved.iter().map(|oid| oid_bytes(py, *oid)).collect();
                    (Phase::Voted(voted), Ok(resolved))
                }
                Err(error) => {
                    py.detach(|| this.engine.discard_blob_files(&files));
                    (Phase::Busy, Err(errors::storage_error(py, &error)))
                }
            }
        })
    }

    /// Makes the transaction durable, calls `callback(tid)`, then lets others see it. If the callback raises, the
    /// transaction is taken back and the exception goes on.
    #[pyo3(signature = (transaction, callback=None))]
    fn _finish<'py>(
        &self,
        transaction: &Bound<'py, PyAny>,
        callback: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let this = self.opened()?;
        let py = transaction.py();
        let current = {
            let mut guard = locked(&this.current);
            if !matches!(Opened::check(guard.as_mut(), transaction)?.phase, Phase::Voted(_)) {
                return Err(errors::transaction_error("tpc_finish without a successful tpc_vote"));
            }
            guard.take()
        };
        let Some(Current { phase: Phase::Voted(voted), .. }) = current else {
            return Err(errors::transaction_error("tpc_finish without a successful tpc_vote"));
        };
        let callback = callback.map(|callback| callback.clone().unbind());
        let mut raised = None;
        let finished = this.courtesy.detach(py, || {
            let finished = this.engine.finish_if(voted, &mut |tid| {
                this.publishing.begin(tid);
                let Some(callback) = &callback else { return true };
                let waiting = this.courtesy.wait_for_gil();
                let called = Python::attach(|py| {
                    drop(waiting);
                    callback.bind(py).call1((tid_bytes(py, tid),)).map(drop)
                });
                called.map_err(|error| raised = Some(error)).is_ok()
            });
            this.publishing.end();
            finished
        });
        match (finished, raised) {
            (Ok(Some(tid)), _) => Ok(tid_bytes(py, tid)),
            (Ok(None), Some(error)) => Err(error),
            (Ok(None), None) => Err(errors::transaction_error("the transaction was taken back")),
            // it could not be taken back
            (Err(error), _) => Err(errors::storage_error(py, &error)),
        }
    }

    /// Gives the transaction up; false if another one is current.
    fn _abort(&self, transaction: &Bound<'_, PyAny>) -> PyResult<bool> {
        let this = self.opened()?;
        let py = transaction.py();
        let current = {
            let mut guard = locked(&this.current);
            match Opened::check(guard.as_mut(), transaction) {
                Ok(_) => guard.take(),
                Err(_) => return Ok(false),
            }
        };
        py.detach(|| match current.map(|current| current.phase) {
            Some(Phase::Begun(pending)) => this.engine.abort_pending(pending),
            Some(Phase::Voted(voted)) => this.engine.abort(voted),
            _ => {}
        });
        Ok(true)
    }

    // -- blobs

    #[pyo3(name = "loadBlob")]
    fn load_blob(
        &self,
        py: Python<'_>,
        oid: &Bound<'_, PyAny>,
        serial: &Bound<'_, PyAny>,
    ) -> PyResult<String> {
        let this = self.opened()?;
        let (oid, serial) = (oid_arg(oid)?, serial_arg(serial)?);
        let path = match (this.engine.blob_path(oid, serial), this.engine.blob_dir()) {
            (Err(StorageError::NoBlob { .. }), Some(dir)) => {
                return Err(errors::no_blob(py, &dir.path(oid, serial), oid, serial));
            }
            (path, _) => path.or_raise(py)?,
        };
        path.into_os_string()
            .into_string()
            .map_err(|path| PyValueError::new_err(format!("not a readable file name: {}", path.display())))
    }

    // -- keeping

    /// Saves the index.
    fn _save_index(&self, py: Python<'_>) -> PyResult<()> {
        let this = self.opened()?;
        py.detach(|| this.engine.checkpoint()).or_raise(py)
    }

    fn _close(&self, py: Python<'_>) -> PyResult<()> {
        let this = self.opened()?;
        py.detach(|| this.engine.close()).or_raise(py)
    }

    /// Position of an oid's current record, or None.
    fn _index_get(&self, oid: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
        let this = self.opened()?;
        Ok(this.engine.snapshot().index.get(oid_arg(oid)?))
    }

    /// The smallest oid from `oid` on and its position, or None.
    fn _index_from<'py>(
        &self,
        py: Python<'py>,
        oid: &Bound<'py, PyAny>,
    ) -> PyResult<Option<(Bound<'py, PyBytes>, u64)>> {
        let this = self.opened()?;
        let found = this.engine.snapshot().index.first_from(oid_arg(oid)?);
        Ok(found.map(|(oid, position)| (oid_bytes(py, oid), position)))
    }

    /// The largest oid given or stored.
    fn _max_oid<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(oid_bytes(py, self.opened()?.engine.max_oid()))
    }

    fn _index_max<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        Ok(self.opened()?.engine.snapshot().index.max_oid().map(|oid| oid_bytes(py, oid)))
    }
}

/// Versions were given up long ago; only an empty one may be named.
fn no_version(version: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
    match version {
        Some(version) if version.is_truthy()? => Err(PyTypeError::new_err("versions are not supported")),
        _ => Ok(()),
    }
}

fn described<'py>(py: Python<'py>, tid: Tid, size: u64, meta: &TxnMeta) -> PyResult<Bound<'py, PyTuple>> {
    let bytes = |bytes: &Bytes| PyBytes::new(py, bytes);
    (tid_bytes(py, tid), size, bytes(&meta.user), bytes(&meta.description), bytes(&meta.extension))
        .into_pyobject(py)
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<FileStorageBase>()?;
    m.add_class::<records::Transactions>()?;
    m.add_class::<records::Records>()?;
    m.add_class::<records::RecordReader>()?;
    m.add_class::<records::Record>()
}
