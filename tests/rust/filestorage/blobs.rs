//! Crashes of transactions with blobs, and of packs: a blob record that is there has its file, whole. A file without a
//! record (of a transaction that was not finished) is never taken for one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::storage::file::file::OsFile;
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::transform::RecordReferences;
use zeo_rs::storage::{
    NoResolution, Op, PackOptions, Result, StagedTxn, Storage, StorageError, TxnMeta, VoteOutcome, VotedTxn,
    WholeStorageLock,
};

use super::crash::scratch;
use super::disk::{Disk, Fault, images};
use super::names::Names;

const BLOB: &[u8] = b"\x80\x03cZODB.blob\nBlob\nq\x00.\x80\x03N.";

type Contents = BTreeMap<(Oid, Tid), Vec<u8>>;

fn options(root: &Path, keep_old: bool) -> FileStorageOptions {
    FileStorageOptions { blob_dir: Some(root.join("blobs")), pack_keep_old: keep_old, ..Default::default() }
}

/// A blob commit, waiting in the temporary directory.
fn store(storage: &FileStorage, oid: u64, serial: Tid, content: &[u8]) -> Op {
    let upload = storage.temporary_directory().unwrap().join(format!("upload{oid}"));
    fs::write(&upload, content).unwrap();
    Op::Store { oid: Oid(oid), serial, data: Bytes::from_static(BLOB).into(), blob: Some(upload) }
}

/// The root object refers to the blobs.
fn root(serial: Tid, oids: &[u64]) -> Op {
    let mut data = b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x00.\x80\x03](".to_vec();
    for oid in oids {
        data.extend_from_slice(b"C\x08");
        data.extend_from_slice(&oid.to_be_bytes());
        data.extend_from_slice(b"h\x00\x86Q");
    }
    data.extend_from_slice(b"e.");
    Op::Store { oid: Oid(0), serial, data: data.into(), blob: None }
}

fn vote(storage: &FileStorage, tid: Option<Tid>, ops: Vec<Op>) -> Result<VotedTxn> {
    let txn = StagedTxn { meta: TxnMeta::default(), tid, status: b' ', ops };
    match storage.vote(txn, &NoResolution)? {
        VoteOutcome::Ready(voted) => Ok(voted),
        VoteOutcome::Conflicts(_) => panic!("a conflict"),
    }
}

fn finish(storage: &FileStorage, group: Vec<VotedTxn>) -> Result<Vec<Tid>> {
    let mut tids = Vec::new();
    storage.finish(group, &mut |committed| tids.push(committed.tid))?;
    Ok(tids)
}

/// Number of transactions, and every blob revision that a record names, with the content of its file.
fn blobs(storage: &FileStorage) -> (usize, Contents) {
    let mut found = Contents::new();
    let mut transactions = storage.iterate(None, None).unwrap();
    let mut count = 0;
    while let Some((_, mut records)) = transactions.next_txn().unwrap() {
        count += 1;
        while let Some(record) = records.next_record().unwrap() {
            if record.data.as_deref() == Some(BLOB) {
                let path = storage.blob_path(record.oid, record.tid).expect("a blob record has its file");
                found.insert((record.oid, record.tid), fs::read(path).unwrap());
            }
        }
    }
    (count, found)
}

/// Blob files of a directory, in no particular order.
fn files(storage: &FileStorage) -> usize {
    let mut count = 0;
    storage
        .blob_dir()
        .unwrap()
        .for_each(&mut |_, _, _| {
            count += 1;
            Ok(())
        })
        .unwrap();
    count
}

#[test]
fn a_blob_transaction_is_there_with_its_files_or_not_at_all() {
    let dir = scratch();
    let disk = Arc::new(Disk::default());
    let names = Names::new(dir.path(), Some(disk.clone()));
    let path = dir.path().join("Data.fs");
    let storage =
        FileStorage::open_with_names(disk.clone(), names.clone(), &path, options(dir.path(), true)).unwrap();
    // After so many (operations on names, events of the data file) so many transactions were acknowledged.
    let mut acknowledged = vec![(names.count(), disk.event_count(), 0)];
    let mut done = 0;
    let mut finished = |group: Vec<VotedTxn>| {
        done += group.len();
        let tids = finish(&storage, group).unwrap();
        acknowledged.push((names.count(), disk.event_count(), done));
        tids
    };
    let first = finished(vec![vote(&storage, None, vec![store(&storage, 1, Tid::ZERO, b"one")]).unwrap()])[0];
    // Two transactions in one group, one with two blobs.
    let group = vec![
        vote(&storage, None, vec![store(&storage, 1, first, b"one again")]).unwrap(),
        vote(
            &storage,
            None,
            vec![store(&storage, 2, Tid::ZERO, b"two"), store(&storage, 0x1_0000, Tid::ZERO, b"far away")],
        )
        .unwrap(),
    ];
    let second = finished(group)[0];
    // Given up after the vote.
    storage.abort(vote(&storage, None, vec![store(&storage, 3, Tid::ZERO, b"never")]).unwrap());
    // Undo links the older file to a new name; a copied transaction brings its tids.
    finished(vec![vote(&storage, None, vec![Op::Undo { tid: second }]).unwrap()]);
    let copied = Tid(storage.last_tid().0 + 1000);
    let upload = storage.temporary_directory().unwrap().join("upload");
    fs::write(&upload, "copied").unwrap();
    let data = Some(Bytes::from_static(BLOB).into());
    let restore = Op::Restore { oid: Oid(4), serial: copied, data, prev_txn: None, blob: Some(upload) };
    finished(vec![vote(&storage, Some(copied), vec![restore]).unwrap()]);
    let (count, expected) = blobs(&storage);
    assert_eq!((count, expected.len()), (5, 6));
    let tids: Vec<Tid> = {
        let mut transactions = storage.iterate(None, None).unwrap();
        std::iter::from_fn(|| transactions.next_txn().unwrap().map(|(txn, _)| txn.tid)).collect()
    };
    let events = disk.events();
    let before = names.events();
    let mut tried = 0;
    // Every moment: so many operations on names and so many events of the data file were done.
    let moments = (0..=names.count()).flat_map(|n| {
        let from = if n == 0 { 0 } else { before[n - 1] };
        let to = before.get(n).copied().unwrap_or(events.len());
        (from..=to).map(move |e| (n, e))
    });
    for (n, e) in moments {
        let acknowledged = acknowledged.iter().rev().find(|(names, events, _)| *names <= n && *events <= e);
        let acknowledged = acknowledged.map_or(0, |(.., done)| *done);
        let mut datas = Vec::new();
        images(&events, e, |data| datas.push(data));
        datas.dedup();
        names.images(n, |image| {
            // Torn writes of the data file are tried elsewhere: here what ends a write, and some of the others.
            let step = (datas.len() / 4).max(1);
            for data in datas.iter().rev().step_by(step) {
                recover(image, data.clone(), acknowledged, &tids, &expected);
                tried += 1;
            }
        });
    }
    println!("{tried} crash images");
    assert!(tried > 1000, "{tried} images are too few to mean anything");
}

fn recover(
    image: &super::names::Image<'_>,
    data: Vec<u8>,
    acknowledged: usize,
    tids: &[Tid],
    expected: &Contents,
) {
    let dir = scratch();
    image.put(dir.path());
    let path = dir.path().join("Data.fs");
    let storage =
        FileStorage::open_with(Arc::new(Disk::with(data)), &path, options(dir.path(), true)).unwrap();
    let (count, found) = blobs(&storage);
    assert!(count >= acknowledged, "{count} transactions of {acknowledged} acknowledged ones");
    let there = &tids[..count];
    let wanted: Contents =
        expected.iter().filter(|((_, tid), _)| there.contains(tid)).map(|(k, v)| (*k, v.clone())).collect();
    assert_eq!(found, wanted);
    // The transaction that was not finished is made again, under the same tid and with other blobs: whatever
    // is left of the first attempt is not taken for them.
    let Some(&tid) = tids.get(count) else { return };
    let Some(&(oid, _)) = expected.keys().find(|(_, serial)| *serial == tid) else { return };
    let serial = storage.current_tid(oid).unwrap_or(Tid::ZERO);
    let op = store(&storage, oid.0, serial, b"the second attempt");
    finish(&storage, vec![vote(&storage, Some(tid), vec![op]).unwrap()]).unwrap();
    let path = storage.blob_path(oid, tid).unwrap();
    assert_eq!(fs::read(path).unwrap(), b"the second attempt");
}

#[test]
fn a_commit_that_fails_takes_its_blob_files_back_where_its_records_are_gone() {
    // The write fails, the sync fails; then, with `lasting`, the cut fails, too.
    for after in 0..2 {
        for lasting in [false, true] {
            let dir = scratch();
            let disk = Arc::new(Disk::default());
            let path = dir.path().join("Data.fs");
            let storage = FileStorage::open_with(disk.clone(), &path, options(dir.path(), true)).unwrap();
            let voted = vote(&storage, None, vec![store(&storage, 1, Tid::ZERO, b"one")]).unwrap();
            disk.fail(Some(Fault { after, error: 5, part: usize::MAX, lasting }));
            assert!(matches!(finish(&storage, vec![voted]), Err(StorageError::Io { .. })));
            assert_eq!(files(&storage), usize::from(lasting));
            assert_eq!(fs::read_dir(storage.temporary_directory().unwrap()).unwrap().count(), 0);
            disk.fail(None);
            drop(storage);
            // If the records could not be taken back, the next opening may find them whole, and then their blobs.
            let storage = FileStorage::open_with(disk, &path, options(dir.path(), true)).unwrap();
            let (count, found) = blobs(&storage);
            assert_eq!((count, found.len()), if lasting { (1, 1) } else { (0, 0) });
        }
    }
}

#[test]
fn what_is_not_confirmed_is_taken_back() {
    let dir = scratch();
    let disk = Arc::new(Disk::default());
    let path = dir.path().join("Data.fs");
    let storage = FileStorage::open_with(disk.clone(), &path, options(dir.path(), true)).unwrap();
    let voted = vote(&storage, None, vec![store(&storage, 1, Tid::ZERO, b"one")]).unwrap();
    let first = storage.finish_if(voted, &mut |_| true).unwrap().unwrap();
    let content = disk.content();
    let voted = vote(&storage, None, vec![store(&storage, 1, first, b"two")]).unwrap();
    let mut asked = None;
    let answer = storage.finish_if(voted, &mut |tid| {
        // Durable by now, and in nobody's view.
        assert!(disk.content().len() > content.len());
        assert_eq!(storage.last_tid(), first);
        assert_eq!(storage.load_before(Oid(1), Tid::MAX).unwrap().unwrap().tid, first);
        asked = Some(tid);
        false
    });
    assert_eq!(answer.unwrap(), None);
    assert!(asked.unwrap() > first);
    assert_eq!(disk.content(), content);
    assert_eq!((storage.last_tid(), files(&storage)), (first, 1));
    // A crash finds nothing of it, at whatever moment after the answer.
    let events = disk.events();
    images(&events, events.len(), |image| assert_eq!(image, content));
    let voted = vote(&storage, None, vec![store(&storage, 1, first, b"three")]).unwrap();
    assert!(storage.finish_if(voted, &mut |_| true).unwrap().unwrap() > asked.unwrap());
    assert_eq!(blobs(&storage).1.len(), 2);
    // If the cut fails, the storage takes no more writes, and says why.
    let last = storage.last_tid();
    let voted = vote(&storage, None, vec![store(&storage, 1, last, b"four")]).unwrap();
    let failing = storage.finish_if(voted, &mut |_| {
        disk.fail(Some(Fault { after: 0, error: 5, part: 0, lasting: true }));
        false
    });
    assert!(matches!(failing, Err(StorageError::Io { .. })));
    assert_eq!(storage.last_tid(), last);
    assert!(storage.write_failure().unwrap().contains("could not be cut off"));
}

#[derive(Default)]
struct CommitLock(Mutex<()>);

impl WholeStorageLock for CommitLock {
    fn with_whole_storage(&self, body: &mut dyn FnMut()) {
        let _held = self.0.lock().unwrap();
        body();
    }
}

fn pack(storage: &FileStorage) {
    let references = RecordReferences;
    let options = PackOptions {
        time: 4e9,
        gc: Some(true),
        references: &references,
        progress: &mut |_| true,
        throttle: None,
    };
    storage.pack(options, &CommitLock::default()).unwrap();
}

#[test]
fn a_crash_of_a_pack_leaves_every_blob_that_a_record_names() {
    let mut tried = 0;
    for keep_old in [true, false] {
        let dir = scratch();
        let path = dir.path().join("Data.fs");
        let make = FileStorage::open(&path, options(dir.path(), keep_old)).unwrap();
        let mut tid = Tid::ZERO;
        for n in 0..4u8 {
            let ops = vec![
                root(tid, if n < 2 { &[1, 2] } else { &[1] }),
                store(&make, 1, tid, &[n]),
                store(&make, 2 + u64::from(n), Tid::ZERO, &[n; 3]),
            ];
            tid = finish(&make, vec![vote(&make, None, ops).unwrap()]).unwrap()[0];
        }
        make.close().unwrap();
        drop(make);
        let (old, expected) = blobs(&FileStorage::open(&path, options(dir.path(), keep_old)).unwrap());
        assert_eq!((old, expected.len()), (4, 8));
        fs::remove_file(dir.path().join("Data.fs.index")).unwrap();
        let names = Names::new(dir.path(), None);
        let file = OsFile(fs::File::options().read(true).write(true).open(&path).unwrap());
        let storage =
            FileStorage::open_with_names(Arc::new(file), names.clone(), &path, options(dir.path(), keep_old))
                .unwrap();
        let start = names.count();
        pack(&storage);
        let (new, left) = blobs(&storage);
        assert_eq!((new, left.len(), files(&storage)), (1, 1, 1));
        assert!(names.count() - start > 10);
        for at in start..=names.count() {
            names.images(at, |image| {
                if image.lost {
                    return; // every file was synced before it got its name, which the images of commits show
                }
                let dir = scratch();
                image.put_links(dir.path());
                let path: PathBuf = dir.path().join("Data.fs");
                let storage = FileStorage::open(&path, options(dir.path(), keep_old)).unwrap();
                let (count, found) = blobs(&storage);
                assert!([(old, &expected), (new, &left)].contains(&(count, &found)), "{count} transactions");
                // The next pack leaves nothing that nobody needs.
                pack(&storage);
                assert_eq!(blobs(&storage), (new, left.clone()));
                assert!(files(&storage) == 1 || !image.ordered, "{} files", files(&storage));
                tried += 1;
            });
        }
    }
    println!("{tried} crash images");
    assert!(tried > 100, "{tried} images are too few to mean anything");
}
