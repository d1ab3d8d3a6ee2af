//! Transactions that are larger than the memory they may take.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::pickle::Value;
use zeo_rs::server::{ServerConfig, ServerHandle};
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::{Conflict, ConflictResolver, Resolution, Storage};
use zeo_rs::wire::{Call, Encoding};

use crate::peer::{PATIENCE, Peer, serve};

/// Records of a kilobyte and a bit; at most ten of them are kept in memory.
const RECORDS: u64 = 100;
const MEMORY: usize = 10_000;

fn record(oid: u64, revision: u8) -> Vec<u8> {
    let mut data = vec![revision; 1000 + oid as usize];
    data.extend(oid.to_be_bytes());
    data
}

fn serve_file(directory: &Path, config: ServerConfig) -> (Arc<FileStorage>, ServerHandle) {
    let storage = FileStorage::open(directory.join("Data.fs"), FileStorageOptions::default()).unwrap();
    let storage = Arc::new(storage);
    let server = serve(ServerConfig { staging_memory: MEMORY, ..config }, Arc::clone(&storage) as _);
    (storage, server)
}

/// Nameless files in `directory` that this process has open.
fn spill_files(directory: &Path) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    targets
        .filter(|target| target.starts_with(directory) && target.to_string_lossy().ends_with("(deleted)"))
        .count()
}

fn until_no_spill_file(directory: &Path) {
    let end = std::time::Instant::now() + PATIENCE;
    while spill_files(directory) > 0 {
        assert!(std::time::Instant::now() < end, "a temporary file stays");
        std::thread::yield_now();
    }
}

fn store_all(peer: &mut Peer, serial: Tid, revision: u8) {
    for oid in 1..=RECORDS {
        peer.store(1, oid, serial, &record(oid, revision));
    }
}

#[test]
fn a_large_transaction_is_the_same_from_disk() {
    let directory = tempfile::tempdir().unwrap();
    let (storage, server) = serve_file(directory.path(), ServerConfig::default());
    let mut peer = Peer::new(&server, Encoding::Msgpack);
    peer.begin(1);
    store_all(&mut peer, Tid::ZERO, 1);
    // One that is on disk by now, and one that is not.
    peer.store(1, 1, Tid::ZERO, b"again");
    peer.ping();
    assert_eq!(spill_files(directory.path()), 1);
    let names: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| name.to_string_lossy().starts_with("Data.fs")), "{names:?}");
    assert_eq!(peer.vote(1).unwrap().as_items(), Some(&[][..]));
    let first = peer.finish(1).unwrap();
    until_no_spill_file(directory.path());
    for oid in 2..=RECORDS {
        assert_eq!(storage.load_serial(Oid(oid), first).unwrap(), record(oid, 1));
    }
    assert_eq!(storage.load_serial(Oid(1), first).unwrap(), "again");

    // Restored with hints that hold and that do not, and undone: the same as from memory.
    peer.begin(1);
    for oid in 1..=RECORDS {
        let data = if oid == 1 { b"again".to_vec() } else { record(oid, if oid % 2 == 0 { 1 } else { 2 }) };
        peer.cast(Call::Restorea {
            oid: Oid(oid),
            serial: Tid(first.0 + 1),
            data: Some(data.into()),
            prev_txn: Some(first),
            txn: Value::Int(1),
        });
    }
    peer.vote(1).unwrap();
    peer.finish(1).unwrap();
    until_no_spill_file(directory.path());
    for oid in 2..=RECORDS {
        let revision = if oid % 2 == 0 { 1 } else { 2 };
        assert_eq!(peer.load(oid, Tid::MAX).unwrap().unwrap().0, record(oid, revision));
    }
    assert_eq!(peer.load(1, Tid::MAX).unwrap().unwrap().0, "again");
    drop(server);
    let reopened = FileStorage::open(directory.path().join("Data.fs"), FileStorageOptions::default());
    assert_eq!(reopened.unwrap().load_serial(Oid(1), first).unwrap(), "again");
}

#[test]
fn an_aborted_or_broken_off_large_transaction_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let (_storage, server) = serve_file(directory.path(), ServerConfig::default());
    let mut peer = Peer::new(&server, Encoding::Pickle);
    peer.begin(1);
    store_all(&mut peer, Tid::ZERO, 1);
    peer.ping();
    assert_eq!(spill_files(directory.path()), 1);
    peer.abort(1);
    until_no_spill_file(directory.path());
    peer.begin(1);
    store_all(&mut peer, Tid::ZERO, 1);
    peer.ping();
    assert_eq!(spill_files(directory.path()), 1);
    drop(peer);
    until_no_spill_file(directory.path());
}

#[test]
fn without_a_place_on_disk_only_the_large_transaction_fails() {
    let directory = tempfile::tempdir().unwrap();
    let config = ServerConfig { staging_directory: Some("/nonexistent".into()), ..ServerConfig::default() };
    let (_storage, server) = serve_file(directory.path(), config);
    let mut peer = Peer::new(&server, Encoding::Msgpack);
    let mut other = Peer::new(&server, Encoding::Msgpack);
    peer.begin(1);
    store_all(&mut peer, Tid::ZERO, 1);
    let fault = peer.vote(1).unwrap_err();
    assert_eq!(fault.class, "ZODB.POSException.StorageError");
    assert!(format!("{:?}", fault.data).contains("/nonexistent"), "{fault:?}");
    let tid = other.commit(1, Tid::ZERO, b"small").unwrap();
    peer.commit(1, tid, b"smaller").unwrap();
}

#[test]
fn the_limit_counts_what_is_on_disk() {
    let directory = tempfile::tempdir().unwrap();
    let config = ServerConfig { max_staged: 50_000, ..ServerConfig::default() };
    let (_storage, server) = serve_file(directory.path(), config);
    let mut peer = Peer::new(&server, Encoding::Msgpack);
    peer.begin(1);
    // The same object again and again: each goes to the file.
    for revision in 0..100 {
        peer.store(1, 1, Tid::ZERO, &vec![revision; MEMORY + 1]);
    }
    peer.expect_closed();
    until_no_spill_file(directory.path());
}

/// Shows what it was asked, and takes what was to be stored.
struct TakesNew;

impl ConflictResolver for TakesNew {
    fn resolve(&self, _: &dyn Storage, conflict: &Conflict, _: Option<Bytes>) -> Resolution {
        assert_eq!(conflict.data, record(conflict.oid.0, 2), "what was staged is read back");
        Resolution::Resolved(record(conflict.oid.0, 3).into())
    }
}

#[test]
fn conflicts_of_a_large_transaction_are_resolved() {
    let directory = tempfile::tempdir().unwrap();
    let config = ServerConfig { resolver: Arc::new(TakesNew), ..ServerConfig::default() };
    let (_storage, server) = serve_file(directory.path(), config);
    let mut peer = Peer::new(&server, Encoding::Msgpack);
    peer.begin(1);
    store_all(&mut peer, Tid::ZERO, 1);
    peer.vote(1).unwrap();
    peer.finish(1).unwrap();
    peer.begin(1);
    store_all(&mut peer, Tid(1), 2);
    assert_eq!(peer.vote(1).unwrap().as_items().map(<[Value]>::len), Some(RECORDS as usize));
    peer.finish(1).unwrap();
    assert_eq!(peer.load(7, Tid::MAX).unwrap().unwrap().0, record(7, 3));
}

#[test]
fn a_client_that_resolves_votes_again_with_what_is_on_disk() {
    let directory = tempfile::tempdir().unwrap();
    let config = ServerConfig { client_conflict_resolution: true, ..ServerConfig::default() };
    let (_storage, server) = serve_file(directory.path(), config);
    let mut peer = Peer::new(&server, Encoding::Msgpack);
    let first = peer.commit(1, Tid::ZERO, b"first").unwrap();
    peer.begin(1);
    store_all(&mut peer, Tid::ZERO, 2);
    let conflicts = peer.vote(1).unwrap();
    let [conflict] = conflicts.as_items().unwrap() else { panic!("{conflicts:?}") };
    assert_eq!(conflict.get("data").unwrap().as_bytes().unwrap(), &record(1, 2)[..]);
    peer.store(1, 1, first, b"merged");
    assert_eq!(peer.vote(1).unwrap().as_items(), Some(&[][..]));
    peer.finish(1).unwrap();
    assert_eq!(peer.load(1, Tid::MAX).unwrap().unwrap().0, "merged");
    assert_eq!(peer.load(RECORDS, Tid::MAX).unwrap().unwrap().0, record(RECORDS, 2));
}
