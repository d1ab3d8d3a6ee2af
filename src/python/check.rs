//! `_zeo.check_file` and `_zeo.dump_file`: a data file verified, or listed. The GIL is free but for the callbacks.

use std::io::{self, Write};
use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::convert::{oid_bytes, tid_bytes};
use super::errors;
use super::pack::progress_call;
use crate::storage::blob::BlobDir;
use crate::storage::file::check::{CheckOptions, Fault, Severity, check_path};
use crate::storage::file::dump::dump;
use crate::storage::transform::RecordReferences;
use crate::storage::{PackProgress, References, StorageError};

/// Verifies the data file at `path`. Calls `fault(dict)` with each fault: severity ('error' or 'warning'), pos, oid, tid,
/// what, and text, which says all of it. `progress` as of `pack`. Answers a dict of counts.
#[pyfunction]
#[pyo3(signature = (path, fault, blob_dir=None, references=true, progress=None))]
fn check_file<'py>(
    py: Python<'py>,
    path: PathBuf,
    fault: Py<PyAny>,
    blob_dir: Option<PathBuf>,
    references: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let mut raised = None;
    let mut stopped = None;
    let checked = py.detach(|| {
        let blobs = blob_dir.map(|dir| BlobDir::open(&dir, false)).transpose()?;
        let native: &dyn References = &RecordReferences;
        let mut tell = |found: &Fault| {
            if raised.is_none() {
                raised = Python::attach(|py| fault_call(py, &fault, found)).err();
            }
        };
        let mut report = |at: &PackProgress| {
            let Some(progress) = &progress else { return Python::attach(|py| py.check_signals()).is_ok() };
            Python::attach(|py| {
                progress_call(py, progress, at).unwrap_or_else(|error| {
                    stopped = Some(error);
                    false
                })
            })
        };
        let options = CheckOptions {
            references: references.then_some(native),
            blobs: blobs.as_ref(),
            fault: &mut tell,
            progress: &mut report,
        };
        check_path(&path, options)
    });
    if let Some(error) = raised.or(stopped) {
        return Err(error);
    }
    let seen = checked.map_err(|error| errors::storage_error(py, &error))?;
    let counts = PyDict::new(py);
    counts.set_item("transactions", seen.transactions)?;
    counts.set_item("records", seen.records)?;
    counts.set_item("objects", seen.objects)?;
    counts.set_item("blobs", seen.blobs)?;
    counts.set_item("end", seen.end)?;
    counts.set_item("last_tid", tid_bytes(py, seen.last_tid))?;
    counts.set_item("errors", seen.errors)?;
    counts.set_item("warnings", seen.warnings)?;
    Ok(counts)
}

fn fault_call(py: Python<'_>, callback: &Py<PyAny>, fault: &Fault) -> PyResult<()> {
    let fields = PyDict::new(py);
    fields.set_item("severity", if fault.severity == Severity::Error { "error" } else { "warning" })?;
    fields.set_item("pos", fault.pos)?;
    fields.set_item("oid", fault.oid.map(|oid| oid_bytes(py, oid)))?;
    fields.set_item("tid", fault.tid.map(|tid| tid_bytes(py, tid)))?;
    fields.set_item("what", &fault.what)?;
    fields.set_item("text", fault.to_string())?;
    callback.bind(py).call1((fields,)).map(drop)
}

/// Lists the data file at `path`, as ZODB's `fsdump` does, by calls of `write(str)`.
#[pyfunction]
fn dump_file(py: Python<'_>, path: PathBuf, write: Py<PyAny>) -> PyResult<()> {
    let mut out = Lines { write, text: Vec::new(), raised: None };
    let dumped = py.detach(|| {
        let dumped = dump(&path, &mut out);
        let flushed = out.flush().map_err(|e| StorageError::io("cannot write the listing", e));
        dumped.and(flushed)
    });
    match out.raised {
        Some(error) => Err(error),
        None => dumped.map_err(|error| errors::storage_error(py, &error)),
    }
}

/// Text on its way to a Python function, in pieces of about 64 KiB.
struct Lines {
    write: Py<PyAny>,
    text: Vec<u8>,
    raised: Option<PyErr>,
}

const PIECE: usize = 64 << 10;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        if self.text.len() >= PIECE && bytes.ends_with(b"\n") {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let text = String::from_utf8_lossy(&self.text).into_owned();
        self.text.clear();
        let called = Python::attach(|py| self.write.bind(py).call1((text,)).map(drop));
        called.map_err(|error| {
            self.raised = Some(error);
            io::Error::other("the listing is no longer wanted")
        })
    }
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(check_file, m)?)?;
    m.add_function(wrap_pyfunction!(dump_file, m)?)
}
