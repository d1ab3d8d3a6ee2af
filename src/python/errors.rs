//! The one mapping of [`StorageError`] to the exceptions that ZODB's users already catch.
//!
//! Costs nothing until an error happens: exception classes are imported at first use.

use std::path::Path;

use pyo3::exceptions::{PyKeyError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::convert::{self, oid_bytes, tid_bytes};
use crate::ids::{Oid, Tid};
use crate::storage::{Conflict, StorageError};

mod zodb {
    use pyo3::import_exception;

    import_exception!(ZODB.POSException, ConflictError);
    import_exception!(ZODB.POSException, MultipleUndoErrors);
    import_exception!(ZODB.POSException, POSKeyError);
    import_exception!(ZODB.POSException, ReadConflictError);
    import_exception!(ZODB.POSException, ReadOnlyError);
    import_exception!(ZODB.POSException, StorageError);
    import_exception!(ZODB.POSException, StorageSystemError);
    import_exception!(ZODB.POSException, StorageTransactionError);
    import_exception!(ZODB.POSException, UndoError);
    import_exception!(ZODB.POSException, Unsupported);
    import_exception!(ZODB.FileStorage.FileStorage, FileStorageError);
    import_exception!(ZODB.FileStorage.FileStorage, FileStorageFormatError);
    import_exception!(ZODB.FileStorage.FileStorage, FileStorageQuotaError);
    import_exception!(ZODB.FileStorage.FileStorage, PackError);
    import_exception!(zc.lockfile, LockError);
    import_exception!(zeo_rs._errors, CorruptedFileError);
}

/// The exception for `error`, as ZODB's own storages raise it.
pub(crate) fn storage_error(py: Python<'_>, error: &StorageError) -> PyErr {
    let text = error.to_string();
    match error {
        StorageError::NotFound(oid) => key_error(py, *oid),
        StorageError::NoBlob { oid, serial } => {
            zodb::POSKeyError::new_err((text, oid_bytes(py, *oid).unbind(), tid_bytes(py, *serial).unbind()))
        }
        StorageError::Conflict(c) => conflict(py, Kind::Write, c.oid, c.committed, c.read, Some(&c.data)),
        StorageError::ReadConflict { oid, committed, read } => {
            conflict(py, Kind::Read, *oid, *committed, *read, None)
        }
        StorageError::ReadOnly => zodb::ReadOnlyError::new_err(()),
        StorageError::Undo { reason, oid } => undo(py, reason, *oid),
        StorageError::MultipleUndo(errors) => {
            let errors: Vec<(Py<PyBytes>, PyErr)> = errors
                .iter()
                .map(|(oid, reason)| (oid_bytes(py, *oid).unbind(), undo(py, reason, Some(*oid))))
                .collect();
            let errors: Vec<_> = errors.into_iter().map(|(oid, e)| (oid, e.into_value(py))).collect();
            zodb::MultipleUndoErrors::new_err((errors,))
        }
        StorageError::Transaction(_) => zodb::StorageTransactionError::new_err(text),
        StorageError::Invalid(_) => zodb::FileStorageError::new_err(text),
        StorageError::Format(_) => zodb::FileStorageFormatError::new_err(text),
        StorageError::Quota(_) => zodb::FileStorageQuotaError::new_err(text),
        StorageError::Corrupted { pos, .. } => zodb::CorruptedFileError::new_err((text, *pos)),
        StorageError::Locked(_) => zodb::LockError::new_err(text),
        StorageError::Unsupported(_) => zodb::Unsupported::new_err(text),
        StorageError::Io { what, source } => os_error(what, source),
        StorageError::PreviousIo(_) => zodb::StorageSystemError::new_err(text),
        StorageError::Closed => PyValueError::new_err("closed"),
        StorageError::PackTime(_) => PyValueError::new_err(text),
        StorageError::Dangling { oid, .. } => PyKeyError::new_err((oid_bytes(py, *oid).unbind(),)),
        StorageError::Cancelled => zodb::PackError::new_err("the pack was cancelled"),
        StorageError::Foreign { .. } | StorageError::Forked { .. } => zodb::StorageError::new_err(text),
        StorageError::WouldBlock => PyRuntimeError::new_err(text),
    }
}

/// The way back: what a Python storage raised, for the server to answer. Classes without a variant keep their name.
pub(crate) fn from_python(py: Python<'_>, error: PyErr) -> StorageError {
    let value = error.value(py);
    let conflict_of = || -> PyResult<(Oid, Tid, Tid)> {
        let serials = value.getattr("serials")?;
        let oid = convert::oid_arg(&value.getattr("oid")?)?;
        Ok((oid, convert::tid_arg(&serials.get_item(0)?)?, convert::tid_arg(&serials.get_item(1)?)?))
    };
    let first_oid = || convert::oid_arg(&value.getattr("args")?.get_item(0)?);
    if error.is_instance_of::<zodb::ReadConflictError>(py) {
        if let Ok((oid, committed, read)) = conflict_of() {
            return StorageError::ReadConflict { oid, committed, read };
        }
    } else if error.is_instance_of::<zodb::ConflictError>(py) {
        if let Ok((oid, committed, read)) = conflict_of() {
            // the record itself is not part of the exception; who has it adds it
            let data = bytes::Bytes::new();
            return StorageError::Conflict(Box::new(Conflict { oid, committed, read, data }));
        }
    } else if error.is_instance_of::<zodb::POSKeyError>(py) {
        if let Ok(oid) = first_oid() {
            return StorageError::NotFound(oid);
        }
    } else if error.is_instance_of::<zodb::ReadOnlyError>(py) {
        return StorageError::ReadOnly;
    } else if error.is_instance_of::<zodb::MultipleUndoErrors>(py) {
        return match undo_errors(value) {
            Ok(errors) => StorageError::MultipleUndo(errors),
            Err(_) => StorageError::Undo { reason: error.to_string(), oid: None },
        };
    } else if error.is_instance_of::<zodb::UndoError>(py) {
        let reason = value.getattr("_reason").and_then(|r| r.extract()).unwrap_or_else(|_| error.to_string());
        let oid = value.getattr("_oid").and_then(|oid| convert::oid_arg(&oid)).ok();
        return StorageError::Undo { reason, oid };
    } else if error.is_instance_of::<zodb::StorageTransactionError>(py) {
        return StorageError::Transaction(value.to_string());
    }
    let class = value.get_type();
    let class = match (class.module(), class.qualname()) {
        (Ok(module), Ok(name)) => format!("{module}.{name}"),
        _ => "builtins.Exception".to_owned(),
    };
    StorageError::Foreign { class, text: value.to_string() }
}

/// The `(oid, reason)` pairs of a `MultipleUndoErrors`, which holds `UndoError`s or texts.
fn undo_errors(error: &Bound<'_, PyAny>) -> PyResult<Vec<(Oid, String)>> {
    let mut errors = Vec::new();
    for pair in error.getattr("_errs")?.try_iter()? {
        let (oid, reason): (Bound<'_, PyAny>, Bound<'_, PyAny>) = pair?.extract()?;
        let reason = reason.getattr("_reason").unwrap_or(reason);
        errors.push((convert::oid_arg(&oid)?, reason.str()?.to_string()));
    }
    Ok(errors)
}

/// `POSKeyError(oid)`.
pub(crate) fn key_error(py: Python<'_>, oid: Oid) -> PyErr {
    zodb::POSKeyError::new_err((oid_bytes(py, oid).unbind(),))
}

/// `POSKeyError(text, oid, serial)`, in ZODB's words.
pub(crate) fn no_blob(py: Python<'_>, path: &Path, oid: Oid, serial: Tid) -> PyErr {
    let text = format!("No blob file at {}", path.display());
    zodb::POSKeyError::new_err((text, oid_bytes(py, oid).unbind(), tid_bytes(py, serial).unbind()))
}

/// `error`, an `OSError`, with the name of the file that somebody wanted to open.
pub(crate) fn about_file(py: Python<'_>, error: PyErr, path: &Path) -> PyErr {
    // an OSError without a number has no place for it
    let _ = error.value(py).setattr("filename", path.as_os_str());
    error
}

/// `POSKeyError` for bytes that are no oid.
pub(crate) fn wrong_oid(bytes: &Bound<'_, PyBytes>) -> PyErr {
    zodb::POSKeyError::new_err((bytes.clone().unbind(),))
}

/// `StorageTransactionError(text)`.
pub(crate) fn transaction_error(text: &'static str) -> PyErr {
    zodb::StorageTransactionError::new_err(text)
}

/// `StorageTransactionError(current, given)`, as ZODB raises it for a transaction that is not being committed.
pub(crate) fn wrong_transaction(current: Option<Py<PyAny>>, given: &Bound<'_, PyAny>) -> PyErr {
    zodb::StorageTransactionError::new_err((current, given.clone().unbind()))
}

/// `FileStorageError(text)`.
pub(crate) fn file_storage_error(text: &'static str) -> PyErr {
    zodb::FileStorageError::new_err(text)
}

/// True for ZODB's `ConflictError`, its subclasses included.
pub(crate) fn is_conflict(py: Python<'_>, error: &PyErr) -> bool {
    error.is_instance_of::<zodb::ConflictError>(py)
}

/// `OSError` with the number of the system error, so that Python picks `FileNotFoundError` and its like.
fn os_error(what: &str, source: &std::io::Error) -> PyErr {
    match source.raw_os_error() {
        Some(number) => {
            let reason = source.to_string();
            // Python says the number itself
            let reason = reason.trim_end_matches(&format!(" (os error {number})"));
            PyOSError::new_err((number, format!("{what}: {reason}")))
        }
        None => PyOSError::new_err(format!("{what}: {source}")),
    }
}

fn undo(py: Python<'_>, reason: &str, oid: Option<Oid>) -> PyErr {
    match oid {
        Some(oid) => zodb::UndoError::new_err((reason.to_owned(), oid_bytes(py, oid).unbind())),
        None => zodb::UndoError::new_err((reason.to_owned(),)),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Write,
    Read,
}

/// `ConflictError(oid=, serials=(committed, read), data=)` or the `ReadConflictError` without data.
fn conflict(py: Python<'_>, kind: Kind, oid: Oid, committed: Tid, read: Tid, data: Option<&[u8]>) -> PyErr {
    let class = match kind {
        Kind::Write => py.get_type::<zodb::ConflictError>(),
        Kind::Read => py.get_type::<zodb::ReadConflictError>(),
    };
    let build = |data: Option<&[u8]>| -> PyResult<PyErr> {
        let keywords = PyDict::new(py);
        keywords.set_item("oid", oid_bytes(py, oid))?;
        keywords.set_item("serials", (tid_bytes(py, committed), tid_bytes(py, read)))?;
        if let Some(data) = data {
            keywords.set_item("data", PyBytes::new(py, data))?;
        }
        Ok(PyErr::from_value(class.call((), Some(&keywords))?))
    };
    // the class name is read from the data, which need not be a pickle: then the error goes without it
    build(data).or_else(|_| build(None)).unwrap_or_else(|error| error)
}
