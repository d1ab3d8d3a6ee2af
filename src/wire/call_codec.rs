//! Calls ↔ their wire names and argument lists. Semantics and names: `docs/protocol.md`.
//!
//! One file of more than 500 lines: a call's two directions stand side by side, and nothing but calls is here.

use bytes::Bytes;

use super::emit::Emitter;
use super::{BadCall, Call, WireError};
use crate::ids::{Oid, Tid};
use crate::pickle::Value;

/// Reads a call. Arguments may be left out where ZEO's own server has a default.
pub(super) fn parse(name: &str, args: &[Value]) -> Result<Call, BadCall> {
    let mut args = Args::new(name, args)?;
    let call = args.call()?;
    args.end()?;
    Ok(call)
}

/// The names of all calls, as constants with the life of the program.
const METHODS: [&str; 35] = [
    "register",
    "get_info",
    "lastTransaction",
    "getInvalidations",
    "loadBefore",
    "loadSerial",
    "getTid",
    "history",
    "record_iternext",
    "new_oids",
    "tpc_begin",
    "storea",
    "checkCurrentSerialInTransaction",
    "deleteObject",
    "restorea",
    "undoa",
    "storeBlobStart",
    "storeBlobChunk",
    "storeBlobEnd",
    "storeBlobShared",
    "vote",
    "tpc_finish",
    "tpc_abort",
    "sendBlob",
    "pack",
    "undoInfo",
    "undoLog",
    "iterator_start",
    "iterator_next",
    "iterator_record_start",
    "iterator_record_next",
    "iterator_gc",
    "server_status",
    "set_client_label",
    "ping",
];

/// The arguments of one call, taken from the left.
struct Args<'a> {
    method: &'static str,
    rest: std::slice::Iter<'a, Value>,
}

impl<'a> Args<'a> {
    fn new(name: &str, args: &'a [Value]) -> Result<Self, BadCall> {
        let method = METHODS.iter().find(|method| **method == name);
        let method = method.ok_or_else(|| BadCall::UnknownMethod(name.to_owned()))?;
        Ok(Self { method, rest: args.iter() })
    }

    fn call(&mut self) -> Result<Call, BadCall> {
        Ok(match self.method {
            "register" => {
                Call::Register { storage: self.text("storage_id")?, read_only: self.truth("read_only")? }
            }
            "get_info" => Call::GetInfo,
            "lastTransaction" => Call::LastTransaction,
            "getInvalidations" => Call::GetInvalidations { tid: self.tid("tid")? },
            "loadBefore" => Call::LoadBefore { oid: self.oid()?, before: self.tid("tid")? },
            "loadSerial" => Call::LoadSerial { oid: self.oid()?, serial: self.tid("serial")? },
            "getTid" => Call::GetTid { oid: self.oid()? },
            "history" => Call::History { oid: self.oid()?, size: self.int_or("size", 1)? },
            "record_iternext" => Call::RecordIternext { next: self.optional("next", Self::to_oid)? },
            "new_oids" => Call::NewOids { count: self.int_or("n", 100)? },
            "tpc_begin" => Call::TpcBegin {
                txn: self.value("id")?,
                user: self.bytes_or_text("user")?,
                description: self.bytes_or_text("description")?,
                extension: self.extension()?,
                tid: self.optional("tid", Self::to_tid)?,
                status: self.status()?,
            },
            "storea" => Call::Storea {
                oid: self.oid()?,
                serial: self.serial()?,
                data: self.bytes("data")?,
                txn: self.value("id")?,
            },
            "checkCurrentSerialInTransaction" => {
                Call::CheckCurrentSerial { oid: self.oid()?, serial: self.serial()?, txn: self.value("id")? }
            }
            "deleteObject" => {
                Call::DeleteObject { oid: self.oid()?, serial: self.serial()?, txn: self.value("id")? }
            }
            "restorea" => Call::Restorea {
                oid: self.oid()?,
                serial: self.tid("serial")?,
                data: self.nullable("data", Self::to_bytes)?,
                prev_txn: self.nullable("prev_txn", Self::to_tid)?,
                txn: self.value("id")?,
            },
            "undoa" => Call::Undoa { trans_id: self.bytes_or_text("trans_id")?, txn: self.value("id")? },
            "storeBlobStart" => Call::StoreBlobStart,
            "storeBlobChunk" => Call::StoreBlobChunk { chunk: self.bytes("chunk")? },
            "storeBlobEnd" => Call::StoreBlobEnd {
                oid: self.oid()?,
                serial: self.serial()?,
                data: self.bytes("data")?,
                txn: self.value("id")?,
            },
            "storeBlobShared" => Call::StoreBlobShared {
                oid: self.oid()?,
                serial: self.serial()?,
                data: self.bytes("data")?,
                filename: self.text("filename")?,
                txn: self.value("id")?,
            },
            "vote" => Call::Vote { txn: self.value("id")? },
            "tpc_finish" => Call::TpcFinish { txn: self.value("id")? },
            "tpc_abort" => Call::TpcAbort { txn: self.value("id")? },
            "sendBlob" => Call::SendBlob { oid: self.oid()?, serial: self.tid("serial")? },
            "pack" => Call::Pack { time: self.float("time")?, wait: self.truth_or("wait", true) },
            "undoInfo" => Call::UndoInfo {
                first: self.int("first")?,
                last: self.int("last")?,
                specification: self.value("spec")?,
            },
            "undoLog" => Call::UndoLog { first: self.int("first")?, last: self.int("last")? },
            "iterator_start" => Call::IteratorStart {
                start: self.nullable("start", Self::to_tid)?,
                stop: self.nullable("stop", Self::to_tid)?,
            },
            "iterator_next" => Call::IteratorNext { iid: self.int("iid")? },
            "iterator_record_start" => {
                Call::IteratorRecordStart { txn_iid: self.int("txn_iid")?, tid: self.tid("tid")? }
            }
            "iterator_record_next" => Call::IteratorRecordNext { iid: self.int("iid")? },
            "iterator_gc" => Call::IteratorGc { iids: self.ints("iids")? },
            "server_status" => Call::ServerStatus,
            "set_client_label" => Call::SetClientLabel { label: self.text("label")? },
            "ping" => Call::Ping,
            other => return Err(BadCall::UnknownMethod(other.to_owned())),
        })
    }

    fn end(&self) -> Result<(), BadCall> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(self.problem(format!("{extra} arguments too many"))),
        }
    }

    fn problem(&self, problem: String) -> BadCall {
        BadCall::Arguments { method: self.method, problem }
    }

    fn wrong(&self, name: &str, wanted: &str, given: &Value) -> BadCall {
        let mut shown = given.to_string();
        if let Some((cut, _)) = shown.char_indices().nth(60) {
            shown.truncate(cut);
            shown.push_str("...");
        }
        self.problem(format!("{name} must be {wanted}, not {shown}"))
    }

    fn next(&mut self, name: &str) -> Result<&'a Value, BadCall> {
        match self.rest.next() {
            Some(value) => Ok(value),
            None => Err(self.problem(format!("argument {name} is missing"))),
        }
    }

    fn value(&mut self, name: &str) -> Result<Value, BadCall> {
        self.next(name).cloned()
    }

    fn to_bytes(&self, name: &'static str, value: &Value) -> Result<Bytes, BadCall> {
        value.as_bytes().cloned().ok_or_else(|| self.wrong(name, "bytes", value))
    }

    fn eight(&self, argument: &'static str, value: &Value) -> Result<[u8; 8], BadCall> {
        let given = self.to_bytes(argument, value)?;
        match <[u8; 8]>::try_from(&given[..]) {
            Ok(eight) => Ok(eight),
            Err(_) => Err(BadCall::NotEightBytes { method: self.method, argument, given }),
        }
    }

    fn to_oid(&self, name: &'static str, value: &Value) -> Result<Oid, BadCall> {
        self.eight(name, value).map(Oid::from_bytes)
    }

    fn to_tid(&self, name: &'static str, value: &Value) -> Result<Tid, BadCall> {
        self.eight(name, value).map(Tid::from_bytes)
    }

    fn oid(&mut self) -> Result<Oid, BadCall> {
        let value = self.next("oid")?;
        self.to_oid("oid", value)
    }

    fn tid(&mut self, name: &'static str) -> Result<Tid, BadCall> {
        let value = self.next(name)?;
        self.to_tid(name, value)
    }

    /// The serial a change was made from. Clients pass on what an application gave for a new object (`None`, text):
    /// what is not eight bytes is the serial of no revision.
    fn serial(&mut self) -> Result<Tid, BadCall> {
        let given = self.next("serial")?.as_bytes();
        Ok(given.and_then(|bytes| Tid::from_slice(bytes)).unwrap_or(Tid::ZERO))
    }

    fn bytes(&mut self, name: &'static str) -> Result<Bytes, BadCall> {
        let value = self.next(name)?;
        self.to_bytes(name, value)
    }

    /// An argument that must be given but may be `None`.
    fn nullable<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&Self, &'static str, &Value) -> Result<T, BadCall>,
    ) -> Result<Option<T>, BadCall> {
        match self.next(name)? {
            Value::None => Ok(None),
            value => read(self, name, value).map(Some),
        }
    }

    /// An argument that may be `None` or left out.
    fn optional<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&Self, &'static str, &Value) -> Result<T, BadCall>,
    ) -> Result<Option<T>, BadCall> {
        if self.rest.len() == 0 { Ok(None) } else { self.nullable(name, read) }
    }

    /// Text from clients that predate bytes there; stored as UTF-8.
    fn bytes_or_text(&mut self, name: &'static str) -> Result<Bytes, BadCall> {
        match self.next(name)? {
            Value::Str(text) => Ok(Bytes::copy_from_slice(text.as_bytes())),
            value => self.to_bytes(name, value),
        }
    }

    fn text(&mut self, name: &'static str) -> Result<String, BadCall> {
        let value = self.next(name)?;
        value.as_str().map(str::to_owned).ok_or_else(|| self.wrong(name, "text", value))
    }

    fn int(&mut self, name: &'static str) -> Result<i64, BadCall> {
        let value = self.next(name)?;
        value.as_int().ok_or_else(|| self.wrong(name, "an integer", value))
    }

    fn int_or(&mut self, name: &'static str, default: i64) -> Result<i64, BadCall> {
        if self.rest.len() == 0 { Ok(default) } else { self.int(name) }
    }

    fn ints(&mut self, name: &'static str) -> Result<Vec<i64>, BadCall> {
        let value = self.next(name)?;
        let ints = value.as_items().and_then(|items| items.iter().map(Value::as_int).collect());
        ints.ok_or_else(|| self.wrong(name, "a list of integers", value))
    }

    fn float(&mut self, name: &'static str) -> Result<f64, BadCall> {
        let value = self.next(name)?;
        value.as_float().ok_or_else(|| self.wrong(name, "a number", value))
    }

    fn truth(&mut self, name: &'static str) -> Result<bool, BadCall> {
        self.next(name).map(Value::is_truthy)
    }

    fn truth_or(&mut self, name: &'static str, default: bool) -> bool {
        self.truth(name).unwrap_or(default)
    }

    /// A dict, also one of a class that pickles itself as `dict(pairs)`; `None` counts as an empty one.
    fn extension(&mut self) -> Result<Value, BadCall> {
        let value = self.next("ext")?;
        match value {
            Value::None => Ok(Value::Dict(Vec::new())),
            Value::Dict(_) => Ok(value.clone()),
            Value::Call { args, state: None, .. } => match args.as_items() {
                Some([dict @ Value::Dict(_)]) => Ok(dict.clone()),
                Some([pairs]) => {
                    let pairs = pairs.as_items().and_then(|pairs| pairs.iter().map(pair).collect());
                    pairs.map(Value::Dict).ok_or_else(|| self.wrong("ext", "a dict", value))
                }
                _ => Err(self.wrong("ext", "a dict", value)),
            },
            other => Err(self.wrong("ext", "a dict", other)),
        }
    }

    /// One character of text (or byte), by default a blank.
    fn status(&mut self) -> Result<u8, BadCall> {
        let Some(value) = self.rest.next() else { return Ok(b' ') };
        let bytes = match value {
            Value::Str(text) => text.as_bytes(),
            Value::Bytes(bytes) => bytes,
            _ => &[],
        };
        match bytes {
            [status] if status.is_ascii() => Ok(*status),
            _ => Err(self.wrong("status", "one character", value)),
        }
    }
}

fn pair(value: &Value) -> Option<(Value, Value)> {
    match value.as_items()? {
        [key, value] => Some((key.clone(), value.clone())),
        _ => None,
    }
}

/// Writes name and arguments, as the Python client does.
pub(super) fn emit(call: &Call, emitter: &mut Emitter<'_>) -> Result<(), WireError> {
    let (name, count) = name_and_count(call);
    emitter.str(name)?;
    if matches!(call, Call::KeepAlive) {
        return emitter.none();
    }
    emitter.tuple(count, |emitter| emit_args(call, emitter))
}

fn name_and_count(call: &Call) -> (&'static str, usize) {
    match call {
        Call::Register { .. } => ("register", 2),
        Call::GetInfo => ("get_info", 0),
        Call::LastTransaction => ("lastTransaction", 0),
        Call::GetInvalidations { .. } => ("getInvalidations", 1),
        Call::LoadBefore { .. } => ("loadBefore", 2),
        Call::LoadSerial { .. } => ("loadSerial", 2),
        Call::GetTid { .. } => ("getTid", 1),
        Call::History { .. } => ("history", 2),
        Call::RecordIternext { .. } => ("record_iternext", 1),
        // The Python client leaves the server's default out.
        Call::NewOids { count } => ("new_oids", usize::from(*count != 100)),
        Call::TpcBegin { .. } => ("tpc_begin", 6),
        Call::Storea { .. } => ("storea", 4),
        Call::CheckCurrentSerial { .. } => ("checkCurrentSerialInTransaction", 3),
        Call::DeleteObject { .. } => ("deleteObject", 3),
        Call::Restorea { .. } => ("restorea", 5),
        Call::Undoa { .. } => ("undoa", 2),
        Call::StoreBlobStart => ("storeBlobStart", 0),
        Call::StoreBlobChunk { .. } => ("storeBlobChunk", 1),
        Call::StoreBlobEnd { .. } => ("storeBlobEnd", 4),
        Call::StoreBlobShared { .. } => ("storeBlobShared", 5),
        Call::Vote { .. } => ("vote", 1),
        Call::TpcFinish { .. } => ("tpc_finish", 1),
        Call::TpcAbort { .. } => ("tpc_abort", 1),
        Call::SendBlob { .. } => ("sendBlob", 2),
        Call::Pack { .. } => ("pack", 2),
        Call::UndoInfo { .. } => ("undoInfo", 3),
        Call::UndoLog { .. } => ("undoLog", 2),
        Call::IteratorStart { .. } => ("iterator_start", 2),
        Call::IteratorNext { .. } => ("iterator_next", 1),
        Call::IteratorRecordStart { .. } => ("iterator_record_start", 2),
        Call::IteratorRecordNext { .. } => ("iterator_record_next", 1),
        Call::IteratorGc { .. } => ("iterator_gc", 1),
        Call::ServerStatus => ("server_status", 0),
        Call::SetClientLabel { .. } => ("set_client_label", 1),
        Call::Ping => ("ping", 0),
        Call::KeepAlive => (".reply", 0),
    }
}

fn emit_args(call: &Call, e: &mut Emitter<'_>) -> Result<(), WireError> {
    match call {
        Call::Register { storage, read_only } => {
            e.str(storage)?;
            e.int(i64::from(*read_only))
        }
        Call::GetInfo
        | Call::LastTransaction
        | Call::StoreBlobStart
        | Call::ServerStatus
        | Call::Ping
        | Call::KeepAlive => Ok(()),
        Call::GetInvalidations { tid } => e.tid(*tid),
        Call::GetTid { oid } => e.oid(*oid),
        Call::LoadBefore { oid, before: tid }
        | Call::LoadSerial { oid, serial: tid }
        | Call::SendBlob { oid, serial: tid } => {
            e.oid(*oid)?;
            e.tid(*tid)
        }
        Call::History { oid, size } => {
            e.oid(*oid)?;
            e.int(*size)
        }
        Call::RecordIternext { next } => e.optional(*next, Emitter::oid),
        Call::NewOids { count: 100 } => Ok(()),
        Call::NewOids { count } => e.int(*count),
        Call::TpcBegin { txn, user, description, extension, tid, status } => {
            e.value(txn)?;
            e.bytes(user)?;
            e.bytes(description)?;
            e.value(extension)?;
            e.optional(*tid, Emitter::tid)?;
            e.str(char::from(*status).encode_utf8(&mut [0; 2]))
        }
        Call::Storea { oid, serial, data, txn } | Call::StoreBlobEnd { oid, serial, data, txn } => {
            e.oid(*oid)?;
            e.tid(*serial)?;
            e.bytes(data)?;
            e.value(txn)
        }
        Call::CheckCurrentSerial { oid, serial, txn } | Call::DeleteObject { oid, serial, txn } => {
            e.oid(*oid)?;
            e.tid(*serial)?;
            e.value(txn)
        }
        Call::Restorea { oid, serial, data, prev_txn, txn } => {
            e.oid(*oid)?;
            e.tid(*serial)?;
            e.optional(data.as_deref(), Emitter::bytes)?;
            e.optional(*prev_txn, Emitter::tid)?;
            e.value(txn)
        }
        Call::Undoa { trans_id, txn } => {
            e.bytes(trans_id)?;
            e.value(txn)
        }
        Call::StoreBlobChunk { chunk } => e.bytes(chunk),
        Call::StoreBlobShared { oid, serial, data, filename, txn } => {
            e.oid(*oid)?;
            e.tid(*serial)?;
            e.bytes(data)?;
            e.str(filename)?;
            e.value(txn)
        }
        Call::Vote { txn } | Call::TpcFinish { txn } | Call::TpcAbort { txn } => e.value(txn),
        Call::Pack { time, wait } => {
            e.float(*time)?;
            e.int(i64::from(*wait))
        }
        Call::UndoInfo { first, last, specification } => {
            e.int(*first)?;
            e.int(*last)?;
            e.value(specification)
        }
        Call::UndoLog { first, last } => {
            e.int(*first)?;
            e.int(*last)
        }
        Call::IteratorStart { start, stop } => {
            e.optional(*start, Emitter::tid)?;
            e.optional(*stop, Emitter::tid)
        }
        Call::IteratorNext { iid } | Call::IteratorRecordNext { iid } => e.int(*iid),
        Call::IteratorRecordStart { txn_iid, tid } => {
            e.int(*txn_iid)?;
            e.tid(*tid)
        }
        Call::IteratorGc { iids } => e.list(iids, |e, iid| e.int(*iid)),
        Call::SetClientLabel { label } => e.str(label),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(name: &str, args: Vec<Value>) -> Result<Call, BadCall> {
        parse(name, &args)
    }

    fn bytes(of: &'static [u8]) -> Value {
        Value::Bytes(Bytes::from_static(of))
    }

    #[test]
    fn the_serial_of_a_new_object_may_be_anything() {
        let text = Value::Str("\0\0\0\0\0\0\0\0".into());
        for serial in [Value::None, text, bytes(b""), bytes(b"\0\0\0\0\0\0\0\0")] {
            let args = vec![bytes(b"\0\0\0\0\0\0\0\x05"), serial, bytes(b"data"), Value::Int(7)];
            let Ok(Call::Storea { serial, .. }) = parsed("storea", args) else { panic!("not taken") };
            assert_eq!(serial, Tid::ZERO);
        }
    }

    #[test]
    fn an_extension_may_be_a_dict_that_pickles_itself_as_a_call() {
        let pair = Value::Tuple(vec![Value::Str("foo".into()), Value::Int(1)]);
        let begin = |extension| {
            let args = vec![Value::Int(7), bytes(b""), bytes(b""), extension];
            match parsed("tpc_begin", args) {
                Ok(Call::TpcBegin { extension, .. }) => Some(extension),
                _ => None,
            }
        };
        let wanted = Value::Dict(vec![(Value::Str("foo".into()), Value::Int(1))]);
        assert_eq!(
            begin(Value::builtin_call("dict", Value::Tuple(vec![pair.clone()]))),
            Some(wanted.clone())
        );
        assert_eq!(begin(Value::builtin_call("dict", wanted.clone())), Some(wanted));
        assert_eq!(begin(Value::builtin_call("dict", pair)), None);
        assert_eq!(begin(Value::Int(1)), None);
    }
}
