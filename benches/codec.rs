//! What the message codec and the reference scanner cost: `cargo bench --bench codec`.
//!
//! Each line is the best of many short rounds, in nanoseconds an operation: what the code costs, not what else the machine
//! was doing. The hot messages (a load and its answer)
//! should stay under 150 ns, either way, in either encoding.

#![allow(clippy::print_stdout)] // a benchmark reports to the terminal

use std::hint::black_box;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::pickle::{ReferenceScanner, Value};
use zeo_rs::wire::{self, Call, Encoding, MessageId, Notice};

const ROUNDS: usize = 60;

/// Least nanoseconds of `operation`, which is told how often to do its thing.
fn measure(times: u32, mut operation: impl FnMut(u32)) -> f64 {
    operation(times);
    let rounds = (0..ROUNDS).map(|_| {
        let start = Instant::now();
        operation(times);
        start.elapsed().as_nanos() as f64 / f64::from(times)
    });
    rounds.fold(f64::INFINITY, f64::min)
}

fn report(what: &str, encoding: Encoding, nanoseconds: f64) {
    println!("{what:<44} {encoding:<8?} {nanoseconds:>9.0} ns");
}

/// The body of a frame that `write` appends.
fn body(write: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::new();
    write(&mut out);
    out.freeze().slice(4..)
}

/// Time to append a frame to a buffer that is emptied when it is full, as a connection's is.
fn encoding_time(mut write: impl FnMut(&mut BytesMut)) -> f64 {
    let mut out = BytesMut::with_capacity(1 << 20);
    measure(2000, |times| {
        for _ in 0..times {
            if out.len() > 1 << 19 {
                out.clear();
            }
            write(black_box(&mut out));
        }
    })
}

fn decoding_time<T>(frame: &Bytes, read: impl Fn(&Bytes) -> T) -> f64 {
    measure(2000, |times| {
        for _ in 0..times {
            black_box(read(black_box(frame)));
        }
    })
}

fn messages(encoding: Encoding) {
    let (oid, before, tid) = (Oid(4711), Tid::MAX, Tid(0x03f5_8e00_0444_4444));
    let id = MessageId::Load { oid, before };
    let record = [b'd'; 300];
    let load = Call::LoadBefore { oid, before };
    let store = Call::Storea {
        oid,
        serial: tid,
        data: Bytes::copy_from_slice(&record),
        txn: Value::Int(139_657_507_283_472),
    };
    let call = |call: &Call, id: &MessageId, is_async, out: &mut BytesMut| {
        wire::encode_call(encoding, id, is_async, call, out).expect("encodable");
    };
    let loaded = |out: &mut BytesMut| {
        wire::encode_loaded(encoding, &id, Some((&record, tid, None)), out).expect("encodable")
    };

    report("loadBefore: write", encoding, encoding_time(|out| call(&load, &id, false, out)));
    let frame = body(|out| call(&load, &id, false, out));
    report(
        "loadBefore: read",
        encoding,
        decoding_time(&frame, |frame| wire::decode_request(encoding, frame)),
    );
    report("its answer, 300 bytes: write", encoding, encoding_time(loaded));
    let frame = body(loaded);
    let read = decoding_time(&frame, |frame| wire::decode_server_message(encoding, frame));
    report("its answer, 300 bytes: read", encoding, read);

    let asynchronous = MessageId::Seq(0);
    report("storea, 300 bytes: write", encoding, encoding_time(|out| call(&store, &asynchronous, true, out)));
    let frame = body(|out| call(&store, &asynchronous, true, out));
    report("storea, 300 bytes: read", encoding, decoding_time(&frame, |f| wire::decode_request(encoding, f)));

    let vote = Call::Vote { txn: Value::Int(139_657_507_283_472) };
    report("vote: write", encoding, encoding_time(|out| call(&vote, &MessageId::Seq(9), false, out)));
    let frame = body(|out| call(&vote, &MessageId::Seq(9), false, out));
    report("vote: read", encoding, decoding_time(&frame, |frame| wire::decode_request(encoding, frame)));

    let news = Notice::InvalidateTransaction { tid, oids: (0..10).map(Oid).collect() };
    let notice = |out: &mut BytesMut| wire::encode_notice(encoding, &news, out).expect("encodable");
    report("invalidation of 10 oids: write", encoding, encoding_time(notice));
    let frame = body(notice);
    let read = decoding_time(&frame, |frame| wire::decode_server_message(encoding, frame));
    report("invalidation of 10 oids: read", encoding, read);
}

/// A record as ZODB writes it: a mapping of `references` references to objects of one class, and some data.
fn record(references: u64) -> Vec<u8> {
    let mut record = b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x00.\x80\x03}q\x01X\x04\x00\x00\x00dataq\x02}q\x03(".to_vec();
    for number in 0..references {
        record.extend(b"X\x08\x00\x00\x00");
        record.extend(format!("key{number:05}").bytes());
        record.extend(b"C\x08");
        record.extend(number.to_be_bytes());
        record.extend(b"h\x00\x86Q");
    }
    record.extend(b"X\x04\x00\x00\x00textC\xc8");
    record.extend([b'x'; 200]);
    record.extend(b"us.");
    record
}

fn references() {
    for count in [0, 10, 1000] {
        let record = record(count);
        let (mut scanner, mut found) = (ReferenceScanner::default(), Vec::new());
        let time = measure(2000, |times| {
            for _ in 0..times {
                found.clear();
                scanner.scan(black_box(&record), &mut found).expect("a record");
            }
        });
        assert_eq!(found.len() as u64, count);
        let megabytes = record.len() as f64 / time * 1000.0;
        println!("references: {count:>4} in {:>6} bytes {time:>29.0} ns {megabytes:>6.0} MB/s", record.len());
    }
}

fn main() {
    for encoding in [Encoding::Pickle, Encoding::Msgpack] {
        messages(encoding);
    }
    references();
}
