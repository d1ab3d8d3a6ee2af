//! `_zeo.AsyncClient`: the client of a `ClientStorage` for asyncio, sharing its connection and cache. `zeo_rs.aio` is its
//! face.
//!
//! Calls that wait run on the blocking threads of `pyo3-async-runtimes`' tokio runtime, without the GIL; a cache hit is
//! answered at once. That runtime does not survive `fork`: use it in the process that will serve.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use pyo3_async_runtimes::tokio::{future_into_py, get_runtime};

use super::client_errors::client_error;
use super::client_storage::{ClientStorageBase, revision};
use super::convert::{oid_arg, oid_bytes, tid_arg};
use crate::client::{Client, ClientError};
use crate::ids::{Oid, Tid};
use crate::storage::Loaded;

#[pyclass(frozen, module = "zeo_rs._zeo")]
struct AsyncClient(Arc<Client>);

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<AsyncClient>()
}

#[pymethods]
impl AsyncClient {
    /// The client of `storage`.
    #[new]
    fn new(storage: &Bound<'_, ClientStorageBase>) -> PyResult<Self> {
        Ok(Self(Arc::clone(storage.get().client()?)))
    }

    /// Awaitable: the revision just before `before` as `(data, tid, end tid or None)`, or `None`. Raises `POSKeyError`.
    fn load<'py>(
        &self,
        py: Python<'py>,
        oid: &Bound<'py, PyAny>,
        before: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (oid, before) = (oid_arg(oid)?, tid_arg(before)?);
        let client = Arc::clone(&self.0);
        future_into_py(py, async move {
            let loaded = match client.load_cached(oid, before) {
                Some(loaded) => Ok(Some(loaded)),
                None => blocking(move || client.load_missed(oid, before)).await,
            };
            Python::attach(|py| {
                let loaded = loaded.map_err(|error| client_error(py, error))?;
                Ok(loaded.map(|loaded| revision_object(py, &loaded)))
            })
        })
    }

    /// Awaitable: `{oid: (data, tid, end tid or None)}`; objects that do not exist before `before` are missing.
    /// Costs a few round trips, whatever the number.
    fn load_many<'py>(
        &self,
        py: Python<'py>,
        oids: &Bound<'py, PyAny>,
        before: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let oids = oids.try_iter()?.map(|oid| oid_arg(&oid?)).collect::<PyResult<Vec<Oid>>>()?;
        let before = tid_arg(before)?;
        let client = Arc::clone(&self.0);
        future_into_py(py, async move {
            let found = blocking(move || load_all(&client, &oids, before)).await;
            Python::attach(|py| {
                let answer = PyDict::new(py);
                for (oid, loaded) in found.map_err(|error| client_error(py, error))? {
                    answer.set_item(oid_bytes(py, oid), revision_object(py, &loaded))?;
                }
                Ok(answer.unbind())
            })
        })
    }

    /// Awaitable: what `function()` returns, called on a thread that may wait.
    fn run<'py>(&self, py: Python<'py>, function: Py<PyAny>) -> PyResult<Bound<'py, PyAny>> {
        future_into_py(py, async move {
            let call = get_runtime().spawn_blocking(move || Python::attach(|py| function.call0(py)));
            call.await.map_err(|error| pyo3::exceptions::PyRuntimeError::new_err(error.to_string()))?
        })
    }
}

/// Asks for all that is not cached before waiting for any of it.
fn load_all(client: &Client, oids: &[Oid], before: Tid) -> Result<Vec<(Oid, Loaded)>, ClientError> {
    client.prefetch(oids, before)?;
    let mut found = Vec::new();
    for &oid in oids {
        match client.load_before(oid, before) {
            Ok(Some(loaded)) => found.push((oid, loaded)),
            Ok(None) => {}
            Err(error) if error.is_missing_object() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ClientError> + Send + 'static,
) -> Result<T, ClientError> {
    let done = get_runtime().spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(ClientError::disconnected(format!("internal error (a bug): {error}"))))
}

fn revision_object(py: Python<'_>, loaded: &Loaded) -> (Py<PyBytes>, Py<PyBytes>, Option<Py<PyBytes>>) {
    let (data, tid, end_tid) = revision(py, loaded);
    (data.unbind(), tid.unbind(), end_tid.map(Bound::unbind))
}
