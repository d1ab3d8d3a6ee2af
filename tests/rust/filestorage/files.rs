//! The files around Data.fs: lock, blobs, oids, tails; and rules that no history shows.

use std::fs;
use std::path::Path;

use zeo_rs::ids::{Oid, Tid};
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::{NoResolution, Op, StagedTxn, Storage, StorageError, TxnMeta, VoteOutcome, VotedTxn};

fn with_blobs(path: &Path) -> FileStorageOptions {
    FileStorageOptions { blob_dir: Some(path.with_file_name("blobs")), ..Default::default() }
}

fn vote(storage: &FileStorage, ops: Vec<Op>) -> Result<VotedTxn, StorageError> {
    match storage.vote(StagedTxn { ops, ..Default::default() }, &NoResolution)? {
        VoteOutcome::Ready(voted) => Ok(voted),
        VoteOutcome::Conflicts(_) => panic!("nobody asked"),
    }
}

fn commit(storage: &FileStorage, ops: Vec<Op>) -> Tid {
    let mut tid = Tid::ZERO;
    storage.finish(vec![vote(storage, ops).unwrap()], &mut |txn| tid = txn.tid).unwrap();
    tid
}

fn store(oid: u64, serial: Tid, data: &'static str) -> Op {
    Op::Store { oid: Oid(oid), serial, data: data.into(), blob: None }
}

fn store_blob(storage: &FileStorage, oid: u64, serial: Tid, content: &str) -> Op {
    let file = storage.temporary_directory().unwrap().join(format!("upload{content}"));
    fs::write(&file, content).unwrap();
    Op::Store { oid: Oid(oid), serial, data: "a blob".into(), blob: Some(file) }
}

/// Files anywhere below.
fn count_files(dir: &Path, suffix: &str) -> usize {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let count = |path: std::path::PathBuf| match path.is_dir() {
        true => count_files(&path, suffix),
        false => usize::from(path.to_string_lossy().ends_with(suffix)),
    };
    entries.map(count).sum()
}

#[test]
fn blobs_come_and_go_with_their_transactions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("Data.fs");
    let storage = FileStorage::open(&path, with_blobs(&path)).unwrap();
    let blobs = dir.path().join("blobs");
    let first = commit(&storage, vec![store_blob(&storage, 1, Tid::ZERO, "one")]);
    let second = commit(&storage, vec![store_blob(&storage, 1, first, "two")]);
    let read = |tid| fs::read_to_string(storage.blob_path(Oid(1), tid).unwrap()).unwrap();
    assert_eq!((read(first), read(second)), ("one".into(), "two".into()));
    let undone = commit(&storage, vec![Op::Undo { tid: second }]);
    assert_eq!(read(undone), "one");
    // Given up before or after the vote: nothing stays, in the temporary directory neither.
    drop(vote(&storage, vec![store_blob(&storage, 1, undone, "three")]).unwrap());
    let mut pending = storage.begin(TxnMeta::default(), None, b' ').unwrap();
    storage.apply(&mut pending, store_blob(&storage, 1, undone, "four"), &NoResolution).unwrap();
    storage.abort_pending(pending);
    assert_eq!(count_files(&blobs, ".blob"), 3);
    assert_eq!(fs::read_dir(blobs.join("tmp")).unwrap().count(), 0);
    assert!(matches!(storage.blob_path(Oid(1), Tid(5)), Err(StorageError::NoBlob { .. })));
}

#[test]
fn a_missing_data_file_costs_no_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("Data.fs");
    let storage = FileStorage::open(&path, with_blobs(&path)).unwrap();
    commit(&storage, vec![store_blob(&storage, 1, Tid::ZERO, "one")]);
    drop(storage);
    fs::rename(&path, dir.path().join("away")).unwrap();
    let error = FileStorage::open(&path, with_blobs(&path)).err().unwrap();
    assert!(error.to_string().contains("is missing, but"), "{error}");
    assert_eq!(count_files(&dir.path().join("blobs"), ".blob"), 1);
    assert!(!path.exists());
    let create = FileStorageOptions { create: true, ..with_blobs(&path) };
    drop(FileStorage::open(&path, create).unwrap());
    assert_eq!(count_files(&dir.path().join("blobs"), ".blob"), 0);
}

#[test]
fn a_second_opener_is_refused_and_a_reader_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("Data.fs");
    let storage = FileStorage::open(&path, FileStorageOptions::default()).unwrap();
    let tid = commit(&storage, vec![store(1, Tid::ZERO, "x")]);
    for without_lock_file in [false, true] {
        if without_lock_file {
            fs::remove_file(dir.path().join("Data.fs.lock")).unwrap();
        }
        let error = FileStorage::open(&path, FileStorageOptions::default()).err().unwrap();
        let pid = std::process::id().to_string();
        assert!(matches!(&error, StorageError::Locked(text) if text.contains(&pid)), "{error}");
        let create = FileStorageOptions { create: true, ..Default::default() };
        assert!(matches!(FileStorage::open(&path, create), Err(StorageError::Locked(_))));
    }
    let read_only = FileStorageOptions { read_only: true, ..Default::default() };
    let reader = FileStorage::open(&path, read_only.clone()).unwrap();
    assert_eq!(reader.current_tid(Oid(1)).unwrap(), tid);
    assert!(matches!(vote(&reader, vec![]), Err(StorageError::ReadOnly)));
    assert!(matches!(reader.new_oids(1), Err(StorageError::ReadOnly)));
    // It is of the moment when it was opened.
    commit(&storage, vec![store(1, tid, "y")]);
    assert_eq!(reader.last_tid(), tid);
    let past = FileStorage::open(&path, FileStorageOptions { stop: Some(tid.next()), ..read_only }).unwrap();
    assert_eq!(past.last_tid(), tid);
    storage.close().unwrap();
    assert!(matches!(storage.load_before(Oid(1), Tid::MAX), Err(StorageError::Closed)));
    FileStorage::open(&path, FileStorageOptions::default()).unwrap();
}

#[test]
fn what_cannot_be_written_is_refused_before_the_vote() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("Data.fs");
    let options = FileStorageOptions { quota: Some(300), ..Default::default() };
    let storage = FileStorage::open(&path, options).unwrap();
    assert!(matches!(vote(&storage, vec![store(1, Tid::ZERO, "")]), Err(StorageError::Invalid(_))));
    let meta = TxnMeta { user: vec![b'u'; 65536].into(), ..Default::default() };
    let long = StagedTxn { meta, ..Default::default() };
    let error = storage.vote(long, &NoResolution).err().unwrap();
    assert_eq!(error.to_string(), "user name too long");
    let unfinished = StagedTxn { status: b'c', ..Default::default() };
    assert!(storage.vote(unfinished, &NoResolution).is_err());
    let tid = commit(&storage, vec![store(1, Tid::ZERO, "x")]);
    let missing = vote(&storage, vec![Op::Delete { oid: Oid(9), serial: tid }]);
    assert!(matches!(missing, Err(StorageError::NotFound(Oid(9)))));
    let stale = vote(&storage, vec![Op::CheckCurrent { oid: Oid(1), serial: Tid(7) }]);
    assert!(matches!(stale, Err(StorageError::ReadConflict { committed, .. }) if committed == tid));
    let many = (2..20).map(|oid| store(oid, Tid::ZERO, "some more")).collect();
    assert!(matches!(vote(&storage, many), Err(StorageError::Quota(300))));
    assert_eq!(fs::metadata(&path).unwrap().len(), storage.size());
}

#[test]
fn oids_are_not_given_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("Data.fs");
    let open = || FileStorage::open(&path, FileStorageOptions::default()).unwrap();
    let storage = open();
    assert_eq!(storage.new_oids(3).unwrap(), [Oid(1), Oid(2), Oid(3)]);
    // Killed: the bytes on disk as they are now, no close.
    let copy = dir.path().join("copy.fs");
    for suffix in ["", ".oid"] {
        let name = |base: &Path| format!("{}{suffix}", base.display());
        fs::copy(name(&path), name(&copy)).unwrap();
    }
    let killed = FileStorage::open(&copy, FileStorageOptions::default()).unwrap();
    assert!(killed.new_oids(1).unwrap() > vec![Oid(3)]);
    drop(storage);
    let storage = open();
    assert_eq!(storage.new_oids(1).unwrap(), [Oid(4)]);
    vote(&storage, vec![store(100, Tid::ZERO, "x")]).unwrap();
    assert_eq!(storage.new_oids(1).unwrap(), [Oid(101)]);
}

#[test]
fn tids_ascend_whatever_the_clock_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("Data.fs");
    let storage = FileStorage::open(&path, FileStorageOptions::default()).unwrap();
    let future = Tid::from_unix(4e9).unwrap();
    let txn = StagedTxn { tid: Some(future), ops: vec![store(1, Tid::ZERO, "x")], ..Default::default() };
    let Ok(VoteOutcome::Ready(voted)) = storage.vote(txn, &NoResolution) else { panic!() };
    storage.finish(vec![voted], &mut |_| ()).unwrap();
    assert_eq!(commit(&storage, vec![store(1, future, "y")]), future.next());
    drop(storage);
    let storage = FileStorage::open(&path, FileStorageOptions::default()).unwrap();
    assert_eq!(commit(&storage, vec![]), Tid(future.0 + 2));
}
