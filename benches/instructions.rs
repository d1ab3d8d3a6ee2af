//! Instructions that the hot paths take, counted by callgrind. `scripts/instructions` runs this program, compares the
//! counts with those in `benches/instructions.json`, and so finds a path that has become longer where a clock cannot: on
//! a machine that does other things as well.
//!
//! Callgrind counts only while [`counted`] runs and writes its count after it, so neither starting nor preparing is in it.
//! For each workload one line goes to the standard output, `name operations`, in the order of the counts. What the
//! kernel does is not counted; files are in memory, so that no system call is made at all.

#![allow(clippy::print_stdout)] // reports to the script

use std::hint::black_box;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use bytes::{Bytes, BytesMut};
use zeo_rs::cache::Cache;
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::pickle::{ReferenceScanner, Value};
use zeo_rs::storage::file::file::StorageFile;
use zeo_rs::storage::file::index::Index;
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::{NoResolution, Op, StagedTxn, Storage, VoteOutcome};
use zeo_rs::wire::{self, Call, Encoding, MessageId, Notice, Request};

const OBJECTS: u64 = 20_000;
const RECORD: [u8; 250] = [b'd'; 250];

fn main() {
    for encoding in [Encoding::Pickle, Encoding::Msgpack] {
        codec(encoding);
    }
    references();
    index();
    cache();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let storage = storage(directory.path());
    loads(&storage);
    commits(&storage);
    reading(directory.path(), &storage);
}

/// The function that callgrind is told of.
#[inline(never)]
fn counted(times: u64, operation: &mut dyn FnMut(u64)) {
    for number in 0..times {
        operation(number);
    }
}

/// Counts `times` calls of `operation`, after some to warm up. `each`: operations in a call.
fn count(name: &str, times: u64, each: u64, mut operation: impl FnMut(u64)) {
    println!("{name} {}", times * each);
    counted(times, &mut operation);
}

fn label(what: &str, encoding: Encoding) -> String {
    let name = match encoding {
        Encoding::Pickle => "Z5",
        Encoding::Msgpack => "M5",
    };
    format!("codec/{name}/{what}")
}

/// The body of a frame that `write` appends.
fn body(write: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::new();
    write(&mut out);
    out.freeze().slice(4..)
}

fn codec(encoding: Encoding) {
    const TIMES: u64 = 200;
    let (oid, before, tid) = (Oid(4711), Tid::MAX, Tid(0x03f5_8e00_0444_4444));
    let id = MessageId::Load { oid, before };
    let mut out = BytesMut::with_capacity(1 << 20);
    let mut write = |what: &str, message: &dyn Fn(&mut BytesMut)| {
        message(&mut out);
        count(&label(what, encoding), TIMES, 1, |_| {
            out.clear();
            message(black_box(&mut out));
        });
        body(message)
    };

    let encode = |id: &MessageId, is_async, call: &Call, out: &mut BytesMut| {
        wire::encode_call(encoding, id, is_async, call, out).expect("encodable");
    };
    let load = Call::LoadBefore { oid, before };
    let load = write("load written", &|out| encode(&id, false, &load, out));
    let loaded = write("load answer written", &|out| {
        wire::encode_loaded(encoding, &id, Some((&RECORD, tid, None)), out).expect("encodable");
    });
    let txn = Value::Int(139_657_507_283_472);
    let store = Call::Storea { oid, serial: tid, data: Bytes::from_static(&RECORD), txn };
    let store = write("store written", &|out| encode(&MessageId::Seq(0), true, &store, out));
    let news = Notice::InvalidateTransaction { tid, oids: (0..10).map(Oid).collect() };
    let news = write("invalidation of 10 written", &|out| {
        wire::encode_notice(encoding, &news, out).expect("encodable");
    });

    for (what, frame) in [("load read", load), ("store read", store)] {
        let read = |frame: &Bytes| black_box(wire::decode_request(encoding, frame)).expect("decodable");
        drop(read(&frame));
        count(&label(what, encoding), TIMES, 1, |_| drop(read(black_box(&frame))));
    }
    for (what, frame) in [("load answer read", loaded), ("invalidation of 10 read", news)] {
        let read =
            |frame: &Bytes| black_box(wire::decode_server_message(encoding, frame)).expect("decodable");
        drop(read(&frame));
        count(&label(what, encoding), TIMES, 1, |_| drop(read(black_box(&frame))));
    }
}

/// A record with ten references, as ZODB writes them.
fn references() {
    let mut record = b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x00.\x80\x03}q\x01X\x04\x00\x00\x00dataq\x02}q\x03(".to_vec();
    for number in 0..10u64 {
        record.extend(format!("X\x08\0\0\0key{number:05}").bytes());
        record.extend(b"C\x08");
        record.extend(number.to_be_bytes());
        record.extend(b"h\x00\x86Q");
    }
    record.extend(b"us.");
    let (mut scanner, mut found) = (ReferenceScanner::default(), Vec::new());
    let mut scan = |_| {
        found.clear();
        scanner.scan(black_box(&record), &mut found).expect("a record");
    };
    scan(0);
    count("pickle/10 references found", 200, 1, scan);
    assert_eq!(found.len(), 10);
}

/// Numbers below `bound` in an order that looks random and is always the same.
fn scattered(number: u64, bound: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % bound
}

fn index() {
    let sequential = Index::new();
    count("index/insert, sequential oids", OBJECTS, 1, |oid| {
        sequential.insert(Oid(oid), oid + 4);
    });
    count("index/get, sequential oids", OBJECTS, 1, |number| {
        black_box(sequential.get(Oid(scattered(number, OBJECTS))));
    });
    count("index/update, sequential oids", OBJECTS, 1, |number| {
        sequential.insert(Oid(scattered(number, OBJECTS)), number + 9);
    });
    let random = Index::new();
    let oid = |number: u64| Oid(scattered(number + 1, u64::MAX));
    count("index/insert, random oids", OBJECTS, 1, |number| {
        random.insert(oid(number), number + 4);
    });
    count("index/get, random oids", OBJECTS, 1, |number| {
        black_box(random.get(oid(number)));
    });
    for (name, index) in [("sequential", &sequential), ("random", &random)] {
        count(&format!("index/iterate, {name} oids"), 1, OBJECTS, |_| {
            let mut sum = 0;
            index.for_each_from(Oid(0), &mut |oid, pos| {
                sum ^= oid.0 ^ pos;
                true
            });
            black_box(sum);
        });
    }
}

fn cache() {
    const KEPT: u64 = 4000;
    let tid = Tid(0x03f5_8e00_0444_4444);
    let cache = Cache::new(KEPT as usize * 400);
    count("cache/store", KEPT / 2, 1, |oid| cache.store(Oid(oid), tid, None, &RECORD));
    count("cache/hit", KEPT / 2, 1, |number| {
        let hit = cache.load_before(Oid(scattered(number, KEPT / 2)), Tid::MAX);
        assert!(black_box(hit).is_some());
    });
    count("cache/miss", KEPT / 2, 1, |number| {
        assert!(black_box(cache.load_before(Oid(number + KEPT), Tid::MAX)).is_none());
    });
    count("cache/invalidate", KEPT / 4, 1, |oid| cache.invalidate(Oid(oid), Some(Tid(tid.0 + 1))));
    (KEPT..KEPT * 3).for_each(|oid| cache.store(Oid(oid), tid, None, &RECORD));
    let evictions = cache.stats().evictions;
    count("cache/store that evicts", KEPT, 1, |number| {
        cache.store(Oid(number + KEPT * 3), tid, None, &RECORD);
    });
    assert!(cache.stats().evictions > evictions, "nothing was evicted");
}

/// A data file in memory: what is counted is the engine.
#[derive(Default)]
struct MemoryFile(RwLock<Vec<u8>>);

impl StorageFile for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.read().unwrap_or_else(PoisonError::into_inner).len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], pos: u64) -> io::Result<usize> {
        let bytes = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let rest = bytes.get(pos as usize..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn try_read_at(&self, buf: &mut [u8], pos: u64) -> io::Result<Option<usize>> {
        self.read_at(buf, pos).map(Some)
    }

    fn write_at(&self, buf: &[u8], pos: u64) -> io::Result<()> {
        let mut bytes = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let (pos, end) = (pos as usize, pos as usize + buf.len());
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[pos..end].copy_from_slice(buf);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn reserve(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn try_lock(&self) -> io::Result<bool> {
        Ok(true)
    }

    fn unlock(&self) -> io::Result<()> {
        Ok(())
    }
}

fn commit(storage: &FileStorage, oids: impl Iterator<Item = u64>, serial: Tid) -> Tid {
    let store =
        |oid| Op::Store { oid: Oid(oid), serial, data: Bytes::from_static(&RECORD).into(), blob: None };
    let txn = StagedTxn { ops: oids.map(store).collect(), ..StagedTxn::default() };
    let Ok(VoteOutcome::Ready(voted)) = storage.vote(txn, &NoResolution) else { panic!("a conflict") };
    let mut committed = Tid::ZERO;
    storage.finish(vec![voted], &mut |done| committed = done.tid).expect("committed");
    committed
}

/// A storage of [`OBJECTS`] objects, the first hundred of them with a second revision.
fn storage(directory: &std::path::Path) -> FileStorage {
    let file = Arc::new(MemoryFile(RwLock::new(Vec::with_capacity(64 << 20))));
    let options = FileStorageOptions::default();
    let storage = FileStorage::open_with(file, directory.join("Data.fs"), options).expect("a new storage");
    let first = commit(&storage, 0..OBJECTS, Tid::ZERO);
    commit(&storage, 0..100, first);
    storage
}

fn loads(storage: &FileStorage) {
    const TIMES: u64 = 1000;
    let oid = |number| Oid(100 + scattered(number, OBJECTS - 100));
    let load = |oid, before| black_box(storage.try_load_before(oid, before)).expect("a record");
    assert!(load(oid(0), Tid::MAX).is_some());
    count("load/current revision", TIMES, 1, |number| drop(load(oid(number), Tid::MAX)));
    let last = storage.last_tid();
    count("load/revision before", TIMES, 1, |number| drop(load(Oid(number % 100), last)));

    for (name, encoding) in [("Z5", Encoding::Pickle), ("M5", Encoding::Msgpack)] {
        let frame = |oid| {
            let (id, call) =
                (MessageId::Load { oid, before: Tid::MAX }, Call::LoadBefore { oid, before: Tid::MAX });
            body(|out| wire::encode_call(encoding, &id, false, &call, out).expect("encodable"))
        };
        let frames: Vec<Bytes> = (0..TIMES).map(|number| frame(oid(number))).collect();
        let mut out = BytesMut::with_capacity(1 << 20);
        let mut serve = |number: u64| {
            out.clear();
            let request = wire::decode_request(encoding, &frames[number as usize]);
            let Ok(Request { id, call: Ok(Call::LoadBefore { oid, before }), .. }) = request else {
                panic!("not the load that was written")
            };
            let loaded = storage.try_load_before(oid, before).expect("a record").expect("a revision");
            let loaded = Some((&loaded.data[..], loaded.tid, loaded.end_tid));
            wire::encode_loaded(encoding, &id, loaded, &mut out).expect("encodable");
        };
        serve(0);
        count(&format!("load/{name} request to answer"), TIMES, 1, serve);
    }
}

fn commits(storage: &FileStorage) {
    let new = |number: u64, count: u64| {
        let first = OBJECTS + number * count;
        first..first + count
    };
    commit(storage, new(0, 1), Tid::ZERO);
    count("commit/one new object", 100, 1, |number| {
        commit(storage, new(number + 1, 1), Tid::ZERO);
    });
    count("commit/100 new objects", 20, 1, |number| {
        commit(storage, new(number + 20, 100), Tid::ZERO);
    });
    let mut serial = storage.current_tid(Oid(7)).expect("a tid");
    count("commit/one changed object", 100, 1, |_| serial = commit(storage, [7].into_iter(), serial));
}

/// What is done once for every record: iteration, and opening with and without index.
fn reading(directory: &std::path::Path, storage: &FileStorage) {
    let mut records = 0;
    let mut transactions = storage.iterate(None, None).expect("an iterator");
    let mut iterate = |_| {
        while let Some((_, mut txn)) = transactions.next_txn().expect("a transaction") {
            while let Some(record) = txn.next_record().expect("a record") {
                black_box(record);
                records += 1;
            }
        }
    };
    let known = OBJECTS + 100 + 101 + 2000 + 100;
    count("iterate/a record", 1, known, &mut iterate);
    assert_eq!(records, known);

    let snapshot = storage.snapshot();
    storage.checkpoint().expect("an index");
    let path = directory.join("Data.fs");
    for with_index in [true, false] {
        if !with_index {
            std::fs::remove_file(directory.join("Data.fs.index")).expect("an index file");
        }
        let options = FileStorageOptions { read_only: true, ..FileStorageOptions::default() };
        let name = if with_index { "open/with index, an object" } else { "open/without index, an object" };
        let mut opened = None;
        count(name, 1, storage.object_count(), |_| {
            opened = Some(FileStorage::open_with(Arc::clone(&snapshot.file), &path, options.clone()));
        });
        let opened = opened.and_then(Result::ok).expect("opened");
        assert_eq!((opened.used_index(), opened.object_count()), (with_index, storage.object_count()));
    }
}
