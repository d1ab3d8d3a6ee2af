//! [`Fault`]s of the known classes: written as a server does, read by condition as a client needs them.
//!
//! Python clients rebuild some exceptions from these arguments and hang if one is missing, so faults of known classes
//! are built here only.

use super::{BadCall, Fault};
use crate::ids::{Oid, Tid};
use crate::pickle::Value;

const POS: &str = "ZODB.POSException.";

impl Fault {
    /// An exception of any class, with text as its only argument.
    pub fn new(class: impl Into<String>, text: impl Into<String>) -> Self {
        Self { class: class.into(), data: Value::Tuple(vec![Value::Str(text.into())]) }
    }

    fn pos(name: &str, data: Value) -> Self {
        Self { class: format!("{POS}{name}"), data }
    }

    /// `POSKeyError(oid)`.
    pub fn pos_key(oid: Oid) -> Self {
        Self::pos_key_bytes(&oid.to_bytes())
    }

    /// `POSKeyError` for what a client sent in place of an oid.
    pub fn pos_key_bytes(oid: &[u8]) -> Self {
        Self::pos("POSKeyError", Value::Tuple(vec![Value::bytes(oid)]))
    }

    /// `POSKeyError(text, oid, serial)`: no blob file.
    pub fn no_blob(oid: Oid, serial: Tid) -> Self {
        Self::pos("POSKeyError", Value::Tuple(vec!["No blob file".into(), oid.into(), serial.into()]))
    }

    /// `ConflictError`; `class_name` is the `module.Class` of the record, if known.
    pub fn conflict(oid: Oid, committed: Tid, read: Tid, class_name: Option<&str>) -> Self {
        Self::pos("ConflictError", conflict_dict("database conflict error", oid, committed, read, class_name))
    }

    /// `ReadConflictError`, of `checkCurrentSerialInTransaction`.
    pub fn read_conflict(oid: Oid, committed: Tid, read: Tid) -> Self {
        Self::pos(
            "ReadConflictError",
            conflict_dict("database read conflict error", oid, committed, read, None),
        )
    }

    pub fn read_only() -> Self {
        Self::pos("ReadOnlyError", Value::Tuple(Vec::new()))
    }

    /// `StorageTransactionError(*args)`: a text, or `(open transaction or None, transaction given)`.
    pub fn storage_transaction(args: Vec<Value>) -> Self {
        Self::pos("StorageTransactionError", Value::Tuple(args))
    }

    /// `UndoError(reason, oid)`.
    pub fn undo(reason: &str, oid: Option<Oid>) -> Self {
        Self::pos("UndoError", Value::dict([("_reason", reason.into()), ("_oid", oid.into())]))
    }

    /// `MultipleUndoErrors([(oid, reason)])`, with the reasons as text: ZEO sends exceptions there, in a form that
    /// differs by encoding; its clients take either.
    pub fn multiple_undo(errors: &[(Oid, String)]) -> Self {
        let errors =
            errors.iter().map(|(oid, reason)| Value::Tuple(vec![(*oid).into(), reason.as_str().into()]));
        Self::pos("MultipleUndoErrors", Value::dict([("_errs", Value::List(errors.collect()))]))
    }

    /// `KeyError(key)`.
    pub fn key_error(key: Value) -> Self {
        Self { class: "builtins.KeyError".into(), data: Value::Tuple(vec![key]) }
    }

    pub fn type_error(text: impl Into<String>) -> Self {
        Self::new("builtins.TypeError", text)
    }

    pub fn value_error(text: impl Into<String>) -> Self {
        Self::new("builtins.ValueError", text)
    }

    /// The error by condition. Anything unknown or misshapen is [`FaultKind::Other`].
    pub fn kind(&self) -> FaultKind<'_> {
        self.known().unwrap_or(FaultKind::Other)
    }

    fn known(&self) -> Option<FaultKind<'_>> {
        let args = self.data.as_items();
        if let Some(name) = self.class.strip_prefix(POS) {
            return Some(match (name, args) {
                ("POSKeyError", Some([Value::Bytes(oid), ..])) => FaultKind::NotFound { oid },
                ("POSKeyError", Some([Value::Str(_), oid, serial])) => {
                    FaultKind::NoBlob { oid: oid.as_oid()?, serial: serial.as_tid()? }
                }
                ("ReadOnlyError", _) => FaultKind::ReadOnly,
                ("StorageTransactionError", Some(args)) => FaultKind::StorageTransaction { args },
                ("ConflictError" | "ReadConflictError", None) => FaultKind::Conflict {
                    is_read: name == "ReadConflictError",
                    oid: self.data.get("oid")?.as_oid(),
                    serials: match self.data.get("serials")?.as_items() {
                        Some([committed, read]) => committed.as_tid().zip(read.as_tid()),
                        _ => None,
                    },
                    class_name: self.data.get("class_name").and_then(Value::as_str),
                    message: self.data.get("message").and_then(Value::as_str),
                },
                ("UndoError", _) => undo_error(&self.data)?,
                ("MultipleUndoErrors", _) => FaultKind::MultipleUndo {
                    errors: self.data.get("_errs")?.as_items()?.iter().map(oid_and_reason).collect(),
                },
                _ => return None,
            });
        }
        Some(
            match (self.class.strip_prefix("builtins.").or(self.class.strip_prefix("exceptions."))?, args?) {
                ("KeyError", args) => FaultKind::Key { args },
                ("TypeError", args) => FaultKind::Type { args },
                ("ValueError", args) => FaultKind::Value { args },
                _ => return None,
            },
        )
    }
}

/// The answer to a call that was understood as a message but not as a call.
impl From<&BadCall> for Fault {
    fn from(bad: &BadCall) -> Self {
        match bad {
            BadCall::NotEightBytes { given, .. } => Self::pos_key_bytes(given),
            BadCall::UnknownMethod(_) => Self::new("builtins.AttributeError", bad.to_string()),
            BadCall::Arguments { .. } => Self::type_error(bad.to_string()),
        }
    }
}

/// A [`Fault`] by condition.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum FaultKind<'a> {
    /// `POSKeyError`; the bytes that were taken for an oid.
    NotFound {
        oid: &'a [u8],
    },
    /// `POSKeyError` of a blob.
    NoBlob {
        oid: Oid,
        serial: Tid,
    },
    /// `ConflictError` or `ReadConflictError`; `serials` are `(committed, read)`.
    Conflict {
        is_read: bool,
        oid: Option<Oid>,
        serials: Option<(Tid, Tid)>,
        class_name: Option<&'a str>,
        message: Option<&'a str>,
    },
    ReadOnly,
    StorageTransaction {
        args: &'a [Value],
    },
    Undo {
        reason: &'a str,
        oid: Option<Oid>,
    },
    MultipleUndo {
        errors: Vec<(Option<Oid>, String)>,
    },
    Key {
        args: &'a [Value],
    },
    Type {
        args: &'a [Value],
    },
    Value {
        args: &'a [Value],
    },
    /// `ServerException(class, data)` on the client.
    Other,
}

fn conflict_dict(message: &str, oid: Oid, committed: Tid, read: Tid, class_name: Option<&str>) -> Value {
    Value::dict([
        ("message", message.into()),
        ("oid", oid.into()),
        ("class_name", class_name.into()),
        ("serials", Value::Tuple(vec![committed.into(), read.into()])),
    ])
}

fn undo_error(data: &Value) -> Option<FaultKind<'_>> {
    let (reason, oid) = match data.as_items() {
        Some([reason]) => (reason, None),
        Some([reason, oid]) => (reason, oid.as_oid()),
        Some(_) => return None,
        None => (data.get("_reason")?, data.get("_oid").and_then(Value::as_oid)),
    };
    Some(FaultKind::Undo { reason: reason.as_str()?, oid })
}

/// One of `_errs`: `(oid, UndoError)`, where the error is text (ours), a `(class, data)` pair (`M5`) or a pickled
/// instance (`Z5`), or anything else that has text.
fn oid_and_reason(error: &Value) -> (Option<Oid>, String) {
    let Some([oid, error]) = error.as_items() else { return (None, error.to_string()) };
    let reason = match error {
        Value::Str(reason) => Some(reason.as_str()),
        Value::Tuple(_) | Value::List(_) => match error.as_items() {
            Some([_, data]) => data.get("_reason").and_then(Value::as_str),
            _ => None,
        },
        Value::Call { args, state, .. } => {
            let in_state = state.as_ref().and_then(|state| state.get("_reason"));
            let in_args = args.as_items().and_then(|args| args.iter().find_map(|arg| arg.get("_reason")));
            in_state.or(in_args).and_then(Value::as_str)
        }
        _ => None,
    };
    (oid.as_oid(), reason.map_or_else(|| error.to_string(), str::to_owned))
}
