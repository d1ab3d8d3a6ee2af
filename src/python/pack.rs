//! `_zeo.pack_file_storage`: packs a `zeo_rs.FileStorage`. The GIL is free but for calls of Python's own `referencesf`
//! and of the progress callback.

use std::sync::Mutex;

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::convert::{OrRaise, oid_arg, tid_arg};
use super::errors;
use super::file_storage::{FileStorageBase, locked};
use crate::ids::Oid;
use crate::storage::transform::RecordReferences;
use crate::storage::{
    PackOptions, PackProgress, References, Result, Storage, StorageError, WholeStorageLock,
};

/// Packs `storage` as of the Unix time `time`.
///
/// `referencesf`: finds references instead of the native scanner, for records that only Python can read. `commit_lock`: held
/// for the final switch. `progress(dict)`: called every now and then; a false answer that is not None cancels.
#[pyfunction]
#[pyo3(signature = (storage, time, commit_lock, referencesf=None, gc=None, progress=None, throttle=None))]
fn pack_file_storage(
    storage: &Bound<'_, FileStorageBase>,
    time: f64,
    commit_lock: Py<PyAny>,
    referencesf: Option<Py<PyAny>>,
    gc: Option<bool>,
    progress: Option<Py<PyAny>>,
    throttle: Option<u64>,
) -> PyResult<()> {
    let py = storage.py();
    let engine = storage.get().engine()?.clone();
    // the first exception of Python's callbacks, to be raised unchanged
    let raised: Mutex<Option<PyErr>> = Mutex::new(None);
    let lock = CommitLock { lock: commit_lock, raised: &raised };
    let storage = storage.clone().into_any().unbind();
    let packed = py.detach(|| {
        let native = RecordReferences;
        let python =
            referencesf.map(|referencesf| PythonReferences { referencesf, storage, raised: &raised });
        let references: &dyn References = match &python {
            Some(python) => python,
            None => &native,
        };
        let mut report = |at: &PackProgress| {
            Python::attach(|py| {
                let called = match &progress {
                    Some(progress) => progress_call(py, progress, at),
                    // Ctrl-C: whoever calls Python's functions is interrupted there.
                    None => py.check_signals().map(|()| true),
                };
                called.unwrap_or_else(|error| {
                    locked(&raised).get_or_insert(error);
                    false
                })
            })
        };
        engine.pack(PackOptions { time, gc, references, progress: &mut report, throttle }, &lock)
    });
    match (packed, locked(&raised).take()) {
        (Ok(()), _) => Ok(()),
        (
            Err(StorageError::Cancelled | StorageError::Invalid(_) | StorageError::Transaction(_)),
            Some(error),
        ) => Err(error),
        (Err(error), _) => Err(errors::storage_error(py, &error)),
    }
}

/// Packs `storage` by `packer`, ZODB's `IFileStoragePacker`: called with the storage, `referencesf`, `stop` (a tid) and `gc`,
/// it writes NAME.pack, takes the commit lock and answers `(size, index)`; or None if there is nothing to be done. False if
/// there was not.
#[pyfunction]
fn pack_file_storage_by(
    storage: &Bound<'_, FileStorageBase>,
    packer: &Bound<'_, PyAny>,
    referencesf: &Bound<'_, PyAny>,
    stop: &Bound<'_, PyAny>,
    gc: bool,
    commit_lock: Py<PyAny>,
) -> PyResult<bool> {
    let py = storage.py();
    let engine = storage.get().engine()?.clone();
    let tid = tid_arg(stop)?;
    let of_the_lock = Mutex::new(None);
    let lock = CommitLock { lock: commit_lock, raised: &of_the_lock };
    let mut raised = None;
    let call = (
        packer.clone().unbind(),
        storage.clone().unbind(),
        referencesf.clone().unbind(),
        stop.clone().unbind(),
    );
    let packed = py.detach(|| {
        let mut pack = || {
            Python::attach(|py| {
                let (packer, storage, referencesf, stop) = &call;
                let answer = packer.bind(py).call1((storage, referencesf, stop, gc)).and_then(|answer| {
                    // the index is made anew, which verifies the file
                    if answer.is_none() { Ok(None) } else { answer.get_item(0)?.extract::<u64>().map(Some) }
                });
                answer.map_err(|error| {
                    raised = Some(error);
                    StorageError::Cancelled
                })
            })
        };
        engine.pack_by(tid, &mut pack, &mut || lock.release())
    });
    match raised.or_else(|| locked(&of_the_lock).take()) {
        Some(error) => Err(error),
        None => packed.or_raise(py),
    }
}

pub(super) fn progress_call(py: Python<'_>, progress: &Py<PyAny>, at: &PackProgress) -> PyResult<bool> {
    let fields = PyDict::new(py);
    fields.set_item("phase", at.phase)?;
    fields.set_item("bytes_done", at.bytes_done)?;
    fields.set_item("bytes_total", at.bytes_total)?;
    fields.set_item("objects_done", at.objects_done)?;
    fields.set_item("objects_total", at.objects_total)?;
    let answer = progress.bind(py).call1((fields,))?;
    Ok(answer.is_none() || answer.is_truthy()?)
}

/// Records read by Python: one GIL transition and one call for each record.
struct PythonReferences<'a> {
    referencesf: Py<PyAny>,
    storage: Py<PyAny>,
    raised: &'a Mutex<Option<PyErr>>,
}

impl References for PythonReferences<'_> {
    fn references(&self, record: &[u8], out: &mut Vec<Oid>) -> Result<()> {
        let found = Python::attach(|py| -> PyResult<()> {
            let oids = self.referencesf.bind(py).call1((PyBytes::new(py, record),))?;
            for oid in oids.try_iter()? {
                out.push(oid_arg(&oid?)?);
            }
            Ok(())
        });
        found.map_err(|error| {
            // an interruption is none of the record's
            let of_the_record = Python::attach(|py| error.is_instance_of::<PyException>(py));
            let text = error.to_string();
            *locked(self.raised) = Some(error);
            if of_the_record { StorageError::Invalid(text) } else { StorageError::Cancelled }
        })
    }

    /// The storage's `is_blob_record`, which knows the wrapper that transforms records.
    fn is_blob(&self, record: &[u8]) -> bool {
        let answer = Python::attach(|py| {
            let record = PyBytes::new(py, record);
            self.storage.bind(py).call_method1("is_blob_record", (record,))?.is_truthy()
        });
        answer.unwrap_or_else(|error| {
            locked(self.raised).get_or_insert(error);
            false
        })
    }
}

/// ZODB's commit lock as the lock of the whole storage: whoever holds it is the only writer.
struct CommitLock<'a> {
    lock: Py<PyAny>,
    /// The first exception, to be raised unchanged: waiting for a lock may be interrupted.
    raised: &'a Mutex<Option<PyErr>>,
}

impl WholeStorageLock for CommitLock<'_> {
    fn with_whole_storage(&self, body: &mut dyn FnMut()) {
        if self.call("acquire") {
            body();
            self.release();
        }
    }
}

impl CommitLock<'_> {
    fn release(&self) {
        self.call("release");
    }

    /// Whether it went well.
    fn call(&self, method: &str) -> bool {
        let called = Python::attach(|py| self.lock.bind(py).call_method0(method).map(drop));
        called
            .map_err(|error| {
                tracing::error!(%error, "the commit lock: {method}");
                locked(self.raised).get_or_insert(error);
            })
            .is_ok()
    }
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(pack_file_storage, m)?)?;
    m.add_function(wrap_pyfunction!(pack_file_storage_by, m)?)
}
