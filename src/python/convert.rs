//! Python arguments to Rust values and back. Each conversion here copies at most the bytes themselves.

use bytes::Bytes;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::errors;
use crate::ids::{Oid, Tid};
use crate::storage::{Result as StorageResult, TxnMeta};

/// `bytes` of an oid.
pub(crate) fn oid_bytes(py: Python<'_>, oid: Oid) -> Bound<'_, PyBytes> {
    PyBytes::new(py, &oid.to_bytes())
}

/// `bytes` of a tid.
pub(crate) fn tid_bytes(py: Python<'_>, tid: Tid) -> Bound<'_, PyBytes> {
    PyBytes::new(py, &tid.to_bytes())
}

/// An oid given by Python. Not bytes: `TypeError`; bytes of another length: `POSKeyError`, no such object can exist.
pub(crate) fn oid_arg(value: &Bound<'_, PyAny>) -> PyResult<Oid> {
    let bytes = value.cast::<PyBytes>().map_err(|_| PyTypeError::new_err("an oid is bytes"))?;
    Oid::from_slice(bytes.as_bytes()).ok_or_else(|| errors::wrong_oid(bytes))
}

/// A tid or serial given by Python. Not bytes: `TypeError`; another length than 8: `ValueError`.
pub(crate) fn tid_arg(value: &Bound<'_, PyAny>) -> PyResult<Tid> {
    let bytes = value.cast::<PyBytes>().map_err(|_| PyTypeError::new_err("a tid is bytes"))?;
    Tid::from_slice(bytes.as_bytes())
        .ok_or_else(|| PyValueError::new_err(format!("a tid has 8 bytes, not {}", bytes.as_bytes().len())))
}

/// A serial given by Python: as [`tid_arg`], but what is not 8 bytes (ZODB's users pass `None`, `b''` and worse for a new
/// object) is the serial of no revision, `Tid::ZERO`.
pub(crate) fn serial_arg(value: &Bound<'_, PyAny>) -> PyResult<Tid> {
    let bytes = value.cast::<PyBytes>().ok();
    Ok(bytes.and_then(|bytes| Tid::from_slice(bytes.as_bytes())).unwrap_or(Tid::ZERO))
}

/// A tid that may be `None` or empty.
pub(crate) fn optional_tid_arg(value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Tid>> {
    match value {
        Some(value) if value.is_truthy()? => tid_arg(value).map(Some),
        _ => Ok(None),
    }
}

/// A data record. Copies: the storage may keep it after the call, when Python no longer does.
pub(crate) fn data_arg(value: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    if let Ok(bytes) = value.cast::<PyBytes>() {
        return Ok(Bytes::copy_from_slice(bytes.as_bytes()));
    }
    // bytearray, memoryview
    let buffer = PyBuffer::<u8>::get(value).map_err(|_| PyTypeError::new_err("a data record is bytes"))?;
    Ok(buffer.to_vec(value.py())?.into())
}

/// How many: ZODB takes any number, where negative ones mean none.
pub(crate) fn count_arg(value: &Bound<'_, PyAny>) -> PyResult<usize> {
    match value.extract::<usize>() {
        Err(error) if error.is_instance_of::<PyOverflowError>(value.py()) => {
            Ok(if value.lt(0)? { 0 } else { usize::MAX })
        }
        count => count,
    }
}

/// User, description and extension of a transaction object (`IStorageTransactionMetaData`).
pub(crate) fn metadata_arg(transaction: &Bound<'_, PyAny>) -> PyResult<TxnMeta> {
    let field = |name: &str| -> PyResult<Bytes> {
        let value = transaction.getattr(name)?;
        if let Ok(text) = value.extract::<&str>() {
            return Ok(Bytes::copy_from_slice(text.as_bytes()));
        }
        Ok(Bytes::copy_from_slice(value.cast::<PyBytes>()?.as_bytes()))
    };
    Ok(TxnMeta {
        user: field("user")?,
        description: field("description")?,
        extension: field("extension_bytes")?,
    })
}

/// Turns a storage's error into ZODB's exception.
pub(crate) trait OrRaise<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for StorageResult<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| errors::storage_error(py, &error))
    }
}
