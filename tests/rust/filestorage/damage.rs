//! Damaged files: every answer may be an error, none may be a panic, an endless walk or a change of the file.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::{NoResolution, Op, StagedTxn, Storage, StorageError};

use super::disk::Disk;

const FIXTURES: &[&str] = &["undo", "multi_undo", "packed", "delete", "metadata", "restore"];

/// Where, and what to put there.
#[derive(Clone, Debug)]
enum Damage {
    Byte(usize, u8),
    Eight(usize, u64),
    Cut(usize),
    Zeros(usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let number = prop_oneof![any::<u64>(), 0..2000u64, Just(u64::MAX), Just(1 << 63), Just(u64::MAX - 7)];
    prop_oneof![
        4 => (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        4 => (any::<usize>(), number).prop_map(|(at, n)| Damage::Eight(at, n)),
        1 => any::<usize>().prop_map(Damage::Cut),
        1 => any::<usize>().prop_map(Damage::Zeros),
    ]
}

fn apply(content: &mut Vec<u8>, damage: &Damage) {
    let len = content.len();
    match damage {
        Damage::Byte(at, byte) => content[at % len] = *byte,
        Damage::Eight(at, n) => {
            let at = at % len;
            let end = (at + 8).min(len);
            content[at..end].copy_from_slice(&n.to_be_bytes()[..end - at]);
        }
        Damage::Cut(at) => content.truncate((at % len).max(1)),
        Damage::Zeros(at) => content[at % len..].fill(0),
    }
}

/// Asks everything; only errors of these kinds may come.
fn ask_everything(storage: &FileStorage) {
    let allowed = |e: &StorageError| match e {
        StorageError::Corrupted { .. } | StorageError::NotFound(_) | StorageError::Io { .. } => {}
        StorageError::Undo { .. } | StorageError::MultipleUndo(_) | StorageError::Conflict(_) => {}
        StorageError::ReadOnly => {}
        other => panic!("{other:?}"),
    };
    let mut oids = Vec::new();
    storage.snapshot().index.for_each_from(Oid(0), &mut |oid, _| {
        oids.push(oid);
        true
    });
    let mut tids = vec![Tid::ZERO, Tid::MAX];
    for oid in oids {
        let history = storage.history(oid, 1000).inspect_err(allowed).unwrap_or_default();
        tids.extend(history.iter().map(|entry| entry.tid));
        for &tid in &tids {
            let _ = storage.load_before(oid, tid).inspect_err(allowed);
            let _ = storage.load_serial(oid, tid).inspect_err(allowed);
        }
        let _ = storage.current_tid(oid).inspect_err(allowed);
        let _ = storage.record_iternext(Some(oid)).inspect_err(allowed);
    }
    let _ = storage.last_invalidations(1000).inspect_err(allowed);
    let _ = storage.undo_log(0, 1000, &mut |_| true).inspect_err(allowed);
    tids.truncate(12);
    for tid in tids {
        let Ok(mut transactions) = storage.iterate(Some(tid), None).inspect_err(allowed) else { continue };
        while let Ok(Some((_, mut records))) = transactions.next_txn().inspect_err(allowed) {
            while let Ok(Some(_)) = records.next_record().inspect_err(allowed) {}
        }
        let undo = StagedTxn { ops: vec![Op::Undo { tid }], ..Default::default() };
        let _ = storage.vote(undo, &NoResolution).map(drop).inspect_err(allowed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn damaged_files_give_errors(
        fixture in proptest::sample::select(FIXTURES),
        damages in proptest::collection::vec(damage(), 1..4),
        with_index in any::<bool>(),
        after_opening in any::<bool>(),
        writable in any::<bool>(),
    ) {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/filestorage").join(fixture);
        let dir = super::crash::scratch();
        let path = dir.path().join("Data.fs");
        if with_index {
            fs::copy(fixture.join("Data.fs.index"), dir.path().join("Data.fs.index")).unwrap();
        }
        let mut content = fs::read(fixture.join("Data.fs")).unwrap();
        let disk = Arc::new(Disk::with(content.clone()));
        damages.iter().for_each(|damage| apply(&mut content, damage));
        if !after_opening {
            disk.put(content.clone());
        }
        let options = FileStorageOptions { read_only: !writable, ..Default::default() };
        match FileStorage::open_with(disk.clone(), &path, options) {
            Ok(storage) => {
                disk.put(content);
                ask_everything(&storage);
            }
            Err(StorageError::Corrupted { .. } | StorageError::Format(_)) => {
                prop_assert_eq!(disk.content(), content, "a refused file is left as it is");
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}
