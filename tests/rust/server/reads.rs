//! Iterators, history, blobs, pack, several storages: calls beside the main path.

use std::sync::Arc;

use zeo_rs::ids::{Oid, Tid};
use zeo_rs::pickle::Value;
use zeo_rs::server::ServerConfig;
use zeo_rs::storage::memory::MemoryStorage;
use zeo_rs::storage::{References, Storage};
use zeo_rs::wire::{Call, Encoding, FaultKind, Notice};

use crate::peer::{Peer, memory, serve, serve_all};

#[test]
fn info_oids_and_labels() {
    for encoding in [Encoding::Pickle, Encoding::Msgpack] {
        let server = serve(ServerConfig::default(), memory());
        let mut peer = Peer::new(&server, encoding);
        peer.commit(8, Tid::ZERO, b"data").unwrap();
        let info = peer.call(Call::GetInfo).unwrap();
        assert_eq!(info.get("length").unwrap().as_int(), Some(1));
        assert_eq!(info.get("name").unwrap().as_str(), Some("memory"));
        assert_eq!(info.get("supportsUndo"), Some(&Value::Bool(true)));
        let Some(Value::Tuple(interfaces)) = info.get("interfaces") else { panic!("{info:?}") };
        assert_eq!(
            interfaces.last().unwrap(),
            &Value::Tuple(vec!["zope.interface".into(), "Interface".into()])
        );
        let oids = |value: Value| {
            value.as_items().unwrap().iter().map(|oid| oid.as_oid().unwrap()).collect::<Vec<_>>()
        };
        let some = oids(peer.call(Call::NewOids { count: 1000 }).unwrap());
        let more = oids(peer.call(Call::NewOids { count: -1 }).unwrap());
        assert_eq!((some.len(), more.len()), (100, 1));
        assert!(some.is_sorted() && some[0] > Oid(8) && more[0] > some[99]);
        peer.cast(Call::SetClientLabel { label: "test".into() });
        // A call that is usually made without waiting may be waited for.
        assert_eq!(peer.call(Call::SetClientLabel { label: "test".into() }).unwrap(), Value::None);
    }
}

#[test]
fn history_and_serials() {
    let server = serve(ServerConfig::default(), memory());
    let mut peer = Peer::new(&server, Encoding::Pickle);
    let first = peer.commit(1, Tid::ZERO, b"one").unwrap();
    let second = peer.commit(1, first, b"three").unwrap();
    assert_eq!(peer.call(Call::LoadSerial { oid: Oid(1), serial: first }).unwrap(), Value::bytes(b"one"));
    let fault = peer.call(Call::LoadSerial { oid: Oid(1), serial: Tid(77) }).unwrap_err();
    assert!(matches!(fault.kind(), FaultKind::NotFound { .. }));
    assert_eq!(peer.call(Call::GetTid { oid: Oid(1) }).unwrap(), second.into());
    let history = peer.call(Call::History { oid: Oid(1), size: 10 }).unwrap();
    let sizes: Vec<_> =
        history.as_items().unwrap().iter().map(|entry| entry.get("size").unwrap().as_int()).collect();
    assert_eq!(sizes, [Some(5), Some(3)]);
    assert_eq!(peer.call(Call::History { oid: Oid(1), size: 0 }).unwrap(), Value::List(vec![]));
    assert_eq!(peer.load(1, second).unwrap(), Some(("one".into(), first, Some(second))));
    assert_eq!(peer.load(1, first).unwrap(), None);
    assert!(peer.load(2, first).is_err());
    let record = peer.call(Call::RecordIternext { next: None }).unwrap();
    assert_eq!(record, Value::Tuple(vec![Oid(1).into(), second.into(), Value::bytes(b"three"), Value::None]));
}

#[test]
fn iterators() {
    let server = serve(ServerConfig::default(), memory());
    let mut peer = Peer::new(&server, Encoding::Pickle);
    let tids: Vec<Tid> = (1..=3).map(|oid| peer.commit(oid, Tid::ZERO, b"x").unwrap()).collect();
    let start = Call::IteratorStart { start: Some(tids[1]), stop: None };
    let iid = peer.call(start).unwrap().as_int().unwrap();
    assert_eq!(iid, 0);
    let out_of_order = Call::IteratorRecordStart { txn_iid: iid, tid: tids[1] };
    assert_eq!(peer.call(out_of_order.clone()).unwrap_err().class, "builtins.Exception");
    for tid in &tids[1..] {
        let next = peer.call(Call::IteratorNext { iid }).unwrap();
        let items = next.as_items().unwrap();
        assert_eq!((items[0].as_tid(), items[1].as_str()), (Some(*tid), Some(" ")));
        assert_eq!(items[2..], [Value::bytes(b"user"), Value::bytes(b"description"), Value::Dict(vec![])]);
        // Twice: both readers see the same.
        for _ in 0..2 {
            let records = Call::IteratorRecordStart { txn_iid: iid, tid: *tid };
            let records = peer.call(records).unwrap().as_int().unwrap();
            let record = peer.call(Call::IteratorRecordNext { iid: records }).unwrap();
            assert_eq!(record.as_items().unwrap()[1].as_tid(), Some(*tid));
            assert_eq!(peer.call(Call::IteratorRecordNext { iid: records }).unwrap(), Value::None);
            assert!(matches!(
                peer.call(Call::IteratorRecordNext { iid: records }).unwrap_err().kind(),
                FaultKind::Key { args: [Value::Int(_)] }
            ));
        }
    }
    assert!(peer.call(out_of_order).is_err());
    assert_eq!(peer.call(Call::IteratorNext { iid }).unwrap(), Value::None);
    assert!(peer.call(Call::IteratorNext { iid }).is_err());
    let iid = peer.call(Call::IteratorStart { start: None, stop: None }).unwrap().as_int().unwrap();
    peer.cast(Call::IteratorGc { iids: vec![iid, 99] });
    assert!(peer.call(Call::IteratorNext { iid }).is_err());
    // Calls that are not waited for one by one are answered in order.
    let iid = peer.call(Call::IteratorStart { start: None, stop: None }).unwrap().as_int().unwrap();
    let ids: Vec<_> = (0..4).map(|_| peer.send(&Call::IteratorNext { iid }, false)).collect();
    let answers: Vec<_> = ids.iter().map(|id| peer.answer(id).unwrap()).collect();
    assert_eq!(answers[3], Value::None);
    assert!(
        answers[..3].iter().zip(&tids).all(|(answer, tid)| answer.as_items().unwrap()[0] == (*tid).into())
    );
    for _ in 0..1000 {
        peer.call(Call::IteratorStart { start: None, stop: None }).unwrap();
    }
    assert!(peer.call(Call::IteratorStart { start: None, stop: None }).is_err());
}

fn upload(peer: &mut Peer, key: i64, oid: u64, serial: Tid, content: &[u8]) {
    // As ZEO's client: the record alone first.
    peer.store(key, oid, serial, b"record");
    peer.cast(Call::StoreBlobStart);
    for chunk in content.chunks(59_000) {
        peer.cast(Call::StoreBlobChunk { chunk: bytes::Bytes::copy_from_slice(chunk) });
    }
    peer.cast(Call::StoreBlobEnd { oid: Oid(oid), serial, data: "record".into(), txn: Value::Int(key) });
}

fn download(peer: &mut Peer, oid: u64, serial: Tid) -> Vec<u8> {
    peer.notices.clear();
    assert_eq!(peer.call(Call::SendBlob { oid: Oid(oid), serial }).unwrap(), Value::None);
    let mut content = Vec::new();
    let mut notices = std::mem::take(&mut peer.notices).into_iter();
    assert_eq!(notices.next(), Some(Notice::ReceiveBlobStart { oid: Oid(oid), serial }));
    for notice in notices.by_ref() {
        match notice {
            Notice::ReceiveBlobChunk { oid: of, serial: at, chunk } => {
                assert!(of == Oid(oid) && at == serial && chunk.len() <= 59_000);
                content.extend_from_slice(&chunk);
            }
            Notice::ReceiveBlobStop { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(notices.next(), None, "contiguous, up to the reply");
    content
}

#[test]
fn blobs_go_up_and_down() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Arc::new(MemoryStorage::with_blobs("blobs", directory.path()));
    let server = serve(ServerConfig::default(), storage);
    for (oid, size) in [(1, 0), (2, 1), (3, 59_000), (4, 59_000 * 16), (5, 59_000 * 16 + 1), (6, 20_000_000)]
    {
        for encoding in [Encoding::Pickle, Encoding::Msgpack] {
            let oid = if encoding == Encoding::Pickle { oid } else { oid + 100 };
            let mut peer = Peer::new(&server, encoding);
            let content: Vec<u8> = (0..size).map(|at: u32| (at % 251) as u8).collect();
            peer.begin(1);
            upload(&mut peer, 1, oid, Tid::ZERO, &content);
            peer.vote(1).unwrap();
            let tid = peer.finish(1).unwrap();
            assert!(download(&mut peer, oid, tid) == content, "{size}");
            let fault = peer.call(Call::SendBlob { oid: Oid(oid), serial: Tid(5) }).unwrap_err();
            assert!(matches!(fault.kind(), FaultKind::NoBlob { .. }), "{fault:?}");
        }
    }
    let files = |count| {
        let start = std::time::Instant::now();
        while std::fs::read_dir(directory.path()).unwrap().count() != count {
            assert!(start.elapsed() < crate::peer::PATIENCE);
            std::thread::yield_now();
        }
    };
    // One for each commit.
    files(12);
    // Aborted, failed, vanished: nothing stays.
    let mut peer = Peer::new(&server, Encoding::Pickle);
    peer.begin(1);
    upload(&mut peer, 1, 50, Tid::ZERO, &[1; 100]);
    peer.ping();
    files(13);
    peer.abort(1);
    files(12);
    peer.begin(2);
    upload(&mut peer, 2, 2, Tid(7), b"conflict");
    assert!(peer.vote(2).is_err());
    files(12);
    peer.begin(3);
    peer.cast(Call::StoreBlobStart);
    peer.cast(Call::StoreBlobChunk { chunk: vec![0; 2 << 20].into() });
    peer.ping();
    files(13);
    drop(peer);
    files(12);
}

#[test]
fn blob_calls_that_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Arc::new(MemoryStorage::with_blobs("blobs", directory.path()));
    let server = serve(ServerConfig::default(), storage);
    std::fs::write(directory.path().join("shared.tmp"), "by the client").unwrap();
    for name in ["../up.tmp", "a/b.tmp", "x.blob", "", ".tmp", "x.tmp12", "/etc/passwd", "..", "\0.tmp"] {
        let mut peer = Peer::new(&server, Encoding::Pickle);
        peer.begin(1);
        peer.cast(Call::StoreBlobShared {
            oid: Oid(1),
            serial: Tid::ZERO,
            data: "r".into(),
            filename: name.into(),
            txn: Value::Int(1),
        });
        peer.expect_closed();
    }
    let mut peer = Peer::new(&server, Encoding::Pickle);
    peer.begin(1);
    peer.cast(Call::StoreBlobShared {
        oid: Oid(1),
        serial: Tid::ZERO,
        data: "r".into(),
        filename: "shared.tmp".into(),
        txn: Value::Int(1),
    });
    peer.vote(1).unwrap();
    let tid = peer.finish(1).unwrap();
    assert_eq!(download(&mut peer, 1, tid), b"by the client");
    // Two uploads at once; a chunk or an end without a start.
    for calls in [
        vec![Call::StoreBlobStart, Call::StoreBlobStart],
        vec![Call::StoreBlobChunk { chunk: "x".into() }],
        vec![Call::StoreBlobEnd { oid: Oid(1), serial: tid, data: "r".into(), txn: Value::Int(1) }],
    ] {
        let mut peer = Peer::new(&server, Encoding::Pickle);
        peer.begin(1);
        calls.into_iter().for_each(|call| peer.cast(call));
        peer.expect_closed();
    }
    let server = serve(ServerConfig::default(), memory());
    let mut peer = Peer::new(&server, Encoding::Pickle);
    assert_eq!(peer.call(Call::StoreBlobStart).unwrap_err().class, "builtins.TypeError");
}

/// A slow reader of a large blob holds up nobody, and its invalidations come after the blob.
#[test]
fn invalidations_wait_for_the_end_of_a_blob() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Arc::new(MemoryStorage::with_blobs("blobs", directory.path()));
    let server = serve(ServerConfig::default(), storage);
    let mut writer = Peer::new(&server, Encoding::Pickle);
    writer.begin(1);
    upload(&mut writer, 1, 1, Tid::ZERO, &vec![3; 30_000_000]);
    writer.vote(1).unwrap();
    let tid = writer.finish(1).unwrap();
    let mut reader = Peer::new(&server, Encoding::Pickle);
    let id = reader.send(&Call::SendBlob { oid: Oid(1), serial: tid }, false);
    let start = reader.notice();
    assert!(matches!(start, Notice::ReceiveBlobStart { .. }));
    let later: Vec<Tid> = (2..12).map(|oid| writer.commit(oid, Tid::ZERO, b"x").unwrap()).collect();
    reader.answer(&id).unwrap();
    let is_blob = |notice: &&Notice| !matches!(notice, Notice::InvalidateTransaction { .. });
    assert_eq!(reader.notices.iter().filter(is_blob).count(), reader.notices.len(), "contiguous");
    reader.ping();
    assert_eq!(reader.invalidations().iter().map(|(tid, _)| *tid).collect::<Vec<_>>(), later);
}

struct NoReferences;

impl References for NoReferences {
    fn references(&self, _: &[u8], _: &mut Vec<Oid>) -> zeo_rs::storage::Result<()> {
        Ok(())
    }
}

#[test]
fn pack_tells_everybody_the_new_size() {
    let config = ServerConfig { references: Arc::new(NoReferences), ..ServerConfig::default() };
    let server = serve(config, memory());
    let mut a = Peer::new(&server, Encoding::Pickle);
    let mut b = Peer::unregistered(&server, Encoding::Msgpack);
    b.register("1", true).unwrap();
    let mut serial = Tid::ZERO;
    for _ in 0..3 {
        serial = a.commit(0, serial, &[0; 1000]).unwrap();
    }
    b.ping();
    b.notices.clear();
    a.notices.clear();
    // Read-only clients may pack.
    assert_eq!(b.call(Call::Pack { time: 4e9, wait: true }).unwrap(), Value::None);
    assert!(matches!(&b.notices[..], [Notice::Info(_)]));
    let Notice::Info(info) = a.notice() else { panic!() };
    assert_eq!(info.get("size").unwrap().as_int(), Some(1024));
    assert_eq!(a.call(Call::Pack { time: 4e9, wait: false }).unwrap(), Value::None);
    assert!(matches!(a.notice(), Notice::Info(_)));
}

#[test]
fn storages_of_one_server_are_apart() {
    let (one, two) = (memory(), memory());
    let storages: Vec<(String, Arc<dyn Storage>)> = vec![("1".into(), one), ("two".into(), two)];
    let server = serve_all(ServerConfig::default(), storages);
    let mut a = Peer::new(&server, Encoding::Pickle);
    let mut b = Peer::unregistered(&server, Encoding::Pickle);
    b.register("two", false).unwrap();
    a.commit(1, Tid::ZERO, b"x").unwrap();
    b.ping();
    assert!(b.notices.is_empty());
    assert!(b.load(1, Tid::MAX).is_err());
}
