//! Crashes and I/O errors: what was acknowledged is there, what was not is wholly there or wholly absent.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use zeo_rs::ids::Oid;
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::{Storage, StorageError};

use super::disk::{Disk, Event, Fault, images};
use super::model::{Model, Step, run, steps};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// A directory in memory where there is one: the indexes saved by thousands of openings need no real syncs.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn open(disk: Arc<Disk>, path: &Path) -> Result<FileStorage, StorageError> {
    FileStorage::open_with(disk, path, FileStorageOptions::default())
}

/// A database run to its end: the events of its file, and when what was true.
struct Run {
    events: Vec<Event>,
    model: Model,
    /// After so many events so many transactions were acknowledged.
    acknowledged: Vec<(usize, usize)>,
    /// After so many events this was the index file.
    indexes: Vec<(usize, Vec<u8>)>,
}

fn run_all(steps: &[Step]) -> Run {
    let dir = scratch();
    let path = dir.path().join("Data.fs");
    let disk = Arc::new(Disk::default());
    let storage = open(disk.clone(), &path).unwrap();
    let mut model = Model::default();
    let (mut acknowledged, mut indexes) = (vec![(disk.event_count(), 0)], Vec::new());
    for step in steps {
        run(&storage, &mut model, step).unwrap();
        acknowledged.push((disk.event_count(), model.transactions()));
        if matches!(step, Step::Checkpoint) {
            indexes.push((disk.event_count(), std::fs::read(dir.path().join("Data.fs.index")).unwrap()));
        }
    }
    Run { events: disk.events(), model, acknowledged, indexes }
}

impl Run {
    /// Opens every image of a crash after each event; answers how many there were.
    fn crash_everywhere(&self) -> usize {
        let dir = scratch();
        let path = dir.path().join("Data.fs");
        let index = dir.path().join("Data.fs.index");
        let mut tried = 0;
        for at in 0..=self.events.len() {
            let acknowledged = self.acknowledged.iter().rev().find(|(events, _)| *events <= at);
            let acknowledged = acknowledged.map_or(0, |(_, n)| *n);
            // An index is renamed into place: the last one or, if the crash came before that was durable, an older one.
            let saved = self.indexes.iter().filter(|(events, _)| *events <= at).map(|(_, bytes)| Some(bytes));
            let indexes: Vec<_> = std::iter::once(None).chain(saved.rev().take(2)).collect();
            images(&self.events, at, |image| {
                // Each in turn, so that all meet all kinds of images.
                let _ = std::fs::remove_file(&index);
                if let Some(bytes) = indexes[tried % indexes.len()] {
                    std::fs::write(&index, bytes).unwrap();
                }
                self.recover(Disk::with(image), &path, acknowledged, tried % 8 == 0);
                tried += 1;
            });
        }
        tried
    }

    fn recover(&self, disk: Disk, path: &Path, acknowledged: usize, go_on: bool) {
        let disk = Arc::new(disk);
        let storage = open(disk.clone(), path).expect("a crash leaves a file that opens");
        let mut iterator = storage.iterate(None, None).unwrap();
        let mut found = 0;
        while iterator.next_txn().unwrap().is_some() {
            found += 1;
        }
        assert!(found >= acknowledged, "{found} transactions of {acknowledged} acknowledged ones");
        let mut model = self.model.prefix(found);
        model.check(&storage);
        assert_eq!(disk.content().len() as u64, storage.size(), "the tail is cut off");
        if !go_on {
            return;
        }
        let step = Step::Commit(vec![[(1, super::model::Write::Store(1, 30))].into()]);
        run(&storage, &mut model, &step).unwrap();
        drop(storage);
        model.check(&open(disk, path).unwrap());
    }
}

#[test]
fn every_crash_keeps_what_was_acknowledged() {
    let mut runner = TestRunner::deterministic();
    let mut tried = 0;
    for _ in 0..4 {
        let history = steps().prop_map(|mut steps| {
            steps.truncate(9);
            steps
        });
        let history = history.new_tree(&mut runner).unwrap().current();
        tried += run_all(&history).crash_everywhere();
    }
    println!("{tried} crash images");
    assert!(tried > 2000, "{tried} images are too few to mean anything");
}

fn committed(n: u8) -> Step {
    Step::Commit(vec![[(n, super::model::Write::Store(n % 4, 200))].into()])
}

#[test]
fn after_an_io_error_loads_go_on_and_writes_do_not() {
    // The events of a finish: its write, its sync; then the cut and its sync.
    for after in 0..2 {
        for (error, part) in [(EIO, 0), (EIO, 120), (ENOSPC, 40)] {
            for lasting in [false, true] {
                let dir = scratch();
                let path = dir.path().join("Data.fs");
                let disk = Arc::new(Disk::default());
                let storage = open(disk.clone(), &path).unwrap();
                let mut model = Model::default();
                for n in 0..3 {
                    run(&storage, &mut model, &committed(n)).unwrap();
                }
                let before = disk.content();
                disk.fail(Some(Fault { after, error, part, lasting }));
                let failed = run(&storage, &mut model, &committed(1)).unwrap_err();
                assert!(matches!(failed, StorageError::Io { .. }), "{failed}");
                disk.fail(None);
                model.check(&storage);
                let refused = run(&storage, &mut model, &committed(2)).unwrap_err();
                let StorageError::PreviousIo(text) = &refused else { panic!("{refused}") };
                assert_eq!(text.contains("could not be cut off"), lasting, "{text}");
                if !lasting {
                    assert_eq!(disk.content(), before);
                }
                drop(storage);
                // Opened again it takes writes, from the last acknowledged transaction on (or from the one in doubt).
                let storage = open(disk, &path).unwrap();
                if storage.last_tid() == model.last_tid() {
                    run(&storage, &mut model, &committed(4)).unwrap();
                    model.check(&storage);
                } else {
                    assert!(lasting && after == 1, "only a write that could not be taken back may be there");
                }
            }
        }
    }
}

#[test]
fn a_full_disk_is_an_error_of_the_vote() {
    let dir = scratch();
    let disk = Arc::new(Disk::default());
    let storage = open(disk.clone(), &dir.path().join("Data.fs")).unwrap();
    let mut model = Model::default();
    // The reservation ahead and the one of just what is needed fail; nothing was written, so the storage goes on.
    disk.fail(Some(Fault { after: 0, error: ENOSPC, part: 0, lasting: true }));
    let events = disk.event_count();
    let error = run(&storage, &mut model, &committed(1)).unwrap_err();
    assert!(error.to_string().contains("no space"), "{error}");
    assert_eq!(disk.event_count(), events);
    disk.fail(None);
    run(&storage, &mut model, &committed(1)).unwrap();
    model.check(&storage);
}

#[test]
fn a_read_error_is_no_torn_tail() {
    let dir = scratch();
    let path = dir.path().join("Data.fs");
    let disk = Arc::new(Disk::default());
    let storage = open(disk.clone(), &path).unwrap();
    let mut model = Model::default();
    run(&storage, &mut model, &committed(1)).unwrap();
    drop(storage);
    let (content, events) = (disk.content(), disk.event_count());
    disk.fail_reads(true);
    assert!(matches!(open(disk.clone(), &path), Err(StorageError::Io { .. })));
    disk.fail_reads(false);
    assert_eq!((disk.content(), disk.event_count()), (content, events));
    let storage = open(disk, &path).unwrap();
    model.check(&storage);
    assert!(storage.load_before(Oid(1), zeo_rs::ids::Tid::MAX).unwrap().is_some());
}

#[test]
fn nobody_waits_for_the_sync_of_a_commit() {
    let dir = scratch();
    let disk = Arc::new(Disk::default());
    let storage = Arc::new(open(disk.clone(), &dir.path().join("Data.fs")).unwrap());
    let mut model = Model::default();
    run(&storage, &mut model, &committed(1)).unwrap();
    disk.hold_syncs(true);
    let finishing = {
        let (storage, mut model) = (storage.clone(), model.clone());
        std::thread::spawn(move || run(&storage, &mut model, &committed(1)).map(|_| model))
    };
    disk.wait_until_a_sync_waits();
    let (done, is_done) = std::sync::mpsc::channel();
    let reading = {
        let (storage, mut model) = (storage.clone(), model.clone());
        std::thread::spawn(move || {
            // What is not synced is not there; another transaction can be voted.
            model.check(&storage);
            run(&storage, &mut model, &Step::Abort(3)).unwrap();
            storage.new_tid();
            done.send(()).unwrap();
        })
    };
    let waited = is_done.recv_timeout(std::time::Duration::from_secs(20));
    disk.hold_syncs(false);
    waited.expect("a load or vote waited for the sync");
    reading.join().unwrap();
    finishing.join().unwrap().unwrap().check(&storage);
}
