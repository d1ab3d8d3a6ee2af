//! [`Value`] to Python and back: the plain values of messages.

use bytes::Bytes;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};

use crate::limits::MAX_DEPTH;
use crate::pickle::Value;

/// What a server sent, as Python objects. Classes and calls (no server should send them) become their text.
pub(crate) fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::None => py.None().into_bound(py),
        Value::Bool(flag) => PyBool::new(py, *flag).to_owned().into_any(),
        Value::Int(number) => number.into_pyobject(py)?.into_any(),
        Value::BigInt(bytes) => {
            let keywords = PyDict::new(py);
            keywords.set_item("signed", true)?;
            py.get_type::<PyInt>().call_method(
                "from_bytes",
                (PyBytes::new(py, bytes), "little"),
                Some(&keywords),
            )?
        }
        Value::Float(number) => PyFloat::new(py, *number).into_any(),
        Value::Bytes(bytes) => PyBytes::new(py, bytes).into_any(),
        Value::Str(text) => PyString::new(py, text).into_any(),
        Value::Tuple(items) => {
            let items = items.iter().map(|item| to_python(py, item)).collect::<PyResult<Vec<_>>>()?;
            PyTuple::new(py, items)?.into_any()
        }
        Value::List(items) => {
            let items = items.iter().map(|item| to_python(py, item)).collect::<PyResult<Vec<_>>>()?;
            PyList::new(py, items)?.into_any()
        }
        Value::Dict(pairs) => {
            let dict = PyDict::new(py);
            for (key, value) in pairs {
                dict.set_item(to_python(py, key)?, to_python(py, value)?)?;
            }
            dict.into_any()
        }
        Value::Global { module, name } => PyString::new(py, &format!("{module}.{name}")).into_any(),
        Value::Call { .. } => PyString::new(py, &format!("{value:?}")).into_any(),
    })
}

/// What Python wants to be sent.
pub(crate) fn from_python(value: &Bound<'_, PyAny>) -> PyResult<Value> {
    convert(value, 0)
}

fn convert(value: &Bound<'_, PyAny>, depth: usize) -> PyResult<Value> {
    if depth > MAX_DEPTH {
        return Err(PyValueError::new_err("nested too deep to be sent"));
    }
    let items = |items: Vec<Bound<'_, PyAny>>| {
        items.iter().map(|item| convert(item, depth + 1)).collect::<PyResult<Vec<_>>>()
    };
    if value.is_none() {
        Ok(Value::None)
    } else if let Ok(flag) = value.cast::<PyBool>() {
        Ok(Value::Bool(flag.is_true()))
    } else if let Ok(number) = value.cast::<PyInt>() {
        match number.extract() {
            Ok(number) => Ok(Value::Int(number)),
            Err(_) => big_int(number),
        }
    } else if let Ok(number) = value.cast::<PyFloat>() {
        Ok(Value::Float(number.value()))
    } else if let Ok(bytes) = value.cast::<PyBytes>() {
        Ok(Value::Bytes(Bytes::copy_from_slice(bytes.as_bytes())))
    } else if let Ok(text) = value.cast::<PyString>() {
        Ok(Value::Str(text.extract()?))
    } else if let Ok(tuple) = value.cast::<PyTuple>() {
        Ok(Value::Tuple(items(tuple.iter().collect())?))
    } else if let Ok(list) = value.cast::<PyList>() {
        Ok(Value::List(items(list.iter().collect())?))
    } else if let Ok(dict) = value.cast::<PyDict>() {
        let pairs =
            dict.iter().map(|(key, value)| Ok((convert(&key, depth + 1)?, convert(&value, depth + 1)?)));
        Ok(Value::Dict(pairs.collect::<PyResult<_>>()?))
    } else if let Some(prefix) = prefix(value, depth)? {
        Ok(prefix)
    } else {
        Err(PyTypeError::new_err(format!(
            "cannot be sent: {} (only None, bool, int, float, bytes, str, tuple, list and dict can)",
            value.get_type().name()?
        )))
    }
}

/// `ZopeUndo.Prefix.Prefix`, in the filter of Zope's undo screen. `Z5` only: `M5` has no form for it.
fn prefix(value: &Bound<'_, PyAny>, depth: usize) -> PyResult<Option<Value>> {
    let class = value.get_type();
    if class.module()? != "ZopeUndo.Prefix" || class.name()? != "Prefix" {
        return Ok(None);
    }
    let callable = Value::Global { module: "ZopeUndo.Prefix".into(), name: "Prefix".into() };
    let state = convert(&value.getattr("__dict__")?, depth + 1)?;
    Ok(Some(Value::Call {
        callable: Box::new(callable),
        args: Box::new(Value::Tuple(Vec::new())),
        state: Some(Box::new(state)),
    }))
}

fn big_int(number: &Bound<'_, PyInt>) -> PyResult<Value> {
    let bits: usize = number.call_method0("bit_length")?.extract()?;
    let keywords = PyDict::new(number.py());
    keywords.set_item("signed", true)?;
    let bytes = number.call_method("to_bytes", (bits / 8 + 1, "little"), Some(&keywords))?;
    Ok(Value::BigInt(Bytes::copy_from_slice(bytes.cast::<PyBytes>()?.as_bytes())))
}
