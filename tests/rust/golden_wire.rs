//! Every recorded frame of real ZEO 6.2 traffic (`tests/fixtures/wire/frames.jsonl`): decoded into a typed message,
//! encoded again, compared byte for byte, in both encodings.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use serde_json::Value as Json;
use zeo_rs::pickle::Value;
use zeo_rs::wire::{
    self, BadCall, Call, ClientHello, Encoding, FaultKind, FrameReader, MessageId, Request, ServerMessage,
    WireError,
};

const FRAMES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/wire/frames.jsonl");

struct Frame {
    place: String,
    from_client: bool,
    protocol: String,
    body: Bytes,
    decoded: String,
}

fn text(json: &Json, key: &str) -> String {
    json[key].as_str().unwrap_or_default().to_owned()
}

fn frames() -> Vec<Frame> {
    let lines = std::fs::read_to_string(FRAMES).unwrap();
    let frame = |line: &str| {
        let json: Json = serde_json::from_str(line).unwrap();
        let hex = text(&json, "hex");
        let digit = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
        Frame {
            place: format!("{} #{}", text(&json, "session"), json["seq"]),
            from_client: json["direction"] == "C->S",
            protocol: text(&json, "protocol"),
            body: (0..hex.len()).step_by(2).map(digit).collect(),
            decoded: text(&json, "decoded"),
        }
    };
    lines.lines().map(frame).collect()
}

/// The body of the one frame in `out`.
fn unframed(mut out: BytesMut) -> Bytes {
    let mut reader = FrameReader::new(usize::MAX);
    // The reader's first frame is a handshake.
    let mut hello = BytesMut::from(&b"\0\0\0\x02Z5"[..]);
    reader.next_frame(&mut hello).unwrap().unwrap();
    let body = reader.next_frame(&mut out).unwrap().expect("a whole frame");
    assert!(out.is_empty(), "more than one frame");
    body
}

fn encoded_request(encoding: Encoding, request: &Request, call: &Call) -> Bytes {
    let mut out = BytesMut::new();
    match call {
        Call::KeepAlive => wire::encode_keep_alive(encoding, &mut out).unwrap(),
        call => wire::encode_call(encoding, &request.id, request.is_async, call, &mut out).unwrap(),
    }
    unframed(out)
}

fn encoded_message(encoding: Encoding, message: &ServerMessage) -> Bytes {
    let mut out = BytesMut::new();
    match message {
        ServerMessage::Loaded { oid, before, loaded } => {
            let id = MessageId::Load { oid: *oid, before: *before };
            let loaded = loaded.as_ref().map(|(data, tid, end)| (&data[..], *tid, *end));
            wire::encode_loaded(encoding, &id, loaded, &mut out)
        }
        ServerMessage::Reply { id, value } => wire::encode_reply(encoding, id, value, &mut out),
        ServerMessage::Fault { id, fault } => wire::encode_fault(encoding, id, fault, &mut out),
        ServerMessage::Notice(notice) => wire::encode_notice(encoding, notice, &mut out),
        ServerMessage::UnknownNotice { name } => panic!("unknown notice {name}"),
    }
    .unwrap();
    unframed(out)
}

/// Why a frame that was understood is not the bytes this crate writes; `None` if it must be.
fn not_ours(call: &Call, decoded: &str) -> Option<&'static str> {
    match call {
        Call::Register { .. } if decoded.ends_with("False))") || decoded.ends_with("True))") => {
            Some("register: read_only sent as a bool (the capture's own client); ClientStorage sends 0 or 1")
        }
        _ => None,
    }
}

#[test]
fn every_recorded_message_survives_typed() {
    let mut counts: BTreeMap<(String, &'static str), usize> = BTreeMap::new();
    for frame in frames() {
        let encoding = match frame.protocol.as_str() {
            "Z5" => Encoding::Pickle,
            "M5" => Encoding::Msgpack,
            _ => continue,
        };
        let mut count = |what| *counts.entry((frame.protocol.clone(), what)).or_default() += 1;
        let place = format!("{} {}", frame.place, frame.decoded);
        if frame.decoded.starts_with("UNDECODABLE") {
            let error = wire::decode_request(encoding, &frame.body).expect_err(&place);
            assert!(matches!(error, WireError::Pickle(_) | WireError::Msgpack { .. }), "{place}: {error}");
            count("garbage, rejected");
            continue;
        }
        if !frame.from_client {
            let message = wire::decode_server_message(encoding, &frame.body).expect(&place);
            if frame.decoded.contains("MultipleUndoErrors") && encoding == Encoding::Pickle {
                let ServerMessage::Fault { fault, .. } = &message else { panic!("{place}") };
                let FaultKind::MultipleUndo { errors } = fault.kind() else { panic!("{place}") };
                assert_eq!(errors.len(), 1, "{place}");
                assert_eq!(errors[0].1, "Some data were modified by a later transaction");
                count("MultipleUndoErrors, understood: its pickled exceptions are never written by us");
                continue;
            }
            assert_eq!(encoded_message(encoding, &message), frame.body, "{place}\n{message:?}");
            count("server message, identical");
            continue;
        }
        let request = wire::decode_request(encoding, &frame.body).expect(&place);
        let call = match &request.call {
            Ok(call) => call,
            Err(BadCall::UnknownMethod(name)) => {
                assert!(["load", "new_oid"].contains(&name.as_str()), "{place}");
                count("unknown method, reported");
                continue;
            }
            Err(BadCall::Arguments { method, .. }) => {
                assert_eq!(*method, "history", "{place}");
                count("wrong argument, reported");
                continue;
            }
            Err(other) => panic!("{place}: {other}"),
        };
        let again = encoded_request(encoding, &request, call);
        if let Some(reason) = not_ours(call, &frame.decoded) {
            let back = wire::decode_request(encoding, &again).unwrap();
            assert_eq!(back.call.as_ref(), Ok(call), "{place}");
            count(reason);
            continue;
        }
        assert_eq!(again, frame.body, "{place}\n{request:?}");
        count("call, identical");
    }
    for ((protocol, what), count) in &counts {
        println!("{protocol}: {count:4} {what}");
    }
    let total = |what: &str| counts.iter().filter(|((_, w), _)| *w == what).map(|(_, n)| n).sum::<usize>();
    assert!(
        total("call, identical") > 500 && total("server message, identical") > 500,
        "the fixture is not whole"
    );
    assert_eq!(total("garbage, rejected"), 2);
}

#[test]
fn every_recorded_handshake_is_understood() {
    let mut seen = BTreeMap::new();
    for frame in frames().iter().filter(|frame| frame.protocol == "handshake") {
        let what = if frame.from_client {
            match ClientHello::parse(&frame.body) {
                Ok(hello) => format!("client {hello:?}"),
                Err(error) => error.to_string(),
            }
        } else {
            format!("server {:?}", wire::choose(&frame.body).unwrap())
        };
        *seen.entry(what).or_insert(0) += 1;
    }
    println!("{seen:#?}");
    assert_eq!(seen.keys().count(), 6);
    assert!(seen.contains_key("the peer speaks protocol \"Z4\", not Z5 or M5"));
}

/// The recorded errors by condition, as a client tells them apart.
#[test]
fn every_recorded_fault_is_recognised() {
    let mut kinds = BTreeMap::new();
    for frame in frames().iter().filter(|frame| !frame.from_client && frame.decoded.contains(" 2, '.reply'"))
    {
        let encoding = if frame.protocol == "Z5" { Encoding::Pickle } else { Encoding::Msgpack };
        let ServerMessage::Fault { fault, .. } = wire::decode_server_message(encoding, &frame.body).unwrap()
        else {
            panic!("{} is no fault", frame.place)
        };
        let kind = format!("{:?}", fault.kind());
        let kind = kind.split([' ', '{']).next().unwrap().to_owned();
        *kinds.entry((fault.class.clone(), kind)).or_insert(0) += 1;
    }
    for ((class, kind), count) in &kinds {
        println!("{count:3} {class} -> {kind}");
        let expected = match class.rsplit('.').next().unwrap() {
            "POSKeyError" => {
                assert!(["NotFound", "NoBlob"].contains(&kind.as_str()));
                continue;
            }
            "ConflictError" | "ReadConflictError" => "Conflict",
            "ReadOnlyError" => "ReadOnly",
            "StorageTransactionError" => "StorageTransaction",
            "UndoError" => "Undo",
            "MultipleUndoErrors" => "MultipleUndo",
            "KeyError" => "Key",
            "TypeError" => "Type",
            "ValueError" => "Value",
            _ => "Other",
        };
        assert_eq!(kind, expected, "{class}");
    }
    assert!(kinds.len() >= 10);
}

/// Values that Python clients cannot read are replaced in replies, so that nobody hangs.
#[test]
fn replies_hold_nothing_a_python_client_cannot_read() {
    let set = Value::Call {
        callable: Box::new(Value::Global { module: "builtins".into(), name: "set".into() }),
        args: Box::new(Value::Tuple(vec![Value::List(vec![Value::Int(1)])])),
        state: None,
    };
    let huge = Value::BigInt(Bytes::from_static(&[0, 0, 0, 0, 0, 0, 0, 0, 1]));
    let extension = Value::Dict(vec![
        (Value::Int(1), set.clone()),
        (Value::None, huge.clone()),
        ("k".into(), Value::Global { module: "datetime".into(), name: "datetime".into() }),
    ]);
    let reread = |encoding| {
        let mut out = BytesMut::new();
        wire::encode_reply(encoding, &MessageId::Seq(1), &extension, &mut out).unwrap();
        match wire::decode_server_message(encoding, &unframed(out)).unwrap() {
            ServerMessage::Reply { value, .. } => value,
            other => panic!("{other:?}"),
        }
    };
    let text = |text: &str| Value::from(text);
    assert_eq!(
        reread(Encoding::Msgpack),
        Value::Dict(vec![
            (text("1"), text("builtins.set([1])")),
            (text("None"), text("0x010000000000000000")),
            (text("k"), text("datetime.datetime")),
        ])
    );
    assert_eq!(
        reread(Encoding::Pickle),
        Value::Dict(vec![
            (Value::Int(1), text("builtins.set([1])")),
            (Value::None, huge),
            (text("k"), text("datetime.datetime")),
        ])
    );
    // A client must not lose meaning silently: it is told.
    let begin = Call::TpcBegin {
        txn: Value::Int(1),
        user: Bytes::new(),
        description: Bytes::new(),
        extension: Value::Dict(vec![("s".into(), set)]),
        tid: None,
        status: b' ',
    };
    let mut out = BytesMut::new();
    let error = wire::encode_call(Encoding::Msgpack, &MessageId::Seq(0), true, &begin, &mut out).unwrap_err();
    assert!(error.to_string().contains("builtins.set([1])"), "{error}");
    assert!(out.is_empty());
    wire::encode_call(Encoding::Pickle, &MessageId::Seq(0), true, &begin, &mut out).unwrap();
    let request = wire::decode_request(Encoding::Pickle, &unframed(out)).unwrap();
    assert_eq!(request.call, Ok(begin));
}
