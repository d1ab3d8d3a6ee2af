//! [`PyServer`] (`_zeo.Server`): a server in threads of its own, started and stopped from Python.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::resolver::PythonResolver;
use super::served_storage::ServedStorage;
use super::tls::PyServerTls;
use super::{errors, logging};
use crate::ids::Tid;
use crate::net::Address;
use crate::server::{Server, ServerConfig, ServerError, ServerHandle};
use crate::storage::Storage;
use crate::storage::file::{FileStorage, FileStorageOptions};
use crate::storage::memory::MemoryStorage;

/// `Server(addresses, storages, options)`: listens and serves as soon as it is made.
///
/// `addresses`: texts (`host:port`, a path) or `(host, port)`. `storages`: `(name, storage)`, a storage being
/// `('filestorage', path, {option: value})`, `('mappingstorage', name)`, or any object with ZODB's `IStorage`. `options`: the
/// names of ZEO's `StorageServer` arguments, and our limits.
#[pyclass(name = "Server", module = "zeo_rs._zeo", frozen)]
struct PyServer {
    /// `None` when this is being dropped.
    handle: Mutex<Option<ServerHandle>>,
    addresses: Vec<Address>,
}

impl PyServer {
    fn with<T>(&self, body: impl FnOnce(&mut ServerHandle) -> T) -> Option<T> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(body)
    }
}

/// One that nobody has stopped. Its threads need the GIL to close storages in Python.
impl Drop for PyServer {
    fn drop(&mut self) {
        let handle = self.handle.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let _ = Python::try_attach(|py| py.detach(|| drop(handle)));
    }
}

#[pymethods]
impl PyServer {
    #[new]
    #[pyo3(signature = (addresses, storages, options=None))]
    fn new(
        py: Python<'_>,
        addresses: Vec<Bound<'_, PyAny>>,
        storages: Vec<(String, Bound<'_, PyAny>)>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        logging::refresh(py);
        let mut config = options.map(config_of).transpose()?.unwrap_or_default();
        config.addresses = addresses.iter().map(address_of).collect::<PyResult<_>>()?;
        config.resolver = Arc::new(PythonResolver::default());
        let clients_resolve = config.client_conflict_resolution;
        let mut opened: Vec<(String, Arc<dyn Storage>)> = Vec::new();
        for (name, specification) in &storages {
            match open(specification, clients_resolve) {
                Ok(storage) => opened.push((name.clone(), storage)),
                Err(error) => {
                    py.detach(|| opened.iter().for_each(|(_, storage)| drop(storage.close())));
                    return Err(error);
                }
            }
        }
        let handle = py.detach(|| Server::bind(config, opened)?.start()).map_err(|error| raise(py, error))?;
        Ok(Self { addresses: handle.addresses().to_vec(), handle: Mutex::new(Some(handle)) })
    }

    /// The first address listened on: `(host, port)` or a path.
    #[getter]
    fn address<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.addresses.first().map(|address| address_value(py, address)).transpose()
    }

    #[getter]
    fn addresses<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.addresses.iter().map(|address| address_value(py, address)).collect()
    }

    /// Where operators are answered over HTTP, or `None`.
    #[getter]
    fn http_address<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let address = self.with(|handle| handle.http_address().cloned()).flatten();
        address.map(|address| address_value(py, &address)).transpose()
    }

    /// The status of all storages as JSON text, as `ruok` answers it.
    fn status(&self, py: Python<'_>) -> String {
        py.detach(|| self.with(|handle| handle.status_json())).unwrap_or_default()
    }

    /// Stops in good order: clients that have voted may finish, storages are closed. Further calls do nothing.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        let stopped = py.detach(|| self.with(ServerHandle::stop));
        stopped.unwrap_or(Ok(())).map_err(|error| raise(py, error))
    }
}

fn raise(py: Python<'_>, error: ServerError) -> PyErr {
    match error {
        ServerError::Storage { source, .. } => errors::storage_error(py, &source),
        ServerError::Bind { ref source, .. } => match source.raw_os_error() {
            Some(number) => PyOSError::new_err((number, error.to_string())),
            None => PyOSError::new_err(error.to_string()),
        },
        ServerError::Threads(_) | ServerError::Inherited(_) => PyOSError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

fn address_of(value: &Bound<'_, PyAny>) -> PyResult<Address> {
    if let Ok((host, port)) = value.extract::<(Option<String>, u16)>() {
        return Ok(Address::tcp(host.unwrap_or_default(), port));
    }
    if let Ok(port) = value.extract::<u16>() {
        return Ok(Address::tcp("127.0.0.1", port));
    }
    let text: String = value.extract().map_err(|_| {
        PyTypeError::new_err(format!("{value} is no address: give (host, port), 'host:port', or a path"))
    })?;
    text.parse().map_err(|error: crate::net::AddressError| PyValueError::new_err(error.to_string()))
}

fn address_value<'py>(py: Python<'py>, address: &Address) -> PyResult<Bound<'py, PyAny>> {
    match address {
        Address::Tcp { host, port } => Ok((host, *port).into_pyobject(py)?.into_any()),
        Address::Unix(path) => Ok(path.to_string_lossy().into_pyobject(py)?.into_any()),
    }
}

fn config_of(options: &Bound<'_, PyDict>) -> PyResult<ServerConfig> {
    let mut config = ServerConfig::default();
    for (name, value) in options {
        let name: String = name.extract()?;
        let seconds = || -> PyResult<Option<Duration>> {
            let seconds: Option<f64> = value.extract()?;
            let seconds = seconds.filter(|seconds| *seconds > 0.0);
            let of = |seconds| {
                Duration::try_from_secs_f64(seconds).map_err(|e| PyValueError::new_err(e.to_string()))
            };
            seconds.map(of).transpose()
        };
        match name.as_str() {
            "msgpack" => config.msgpack = value.is_truthy()?,
            "read_only" => config.read_only = value.is_truthy()?,
            "client_conflict_resolution" => config.client_conflict_resolution = value.is_truthy()?,
            "invalidation_queue_size" => config.invalidation_queue_size = value.extract()?,
            "invalidation_age" => config.invalidation_age = seconds()?,
            "transaction_timeout" => config.transaction_timeout = seconds()?,
            "inherit" => config.inherit = value.is_truthy()?,
            "http" => config.http = if value.is_none() { None } else { Some(address_of(&value)?) },
            "shutdown_grace" => config.shutdown_grace = seconds()?.unwrap_or_default(),
            "handshake_timeout" => config.handshake_timeout = seconds()?.unwrap_or(config.handshake_timeout),
            "max_frame" => config.max_frame = value.extract()?,
            "max_connections" => config.max_connections = value.extract()?,
            "max_unread" => config.max_unread = value.extract()?,
            "max_staged" => config.max_staged = value.extract()?,
            "max_cursors" => config.max_cursors = value.extract()?,
            "load_threads" => config.load_threads = value.extract()?,
            "local_socket" => config.local_socket = value.is_truthy()?,
            "shared_cache_size" => config.shared_cache_size = value.extract()?,
            "peer_timeout" => config.peer_timeout = seconds()?.unwrap_or(config.peer_timeout),
            "slow_operation" => config.slow_operation = seconds()?,
            "staging_memory" => config.staging_memory = value.extract()?,
            "staging_directory" => config.staging_directory = value.extract()?,
            "tls" => {
                let tls: Option<PyRef<'_, PyServerTls>> = value.extract()?;
                config.tls = tls.map(|tls| tls.0.clone());
            }
            "workers" => config.workers = value.extract()?,
            _ => return Err(PyTypeError::new_err(format!("{name:?} is no option of a server"))),
        }
    }
    Ok(config)
}

fn open(specification: &Bound<'_, PyAny>, clients_resolve: bool) -> PyResult<Arc<dyn Storage>> {
    let py = specification.py();
    let Ok(parts) = specification.cast::<PyTuple>() else {
        return Ok(Arc::new(ServedStorage::new(specification, clients_resolve)?));
    };
    let kind: String = parts.get_item(0)?.extract()?;
    match kind.as_str() {
        "mappingstorage" => Ok(Arc::new(MemoryStorage::new(parts.get_item(1)?.extract::<String>()?))),
        "filestorage" => {
            let path: PathBuf = parts.get_item(1)?.extract()?;
            let options = match parts.get_item(2) {
                Ok(options) => file_options(options.cast::<PyDict>()?)?,
                Err(_) => FileStorageOptions::default(),
            };
            let storage = py.detach(|| FileStorage::open(path, options));
            Ok(Arc::new(storage.map_err(|error| errors::storage_error(py, &error))?))
        }
        _ => Err(PyValueError::new_err(format!(
            "{kind:?} is no kind of storage: use 'filestorage' or 'mappingstorage'"
        ))),
    }
}

fn file_options(options: &Bound<'_, PyDict>) -> PyResult<FileStorageOptions> {
    let mut parsed = FileStorageOptions::default();
    for (name, value) in options {
        let name: String = name.extract()?;
        match name.as_str() {
            "create" => parsed.create = value.is_truthy()?,
            "read_only" => parsed.read_only = value.is_truthy()?,
            "stop" => {
                let stop: Option<Vec<u8>> = value.extract()?;
                let tid = |bytes: Vec<u8>| {
                    Tid::from_slice(&bytes)
                        .ok_or_else(|| PyValueError::new_err("stop must be a tid of 8 bytes"))
                };
                parsed.stop = stop.map(tid).transpose()?;
            }
            "quota" => parsed.quota = value.extract()?,
            "pack_gc" => parsed.pack_gc = value.is_truthy()?,
            "pack_keep_old" => parsed.pack_keep_old = value.is_truthy()?,
            "blob_dir" => parsed.blob_dir = value.extract()?,
            _ => return Err(PyTypeError::new_err(format!("{name:?} is no option of a filestorage"))),
        }
    }
    Ok(parsed)
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyServer>()
}
