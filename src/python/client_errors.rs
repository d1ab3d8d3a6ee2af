//! The one mapping of [`ClientError`] to exceptions: ZODB's where they exist, else those of `zeo_rs.exceptions`.

use pyo3::exceptions::{PyKeyError, PyOSError, PyRuntimeError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::convert::oid_bytes;
use super::values::to_python;
use crate::client::ClientError;
use crate::pickle::Value;
use crate::wire::Fault;

mod raised {
    use pyo3::import_exception;

    import_exception!(ZODB.POSException, BTreesConflictError);
    import_exception!(ZODB.POSException, ConflictError);
    import_exception!(ZODB.POSException, MultipleUndoErrors);
    import_exception!(ZODB.POSException, POSKeyError);
    import_exception!(ZODB.POSException, ReadConflictError);
    import_exception!(ZODB.POSException, ReadOnlyError);
    import_exception!(ZODB.POSException, StorageTransactionError);
    import_exception!(ZODB.POSException, UndoError);
    import_exception!(ZODB.POSException, Unsupported);
    import_exception!(zeo_rs.exceptions, ClientDisconnected);
    import_exception!(zeo_rs.exceptions, ServerException);
    import_exception!(zeo_rs.exceptions, UnrecognizedResult);
}

pub(crate) fn client_error(py: Python<'_>, error: ClientError) -> PyErr {
    let text = error.to_string();
    match error {
        ClientError::Disconnected(_) => raised::ClientDisconnected::new_err(text),
        ClientError::Fault(fault) => fault_error(py, &fault).unwrap_or_else(|error| error),
        ClientError::UnexpectedAnswer { .. } => raised::UnrecognizedResult::new_err(text),
        ClientError::NotFound(oid) => raised::POSKeyError::new_err((oid_bytes(py, oid).unbind(),)),
        ClientError::ReadOnly => raised::ReadOnlyError::new_err(()),
        ClientError::Transaction(_) => raised::StorageTransactionError::new_err(text),
        ClientError::InCallback(_) | ClientError::Forked(_) => PyRuntimeError::new_err(text),
        ClientError::Callback(inner) => match inner.0.downcast_ref::<PyErr>() {
            Some(error) => error.clone_ref(py),
            None => PyRuntimeError::new_err(text),
        },
        ClientError::NoBlobDir => raised::Unsupported::new_err(text),
        ClientError::Io { what, source } => match source.raw_os_error() {
            Some(number) => PyOSError::new_err((number, format!("{what}: {source}"))),
            None => PyOSError::new_err(text),
        },
        ClientError::Unsendable(_) => PyTypeError::new_err(text),
    }
}

/// An error reply. Its class is only compared, never imported.
fn fault_error(py: Python<'_>, fault: &Fault) -> PyResult<PyErr> {
    let data = to_python(py, &fault.data)?;
    let args = || -> PyResult<Py<PyTuple>> {
        Ok(match data.cast::<PyTuple>() {
            Ok(args) => args.clone().unbind(),
            Err(_) => PyTuple::new(py, [&data])?.unbind(),
        })
    };
    Ok(match fault.class.as_str() {
        "builtins.KeyError" | "exceptions.KeyError" => PyKeyError::new_err(args()?),
        "builtins.TypeError" | "exceptions.TypeError" => PyTypeError::new_err(args()?),
        "ZODB.POSException.POSKeyError" => raised::POSKeyError::new_err(args()?),
        "ZODB.POSException.ReadOnlyError" => raised::ReadOnlyError::new_err(args()?),
        "ZODB.POSException.StorageTransactionError" => raised::StorageTransactionError::new_err(args()?),
        "ZODB.POSException.UndoError" => raised::UndoError::new_err(undo_args(py, &fault.data)?),
        "ZODB.POSException.ConflictError" => conflict(py, py.get_type::<raised::ConflictError>(), &data)?,
        "ZODB.POSException.ReadConflictError" => {
            conflict(py, py.get_type::<raised::ReadConflictError>(), &data)?
        }
        "ZODB.POSException.BTreesConflictError" => {
            let part = |name: &str| data.get_item(name);
            let reasons = PyTuple::new(py, [part("p1")?, part("p2")?, part("p3")?, part("reason")?])?;
            raised::BTreesConflictError::new_err((reasons.unbind(),))
        }
        "ZODB.POSException.MultipleUndoErrors" => {
            raised::MultipleUndoErrors::new_err((data.get_item("_errs")?.unbind(),))
        }
        class => raised::ServerException::new_err((class.to_owned(), data.unbind())),
    })
}

fn conflict(
    py: Python<'_>,
    class: Bound<'_, pyo3::types::PyType>,
    data: &Bound<'_, PyAny>,
) -> PyResult<PyErr> {
    let keywords = PyDict::new(py);
    let mut class_name = None;
    if let Ok(given) = data.cast::<PyDict>() {
        for (name, key) in [("message", "message"), ("oid", "oid"), ("serials", "serials")] {
            if let Some(value) = given.get_item(key)? {
                keywords.set_item(name, value)?;
            }
        }
        class_name = given.get_item("class_name")?;
    } else {
        keywords.set_item("message", data.str()?)?;
    }
    let error = class.call((), Some(&keywords))?;
    if let Some(class_name) = class_name {
        error.setattr("class_name", class_name)?;
    }
    Ok(PyErr::from_value(error))
}

/// `UndoError(reason, oid)` from its attributes or arguments.
fn undo_args(py: Python<'_>, data: &Value) -> PyResult<Py<PyTuple>> {
    let items = match data {
        Value::Dict(pairs) => ["_reason", "_oid"]
            .iter()
            .map(|name| {
                let found = pairs.iter().find(|(key, _)| matches!(key, Value::Str(text) if text == name));
                found.map_or(Ok(py.None().into_bound(py)), |(_, value)| to_python(py, value))
            })
            .collect::<PyResult<Vec<_>>>()?,
        Value::Tuple(items) | Value::List(items) => {
            items.iter().map(|item| to_python(py, item)).collect::<PyResult<Vec<_>>>()?
        }
        other => vec![to_python(py, other)?],
    };
    Ok(PyTuple::new(py, items)?.unbind())
}
