//! Properties of the message codec: both encodings, hot path against general path, hostile bytes.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::emit::{Emitter, Foreign};
use super::*;
use crate::ids::{Oid, Tid};
use crate::limits::MAX_DEPTH;
use crate::pickle::Value;
use crate::pickle::proptests::values;

const BOTH: [Encoding; 2] = [Encoding::Pickle, Encoding::Msgpack];

fn unframed(out: BytesMut) -> Bytes {
    let whole = out.freeze();
    let announced = u32::from_be_bytes(whole[..4].try_into().unwrap()) as usize;
    assert_eq!(announced, whole.len() - 4);
    whole.slice(4..)
}

fn oids() -> impl Strategy<Value = Oid> {
    any::<u64>().prop_map(Oid)
}

fn tids() -> impl Strategy<Value = Tid> {
    any::<u64>().prop_map(Tid)
}

/// Short, and of the lengths at which the form of a byte string changes.
fn data() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from),
        prop_oneof![Just(255usize), Just(256), Just(65_535), Just(65_536)].prop_map(|n| vec![b'd'; n].into()),
    ]
}

fn txns() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u64>().prop_map(Value::from),
        (0..300i64).prop_map(Value::Int),
        "[a-z]{1,9}".prop_map(Value::Str)
    ]
}

fn calls() -> impl Strategy<Value = Call> {
    let pair = || (oids(), tids());
    prop_oneof![
        ("[^\\x00]{0,9}", any::<bool>())
            .prop_map(|(storage, read_only)| Call::Register { storage, read_only }),
        pair().prop_map(|(oid, before)| Call::LoadBefore { oid, before }),
        (pair(), data(), txns()).prop_map(|((oid, serial), data, txn)| Call::Storea {
            oid,
            serial,
            data,
            txn
        }),
        (pair(), data(), txns()).prop_map(|((oid, serial), data, txn)| Call::StoreBlobEnd {
            oid,
            serial,
            data,
            txn
        }),
        data().prop_map(|chunk| Call::StoreBlobChunk { chunk }),
        (pair(), proptest::option::of(data()), proptest::option::of(tids()), txns()).prop_map(
            |((oid, serial), data, prev_txn, txn)| Call::Restorea { oid, serial, data, prev_txn, txn }
        ),
        (txns(), data(), proptest::option::of(tids()), proptest::char::range(' ', '~')).prop_map(
            |(txn, user, tid, status)| Call::TpcBegin {
                txn,
                description: user.clone(),
                user,
                extension: Value::dict([("k", "v".into())]),
                tid,
                status: status as u8,
            }
        ),
        (any::<i64>(), any::<i64>(), any::<bool>()).prop_map(|(first, last, by_user)| {
            let user = Value::dict([("user_name", Value::bytes(b"jim"))]);
            Call::UndoInfo { first, last, specification: if by_user { user } else { Value::None } }
        }),
        proptest::collection::vec(any::<i64>(), 0..9).prop_map(|iids| Call::IteratorGc { iids }),
        proptest::option::of(oids()).prop_map(|next| Call::RecordIternext { next }),
        (0..200i64).prop_map(|count| Call::NewOids { count }),
        (-1e9..1e9f64, any::<bool>()).prop_map(|(time, wait)| Call::Pack { time, wait }),
    ]
}

/// What `M5` leaves of a value: lists are tuples there.
fn as_msgpack(value: &Value) -> Value {
    match value {
        Value::Tuple(items) | Value::List(items) => Value::Tuple(items.iter().map(as_msgpack).collect()),
        Value::Dict(pairs) => {
            Value::Dict(pairs.iter().map(|(k, v)| (as_msgpack(k), as_msgpack(v))).collect())
        }
        other => other.clone(),
    }
}

fn ids() -> impl Strategy<Value = MessageId> {
    prop_oneof![
        (0..i64::MAX).prop_map(MessageId::Seq),
        (oids(), tids()).prop_map(|(oid, before)| MessageId::Load { oid, before }),
        Just(MessageId::Other(Value::Tuple(vec![Value::bytes(b"a"), "b".into(), Value::Int(3)]))),
    ]
}

/// A frame written without the hot path.
fn general(
    encoding: Encoding,
    foreign: Foreign,
    write: impl FnOnce(&mut Emitter<'_>) -> Result<(), WireError>,
) -> Bytes {
    let mut out = BytesMut::new();
    codec::put_message(encoding, foreign, &mut out, write).unwrap();
    unframed(out)
}

proptest! {
    #[test]
    fn calls_survive(id in ids(), is_async in any::<bool>(), call in calls()) {
        for encoding in BOTH {
            let mut out = BytesMut::from(&b"before"[..]);
            encode_call(encoding, &id, is_async, &call, &mut out).unwrap();
            let request = decode_request(encoding, &unframed(out.split_off(6))).unwrap();
            prop_assert_eq!((&request.id, request.is_async), (&id, is_async));
            prop_assert_eq!(request.call, Ok(call.clone()));
        }
    }

    #[test]
    fn replies_survive(seq in 0..i64::MAX, value in values(false)) {
        for encoding in BOTH {
            let mut out = BytesMut::new();
            encode_reply(encoding, &MessageId::Seq(seq), &value, &mut out).unwrap();
            let expected = if encoding == Encoding::Pickle { value.clone() } else { as_msgpack(&value) };
            let message = decode_server_message(encoding, &unframed(out)).unwrap();
            prop_assert_eq!(message, ServerMessage::Reply { id: MessageId::Seq(seq), value: expected });
        }
    }

    /// Whatever is in a reply, a Python client can read it: no class, no call, in `M5` only keys of text or bytes.
    #[test]
    fn replies_of_objects_are_readable(value in values(true)) {
        for encoding in BOTH {
            let mut out = BytesMut::new();
            encode_reply(encoding, &MessageId::Seq(1), &value, &mut out).unwrap();
            // Requests allow next to no class, and nothing of what the strategy makes up.
            prop_assert!(decode_request(encoding, &unframed(out)).is_ok());
        }
    }

    #[test]
    fn the_hot_path_writes_and_reads_what_the_general_one_does(
        (oid, before, tid) in (oids(), tids(), tids()),
        end_tid in proptest::option::of(tids()),
        data in data(),
        txn in any::<u64>(),
    ) {
        let id = MessageId::Load { oid, before };
        for encoding in BOTH {
            let mut out = BytesMut::new();
            encode_call(encoding, &id, false, &Call::LoadBefore { oid, before }, &mut out).unwrap();
            let slow = general(encoding, Foreign::Keep, |e| {
                codec::emit_id(&id, e)?;
                e.bool(false)?;
                call_codec::emit(&Call::LoadBefore { oid, before }, e)
            });
            let frame = unframed(out);
            prop_assert_eq!(&frame, &slow);
            let fast = fast::request(encoding, &frame).expect("taken by the hot path");
            prop_assert_eq!(&fast, &codec::decode_request_generally(encoding, &frame).unwrap());

            let mut out = BytesMut::new();
            encode_loaded(encoding, &id, Some((&data, tid, end_tid)), &mut out).unwrap();
            let frame = unframed(out);
            let slow = general(encoding, Foreign::Text, |e| codec::emit_loaded(&id, Some((&data, tid, end_tid)), e));
            prop_assert_eq!(&frame, &slow);
            let fast = fast::server_message(encoding, &frame).expect("taken by the hot path");
            prop_assert_eq!(&fast, &codec::decode_server_message_generally(encoding, &frame).unwrap());

            let chunk = Notice::ReceiveBlobChunk { oid, serial: tid, chunk: data.clone() };
            let mut out = BytesMut::new();
            encode_notice(encoding, &chunk, &mut out).unwrap();
            let frame = unframed(out);
            let fast = fast::server_message(encoding, &frame).expect("taken by the hot path");
            prop_assert_eq!(&fast, &codec::decode_server_message_generally(encoding, &frame).unwrap());
            prop_assert_eq!(fast, ServerMessage::Notice(chunk));

            for count in [0, 1, 15, 16, 300] {
                let told = Notice::InvalidateTransaction { tid, oids: vec![oid; count] };
                let mut out = BytesMut::new();
                encode_notice(Encoding::Msgpack, &told, &mut out).unwrap();
                let frame = unframed(out);
                let fast = fast::server_message(Encoding::Msgpack, &frame).expect("taken by the hot path");
                prop_assert_eq!(&fast, &codec::decode_server_message_generally(Encoding::Msgpack, &frame).unwrap());
                prop_assert_eq!(fast, ServerMessage::Notice(told));
            }

            for call in [
                Call::Storea { oid, serial: tid, data: data.clone(), txn: Value::from(txn >> 1) },
                Call::StoreBlobChunk { chunk: data.clone() },
            ] {
                let mut out = BytesMut::new();
                encode_call(encoding, &MessageId::Seq(0), true, &call, &mut out).unwrap();
                let frame = unframed(out);
                let fast = fast::request(encoding, &frame).expect("taken by the hot path");
                prop_assert_eq!(&fast, &codec::decode_request_generally(encoding, &frame).unwrap());
            }
            let [mut whole, mut parts] = [BytesMut::new(), BytesMut::new()];
            let call = Call::StoreBlobChunk { chunk: data.clone() };
            encode_call(encoding, &MessageId::Seq(0), true, &call, &mut whole).unwrap();
            encode_upload(encoding, data.len(), &mut parts, |out| {
                out.extend_from_slice(&data);
                Ok::<_, WireError>(())
            }).unwrap();
            prop_assert_eq!(whole, parts);
        }
    }

    /// One wrong byte anywhere in a hot message: both paths agree, or the hot path leaves it.
    #[test]
    fn the_hot_path_takes_nothing_it_should_not(
        (oid, before) in (oids(), tids()),
        data in proptest::collection::vec(any::<u8>(), 0..20),
        which in 0..5,
        at in any::<usize>(),
        with in any::<u8>(),
        length in any::<usize>(),
    ) {
        for encoding in BOTH {
            let mut out = BytesMut::new();
            let data = Bytes::from(data.clone());
            let id = MessageId::Load { oid, before };
            match which {
                0 => encode_call(encoding, &id, false, &Call::LoadBefore { oid, before }, &mut out),
                1 => encode_loaded(encoding, &id, Some((&data, before, Some(before))), &mut out),
                2 => {
                    let call = Call::Storea { oid, serial: before, data, txn: Value::Int(1 << 40) };
                    encode_call(encoding, &MessageId::Seq(0), true, &call, &mut out)
                }
                3 => {
                    let told = Notice::InvalidateTransaction { tid: before, oids: vec![oid; data.len()] };
                    encode_notice(encoding, &told, &mut out)
                }
                _ => encode_notice(encoding, &Notice::ReceiveBlobChunk { oid, serial: before, chunk: data }, &mut out),
            }.unwrap();
            let mut frame = out.split_off(4);
            let at = at % frame.len();
            frame[at] = with;
            frame.truncate(1 + length % (frame.len() + 20));
            let frame = frame.freeze();
            if let Some(fast) = fast::request(encoding, &frame) {
                prop_assert_eq!(Ok(fast), codec::decode_request_generally(encoding, &frame));
            }
            if let Some(fast) = fast::server_message(encoding, &frame) {
                prop_assert_eq!(Ok(fast), codec::decode_server_message_generally(encoding, &frame));
            }
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let frame = Bytes::from(bytes);
        for encoding in BOTH {
            let _ = decode_request(encoding, &frame);
            let _ = decode_server_message(encoding, &frame);
        }
    }

    #[test]
    fn notices_survive(tid in tids(), oids in proptest::collection::vec(oids(), 0..20), count in 0..3000u64) {
        let many = (0..count).map(Oid).collect();
        for notice in [
            Notice::InvalidateTransaction { tid, oids },
            Notice::InvalidateTransaction { tid, oids: many },
            Notice::Info(Value::dict([("length", Value::from(tid.0))])),
            Notice::ReceiveBlobStart { oid: Oid(tid.0), serial: tid },
            Notice::ReceiveBlobStop { oid: Oid(tid.0), serial: tid },
        ] {
            for encoding in BOTH {
                let mut out = BytesMut::new();
                encode_notice(encoding, &notice, &mut out).unwrap();
                let message = decode_server_message(encoding, &unframed(out)).unwrap();
                prop_assert_eq!(message, ServerMessage::Notice(notice.clone()));
            }
        }
    }

    /// Frames come out the same however the bytes come in.
    #[test]
    fn frames_survive_any_splitting(
        bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 1..8),
        steps in proptest::collection::vec(1usize..40, 1..20),
    ) {
        let mut stream = BytesMut::new();
        for body in &bodies {
            put_frame(&mut stream, body).unwrap();
        }
        let (mut reader, mut received, mut frames) = (FrameReader::new(64), BytesMut::new(), Vec::new());
        let mut steps = steps.iter().cycle();
        while !stream.is_empty() {
            let step = (*steps.next().unwrap()).min(stream.len());
            received.extend_from_slice(&stream.split_to(step));
            prop_assert!(reader.room_wanted(&received) <= 64 + 4);
            while let Some(frame) = reader.next_frame(&mut received).unwrap() {
                frames.push(frame.to_vec());
            }
        }
        prop_assert_eq!(frames, bodies);
        prop_assert!(received.is_empty());
    }
}

#[test]
fn lengths_beyond_the_limit_are_refused_at_once() {
    let next = |reader: &mut FrameReader, bytes: &[u8]| reader.next_frame(&mut BytesMut::from(bytes));
    let mut reader = FrameReader::new(1000);
    assert_eq!(next(&mut reader, b"\0\0\0"), Ok(None));
    assert_eq!(next(&mut reader, b"\0\0\0\x41"), Err(WireError::TooLarge { announced: 65, limit: 64 }));
    for hello in [&b"\x16\x03\x01\x02\x00\x01"[..], b"\x16\x03\x03\x00\x05"] {
        assert_eq!(next(&mut FrameReader::new(1 << 30), hello), Err(WireError::TlsHello));
    }
    assert!(matches!(next(&mut reader, b"GET / HTTP/1.1"), Err(WireError::TooLarge { .. })));
    assert_eq!(next(&mut reader, b"\0\0\0\x02Z5").unwrap().unwrap(), "Z5");
    // Now the first frame is through, and the limit is that of messages.
    assert_eq!(next(&mut reader, b"\0\0\x03\xe8"), Ok(None));
    assert_eq!(next(&mut reader, b"\0\0\x03\xe9"), Err(WireError::TooLarge { announced: 1001, limit: 1000 }));
    assert!(matches!(next(&mut reader, b"\x16\x03\x01\x02"), Err(WireError::TooLarge { .. })));
    let begun = BytesMut::from(&b"\x3f\xff\xff\xff"[..]);
    assert_eq!(FrameReader::new(1 << 30).room_wanted(&begun), crate::limits::MAX_PREALLOCATE);
}

#[test]
fn a_message_that_cannot_be_written_leaves_no_trace() {
    let mut deep = Value::None;
    for _ in 0..100 {
        deep = Value::List(vec![deep]);
    }
    for encoding in BOTH {
        let mut out = BytesMut::from(&b"kept"[..]);
        let error = encode_reply(encoding, &MessageId::Seq(1), &deep, &mut out).unwrap_err();
        assert!(matches!(error, WireError::Unencodable(_)));
        assert_eq!(out, "kept");
    }
}

/// What may be written is what may be read: the envelope counts on both sides.
#[test]
fn nesting_has_one_limit() {
    for encoding in BOTH {
        for (depth, fits) in [(MAX_DEPTH - 1, true), (MAX_DEPTH, false)] {
            let value = (0..depth).fold(Value::None, |inner, _| Value::Tuple(vec![inner]));
            let mut out = BytesMut::new();
            let written = encode_reply(encoding, &MessageId::Seq(1), &value, &mut out);
            assert_eq!(written.is_ok(), fits, "{encoding:?} {depth}");
            if fits {
                decode_server_message(encoding, &unframed(out)).unwrap();
            }
        }
    }
}

#[test]
fn hostile_msgpack_is_refused() {
    let nested = [vec![0x91; 100_000], vec![0xc0]].concat();
    for (frame, problem) in [
        (&b"\x92\x01\xc4\x05"[..], "ends early"),
        (b"\xdd\xff\xff\xff\xff", "more items than it has bytes"),
        (b"\xdf\xff\xff\xff\xff", "more items than it has bytes"),
        (b"\xc6\xff\xff\xff\xff", "ends early"),
        (b"\xdb\xff\xff\xff\xff", "ends early"),
        (b"\xa1\xff", "UTF-8"),
        (b"\xd6\xff\0\0\0\0", "type that ZEO does not use"),
        (b"\xc1", "type that ZEO does not use"),
        (b"\x94\x01\xc2\xa4ping\x90\0", "something follows"),
        (&nested, "deep"),
        (b"", "ends early"),
    ] {
        let frame = Bytes::copy_from_slice(frame);
        let error = decode_request(Encoding::Msgpack, &frame).unwrap_err();
        assert!(matches!(error, WireError::Msgpack { .. }) && error.to_string().contains(problem), "{error}");
    }
    for (frame, problem) in
        [(&b"\xc0"[..], "no tuple"), (b"\x93\x01\xc2\xc0", "4 items"), (b"\x94\x01\xc2\x07\xc0", "name")]
    {
        let error = decode_request(Encoding::Msgpack, &Bytes::copy_from_slice(frame)).unwrap_err();
        assert!(matches!(error, WireError::Message(_)) && error.to_string().contains(problem), "{error}");
    }
}

#[test]
fn malformed_calls_are_told_apart() {
    let request = |args: Value, name: &str| {
        let frame = general(Encoding::Pickle, Foreign::Keep, |e| {
            e.int(7)?;
            e.bool(false)?;
            e.str(name)?;
            e.value(&args)
        });
        decode_request(Encoding::Pickle, &frame).unwrap()
    };
    let bad = |args: Vec<Value>, name: &str| request(Value::Tuple(args), name).call.unwrap_err();
    let fault = |bad: &BadCall| Fault::from(bad).class;
    let short = bad(vec![Value::bytes(b"short"), Tid::MAX.into()], "loadBefore");
    assert!(matches!(short, BadCall::NotEightBytes { method: "loadBefore", argument: "oid", .. }));
    assert_eq!(fault(&short), "ZODB.POSException.POSKeyError");
    for (args, name, says) in [
        (vec![], "getTid", "oid is missing"),
        (vec![Value::None], "getTid", "oid must be bytes, not None"),
        (vec![Oid::ROOT.into(), Value::None], "getTid", "1 arguments too many"),
        (vec![Oid::ROOT.into(), Value::None], "history", "size must be an integer"),
        (vec![Value::Int(1)], "iterator_gc", "list of integers"),
    ] {
        let bad = bad(args, name);
        assert!(bad.to_string().contains(says) && bad.to_string().starts_with(name), "{bad}");
        assert_eq!(fault(&bad), "builtins.TypeError");
    }
    assert_eq!(bad(vec![], "new_oid"), BadCall::UnknownMethod("new_oid".into()));
    assert_eq!(request(Value::None, ".reply").call, Err(BadCall::UnknownMethod(".reply".into())));
    // Defaults of ZEO's server, and lists for tuples.
    assert_eq!(request(Value::List(vec![]), "new_oids").call, Ok(Call::NewOids { count: 100 }));
    assert_eq!(
        request(Value::Tuple(vec![]), "record_iternext").call,
        Ok(Call::RecordIternext { next: None })
    );
    let begin = vec![Value::Int(1), "jim".into(), Value::bytes(b"d"), Value::Dict(vec![])];
    let Ok(Call::TpcBegin { user, tid: None, status: b' ', .. }) =
        request(Value::Tuple(begin), "tpc_begin").call
    else {
        panic!("tpc_begin without tid and status")
    };
    assert_eq!(user, "jim");
}

/// Faults that Python clients rebuild have exactly the arguments that these need.
#[test]
fn faults_are_read_as_they_were_written() {
    let (oid, committed, read) = (Oid(1), Tid(2), Tid(3));
    let oid_bytes = oid.to_bytes();
    let conflict = |is_read, class_name, message| FaultKind::Conflict {
        is_read,
        oid: Some(oid),
        serials: Some((committed, read)),
        class_name,
        message: Some(message),
    };
    for (fault, kind) in [
        (Fault::pos_key(oid), FaultKind::NotFound { oid: &oid_bytes }),
        (Fault::no_blob(oid, read), FaultKind::NoBlob { oid, serial: read }),
        (
            Fault::conflict(oid, committed, read, Some("m.C")),
            conflict(false, Some("m.C"), "database conflict error"),
        ),
        (Fault::read_conflict(oid, committed, read), conflict(true, None, "database read conflict error")),
        (Fault::read_only(), FaultKind::ReadOnly),
        (Fault::undo("why", Some(oid)), FaultKind::Undo { reason: "why", oid: Some(oid) }),
        (
            Fault::multiple_undo(&[(oid, "why".into())]),
            FaultKind::MultipleUndo { errors: vec![(Some(oid), "why".into())] },
        ),
        (
            Fault::storage_transaction(vec![Value::None]),
            FaultKind::StorageTransaction { args: &[Value::None] },
        ),
        (Fault::key_error(Value::Int(9)), FaultKind::Key { args: &[Value::Int(9)] }),
        (Fault::new("builtins.AssertionError", "x"), FaultKind::Other),
    ] {
        assert_eq!(fault.kind(), kind);
        for encoding in BOTH {
            let mut out = BytesMut::new();
            encode_fault(encoding, &MessageId::Seq(5), &fault, &mut out).unwrap();
            let message = decode_server_message(encoding, &unframed(out)).unwrap();
            let ServerMessage::Fault { id: MessageId::Seq(5), fault: received } = message else {
                panic!("{message:?}")
            };
            assert_eq!(received.kind(), kind, "{encoding:?}");
        }
    }
    // Misshapen ones are not trusted.
    for data in [Value::None, Value::Tuple(vec![]), Value::dict([("serials", Value::Int(1))])] {
        for class in ["ConflictError", "POSKeyError", "UndoError", "MultipleUndoErrors"] {
            let fault = Fault { class: format!("ZODB.POSException.{class}"), data: data.clone() };
            assert_eq!(fault.kind(), FaultKind::Other, "{class} {data}");
        }
    }
}

/// A message that a server is to understand does not become many times its size in memory.
#[test]
fn a_request_has_not_too_many_values() {
    for encoding in BOTH {
        let gc = |count: i64| {
            let call = Call::IteratorGc { iids: (0..count).collect() };
            let mut out = BytesMut::new();
            encode_call(encoding, &MessageId::Seq(5), false, &call, &mut out).unwrap();
            decode_request(encoding, &unframed(out))
        };
        assert!(
            matches!(gc(100_000), Ok(Request { call: Ok(Call::IteratorGc { iids }), .. }) if iids.len() == 100_000)
        );
        assert!(gc(200_000).is_err(), "{encoding:?}");
    }
}
