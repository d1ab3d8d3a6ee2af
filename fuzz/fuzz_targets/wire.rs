//! A peer sends anything: frames are cut or refused, messages understood or refused, and what was understood survives
//! being written and read again.

#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use zeo_rs::wire::{
    self, ClientHello, Encoding, FrameReader, MessageId, Request, ServerMessage, WireError, decode_request,
    decode_server_message,
};

fuzz_target!(|stream: &[u8]| {
    let mut received = BytesMut::from(stream);
    let mut reader = FrameReader::new(1 << 16);
    while let Ok(Some(frame)) = reader.next_frame(&mut received) {
        let _ = ClientHello::parse(&frame);
        let _ = wire::choose(&frame);
        for encoding in [Encoding::Pickle, Encoding::Msgpack] {
            if let Ok(request) = decode_request(encoding, &frame) {
                check_request(encoding, &request);
            }
            if let Ok(message) = decode_server_message(encoding, &frame) {
                check_message(encoding, &message);
            }
        }
    }
});

fn body(mut out: BytesMut) -> Bytes {
    out.split_off(4).freeze()
}

fn check_request(encoding: Encoding, request: &Request) {
    let Ok(call) = &request.call else { return };
    if *call == wire::Call::KeepAlive {
        return;
    }
    let mut out = BytesMut::new();
    match wire::encode_call(encoding, &request.id, request.is_async, call, &mut out) {
        Ok(()) => {
            let again = decode_request(encoding, &body(out)).expect("what we write we read");
            assert_eq!(format!("{again:?}"), format!("{request:?}"));
        }
        Err(error) => assert!(matches!(error, WireError::Unencodable(_)), "{error}"),
    }
}

/// Classes become text in replies, so only their second writing is the same.
fn check_message(encoding: Encoding, message: &ServerMessage) {
    let Some(first) = written(encoding, message) else { return };
    let second = decode_server_message(encoding, &first).expect("what we write we read");
    assert_eq!(written(encoding, &second), Some(first));
}

fn written(encoding: Encoding, message: &ServerMessage) -> Option<Bytes> {
    let mut out = BytesMut::new();
    match message {
        ServerMessage::Loaded { oid, before, loaded } => {
            let loaded = loaded.as_ref().map(|(data, tid, end_tid)| (&data[..], *tid, *end_tid));
            wire::encode_loaded(encoding, &MessageId::Load { oid: *oid, before: *before }, loaded, &mut out)
        }
        ServerMessage::Reply { id, value } => wire::encode_reply(encoding, id, value, &mut out),
        ServerMessage::Fault { id, fault } => {
            let _ = fault.kind();
            wire::encode_fault(encoding, id, fault, &mut out)
        }
        ServerMessage::Notice(notice) => wire::encode_notice(encoding, notice, &mut out),
        ServerMessage::UnknownNotice { .. } => return None,
    }
    .ok()
    .map(|()| body(out))
}
