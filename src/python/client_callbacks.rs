//! What a client tells its storage: calls of Python methods, from the background thread if nothing else is said.

use std::cell::Cell;
use std::path::PathBuf;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple, PyWeakrefMethods, PyWeakrefReference};

use super::convert::{oid_bytes, tid_bytes};
use crate::client::{CallbackError, DatabaseCallbacks, Session};
use crate::ids::{Oid, Tid};
use crate::storage::Owner;
use crate::wire::Encoding;

thread_local! {
    /// Whether this is Python's main thread, and in which process that was asked: a fork makes its thread the main one.
    static IS_MAIN: Cell<Option<(Owner, bool)>> = const { Cell::new(None) };
}

/// The storage. Weak: a storage nobody uses any more goes, and closes its client.
pub(super) struct Callbacks(Py<PyWeakrefReference>);

impl Callbacks {
    pub(super) fn new(storage: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(PyWeakrefReference::new(storage)?.unbind()))
    }

    /// Calls a method of the storage, if it and the interpreter are still there. Its errors are reported, not raised:
    /// there is nobody to catch them.
    fn call(
        &self,
        method: impl FnOnce(Python<'_>) -> &Bound<'_, PyString>,
        args: impl FnOnce(Python<'_>) -> PyResult<Py<PyTuple>>,
    ) {
        Python::try_attach(|py| {
            let method = method(py);
            let called = (|| -> PyResult<()> {
                if let Some(storage) = self.0.bind(py).upgrade() {
                    storage.call_method1(method, args(py)?.bind(py))?;
                }
                Ok(())
            })();
            if let Err(error) = called {
                tracing::error!(%method, %error, "a callback of the storage failed");
                error.write_unraisable(py, None);
            }
        });
    }
}

impl DatabaseCallbacks for Callbacks {
    /// The thread keeps one Python thread state, detached while it waits: to make one for each callback costs an `mmap`,
    /// a page fault and a `munmap`. At the interpreter's end the thread hangs where it would attach again (pyo3-ffi).
    fn enter(&self, run: Box<dyn FnOnce() + Send>) {
        let mut run = Some(run);
        Python::try_attach(|py| {
            if let Some(run) = run.take() {
                py.detach(run);
            }
        });
        if let Some(run) = run {
            run();
        }
    }

    fn invalidate(&self, tid: Tid, oids: &[Oid]) {
        self.call(
            |py| intern!(py, "_invalidate"),
            |py| {
                let oids = PyList::new(py, oids.iter().map(|oid| oid_bytes(py, *oid)))?;
                Ok((tid_bytes(py, tid), oids).into_pyobject(py)?.unbind())
            },
        );
    }

    fn together(&self, run: &mut dyn FnMut()) {
        if Python::try_attach(|_| run()).is_none() {
            run();
        }
    }

    /// Not on the main thread, which runs signal handlers in the middle of any Python code.
    fn may_be_told_here(&self) -> bool {
        if let Some((_, is_main)) = IS_MAIN.get().filter(|(process, _)| process.is_here()) {
            return !is_main;
        }
        // The system's main thread, too: gevent runs there what calls itself threads.
        #[cfg(target_os = "linux")]
        if rustix::thread::gettid() == rustix::process::getpid() {
            IS_MAIN.set(Some((Owner::here(), true)));
            return false;
        }
        // `main_thread()` and `ident` are Python code: a signal handler could run in it, what it raises would be lost, and
        // it must not use the storage while this thread is its reader.
        let is_main = Python::try_attach(|py| -> PyResult<bool> {
            let threading = py.import("threading")?;
            let main = threading.getattr("_main_thread")?.getattr("_ident")?;
            threading.call_method0("get_ident")?.eq(main)
        });
        // Unknown (the interpreter ends) is as good as main, and asked again.
        let Some(Ok(is_main)) = is_main else { return false };
        IS_MAIN.set(Some((Owner::here(), is_main)));
        !is_main
    }

    fn invalidate_cache(&self) {
        self.call(|py| intern!(py, "_invalidate_cache"), |py| Ok(PyTuple::empty(py).unbind()));
    }

    fn connected(&self, session: &Session) {
        self.call(
            |py| intern!(py, "_connected"),
            |py| {
                let protocol = match session.encoding {
                    Encoding::Pickle => "Z5",
                    Encoding::Msgpack => "M5",
                };
                let args = (&session.host, session.port, protocol, session.read_only, session.generation);
                Ok(args.into_pyobject(py)?.unbind())
            },
        );
    }

    fn disconnected(&self) {
        self.call(|py| intern!(py, "_disconnected"), |py| Ok(PyTuple::empty(py).unbind()));
    }

    fn stale_cache(&self) {
        self.call(|py| intern!(py, "_stale_cache"), |py| Ok(PyTuple::empty(py).unbind()));
    }

    fn interrupted(&self) -> Result<(), CallbackError> {
        let checked = Python::try_attach(|py| py.check_signals());
        checked.unwrap_or(Ok(())).map_err(|error| CallbackError(Box::new(error), "interrupted".into()))
    }
}

/// What a cache file holds, as a dict; `None` if the file is no cache of zeo_rs. The file may be in use.
#[pyfunction]
pub(super) fn cache_file_stats(py: Python<'_>, path: PathBuf) -> PyResult<Option<Bound<'_, PyDict>>> {
    let Some(stats) = py.detach(|| crate::cache::inspect(&path))? else { return Ok(None) };
    let dict = PyDict::new(py);
    for (key, value) in [
        ("file_bytes", stats.file_bytes),
        ("whole_bytes", stats.whole_bytes),
        ("values_bytes", stats.values_bytes),
        ("stores", stats.stores),
        ("invalidations", stats.invalidations),
        ("objects", stats.objects),
        ("revisions", stats.revisions),
        ("current", stats.current),
        ("data_bytes", stats.data_bytes),
        ("largest", stats.largest),
        ("cache_bytes", stats.cache_bytes),
    ] {
        dict.set_item(key, value)?;
    }
    dict.set_item("last_tid", tid_bytes(py, stats.last_tid))?;
    Ok(Some(dict))
}
