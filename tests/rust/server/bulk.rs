//! Transactions that are larger than the memory they may take; blobs beside other work.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::pickle::Value;
use zeo_rs::server::{ServerConfig, ServerHandle};
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::memory::MemoryStorage;
use zeo_rs::storage::{Conflict, ConflictResolver, Resolution, Storage};
use zeo_rs::wire::{Call, Encoding, Notice};

use crate::peer::{Gated, PATIENCE, Peer, serve};

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

fn chunk(peer: &mut Peer, content: Vec<u8>) {
    peer.cast(Call::StoreBlobChunk { chunk: content.into() });
}

fn end(peer: &mut Peer, oid: u64, serial: Tid) {
    peer.cast(Call::StoreBlobEnd { oid: Oid(oid), serial, data: "record".into(), txn: Value::Int(1) });
}

fn blob(peer: &mut Peer, oid: u64, serial: Tid) -> Vec<u8> {
    peer.notices.clear();
    peer.call(Call::SendBlob { oid: Oid(oid), serial }).unwrap();
    let chunk_of = |notice| match notice {
        Notice::ReceiveBlobChunk { oid: of, chunk, .. } if of == Oid(oid) => Some(chunk),
        _ => None,
    };
    peer.notices.drain(..).filter_map(chunk_of).flatten().collect()
}

#[test]
fn uploads_of_several_clients_are_kept_apart() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Arc::new(MemoryStorage::with_blobs("blobs", directory.path()));
    let server = serve(ServerConfig::default(), storage);
    let mut peers: Vec<_> = (0..3).map(|_| Peer::new(&server, Encoding::Msgpack)).collect();
    for peer in &mut peers {
        peer.begin(1);
        peer.cast(Call::StoreBlobStart);
    }
    // Of sizes below and above what is written at a time, in turns.
    let sizes = [1, 300_000, 5_000_000, 59_000, 1 << 20, 100];
    for size in sizes {
        for (number, peer) in peers.iter_mut().enumerate() {
            chunk(peer, vec![number as u8; size]);
        }
    }
    for (number, peer) in peers.iter_mut().enumerate() {
        end(peer, number as u64 + 1, Tid::ZERO);
        peer.vote(1).unwrap();
        let tid = peer.finish(1).unwrap();
        let content = blob(peer, number as u64 + 1, tid);
        assert_eq!(content.len(), sizes.iter().sum::<usize>());
        assert!(content.iter().all(|byte| *byte == number as u8));
    }
}

/// With one thread for all connections, nobody waits for the disk of an upload; its own client does, once enough of it
/// has been received.
#[test]
fn an_upload_is_written_off_the_event_loop() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Gated::over(MemoryStorage::with_blobs("blobs", directory.path()), true);
    let config = ServerConfig { workers: Some(1), ..ServerConfig::default() };
    let server = serve(config, Arc::clone(&storage) as _);
    let mut other = Peer::new(&server, Encoding::Msgpack);
    let mut peer = Peer::new(&server, Encoding::Msgpack);
    let first = other.commit(1, Tid::ZERO, b"first").unwrap();
    storage.uploads.shut();
    peer.begin(1);
    peer.cast(Call::StoreBlobStart);
    chunk(&mut peer, vec![1; 2 << 20]);
    storage.uploads.wait_for(1);
    other.commit(1, first, b"second").unwrap();
    assert_eq!(other.load(1, Tid::MAX).unwrap().unwrap().0, "second");
    // The same client, while little is waiting.
    peer.ping();
    let status = other.call(Call::ServerStatus).unwrap();
    assert_eq!(status.get("blob_uploads").unwrap().as_int(), Some(1));
    assert_eq!(status.get("blob_bytes_received").unwrap().as_int(), Some(2 << 20));
    chunk(&mut peer, vec![1; 4 << 20]);
    let ping = peer.send(&Call::Ping, false);
    other.ping();
    storage.uploads.open();
    peer.answer(&ping).unwrap();
    end(&mut peer, 2, Tid::ZERO);
    peer.vote(1).unwrap();
    let tid = peer.finish(1).unwrap();
    assert_eq!(blob(&mut peer, 2, tid).len(), 6 << 20);
    let status = other.call(Call::ServerStatus).unwrap();
    assert_eq!(status.get("blob_uploads").unwrap().as_int(), Some(0));
    assert_eq!(status.get("blob_downloads").unwrap().as_int(), Some(0));
    assert_eq!(status.get("blob_bytes_sent").unwrap().as_int(), Some(6 << 20));
}

/// While the first one is still being written.
#[test]
fn an_aborted_upload_does_not_get_into_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Gated::over(MemoryStorage::with_blobs("blobs", directory.path()), true);
    let server = serve(ServerConfig::default(), Arc::clone(&storage) as _);
    let mut peer = Peer::new(&server, Encoding::Msgpack);
    storage.uploads.shut();
    peer.begin(1);
    peer.cast(Call::StoreBlobStart);
    chunk(&mut peer, vec![1; 2 << 20]);
    storage.uploads.wait_for(1);
    peer.abort(1);
    peer.begin(1);
    peer.cast(Call::StoreBlobStart);
    chunk(&mut peer, vec![2; 2 << 20]);
    end(&mut peer, 1, Tid::ZERO);
    storage.uploads.wait_for(2);
    storage.uploads.open();
    peer.vote(1).unwrap();
    let tid = peer.finish(1).unwrap();
    assert!(blob(&mut peer, 1, tid) == vec![2; 2 << 20]);
    let start = std::time::Instant::now();
    while std::fs::read_dir(directory.path()).unwrap().count() != 1 {
        assert!(start.elapsed() < PATIENCE, "the aborted file stays");
    }
}

#[test]
fn a_blob_that_cannot_be_written_fails_in_the_vote() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("blobs");
    std::fs::create_dir(&place).unwrap();
    let storage = Arc::new(MemoryStorage::with_blobs("blobs", &place));
    let server = serve(ServerConfig::default(), storage);
    let mut peer = Peer::new(&server, Encoding::Msgpack);
    std::fs::remove_dir(&place).unwrap();
    peer.begin(1);
    peer.cast(Call::StoreBlobStart);
    for _ in 0..6 {
        chunk(&mut peer, vec![1; 1 << 20]);
    }
    end(&mut peer, 1, Tid::ZERO);
    let fault = peer.vote(1).unwrap_err();
    assert_eq!(fault.class, "ZODB.POSException.StorageError");
    peer.commit(1, Tid::ZERO, b"no blob").unwrap();
}
