//! Replies, faults and notices ↔ their wire form.

use super::emit::Emitter;
use super::{Fault, MessageId, Notice, ServerMessage, WireError};
use crate::ids::Oid;
use crate::pickle::Value;

/// A `.reply` without error.
pub(super) fn parse_reply(id: MessageId, value: Value) -> ServerMessage {
    let MessageId::Load { oid, before } = id else { return ServerMessage::Reply { id, value } };
    let loaded = match &value {
        Value::None => None,
        _ => match value.as_items() {
            Some([Value::Bytes(data), tid, end_tid]) => match (tid.as_tid(), end_tid, end_tid.as_tid()) {
                (Some(tid), Value::None, _) => Some((data.clone(), tid, None)),
                (Some(tid), _, Some(end_tid)) => Some((data.clone(), tid, Some(end_tid))),
                _ => return ServerMessage::Reply { id, value },
            },
            _ => return ServerMessage::Reply { id, value },
        },
    };
    ServerMessage::Loaded { oid, before, loaded }
}

/// A `.reply` with the error flag.
pub(super) fn parse_fault(id: MessageId, args: Value) -> Result<ServerMessage, WireError> {
    match args.as_items() {
        Some([Value::Str(class), data]) => {
            let fault = Fault { class: class.clone(), data: data.clone() };
            Ok(ServerMessage::Fault { id, fault })
        }
        _ => Err(WireError::message(format!("an error reply must be (class, data), not {args}"))),
    }
}

/// Anything that is no reply.
pub(super) fn parse_notice(name: &str, args: &Value) -> Result<ServerMessage, WireError> {
    let args = args.as_items().unwrap_or_default();
    let notice = match (name, args) {
        ("invalidateTransaction", [tid, oids]) => {
            tid.as_tid().zip(parse_oids(oids)).map(|(tid, oids)| Notice::InvalidateTransaction { tid, oids })
        }
        ("info", [info @ Value::Dict(_)]) => Some(Notice::Info(info.clone())),
        ("receiveBlobStart", [oid, serial]) => {
            oid.as_oid().zip(serial.as_tid()).map(|(oid, serial)| Notice::ReceiveBlobStart { oid, serial })
        }
        ("receiveBlobStop", [oid, serial]) => {
            oid.as_oid().zip(serial.as_tid()).map(|(oid, serial)| Notice::ReceiveBlobStop { oid, serial })
        }
        ("receiveBlobChunk", [oid, serial, Value::Bytes(chunk)]) => oid
            .as_oid()
            .zip(serial.as_tid())
            .map(|(oid, serial)| Notice::ReceiveBlobChunk { oid, serial, chunk: chunk.clone() }),
        (
            "invalidateTransaction" | "info" | "receiveBlobStart" | "receiveBlobStop" | "receiveBlobChunk",
            _,
        ) => None,
        _ => return Ok(ServerMessage::UnknownNotice { name: name.to_owned() }),
    };
    notice
        .map(ServerMessage::Notice)
        .ok_or_else(|| WireError::message(format!("the arguments of {name} are not what they should be")))
}

fn parse_oids(oids: &Value) -> Option<Vec<Oid>> {
    oids.as_items()?.iter().map(Value::as_oid).collect()
}

/// Writes name and arguments.
pub(super) fn emit_notice(notice: &Notice, e: &mut Emitter<'_>) -> Result<(), WireError> {
    match notice {
        Notice::InvalidateTransaction { tid, oids } => {
            e.str("invalidateTransaction")?;
            e.tuple(2, |e| {
                e.tid(*tid)?;
                e.list(oids, |e, oid| e.oid(*oid))
            })
        }
        Notice::Info(info) => {
            e.str("info")?;
            e.tuple(1, |e| e.value(info))
        }
        Notice::ReceiveBlobStart { oid, serial } => {
            e.str("receiveBlobStart")?;
            e.tuple(2, |e| {
                e.oid(*oid)?;
                e.tid(*serial)
            })
        }
        Notice::ReceiveBlobChunk { oid, serial, chunk } => {
            e.str("receiveBlobChunk")?;
            e.tuple(3, |e| {
                e.oid(*oid)?;
                e.tid(*serial)?;
                e.bytes(chunk)
            })
        }
        Notice::ReceiveBlobStop { oid, serial } => {
            e.str("receiveBlobStop")?;
            e.tuple(2, |e| {
                e.oid(*oid)?;
                e.tid(*serial)
            })
        }
    }
}
