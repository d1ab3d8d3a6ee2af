//! `_zeo.ClientStorageBase`: the client under `zeo_rs.ClientStorage`, which adds ZODB's interfaces, blobs and configuration.
//!
//! A long list of short methods: one for each of ZODB's that is not Python.
//!
//! Every method that may wait gives the GIL up first. `loadBefore` and `new_oid` look for an answer that needs no
//! waiting before they do: a cache hit costs one shard lock, one copy of the data into a `bytes` and no GIL transition.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString, PyTuple};

use super::client_callbacks::Callbacks;
use super::client_errors::client_error;
use super::convert::{data_arg, oid_arg, oid_bytes, optional_tid_arg, serial_arg, tid_arg, tid_bytes};
use super::tls::PyClientTls;
use super::values::{from_python, to_python};
use super::{errors, logging};
use crate::client::{Access, CallbackError, Client, ClientError, FinishCallback, Options};
use crate::ids::{Oid, Tid};
use crate::net::Address;
use crate::pickle::{self, Value};
use crate::storage::Loaded;
use crate::wire::{Call, TxnKey};

pub(crate) type Revision<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>, Option<Bound<'py, PyBytes>>);

#[pyclass(subclass, frozen, weakref, module = "zeo_rs._zeo")]
pub(crate) struct ClientStorageBase {
    first: Life,
}

/// The client and its transaction, as of one process. A forked child gets the next one: what the parent had may be
/// locked by threads that the child does not have, and its socket is the parent's.
struct Life {
    /// [`FORKS`] when it began.
    forks: u32,
    client: OnceLock<Arc<Client>>,
    /// The transaction being committed: keeps the object alive whose address is its key.
    transaction: Mutex<Option<Py<PyAny>>>,
    /// What `new_addr` has set. Locked only with the GIL held, so never by another thread at a fork.
    addresses: Mutex<Option<Vec<Address>>>,
    next: OnceLock<Box<Self>>,
}

/// How often this process and its parents were forked. Counted by `os.register_at_fork`.
static FORKS: AtomicU32 = AtomicU32::new(0);

impl Life {
    fn new() -> Self {
        Self {
            forks: FORKS.load(Ordering::Relaxed),
            client: OnceLock::new(),
            transaction: Mutex::new(None),
            addresses: Mutex::new(None),
            next: OnceLock::new(),
        }
    }
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<ClientStorageBase>()?;
    m.add_function(wrap_pyfunction!(_after_fork_in_child, m)?)?;
    m.add_function(wrap_pyfunction!(super::client_callbacks::cache_file_stats, m)?)?;
    let keywords = PyDict::new(m.py());
    keywords.set_item("after_in_child", m.getattr("_after_fork_in_child")?)?;
    m.py().import("os")?.call_method("register_at_fork", (), Some(&keywords))?;
    Ok(())
}

#[pyfunction]
fn _after_fork_in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

#[pymethods]
#[allow(non_snake_case)]
impl ClientStorageBase {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs))]
    fn new(_args: &Bound<'_, PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> Self {
        Self { first: Life::new() }
    }

    /// Starts the client. `addresses`: text is a path, a pair host and port. `access`: `w`, `r`, or `wr` for
    /// writable with fallback.
    #[pyo3(signature = (addresses, storage, name, access, wait_timeout, cache_size, label=None, tls=None, cache_path=None, cache_trace=None))]
    #[allow(clippy::too_many_arguments)]
    fn _open(
        slf: &Bound<'_, Self>,
        addresses: Vec<Bound<'_, PyAny>>,
        storage: String,
        name: String,
        access: &str,
        wait_timeout: f64,
        cache_size: usize,
        label: Option<String>,
        tls: Option<PyRef<'_, PyClientTls>>,
        cache_path: Option<PathBuf>,
        cache_trace: Option<PathBuf>,
    ) -> PyResult<()> {
        let py = slf.py();
        logging::refresh(py);
        let mut options = Options::new(addresses_of(&addresses)?);
        options.storage = storage;
        options.name = name;
        options.access = match access {
            "r" => Access::ReadOnly,
            "wr" => Access::Fallback,
            _ => Access::Writable,
        };
        options.wait_timeout = Duration::try_from_secs_f64(wait_timeout)
            .map_err(|_| PyValueError::new_err(format!("wait_timeout is no duration: {wait_timeout}")))?;
        options.cache_size = cache_size;
        options.label = label;
        options.cache_path = cache_path;
        options.cache_trace = cache_trace;
        options.tls = tls.map(|tls| tls.0.clone());
        let callbacks = Arc::new(Callbacks::new(slf.as_any())?);
        let client =
            py.detach(|| Client::new(options, callbacks)).map_err(|error| client_error(py, error))?;
        // Known before its thread calls back.
        let life = &slf.get().first;
        life.client
            .set(client)
            .map_err(|_| PyRuntimeError::new_err("this storage has been opened already"))?;
        slf.get().wait(py, |client| client.connect())
    }

    fn _wait_connected(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let timeout = Duration::try_from_secs_f64(timeout).unwrap_or_default();
        self.wait(py, |client| client.wait_connected(timeout))
    }

    fn _close(&self, py: Python<'_>) -> PyResult<()> {
        let life = self.life();
        match life.client.get() {
            Some(client) => py.detach(|| client.close()),
            // Not opened, or forked and not used since: what the parent has is not ours to close.
            None if life.forks != FORKS.load(Ordering::Relaxed) => {
                let client = self.client()?;
                py.detach(|| client.close());
            }
            None => {}
        }
        Ok(())
    }

    fn _set_addresses(&self, addresses: Vec<Bound<'_, PyAny>>) -> PyResult<()> {
        let addresses = addresses_of(&addresses)?;
        let client = self.client()?;
        *self.life().addresses.lock().unwrap_or_else(PoisonError::into_inner) = Some(addresses.clone());
        client.set_addresses(addresses);
        Ok(())
    }

    // ---- loads

    fn loadBefore<'py>(
        &self,
        py: Python<'py>,
        oid: &Bound<'py, PyAny>,
        tid: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Revision<'py>>> {
        let (oid, before) = (oid_arg(oid)?, tid_arg(tid)?);
        let client = self.client()?;
        let loaded = match client.load_cached(oid, before) {
            Some(loaded) => Some(loaded),
            None => self.wait(py, |client| client.load_missed(oid, before))?,
        };
        Ok(loaded.map(|loaded| revision(py, &loaded)))
    }

    #[pyo3(signature = (oid, version = None))]
    fn load<'py>(
        &self,
        py: Python<'py>,
        oid: &Bound<'py, PyAny>,
        version: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let _ = version;
        let oid = oid_arg(oid)?;
        let client = self.client()?;
        let loaded = match client.load_cached(oid, Tid::MAX) {
            Some(loaded) => Some(loaded),
            None => self.wait(py, |client| client.load_missed(oid, Tid::MAX))?,
        };
        let loaded = loaded.ok_or_else(|| errors::key_error(py, oid))?;
        Ok((PyBytes::new(py, &loaded.data), tid_bytes(py, loaded.tid)))
    }

    fn loadSerial<'py>(
        &self,
        py: Python<'py>,
        oid: &Bound<'py, PyAny>,
        serial: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (oid, serial) = (oid_arg(oid)?, tid_arg(serial)?);
        self.read(py, "loadSerial", &Call::LoadSerial { oid, serial })
    }

    fn getTid<'py>(&self, py: Python<'py>, oid: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.read(py, "getTid", &Call::GetTid { oid: oid_arg(oid)? })
    }

    /// Starts loading what the cache does not have; waits for nothing and never raises for the network.
    fn prefetch(&self, py: Python<'_>, oids: &Bound<'_, PyAny>, tid: &Bound<'_, PyAny>) -> PyResult<()> {
        let before = tid_arg(tid)?;
        let oids = oids.try_iter()?.map(|oid| oid_arg(&oid?)).collect::<PyResult<Vec<Oid>>>()?;
        self.wait(py, |client| client.prefetch(&oids, before))
    }

    fn lastTransaction<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let client = self.client()?;
        // What is waited for may be a callback, which wants the GIL: it is never kept while waiting.
        let tid = client.try_last_tid().unwrap_or_else(|| py.detach(|| client.last_tid()));
        Ok(tid_bytes(py, tid))
    }

    fn new_oid<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let oid = match self.client()?.try_new_oid() {
            Some(oid) => oid,
            None => self.wait(py, |client| client.new_oid())?,
        };
        Ok(oid_bytes(py, oid))
    }

    // ---- plain calls

    #[pyo3(signature = (oid, size = 1))]
    fn history<'py>(
        &self,
        py: Python<'py>,
        oid: &Bound<'py, PyAny>,
        size: i64,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.read(py, "history", &Call::History { oid: oid_arg(oid)?, size })
    }

    #[pyo3(signature = (next = None))]
    fn record_iternext<'py>(
        &self,
        py: Python<'py>,
        next: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let next = next.map(oid_arg).transpose()?;
        self.read(py, "record_iternext", &Call::RecordIternext { next })
    }

    #[pyo3(signature = (first = 0, last = -20, specification = None), text_signature = "($self, first=0, last=-20, specification=None)")]
    fn undoInfo<'py>(
        &self,
        py: Python<'py>,
        first: i64,
        last: i64,
        specification: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let specification = specification.map_or(Ok(Value::None), from_python)?;
        self.read(py, "undoInfo", &Call::UndoInfo { first, last, specification })
    }

    #[pyo3(signature = (first = 0, last = -20, filter = None), text_signature = "($self, first=0, last=-20, filter=None)")]
    fn undoLog<'py>(
        &self,
        py: Python<'py>,
        first: i64,
        last: i64,
        filter: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if filter.is_some() {
            // A function cannot be sent.
            return Ok(pyo3::types::PyList::empty(py).into_any());
        }
        self.read(py, "undoLog", &Call::UndoLog { first, last })
    }

    fn _pack(&self, py: Python<'_>, time: f64, wait: bool) -> PyResult<()> {
        self.wait(py, |client| client.call("pack", &Call::Pack { time, wait })).map(drop)
    }

    #[pyo3(signature = (timeout = None))]
    fn server_status<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyAny>> {
        let answer = self.wait(py, |client| {
            let timeout = timeout.map(|t| Duration::try_from_secs_f64(t).unwrap_or_default());
            let timeout = timeout.unwrap_or(client.options().wait_timeout);
            client.call_within("server_status", &Call::ServerStatus, timeout)
        })?;
        to_python(py, &answer)
    }

    fn _ping(&self, py: Python<'_>) -> PyResult<()> {
        self.wait(py, |client| client.read("ping", &Call::Ping)).map(drop)
    }

    // ---- iterators: they live in one connection

    fn _iterator_start<'py>(
        &self,
        py: Python<'py>,
        start: Option<&Bound<'py, PyAny>>,
        stop: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(u64, Bound<'py, PyAny>)> {
        let (start, stop) = (optional_tid_arg(start)?, optional_tid_arg(stop)?);
        let (generation, answer) = self.wait(py, |client| {
            client.wait_connected(client.options().wait_timeout)?;
            let generation = client.session().map_or(0, |session| session.generation);
            let answer =
                client.call_on(generation, "iterator_start", &Call::IteratorStart { start, stop })?;
            Ok((generation, answer))
        })?;
        Ok((generation, to_python(py, &answer)?))
    }

    fn _iterator_next<'py>(&self, py: Python<'py>, generation: u64, iid: i64) -> PyResult<Bound<'py, PyAny>> {
        self.call_on(py, generation, "iterator_next", &Call::IteratorNext { iid })
    }

    fn _iterator_record_start<'py>(
        &self,
        py: Python<'py>,
        generation: u64,
        iid: i64,
        tid: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let call = Call::IteratorRecordStart { txn_iid: iid, tid: tid_arg(tid)? };
        self.call_on(py, generation, "iterator_record_start", &call)
    }

    fn _iterator_record_next<'py>(
        &self,
        py: Python<'py>,
        generation: u64,
        iid: i64,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.call_on(py, generation, "iterator_record_next", &Call::IteratorRecordNext { iid })
    }

    /// Tells the server, with the next call, which of its iterators nobody needs any more.
    fn _iterator_gc(&self, py: Python<'_>, generation: u64, iids: Vec<i64>) -> PyResult<()> {
        let client = self.client()?;
        if client.session().is_some_and(|session| session.generation == generation) {
            return self.wait(py, |client| client.notify(&Call::IteratorGc { iids }));
        }
        Ok(())
    }

    // ---- two-phase commit

    #[pyo3(signature = (txn, tid = None, status = " "))]
    fn tpc_begin(
        &self,
        py: Python<'_>,
        txn: &Bound<'_, PyAny>,
        tid: Option<&Bound<'_, PyAny>>,
        status: &str,
    ) -> PyResult<()> {
        let tid = optional_tid_arg(tid)?;
        let status = match status.as_bytes() {
            [status] => *status,
            _ => return Err(PyValueError::new_err(format!("a status is one character, not {status:?}"))),
        };
        let text = |name: &str| -> PyResult<Bytes> {
            let value = txn.getattr(name)?;
            match value.cast::<PyString>() {
                Ok(text) => Ok(Bytes::copy_from_slice(text.to_str()?.as_bytes())),
                Err(_) => data_arg(&value),
            }
        };
        let (user, description, extension) = (text("user")?, text("description")?, extension_of(txn)?);
        let key = key_of(txn);
        self.wait(py, |client| client.tpc_begin(key, user, description, extension, tid, status))?;
        // Dropped without the lock: that may run Python code.
        let ended = self.transaction().replace(txn.clone().unbind());
        drop(ended);
        Ok(())
    }

    /// Queued and written with others; errors show at `tpc_vote`.
    fn store(
        &self,
        py: Python<'_>,
        oid: &Bound<'_, PyAny>,
        serial: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
        version: &Bound<'_, PyAny>,
        txn: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        no_version(version)?;
        let key = self.committing(txn)?;
        let (oid, serial, data) = (oid_arg(oid)?, serial_arg(serial)?, data_arg(data)?);
        self.wait(py, |client| client.store(&key, oid, serial, data))
    }

    fn checkCurrentSerialInTransaction(
        &self,
        py: Python<'_>,
        oid: &Bound<'_, PyAny>,
        serial: &Bound<'_, PyAny>,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let key = self.committing(transaction)?;
        let (oid, serial) = (oid_arg(oid)?, serial_arg(serial)?);
        self.wait(py, |client| client.check_current(&key, oid, serial))
    }

    fn deleteObject(
        &self,
        py: Python<'_>,
        oid: &Bound<'_, PyAny>,
        serial: &Bound<'_, PyAny>,
        txn: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let key = self.committing(txn)?;
        let (oid, serial) = (oid_arg(oid)?, serial_arg(serial)?);
        self.wait(py, |client| client.delete_object(&key, oid, serial))
    }

    #[allow(clippy::too_many_arguments)]
    fn restore(
        &self,
        py: Python<'_>,
        oid: &Bound<'_, PyAny>,
        serial: &Bound<'_, PyAny>,
        data: Option<&Bound<'_, PyAny>>,
        version: &Bound<'_, PyAny>,
        prev_txn: Option<&Bound<'_, PyAny>>,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        no_version(version)?;
        let key = self.committing(transaction)?;
        let (oid, serial) = (oid_arg(oid)?, serial_arg(serial)?);
        let (data, prev) = (data.map(data_arg).transpose()?, optional_tid_arg(prev_txn)?);
        self.wait(py, |client| client.restore(&key, oid, serial, data, prev))
    }

    fn undo(&self, py: Python<'_>, trans_id: &Bound<'_, PyAny>, txn: &Bound<'_, PyAny>) -> PyResult<()> {
        let key = self.committing(txn)?;
        let trans_id = data_arg(trans_id)?;
        self.wait(py, |client| client.undo(&key, trans_id))
    }

    #[allow(clippy::too_many_arguments)]
    fn _store_blob(
        &self,
        py: Python<'_>,
        oid: &Bound<'_, PyAny>,
        serial: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
        path: PathBuf,
        shared: bool,
        transaction: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let key = self.committing(transaction)?;
        let (oid, serial, data) = (oid_arg(oid)?, serial_arg(serial)?, data_arg(data)?);
        self.wait(py, |client| {
            if shared {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                client.store_blob_shared(&key, oid, serial, data, name)
            } else {
                client.store_blob(&key, oid, serial, data, &path)
            }
        })
    }

    /// The answer to `vote`: oids resolved or undone by the server, dicts of conflicts to resolve.
    fn _vote<'py>(
        &self,
        py: Python<'py>,
        transaction: &Bound<'py, PyAny>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let key = self.committing(transaction)?;
        let answer = self.wait(py, |client| client.tpc_vote(&key))?;
        answer.iter().map(|item| to_python(py, item)).collect()
    }

    fn _finish<'py>(
        &self,
        py: Python<'py>,
        transaction: &Bound<'py, PyAny>,
        callback: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let key = self.committing(transaction)?;
        let callback: FinishCallback = match callback {
            None => Box::new(|_| Ok(())),
            Some(callback) => Box::new(move |tid| {
                Python::attach(|py| {
                    let result = callback.call1(py, (tid_bytes(py, tid),)).map(drop);
                    drop(callback);
                    result.map_err(|error| CallbackError(Box::new(error.clone_ref(py)), error.to_string()))
                })
            }),
        };
        let finished = self.wait(py, |client| client.tpc_finish(&key, callback));
        self.forget(transaction);
        Ok(tid_bytes(py, finished?))
    }

    fn _abort(&self, py: Python<'_>, transaction: &Bound<'_, PyAny>) -> PyResult<()> {
        let key = key_of(transaction);
        let aborted = self.wait(py, |client| client.tpc_abort(&key));
        self.forget(transaction);
        aborted
    }

    fn _is_committing(&self, transaction: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(self.client()?.is_committing(&key_of(transaction)))
    }

    /// The transaction being committed, or `None`.
    fn tpc_transaction(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.transaction().as_ref().map(|transaction| transaction.clone_ref(py))
    }

    // ---- blobs

    /// Number of bytes, or `None` if the server sent nothing.
    fn _download_blob(
        &self,
        py: Python<'_>,
        oid: &Bound<'_, PyAny>,
        serial: &Bound<'_, PyAny>,
        path: PathBuf,
    ) -> PyResult<Option<u64>> {
        let (oid, serial) = (oid_arg(oid)?, tid_arg(serial)?);
        self.wait(py, |client| client.download_blob(oid, serial, &path))
    }

    // ---- state

    fn _is_connected(&self) -> bool {
        self.client().is_ok_and(|client| client.is_connected())
    }

    fn _is_read_only(&self) -> PyResult<bool> {
        Ok(self.client()?.is_read_only())
    }

    fn _info<'py>(&self, py: Python<'py>, key: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.client()?.info(key).map(|value| to_python(py, &value)).transpose()
    }

    /// `uploaded`, `downloaded`: bytes since this storage was made; `transfers`: what is on its way now.
    fn blob_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        // Its lock is held by who writes a blob to the disk.
        let client = self.client()?;
        let stats = py.detach(|| client.blob_stats());
        let transfers = stats.transfers.into_iter().map(|transfer| {
            let dict = PyDict::new(py);
            dict.set_item("direction", if transfer.is_upload { "up" } else { "down" })?;
            dict.set_item("oid", oid_bytes(py, transfer.oid))?;
            dict.set_item("bytes_done", transfer.bytes_done)?;
            dict.set_item("bytes_total", transfer.bytes_total)?;
            Ok(dict)
        });
        let dict = PyDict::new(py);
        dict.set_item("transfers", transfers.collect::<PyResult<Vec<_>>>()?)?;
        dict.set_item("uploaded", stats.uploaded)?;
        dict.set_item("downloaded", stats.downloaded)?;
        Ok(dict)
    }

    /// `hits`, `misses` and the like of the object cache; `shared`: misses that were found in the cache shared by the clients of the
    /// server's machine.
    fn cache_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let client = self.client()?;
        let stats = client.cache().stats();
        let dict = PyDict::new(py);
        for (key, value) in [
            ("hits", stats.hits),
            ("misses", stats.misses),
            ("shared", client.shelf_hits()),
            ("stores", stats.stores),
            ("evictions", stats.evictions),
            ("invalidations", stats.invalidations),
            ("revisions", stats.revisions),
            ("bytes", stats.bytes),
            ("max_bytes", stats.max_bytes),
        ] {
            dict.set_item(key, value)?;
        }
        Ok(dict)
    }
}

impl ClientStorageBase {
    /// The client of this process. After a fork the child gets a new one, with a connection and a cache of its own.
    /// Otherwise one atomic read and one comparison.
    pub(crate) fn client(&self) -> PyResult<&Arc<Client>> {
        let life = self.life();
        if let (Some(client), true) = (life.client.get(), life.forks == FORKS.load(Ordering::Relaxed)) {
            return Ok(client);
        }
        let Some(parents) = life.client.get() else {
            return Err(PyRuntimeError::new_err("ClientStorage.__init__ has not been called"));
        };
        let next = life.next.get_or_init(|| Box::new(Life::new()));
        if next.client.get().is_none() {
            let addresses = life.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let client =
                parents.reopen(addresses).map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
            if let Err(second) = next.client.set(client) {
                second.start_close();
            }
        }
        if let Some(client) = next.client.get() {
            client.connect().map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        }
        next.client
            .get()
            .ok_or_else(|| PyRuntimeError::new_err("the storage could not be opened after a fork"))
    }

    /// The newest one.
    fn life(&self) -> &Life {
        let mut life = &self.first;
        while let Some(next) = life.next.get() {
            life = next;
        }
        life
    }

    /// Runs what may wait without the GIL.
    fn wait<T: Send>(
        &self,
        py: Python<'_>,
        run: impl FnOnce(&Arc<Client>) -> Result<T, ClientError> + Send,
    ) -> PyResult<T> {
        let client = self.client()?;
        py.detach(|| run(client)).map_err(|error| client_error(py, error))
    }

    fn read<'py>(&self, py: Python<'py>, name: &'static str, call: &Call) -> PyResult<Bound<'py, PyAny>> {
        let answer = self.wait(py, |client| client.read(name, call))?;
        to_python(py, &answer)
    }

    fn call_on<'py>(
        &self,
        py: Python<'py>,
        generation: u64,
        name: &'static str,
        call: &Call,
    ) -> PyResult<Bound<'py, PyAny>> {
        let answer = self.wait(py, |client| client.call_on(generation, name, call))?;
        to_python(py, &answer)
    }

    fn transaction(&self) -> std::sync::MutexGuard<'_, Option<Py<PyAny>>> {
        self.life().transaction.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key of the transaction, which must be the one being committed. Checked before the other arguments.
    fn committing(&self, transaction: &Bound<'_, PyAny>) -> PyResult<TxnKey> {
        let (client, key) = (self.client()?, key_of(transaction));
        if client.is_committing(&key) {
            return Ok(key);
        }
        let py = transaction.py();
        if client.is_read_only() {
            return Err(client_error(py, ClientError::ReadOnly));
        }
        Err(errors::wrong_transaction(self.tpc_transaction(py), transaction))
    }

    fn forget(&self, transaction: &Bound<'_, PyAny>) {
        let ended = self.transaction().take_if(|open| open.is(transaction));
        drop(ended);
    }
}

impl Drop for ClientStorageBase {
    fn drop(&mut self) {
        let mut life = Some(&mut self.first);
        while let Some(current) = life {
            if let Some(client) = current.client.take() {
                if current.forks == FORKS.load(Ordering::Relaxed) {
                    client.start_close();
                } else {
                    // The parent's: closing its socket here would end the parent's connection.
                    std::mem::forget(client);
                }
            }
            life = current.next.get_mut().map(Box::as_mut);
        }
    }
}

pub(crate) fn revision<'py>(py: Python<'py>, loaded: &Loaded) -> Revision<'py> {
    (
        PyBytes::new(py, &loaded.data),
        tid_bytes(py, loaded.tid),
        loaded.end_tid.map(|end_tid| tid_bytes(py, end_tid)),
    )
}

/// As ZEO does: the address of the transaction object.
fn key_of(transaction: &Bound<'_, PyAny>) -> TxnKey {
    Value::Int(transaction.as_ptr() as i64)
}

fn no_version(version: &Bound<'_, PyAny>) -> PyResult<()> {
    if version.is_truthy()? { Err(PyTypeError::new_err("versions are not supported")) } else { Ok(()) }
}

/// The extension as a dict: from `extension_bytes`, so that its classes stay data, else from `extension`. The latter also
/// if it was stored as something else than a dict: by a subclass that pickles itself in its own way.
fn extension_of(transaction: &Bound<'_, PyAny>) -> PyResult<Value> {
    if let Ok(stored) = transaction.getattr("extension_bytes")
        && let Ok(stored) = stored.cast::<PyBytes>()
    {
        let decoded = pickle::decode_extension(stored.as_bytes())
            .map_err(|problem| PyValueError::new_err(format!("the transaction's extension: {problem}")))?;
        if matches!(decoded, Value::Dict(_)) {
            return Ok(decoded);
        }
    }
    match transaction.getattr("extension").or_else(|_| transaction.getattr("_extension")) {
        Ok(extension) => from_python(&extension),
        Err(_) => Ok(Value::Dict(Vec::new())),
    }
}

fn addresses_of(addresses: &[Bound<'_, PyAny>]) -> PyResult<Vec<Address>> {
    addresses
        .iter()
        .map(|address| {
            if let Ok((host, port)) = address.extract::<(Option<String>, u16)>() {
                return Ok(Address::tcp(host.unwrap_or_default(), port));
            }
            if let Ok(path) = address.extract::<PathBuf>() {
                return Ok(Address::Unix(path));
            }
            Err(PyValueError::new_err(format!(
                "{} is no address: use (host, port), a port, or the path of a unix socket",
                address.repr()?
            )))
        })
        .collect()
}
