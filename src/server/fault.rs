//! Storage errors as the faults that a client knows, and as what it raises.

use crate::pickle::{self, Value};
use crate::storage::StorageError;
use crate::storage::transform::untransform;
use crate::wire::Fault;

const FILE_STORAGE: &str = "ZODB.FileStorage.FileStorage.";

/// The exception that ZODB's storages raise for `error`.
pub(crate) fn of(error: &StorageError) -> Fault {
    let text = error.to_string();
    match error {
        StorageError::NotFound(oid) => Fault::pos_key(*oid),
        StorageError::NoBlob { oid, serial } => Fault::no_blob(*oid, *serial),
        StorageError::Conflict(conflict) => {
            let record = untransform(&conflict.data).unwrap_or_default();
            let class = pickle::class_of(&record).map(|(module, name)| format!("{module}.{name}"));
            Fault::conflict(conflict.oid, conflict.committed, conflict.read, class.as_deref())
        }
        StorageError::ReadConflict { oid, committed, read } => Fault::read_conflict(*oid, *committed, *read),
        StorageError::ReadOnly => Fault::read_only(),
        StorageError::Undo { reason, oid } => Fault::undo(reason, *oid),
        StorageError::MultipleUndo(errors) => Fault::multiple_undo(errors),
        StorageError::Transaction(_) => Fault::storage_transaction(vec![text.into()]),
        StorageError::Invalid(_) => Fault::new(format!("{FILE_STORAGE}FileStorageError"), text),
        StorageError::Format(_) => Fault::new(format!("{FILE_STORAGE}FileStorageFormatError"), text),
        StorageError::Quota(_) => Fault::new(format!("{FILE_STORAGE}FileStorageQuotaError"), text),
        StorageError::Corrupted { .. } => {
            Fault::new(format!("{FILE_STORAGE}CorruptedFileStorageError"), text)
        }
        StorageError::Unsupported(_) => Fault::new("builtins.AttributeError", text),
        StorageError::Io { .. } => Fault::new("builtins.OSError", text),
        StorageError::PackTime(_) => Fault::new("builtins.ValueError", text),
        StorageError::Foreign { class, text } => Fault::new(class.clone(), text.clone()),
        _ => Fault::new("ZODB.POSException.StorageSystemError", text),
    }
}

/// The extension of a transaction as pairs of a dict; what cannot be read is left out rather than fail the whole answer.
pub(crate) fn extension(stored: &[u8]) -> Vec<(Value, Value)> {
    match pickle::decode_extension(stored) {
        Ok(Value::Dict(pairs)) => pairs,
        _ => Vec::new(),
    }
}
