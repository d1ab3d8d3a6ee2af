//! Storage errors as the faults that a client knows, and as what it raises.

use crate::pickle::{self, Value};
use crate::storage::StorageError;
use crate::wire::Fault;

const FILE_STORAGE: &str = "ZODB.FileStorage.FileStorage.";

/// The exception that ZODB's storages raise for `error`.
pub(crate) fn of(error: &StorageError) -> Fault {
    let text = error.to_string();
    match error {
        StorageError::NotFound(oid) => Fault::pos_key(*oid),
        StorageError::NoBlob { oid, serial } => Fault::no_blob(*oid, *serial),
        StorageError::Conflict(conflict) => {
            let class = class_name(&conflict.data);
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
        StorageError::Foreign { class, text } => Fault::new(class.clone(), text.clone()),
        _ => Fault::new("ZODB.POSException.StorageSystemError", text),
    }
}

/// `module.Class` of a data record, where its pickle starts with the class as ZODB's own do.
fn class_name(record: &[u8]) -> Option<String> {
    let rest = match record {
        [0x80, _protocol, rest @ ..] => rest,
        rest => rest,
    };
    let rest = rest.strip_prefix(b"(").unwrap_or(rest).strip_prefix(b"c")?;
    let mut lines = rest.split(|byte| *byte == b'\n');
    let (module, name) = (std::str::from_utf8(lines.next()?).ok()?, std::str::from_utf8(lines.next()?).ok()?);
    lines.next()?;
    (!module.is_empty() && !name.is_empty()).then(|| format!("{module}.{name}"))
}

/// The extension of a transaction as pairs of a dict; what cannot be read is left out rather than fail the whole answer.
pub(crate) fn extension(stored: &[u8]) -> Vec<(Value, Value)> {
    match pickle::decode_extension(stored) {
        Ok(Value::Dict(pairs)) => pairs,
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_records() {
        assert_eq!(class_name(b"\x80\x03cpkg.mod\nCls\nq\x01.").as_deref(), Some("pkg.mod.Cls"));
        assert_eq!(class_name(b"\x80\x02(cm\nC\nq\x01tq\x02.").as_deref(), Some("m.C"));
        for other in [&b""[..], b"\x80\x03", b"\x80\x03cm", b"\x80\x03cm\nC", b"\x80\x03c\n\n.", b"(dp1\n."] {
            assert_eq!(class_name(other), None, "{other:?}");
        }
    }
}
