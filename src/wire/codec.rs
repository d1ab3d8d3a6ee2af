//! Messages ↔ frames. Every message is the 4-tuple `(id, flag, name, arguments)`.
//!
//! The `encode_*` functions append one whole frame, length included, and leave `out` alone if they fail. The `decode_*`
//! functions take one frame's body; byte strings in what they return share its buffer.

use bytes::{BufMut, Bytes, BytesMut};

use super::emit::{Emitter, Foreign};
use super::frame::put_frame_with;
use super::{
    Call, Encoding, Fault, MessageId, Notice, Request, ServerMessage, WireError, call_codec, fast, msgpack,
    reply_codec,
};
use crate::ids::Tid;
use crate::pickle::{self, Globals, Value};

const REPLY: &str = ".reply";

/// Server: understands a message of a client.
///
/// Cost: `loadBefore`, `storea` and `storeBlobChunk` in the form that ZEO's and our clients write are compared with a
/// template and cut (no allocation but the name of a transaction); all else goes through a tree of [`Value`]s.
///
/// # Errors
/// The connection is to be closed: not decodable, or not a 4-tuple. A call that is wrong in itself is an
/// `Err` in [`Request::call`].
pub fn decode_request(encoding: Encoding, frame: &Bytes) -> Result<Request, WireError> {
    match fast::request(encoding, frame) {
        Some(request) => Ok(request),
        None => decode_request_generally(encoding, frame),
    }
}

pub(super) fn decode_request_generally(encoding: Encoding, frame: &Bytes) -> Result<Request, WireError> {
    let message = Message::decode(encoding, frame, Globals::Request)?;
    if message.id == MessageId::Seq(-1) {
        return Ok(Request { id: message.id, is_async: true, call: Ok(Call::KeepAlive) });
    }
    let call = match message.args.as_items() {
        Some(args) => call_codec::parse(&message.name, args),
        // No known method has such arguments (`.reply` has): report its name.
        None => Err(super::BadCall::UnknownMethod(message.name)),
    };
    Ok(Request { id: message.id, is_async: message.flag, call })
}

/// Client: appends a `storeBlobChunk` whose `length` bytes `put` appends, straight from where they are.
///
/// # Errors
/// [`WireError::Unencodable`] for more than 1 GiB; those of `put`.
pub fn encode_upload<E: From<WireError>>(
    encoding: Encoding,
    length: usize,
    out: &mut BytesMut,
    put: impl FnOnce(&mut BytesMut) -> Result<(), E>,
) -> Result<(), E> {
    if !fast::put_upload_head(encoding, length, out) {
        return Err(WireError::frame_too_long().into());
    }
    put(out)?;
    out.extend_from_slice(fast::upload_end(encoding));
    Ok(())
}

/// Client: appends a call. `id` is 0 for an asynchronous one; for `loadBefore` use [`MessageId::Load`].
///
/// # Errors
/// [`WireError::Unencodable`] naming the value that has no form in this encoding.
pub fn encode_call(
    encoding: Encoding,
    id: &MessageId,
    is_async: bool,
    call: &Call,
    out: &mut BytesMut,
) -> Result<(), WireError> {
    if let (MessageId::Load { oid, before }, Call::LoadBefore { oid: of, before: at }, false) =
        (id, call, is_async)
        && (oid, before) == (of, at)
    {
        fast::put_load_before(encoding, *oid, *before, out);
        return Ok(());
    }
    put_message(encoding, Foreign::Keep, out, |e| {
        emit_id(id, e)?;
        e.bool(is_async)?;
        call_codec::emit(call, e)
    })
}

/// Client: appends the keep-alive, which is sent every minute and never answered.
///
/// # Errors
/// None in practice.
pub fn encode_keep_alive(encoding: Encoding, out: &mut BytesMut) -> Result<(), WireError> {
    put_message(encoding, Foreign::Keep, out, |e| {
        e.int(-1)?;
        e.int(0)?;
        call_codec::emit(&Call::KeepAlive, e)
    })
}

/// Client: understands a message of a server.
///
/// Cost: a load's reply and a blob's chunk are compared with a template and cut, without allocation.
///
/// # Errors
/// The connection is to be closed.
pub fn decode_server_message(encoding: Encoding, frame: &Bytes) -> Result<ServerMessage, WireError> {
    match fast::server_message(encoding, frame) {
        Some(message) => Ok(message),
        None => decode_server_message_generally(encoding, frame),
    }
}

pub(super) fn decode_server_message_generally(
    encoding: Encoding,
    frame: &Bytes,
) -> Result<ServerMessage, WireError> {
    let Message { id, flag, name, args } = Message::decode(encoding, frame, Globals::Any)?;
    match (name.as_str(), flag) {
        (REPLY, false) => Ok(reply_codec::parse_reply(id, args)),
        (REPLY, true) => reply_codec::parse_fault(id, args),
        _ => reply_codec::parse_notice(&name, &args),
    }
}

/// Server: appends the answer to a call. Values that a Python client could not read (classes and calls; in `M5` also
/// keys that are neither text nor bytes, and huge integers) are sent as text, because such a client hangs otherwise.
///
/// # Errors
/// [`WireError::Unencodable`]: too deep or too long; answer a fault instead.
pub fn encode_reply(
    encoding: Encoding,
    id: &MessageId,
    value: &Value,
    out: &mut BytesMut,
) -> Result<(), WireError> {
    put_message(encoding, Foreign::Text, out, |e| {
        emit_id(id, e)?;
        e.int(0)?;
        e.str(REPLY)?;
        e.value(value)
    })
}

/// Server: appends the answer to `loadBefore`: `(data, tid, end_tid)`, or `None` for an object younger than asked for.
///
/// Cost: one reservation in `out`, one copy of `data`.
///
/// # Errors
/// [`WireError::Unencodable`] for a record of 4 GiB.
pub fn encode_loaded(
    encoding: Encoding,
    id: &MessageId,
    loaded: Option<(&[u8], Tid, Option<Tid>)>,
    out: &mut BytesMut,
) -> Result<(), WireError> {
    if let (MessageId::Load { oid, before }, Some((data, tid, end_tid))) = (id, loaded)
        && fast::put_loaded(encoding, *oid, *before, data, tid, end_tid, out)
    {
        return Ok(());
    }
    put_message(encoding, Foreign::Text, out, |e| emit_loaded(id, loaded, e))
}

pub(super) fn emit_loaded(
    id: &MessageId,
    loaded: Option<(&[u8], Tid, Option<Tid>)>,
    e: &mut Emitter<'_>,
) -> Result<(), WireError> {
    emit_id(id, e)?;
    e.int(0)?;
    e.str(REPLY)?;
    e.optional(loaded, |e, (data, tid, end_tid)| {
        e.tuple(3, |e| {
            e.bytes(data)?;
            e.tid(tid)?;
            e.optional(end_tid, Emitter::tid)
        })
    })
}

/// Server: appends an error answer to a call.
///
/// # Errors
/// As [`encode_reply`].
pub fn encode_fault(
    encoding: Encoding,
    id: &MessageId,
    fault: &Fault,
    out: &mut BytesMut,
) -> Result<(), WireError> {
    put_message(encoding, Foreign::Text, out, |e| {
        emit_id(id, e)?;
        e.int(2)?;
        e.str(REPLY)?;
        e.tuple(2, |e| {
            e.str(&fault.class)?;
            e.value(&fault.data)
        })
    })
}

/// Server: appends a one-way message.
///
/// # Errors
/// As [`encode_reply`].
pub fn encode_notice(encoding: Encoding, notice: &Notice, out: &mut BytesMut) -> Result<(), WireError> {
    put_message(encoding, Foreign::Text, out, |e| {
        e.int(0)?;
        e.bool(true)?;
        reply_codec::emit_notice(notice, e)
    })
}

/// A frame with the 4-tuple whose items `write` writes.
pub(super) fn put_message(
    encoding: Encoding,
    foreign: Foreign,
    out: &mut BytesMut,
    write: impl FnOnce(&mut Emitter<'_>) -> Result<(), WireError>,
) -> Result<(), WireError> {
    put_frame_with(out, |out| {
        if encoding == Encoding::Pickle {
            out.put_slice(b"\x80\x03");
        }
        Emitter::new(encoding, foreign, out).tuple(4, write)?;
        if encoding == Encoding::Pickle {
            out.put_u8(b'.');
        }
        Ok(())
    })
}

pub(super) fn emit_id(id: &MessageId, e: &mut Emitter<'_>) -> Result<(), WireError> {
    match id {
        MessageId::Seq(number) => e.int(*number),
        MessageId::Load { oid, before } => e.tuple(2, |e| {
            e.oid(*oid)?;
            e.tid(*before)
        }),
        MessageId::Other(value) => e.value(value),
    }
}

/// The 4-tuple.
struct Message {
    id: MessageId,
    flag: bool,
    name: String,
    args: Value,
}

impl Message {
    fn decode(encoding: Encoding, frame: &Bytes, globals: Globals) -> Result<Self, WireError> {
        let value = match encoding {
            Encoding::Pickle => pickle::decode(frame, globals)?,
            Encoding::Msgpack => msgpack::decode(frame, globals.max_values())?,
        };
        let (Value::Tuple(items) | Value::List(items)) = value else {
            return Err(WireError::message("it is no tuple"));
        };
        let Ok([id, flag, name, args]) = <[Value; 4]>::try_from(items) else {
            return Err(WireError::message("it has not 4 items"));
        };
        let Value::Str(name) = name else { return Err(WireError::message("its name is no text")) };
        Ok(Self { id: message_id(id), flag: flag.is_truthy(), name, args })
    }
}

fn message_id(id: Value) -> MessageId {
    match &id {
        Value::Int(number) => MessageId::Seq(*number),
        Value::Tuple(items) => match items.as_slice() {
            [oid, before] => match (oid.as_oid(), before.as_tid()) {
                (Some(oid), Some(before)) => MessageId::Load { oid, before },
                _ => MessageId::Other(id),
            },
            _ => MessageId::Other(id),
        },
        _ => MessageId::Other(id),
    }
}
