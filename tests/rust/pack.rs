//! Pack: ZODB's bytes where ZODB is right, right results where it is not, and nothing lost whatever happens meanwhile.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::Value;
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::storage::file::check::{CheckOptions, check_path};
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::transform::RecordReferences;
use zeo_rs::storage::{
    Loaded, NoResolution, Op, PackOptions, PackProgress, Result, StagedTxn, Storage, StorageError,
    VoteOutcome, WholeStorageLock,
};

/// Commits and the switch exclude each other by this.
#[derive(Default)]
struct CommitLock(Mutex<()>);

impl WholeStorageLock for CommitLock {
    fn with_whole_storage(&self, body: &mut dyn FnMut()) {
        let _held = self.0.lock().unwrap();
        body();
    }
}

/// A storage in a directory of its own.
struct Fixture {
    dir: tempfile::TempDir,
    storage: FileStorage,
    lock: CommitLock,
}

impl Fixture {
    fn new() -> Self {
        Self::open(tempfile::tempdir().unwrap(), FileStorageOptions::default())
    }

    fn open(dir: tempfile::TempDir, options: FileStorageOptions) -> Self {
        let storage = FileStorage::open(dir.path().join("Data.fs"), options).unwrap();
        Self { dir, storage, lock: CommitLock::default() }
    }

    fn of_file(data: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(data, dir.path().join("Data.fs")).unwrap();
        Self::open(dir, FileStorageOptions::default())
    }

    /// Closed and opened again, with or without the index file.
    fn reopened(self, with_index: bool) -> Self {
        let options = self.storage.options().clone();
        self.storage.close().unwrap();
        if !with_index {
            fs::remove_file(self.path(".index")).unwrap();
        }
        let reopened = Self::open(self.dir, options);
        assert_eq!(reopened.storage.used_index(), with_index);
        reopened
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.dir.path().join(format!("Data.fs{suffix}"))
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.path("")).unwrap()
    }

    fn pack(&self, time: f64, gc: bool) -> Result<()> {
        self.pack_with(time, gc, &mut |_| true)
    }

    fn pack_with(
        &self,
        time: f64,
        gc: bool,
        progress: &mut (dyn FnMut(&PackProgress) -> bool + Send),
    ) -> Result<()> {
        let options =
            PackOptions { time, gc: Some(gc), references: &RecordReferences, progress, throttle: None };
        self.storage.pack(options, &self.lock)
    }

    fn commit(&self, number: u64, ops: Vec<Op>) -> Result<Tid> {
        let _held = self.lock.0.lock().unwrap();
        let tid = tid_of(number);
        let txn = StagedTxn { tid: Some(tid), ops, ..StagedTxn::default() };
        let voted = match self.storage.vote(txn, &NoResolution)? {
            VoteOutcome::Ready(voted) => voted,
            VoteOutcome::Conflicts(_) => unreachable!("NoResolution does not ask"),
        };
        self.storage.finish(vec![voted], &mut |_| {})?;
        Ok(tid)
    }

    /// Stores `oid` on top of its current revision.
    fn store(&self, oid: u64, value: u32, refs: &[u64]) -> Op {
        let serial = self.storage.history(Oid(oid), 1).map_or(Tid::ZERO, |entries| entries[0].tid);
        Op::Store { oid: Oid(oid), serial, data: record(value, refs).into(), blob: None }
    }

    fn current(&self, oid: u64) -> Option<Bytes> {
        match self.storage.load_before(Oid(oid), Tid::MAX) {
            Ok(loaded) => loaded.map(|loaded| loaded.data),
            Err(StorageError::NotFound(_)) => None,
            Err(e) => panic!("{e}"),
        }
    }
}

/// Transactions are ten seconds apart.
const START: f64 = 1_700_000_000.0;

fn tid_of(number: u64) -> Tid {
    Tid::from_unix(START + 10.0 * number as f64).unwrap()
}

/// Pack time just after transaction `number`.
fn after(number: u64) -> f64 {
    START + 10.0 * number as f64 + 5.0
}

/// A record as ZODB's pickler writes it: a list of references and a number.
fn record(value: u32, refs: &[u64]) -> Bytes {
    let mut out = b"\x80\x03capp\nThing\nq\x00.\x80\x03](J".to_vec();
    out.extend_from_slice(&value.to_le_bytes());
    for oid in refs {
        out.extend_from_slice(b"C\x08");
        out.extend_from_slice(&oid.to_be_bytes());
        out.extend_from_slice(b"h\x00\x86Q");
    }
    out.extend_from_slice(b"e.");
    out.into()
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/filestorage")
}

fn manifest() -> Value {
    serde_json::from_slice(&fs::read(fixtures().join("manifest.json")).unwrap()).unwrap()
}

/// Current data of the objects below `limit`.
fn all_current(f: &Fixture, limit: u64) -> BTreeMap<u64, Option<Bytes>> {
    (0..limit).map(|oid| (oid, f.current(oid))).collect()
}

/// Every structure of the file is in order; with `references`, also every reference.
fn assert_sound(f: &Fixture, references: bool) {
    let mut faults = Vec::new();
    let options = CheckOptions {
        references: references.then_some(&RecordReferences),
        blobs: f.storage.blob_dir().map(|dir| &**dir),
        fault: &mut |fault| faults.push(fault.to_string()),
        progress: &mut |_| true,
    };
    check_path(&f.path(""), options).unwrap();
    faults.retain(|fault| fault.starts_with("error"));
    assert!(faults.is_empty(), "{faults:#?}");
}

/// A time that no tid can tell was once taken for one after everything: all history was dropped.
#[test]
fn a_time_that_is_none_packs_nothing() {
    let fixture = Fixture::new();
    let memory = zeo_rs::storage::memory::MemoryStorage::new("memory");
    let storages: [&dyn Storage; 2] = [&fixture.storage, &memory];
    for time in [f64::NAN, f64::INFINITY, -f64::INFINITY, 1e30, -1e10] {
        for storage in storages {
            let mut progress = |_: &PackProgress| true;
            let options = PackOptions {
                time,
                gc: None,
                references: &RecordReferences,
                progress: &mut progress,
                throttle: None,
            };
            let packed = storage.pack(options, &fixture.lock);
            assert!(matches!(packed, Err(StorageError::PackTime(_))), "{time} {packed:?}");
        }
    }
}

#[test]
fn bytes_are_zodbs() {
    let manifest = manifest();
    let packs = &manifest["packs"];
    let source = fixtures().join(packs["source"].as_str().unwrap());
    let original = fs::read(&source).unwrap();
    let (mut wrong, mut longer) = (Vec::new(), 0);
    for case in packs["results"].as_array().unwrap() {
        let (time, gc) = (case["t"].as_f64().unwrap(), case["gc"].as_bool().unwrap());
        let f = Fixture::of_file(&source);
        let before = all_current(&f, 6);
        f.pack(time, gc).unwrap();
        if case["error"].is_null() {
            let expected = match case["file"].as_str() {
                Some(file) => fs::read(fixtures().join(file)).unwrap(),
                None => original.clone(),
            };
            let bytes = f.bytes();
            let (same, header) = bytes.split_at(expected.len().min(bytes.len()));
            // On purpose: ZODB's file would go back to an earlier lastTransaction() when it is opened again.
            let newest_is_empty = !header.is_empty()
                && header.starts_with(&f.storage.last_tid().to_bytes())
                && header.ends_with(&(header.len() as u64 - 8).to_be_bytes());
            if same != expected || !(header.is_empty() || newest_is_empty) {
                wrong.push(format!("t={time} gc={gc}: {} bytes, not {}", bytes.len(), expected.len()));
                continue;
            }
            longer += usize::from(newest_is_empty);
            let index = case["index"].as_object().unwrap();
            assert_eq!(f.storage.object_count(), index.len() as u64);
            let old = fs::read(f.path(".old")).ok();
            assert_eq!(old, case["changed"].as_bool().unwrap().then(|| original.clone()), "t={time} gc={gc}");
        }
        let after = all_current(&f, 6);
        let kept = |(oid, data): (&u64, &Option<Bytes>)| after[oid].is_some() && after[oid] != *data;
        assert!(!before.iter().any(kept), "t={time} gc={gc}: data of an object changed");
        assert!(!f.path(".pack").exists());
        assert_sound(&f, true);
        for with_index in [true, false] {
            let f = Fixture::of_file(&f.path(""));
            let f = f.reopened(with_index);
            assert_eq!(all_current(&f, 6), after);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(longer, 4);
}

#[test]
fn where_zodb_is_wrong() {
    for case in manifest()["pack_bugs"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let f = Fixture::of_file(&fixtures().join(case["source"].as_str().unwrap()));
        let (before, bytes) = (all_current(&f, 6), f.bytes());
        let result = f.pack(case["t"].as_f64().unwrap(), case["gc"].as_bool().unwrap());
        if name == "dangling_gc" {
            assert!(matches!(result, Err(StorageError::Dangling { oid: Oid(1), .. })), "{result:?}");
            assert_eq!(f.bytes(), bytes);
        } else {
            result.unwrap();
            assert_ne!(f.bytes(), bytes, "{name}: nothing was packed");
        }
        assert_eq!(all_current(&f, 6), before, "{name}");
        assert_sound(&f, false);
        let f = f.reopened(false);
        assert_eq!(all_current(&f, 6), before, "{name} after opening again");
    }
}

#[test]
fn garbage_goes_and_history_goes() {
    let f = Fixture::new();
    f.commit(0, vec![f.store(0, 0, &[1]), f.store(1, 0, &[2]), f.store(2, 0, &[]), f.store(3, 0, &[3])])
        .unwrap();
    f.commit(1, vec![f.store(0, 1, &[2])]).unwrap();
    f.commit(2, vec![f.store(2, 1, &[])]).unwrap();
    f.pack(after(1), true).unwrap();
    let living: Vec<_> = (0..4).filter(|&oid| f.current(oid).is_some()).collect();
    assert_eq!(living, [0, 2]);
    assert_eq!(f.storage.load_before(Oid(0), tid_of(1)).unwrap(), None);
    let loaded = f.storage.load_before(Oid(2), tid_of(2)).unwrap().unwrap();
    assert_eq!((loaded.tid, loaded.end_tid), (tid_of(0), Some(tid_of(2))));
    // Nothing more to be done: the same file, not one like it.
    let inode = |f: &Fixture| std::os::unix::fs::MetadataExt::ino(&fs::metadata(f.path("")).unwrap());
    let packed = inode(&f);
    f.pack(after(1), true).unwrap();
    f.pack(after(0), true).unwrap();
    assert_eq!(inode(&f), packed);
    fs::set_permissions(f.path(""), fs::Permissions::from_mode(0o600)).unwrap();
    f.pack(after(2), true).unwrap();
    assert_eq!(fs::metadata(f.path("")).unwrap().permissions().mode() & 0o777, 0o600);
    assert_ne!(inode(&f), packed);
}

#[test]
fn an_object_linked_again_later_stays() {
    // Cut and paste with the pack time in between: 1 and 2 are garbage at the pack time, and not stored after it.
    let f = Fixture::new();
    f.commit(0, vec![f.store(0, 0, &[1]), f.store(1, 0, &[2]), f.store(2, 0, &[])]).unwrap();
    f.commit(1, vec![f.store(0, 1, &[])]).unwrap();
    f.commit(2, vec![f.store(0, 2, &[1])]).unwrap();
    let before = all_current(&f, 3);
    f.pack(after(1), true).unwrap();
    assert_eq!(all_current(&f, 3), before);
}

#[test]
fn what_only_a_later_undo_reaches_stays() {
    let f = Fixture::new();
    f.commit(0, vec![f.store(0, 0, &[1]), f.store(1, 0, &[2]), f.store(2, 0, &[])]).unwrap();
    f.commit(1, vec![f.store(1, 1, &[])]).unwrap();
    f.commit(2, vec![f.store(0, 2, &[])]).unwrap();
    for (number, undone) in [(3, 2), (4, 1)] {
        f.commit(number, vec![Op::Undo { tid: tid_of(undone) }]).unwrap();
    }
    let before = all_current(&f, 3);
    assert!(before.values().all(Option::is_some));
    f.pack(after(2), true).unwrap();
    assert_eq!(all_current(&f, 3), before);
}

#[test]
fn last_transaction_does_not_go_back() {
    let f = Fixture::new();
    f.commit(0, vec![f.store(0, 0, &[]), f.store(1, 0, &[])]).unwrap();
    f.commit(1, vec![Op::Delete { oid: Oid(1), serial: tid_of(0) }]).unwrap();
    f.pack(after(1), true).unwrap();
    assert_eq!(f.current(1), None);
    for with_index in [true, false] {
        let f = Fixture::of_file(&f.path("")).reopened(with_index);
        assert_eq!(f.storage.last_tid(), tid_of(1));
    }
}

#[test]
fn refusals() {
    let f = Fixture::new();
    f.pack(after(0), true).unwrap();
    f.commit(0, vec![f.store(0, 0, &[7])]).unwrap();
    let bytes = f.bytes();
    let dangling = f.pack(after(0), true);
    assert!(
        matches!(dangling, Err(StorageError::Dangling { oid: Oid(7), referrer: Oid(0) })),
        "{dangling:?}"
    );
    let mut nested = None;
    f.commit(1, vec![f.store(0, 1, &[])]).unwrap();
    f.pack_with(after(1), true, &mut |_| {
        nested.get_or_insert_with(|| f.pack(after(1), true));
        true
    })
    .unwrap();
    assert!(matches!(nested, Some(Err(StorageError::Invalid(text))) if text == "Already packing"));
    assert!(f.bytes() != bytes && !f.path(".pack").exists());
    f.storage.close().unwrap();
    let options = FileStorageOptions { read_only: true, ..FileStorageOptions::default() };
    let f = Fixture::open(f.dir, options);
    assert!(matches!(f.pack(after(1), true), Err(StorageError::ReadOnly)));
}

#[test]
fn a_full_disk_leaves_everything_as_it_was() {
    let f = eventful();
    let (bytes, before) = (f.bytes(), all_current(&f, 10));
    std::os::unix::fs::symlink("/dev/full", f.path(".pack")).unwrap();
    let full = f.pack(after(3), true);
    assert!(
        matches!(&full, Err(StorageError::Io { source, .. }) if source.raw_os_error() == Some(28)),
        "{full:?}"
    );
    assert_eq!(f.bytes(), bytes);
    assert_eq!(all_current(&f, 10), before);
    assert!(fs::symlink_metadata(f.path(".pack")).is_err() && !f.path(".old").exists());
    f.commit(5, vec![f.store(0, 9, &[1])]).unwrap();
    f.pack(after(3), true).unwrap();
    assert_eq!(f.reopened(true).current(3), None);
}

#[test]
fn without_links_the_previous_file_cannot_be_kept() {
    // A directory in the place of NAME.old is as unremovable as no support for links.
    let f = eventful();
    fs::create_dir_all(f.path(".old").join("x")).unwrap();
    let (bytes, result) = (f.bytes(), f.pack(after(3), true));
    assert!(matches!(result, Err(StorageError::Io { .. })), "{result:?}");
    assert_eq!(f.bytes(), bytes);
    let f = f.reopened(true);
    assert_eq!(f.bytes(), bytes, "the index was removed for the switch, and saved again");
}

/// Files below a directory, relative, with their content; no temporary directory.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut to_do = vec![dir.to_owned()];
    while let Some(at) = to_do.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            if !path.is_dir() {
                found.insert(path.strip_prefix(dir).unwrap().to_owned(), fs::read(&path).unwrap());
            } else if !path.ends_with("tmp") {
                to_do.push(path);
            }
        }
    }
    found
}

/// The storage with blobs of which `blobs_packed` is the packed state.
fn with_blobs(pack_keep_old: bool) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let source = fixtures().join("blobs");
    let blobs = dir.path().join("blobs");
    fs::copy(source.join("Data.fs"), dir.path().join("Data.fs")).unwrap();
    for (name, content) in tree(&source.join("blobs")) {
        fs::create_dir_all(blobs.join(&name).parent().unwrap()).unwrap();
        fs::write(blobs.join(&name), content).unwrap();
    }
    Fixture::open(
        dir,
        FileStorageOptions { pack_keep_old, blob_dir: Some(blobs), ..FileStorageOptions::default() },
    )
}

#[test]
fn blob_files_go_with_their_revisions() {
    let expected = fixtures().join("blobs_packed");
    for keep_old in [true, false] {
        let f = with_blobs(keep_old);
        let [blobs, old] = ["blobs", "blobs.old"].map(|name| f.dir.path().join(name));
        let all = tree(&blobs);
        f.pack(after(0) * 2.0, true).unwrap();
        assert_eq!(f.bytes(), fs::read(expected.join("Data.fs")).unwrap());
        assert_eq!(tree(&blobs), tree(&expected.join("blobs")));
        assert_eq!(old.exists().then(|| tree(&old)), keep_old.then_some(all));
        if keep_old {
            assert_eq!(tree(&old), tree(&expected.join("blobs.old")));
        }
        assert_sound(&f, true);
    }
}

#[test]
fn a_killed_pack_leaves_no_blob_files_for_ever_and_takes_none_that_is_needed() {
    let f = with_blobs(true);
    let blobs = f.dir.path().join("blobs");
    let all = tree(&blobs);
    let name = all.keys().find(|name| name.extension().is_some()).unwrap();
    let tid = u64::from_str_radix(&name.file_stem().unwrap().to_str().unwrap()[2..], 16).unwrap();
    let oid = name
        .iter()
        .take(8)
        .fold(0, |oid, byte| oid << 8 | u64::from_str_radix(&byte.to_str().unwrap()[2..], 16).unwrap());
    let list = format!("{oid:016x}{tid:016x}\n");
    // Killed before the switch: the list is of no consequence. (Packed to a time when there was nothing.)
    fs::write(blobs.join(".removed.new"), &list).unwrap();
    f.pack(1000.0, true).unwrap();
    assert!(tree(&blobs).contains_key(name) && !blobs.join(".removed.new").exists());
    // Whatever a list says: what the data file has stays.
    fs::write(blobs.join(".removed.todo"), &list).unwrap();
    f.pack(1000.0, true).unwrap();
    assert!(tree(&blobs).contains_key(name));
    // Killed after it, before the file of a revision that is gone was removed.
    let gone = name.with_file_name(format!("0x{:016x}.blob", tid + 1));
    fs::write(blobs.join(&gone), "gone").unwrap();
    let list = format!("{oid:016x}{:016x}\n", tid + 1);
    fs::write(blobs.join(".removed.todo"), &list).unwrap();
    f.pack(1000.0, true).unwrap();
    assert!(!tree(&blobs).contains_key(&gone) && tree(&blobs).contains_key(name));
    let old = f.dir.path().join("blobs.old");
    assert_eq!(tree(&old).get(&gone).unwrap(), b"gone");
    // Killed while they were removed: what has been moved away stays there.
    fs::write(blobs.join(".removed.doing"), &list).unwrap();
    f.pack(1000.0, true).unwrap();
    assert_eq!(tree(&old).get(&gone).unwrap(), b"gone");
    assert!(!tree(&blobs).keys().any(|name| name.to_string_lossy().starts_with(".removed.d")));
}

const PHASES: [&str; 5] = ["index", "mark", "copy", "catch up", "switch"];

/// Root → 1 → 2; 2 was unlinked and 3 is garbage; enough of it for every phase to come.
fn eventful() -> Fixture {
    let f = Fixture::new();
    f.commit(0, vec![f.store(0, 0, &[1]), f.store(1, 0, &[2]), f.store(2, 0, &[4])]).unwrap();
    f.commit(1, vec![f.store(3, 0, &[]), f.store(4, 0, &[])]).unwrap();
    f.commit(2, vec![f.store(1, 1, &[])]).unwrap();
    f.commit(3, vec![f.store(1, 2, &[])]).unwrap();
    // More than is copied under the lock.
    let large = Op::Store {
        oid: Oid(9),
        serial: Tid::ZERO,
        data: [&record(0, &[]), &vec![b'x'; 3 << 20][..]].concat().into(),
        blob: None,
    };
    f.commit(4, vec![large]).unwrap();
    f
}

#[test]
fn a_cancelled_pack_leaves_everything_as_it_was() {
    for phase in PHASES {
        let f = eventful();
        let (bytes, before) = (f.bytes(), all_current(&f, 10));
        let mut seen = Vec::new();
        let result = f.pack_with(after(3), true, &mut |p| {
            seen.push(p.phase);
            p.phase != phase
        });
        assert!(matches!(result, Err(StorageError::Cancelled)), "{phase}: {result:?}");
        assert_eq!(seen.last(), Some(&phase));
        assert_eq!(f.bytes(), bytes, "{phase}");
        assert!(!f.path(".pack").exists() && !f.path(".old").exists());
        f.commit(5, vec![f.store(0, 9, &[1])]).unwrap();
        f.pack(after(3), true).unwrap();
        let f = f.reopened(true);
        assert_eq!(f.current(3), None);
        assert_eq!(f.current(1), before[&1]);
    }
}

/// Commits `ops` when the pack reaches `phase`; answers the storage after it.
fn commit_at(phase: &str, gc: bool, ops: impl Fn(&Fixture) -> Vec<Op> + Sync) -> Fixture {
    let f = eventful();
    let mut done = false;
    f.pack_with(after(3), gc, &mut |p| {
        if p.phase == phase && !done {
            done = true;
            f.commit(5, ops(&f)).unwrap();
        }
        true
    })
    .unwrap();
    assert!(done, "the pack never came to {phase}");
    f
}

#[test]
fn commits_meanwhile_are_there_afterwards() {
    for phase in PHASES {
        for gc in [true, false] {
            let f = commit_at(phase, gc, |f| vec![f.store(1, 7, &[10]), f.store(10, 7, &[])]);
            for with_index in [true, false] {
                let f = Fixture::of_file(&f.path("")).reopened(with_index);
                assert_eq!(f.current(1), Some(record(7, &[10])), "{phase}");
                assert_eq!(f.current(10), Some(record(7, &[])), "{phase}");
                let older = f.storage.load_before(Oid(1), tid_of(5)).unwrap().unwrap();
                assert_eq!((older.tid, older.end_tid), (tid_of(3), Some(tid_of(5))), "{phase}");
                assert_eq!(f.storage.last_tid(), tid_of(5));
            }
        }
    }
}

#[test]
fn an_undo_meanwhile_to_a_dropped_revision_brings_back_what_it_reaches() {
    for phase in PHASES {
        for gc in [true, false] {
            let f = commit_at(phase, gc, |_| vec![Op::Undo { tid: tid_of(3) }, Op::Undo { tid: tid_of(2) }]);
            let f = f.reopened(false);
            assert_eq!(f.current(1), Some(record(0, &[2])), "{phase} gc={gc}");
            assert_eq!(f.current(2), Some(record(0, &[4])), "{phase} gc={gc}");
            assert_eq!(f.current(4), Some(record(0, &[])), "{phase} gc={gc}");
            assert_eq!(f.current(3).is_none(), gc, "{phase}");
            assert_sound(&f, true);
        }
    }
}

#[test]
fn garbage_that_is_linked_again_meanwhile_stays() {
    for phase in PHASES {
        let f = commit_at(phase, true, |f| vec![f.store(0, 7, &[1, 2])]).reopened(false);
        assert_eq!(f.current(2), Some(record(0, &[4])), "{phase}");
        assert_eq!(f.current(4), Some(record(0, &[])), "{phase}");
        assert_eq!(f.current(3), None, "{phase}");
    }
    // Again and again: in the end nothing is thought garbage.
    let f = eventful();
    let mut number = 5;
    f.pack_with(after(3), true, &mut |p| {
        if p.phase == "switch" && number < 9 {
            let garbage = [2, 3, 4, 9][(number - 5) as usize];
            f.commit(number, vec![f.store(0, 7, &[1, garbage])]).unwrap();
            number += 1;
        }
        true
    })
    .unwrap();
    assert_eq!(f.current(1), Some(record(2, &[])));
    assert_eq!(f.storage.load_before(Oid(1), tid_of(3)).unwrap(), None, "it was packed in the end");
}

#[test]
fn readers_and_writers_go_on_during_a_pack() {
    const OBJECTS: u64 = 2000;
    let f = Fixture::new();
    let all: Vec<u64> = (1..OBJECTS).collect();
    f.commit(
        0,
        std::iter::once(f.store(0, 0, &all)).chain(all.iter().map(|&oid| f.store(oid, 0, &[]))).collect(),
    )
    .unwrap();
    for number in 1..20 {
        f.commit(number, all.iter().map(|&oid| f.store(oid, number as u32, &[])).collect()).unwrap();
    }
    let packing = AtomicBool::new(true);
    let mut committed = 19;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for time in [5, 10, 15, 19] {
                f.pack(after(time), true).unwrap();
            }
            packing.store(false, Ordering::Release);
        });
        scope.spawn(|| {
            let mut oid = 1;
            while packing.load(Ordering::Acquire) {
                assert!(f.current(oid).is_some());
                oid = oid % (OBJECTS - 1) + 1;
            }
        });
        while packing.load(Ordering::Acquire) {
            committed += 1;
            f.commit(committed, vec![f.store(committed % OBJECTS, committed as u32, &[])]).unwrap();
        }
    });
    assert_sound(&f, true);
    let newest = |oid: u64| (20..=committed).rev().find(|number| number % OBJECTS == oid).unwrap_or(19);
    for with_index in [true, false] {
        let f = Fixture::of_file(&f.path("")).reopened(with_index);
        assert_eq!(f.storage.last_tid(), tid_of(committed));
        for oid in 1..OBJECTS {
            assert_eq!(f.current(oid), Some(record(newest(oid) as u32, &[])), "{oid}");
        }
    }
}

/// One transaction of a random history.
#[derive(Clone, Debug)]
enum Step {
    Store(Vec<(u64, Vec<u64>)>),
    Delete(u64),
    Undo(usize),
    UndoTwo(usize, usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let refs = proptest::collection::vec(0..8u64, 0..3);
    let store = proptest::collection::vec((0..8u64, refs), 1..4);
    let step = prop_oneof![
        6 => store.prop_map(Step::Store),
        1 => (1..8u64).prop_map(Step::Delete),
        3 => (0..20usize).prop_map(Step::Undo),
        1 => (0..20usize, 0..20usize).prop_map(|(a, b)| Step::UndoTwo(a, b)),
    ];
    proptest::collection::vec(step, 2..20)
}

/// Runs a history; transactions that cannot be committed are left out.
fn run(f: &Fixture, steps: &[Step]) -> u64 {
    let first: Vec<Op> = (0..8).map(|oid| f.store(oid, 1000, &[(oid + 1) % 8])).collect();
    f.commit(0, first).unwrap();
    let mut last = 0;
    for (i, step) in steps.iter().enumerate() {
        let number = i as u64 + 1;
        let undo = |back: &usize| Op::Undo { tid: tid_of(number.saturating_sub(1 + *back as u64)) };
        let ops = match step {
            Step::Store(stores) => {
                let unique: BTreeMap<_, _> = stores.iter().cloned().collect();
                unique.iter().map(|(oid, refs)| f.store(*oid, number as u32, refs)).collect()
            }
            Step::Delete(oid) => match f.storage.current_tid(Oid(*oid)) {
                Ok(serial) => vec![Op::Delete { oid: Oid(*oid), serial }],
                Err(_) => continue,
            },
            Step::Undo(back) => vec![undo(back)],
            Step::UndoTwo(a, b) => vec![undo(a), undo(b)],
        };
        if f.commit(number, ops).is_ok() {
            last = number;
        }
    }
    last
}

type State = BTreeMap<u64, Option<Loaded>>;

/// What loads answer as of each transaction from `from` on.
fn states(f: &Fixture, from: u64, last: u64) -> Vec<State> {
    let load = |oid, number| match f.storage.load_before(Oid(oid), tid_of(number).next()) {
        Ok(loaded) => loaded,
        Err(StorageError::NotFound(_)) => None,
        Err(e) => panic!("{e}"),
    };
    (from..=last).map(|number| (0..8).map(|oid| (oid, load(oid, number))).collect()).collect()
}

fn refs_of(loaded: &Loaded) -> Vec<u64> {
    let mut oids = Vec::new();
    zeo_rs::storage::References::references(&RecordReferences, &loaded.data, &mut oids).unwrap();
    oids.into_iter().map(|oid| oid.0).collect()
}

/// Objects that the root reaches in a state.
fn reachable(state: &State) -> BTreeSet<u64> {
    let (mut seen, mut to_do) = (BTreeSet::new(), vec![0]);
    while let Some(oid) = to_do.pop() {
        if let Some(loaded) = &state[&oid]
            && seen.insert(oid)
        {
            to_do.extend(refs_of(loaded));
        }
    }
    seen
}

/// What a pack has to keep is as it was.
///
/// Only that, state by state: an object that was deleted before the pack time and brought back later may seem never to
/// have been away, as after ZODB's pack.
fn assert_kept(before: &[State], after: &[State], gc: bool) {
    for (old, new) in before.iter().zip(after) {
        let existing = old.iter().filter(|(_, loaded)| loaded.is_some()).map(|(oid, _)| *oid);
        let kept = if gc { reachable(old) } else { existing.collect() };
        for oid in kept {
            assert_eq!(old[&oid], new[&oid], "object {oid}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nothing_that_is_reachable_changes(history in steps(), at in 0..20u64, gc in any::<bool>()) {
        let f = Fixture::new();
        let last = run(&f, &history);
        let at = at.min(last);
        let before = states(&f, at, last);
        let bytes = f.bytes();
        match f.pack(after(at), gc) {
            // The random history may well have dangling references.
            Err(StorageError::Dangling { .. }) if gc => {
                prop_assert_eq!(f.bytes(), bytes);
                return Ok(());
            }
            result => result.unwrap(),
        }
        assert_sound(&f, false);
        let after_pack = states(&f, at, last);
        assert_kept(&before, &after_pack, gc);
        if let (Some(old), Some(new), false) = (before.last(), after_pack.last(), gc) {
            prop_assert_eq!(old, new);
        }
        prop_assert_eq!(f.storage.last_tid(), Fixture::of_file(&f.path("")).storage.last_tid());
        // The second time may drop what the first made: a copy of a deletion is a deletion now.
        let once = f.bytes();
        match f.pack(after(at), gc) {
            // Something may refer to what is a deletion now.
            Err(StorageError::Dangling { .. }) if gc => prop_assert!(f.bytes() == once),
            result => {
                result.unwrap();
                let twice = f.bytes();
                f.pack(after(at), gc).unwrap();
                prop_assert!(f.bytes() == twice);
            }
        }
        let packed_again = states(&f, at, last);
        assert_kept(&after_pack, &packed_again, gc);
        for with_index in [true, false] {
            let f = Fixture::of_file(&f.path("")).reopened(with_index);
            prop_assert_eq!(states(&f, at, last), packed_again.clone());
        }
    }
}
