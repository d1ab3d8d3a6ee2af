//! A storage as a map, and random histories run on it and on the engine.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use proptest::prelude::*;
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::{NoResolution, Op, StagedTxn, Storage, StorageError, TxnMeta, VoteOutcome, VotedTxn};

#[derive(Clone, Debug)]
pub(crate) struct Revision {
    tid: Tid,
    data: Option<Bytes>,
    /// Every record has its own.
    id: usize,
    /// The record that this one is a copy of (undo).
    back: Option<usize>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    objects: BTreeMap<Oid, Vec<Revision>>,
    transactions: Vec<(Tid, Vec<Oid>)>,
    records: usize,
}

/// A record that an undo writes: the data, and the record they are of.
type Copied = (Oid, Option<Bytes>, Option<usize>);

/// What one transaction does to one object.
#[derive(Clone, Debug)]
pub(crate) enum Write {
    /// Data number and length.
    Store(u8, usize),
    Delete,
    /// `restore` of these data.
    Restore(u8),
}

#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// A group of transactions over different objects, finished together.
    Commit(Vec<BTreeMap<u8, Write>>),
    /// Undo of the n-th transaction from the end.
    Undo(usize),
    /// A store with a serial that is not the current one.
    Stale(u8),
    /// Voted and given up.
    Abort(u8),
    Checkpoint,
    /// Closed and opened; with the index file or without.
    Reopen(bool),
}

pub(crate) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = prop_oneof![
        6 => (0..4u8, prop_oneof![5 => 1..300usize, 1 => 900..3000usize]).prop_map(|(n, len)| Write::Store(n, len)),
        1 => Just(Write::Delete),
        1 => (0..4u8).prop_map(Write::Restore),
    ];
    let txn = proptest::collection::btree_map(0..6u8, write, 0..4);
    let step = prop_oneof![
        6 => proptest::collection::vec(txn, 1..4).prop_map(Step::Commit),
        3 => (0..6usize).prop_map(Step::Undo),
        1 => (0..6u8).prop_map(Step::Stale),
        1 => (0..6u8).prop_map(Step::Abort),
        1 => Just(Step::Checkpoint),
        1 => any::<bool>().prop_map(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..25)
}

fn data(number: u8, len: usize) -> Bytes {
    vec![number + 1; len].into()
}

impl Model {
    pub(crate) fn transactions(&self) -> usize {
        self.transactions.len()
    }

    pub(crate) fn last_tid(&self) -> Tid {
        self.transactions.last().map_or(Tid::ZERO, |t| t.0)
    }

    /// The database as it was after its first `n` transactions.
    pub(crate) fn prefix(&self, n: usize) -> Self {
        let last = n.checked_sub(1).map_or(Tid::ZERO, |i| self.transactions[i].0);
        let mut model = self.clone();
        model.transactions.truncate(n);
        model.objects.values_mut().for_each(|revisions| revisions.retain(|r| r.tid <= last));
        model.objects.retain(|_, revisions| !revisions.is_empty());
        model
    }

    fn newest(&self, oid: Oid) -> Option<&Revision> {
        self.objects.get(&oid)?.last()
    }

    fn serial(&self, oid: Oid) -> Tid {
        self.newest(oid).map_or(Tid::ZERO, |revision| revision.tid)
    }

    fn add(&mut self, oid: Oid, tid: Tid, data: Option<Bytes>, back: Option<usize>) {
        self.records += 1;
        let id = self.records;
        self.objects.entry(oid).or_default().push(Revision { tid, data, id, back });
    }

    /// The operations of a transaction, leaving out what cannot be done.
    fn ops(&self, txn: &BTreeMap<u8, Write>) -> Vec<(Oid, Op)> {
        let mut ops = Vec::new();
        for (&oid, write) in txn {
            let oid = Oid(u64::from(oid));
            let serial = self.serial(oid);
            let op = match write {
                Write::Store(n, len) => Op::Store { oid, serial, data: data(*n, *len).into(), blob: None },
                Write::Delete if serial == Tid::ZERO => continue,
                Write::Delete => Op::Delete { oid, serial },
                // The serial is put in when the tid is known.
                Write::Restore(n) => {
                    Op::Restore { oid, serial, data: Some(data(*n, 40).into()), prev_txn: None, blob: None }
                }
            };
            ops.push((oid, op));
        }
        ops
    }

    /// What undoing a transaction writes, or nothing if it must be refused.
    fn undone(&self, index: usize) -> Option<Vec<Copied>> {
        let (tid, oids) = &self.transactions[index];
        let mut writes = Vec::new();
        for oid in oids {
            let revisions = &self.objects[oid];
            let at = revisions.iter().position(|r| r.tid == *tid).unwrap();
            let (undone, newest) = (&revisions[at], revisions.last().unwrap());
            let untouched = newest.id == undone.id || newest.back == Some(undone.id);
            let same = undone.data.is_some() && newest.data == undone.data;
            if !untouched && !same {
                return None;
            }
            let before = at.checked_sub(1).map(|i| &revisions[i]);
            writes.push((*oid, before.and_then(|r| r.data.clone()), before.map(|r| r.id)));
        }
        Some(writes)
    }

    /// Compares everything that a storage answers.
    pub(crate) fn check(&self, storage: &FileStorage) {
        assert_eq!(storage.last_tid(), self.last_tid());
        assert_eq!(storage.object_count(), self.objects.len() as u64);
        assert!(matches!(storage.load_before(Oid(77), Tid::MAX), Err(StorageError::NotFound(Oid(77)))));
        for (&oid, revisions) in &self.objects {
            for (i, revision) in revisions.iter().enumerate() {
                let end_tid = revisions.get(i + 1).map(|r| r.tid);
                let found = storage.load_before(oid, revision.tid.next());
                match &revision.data {
                    Some(data) => {
                        let loaded = found.unwrap().unwrap();
                        assert_eq!((&loaded.data, loaded.tid, loaded.end_tid), (data, revision.tid, end_tid));
                        assert_eq!(storage.load_serial(oid, revision.tid).unwrap(), data);
                    }
                    None => assert!(matches!(found, Err(StorageError::NotFound(_))), "{found:?}"),
                }
            }
            assert_eq!(storage.load_before(oid, revisions[0].tid).unwrap(), None);
            let tids: Vec<_> = storage.history(oid, 1000).unwrap().iter().map(|e| e.tid).collect();
            assert_eq!(tids, revisions.iter().rev().map(|r| r.tid).collect::<Vec<_>>());
        }
        self.check_transactions(storage);
        self.check_current(storage);
    }

    fn check_transactions(&self, storage: &FileStorage) {
        for start in [None, self.transactions.get(self.transactions.len() / 2).map(|t| t.0)] {
            let mut iterator = storage.iterate(start, None).unwrap();
            for (tid, oids) in self.transactions.iter().filter(|t| start.is_none_or(|start| t.0 >= start)) {
                let (info, mut records) = iterator.next_txn().unwrap().expect("a transaction");
                assert_eq!(info.tid, *tid);
                for oid in oids {
                    let record = records.next_record().unwrap().expect("a record");
                    let revision = self.objects[oid].iter().find(|r| r.tid == *tid).unwrap();
                    assert_eq!((record.oid, record.tid, &record.data), (*oid, *tid, &revision.data));
                }
                assert_eq!(records.next_record().unwrap(), None);
            }
            assert!(iterator.next_txn().unwrap().is_none());
        }
        let last = self.transactions.len().saturating_sub(3);
        assert_eq!(storage.last_invalidations(3).unwrap(), self.transactions[last..]);
        let log = storage.undo_log(1, 4, &mut |_| true).unwrap();
        let expected: Vec<_> = self.transactions.iter().rev().skip(1).take(3).map(|t| t.0).collect();
        assert_eq!(log.iter().map(|e| e.tid).collect::<Vec<_>>(), expected);
    }

    fn check_current(&self, storage: &FileStorage) {
        let mut living = self.objects.iter().filter_map(|(oid, revisions)| {
            let newest = revisions.last()?;
            Some((*oid, newest.tid, newest.data.clone()?))
        });
        let mut next = Some(Oid(0));
        while let Some(from) = next {
            let record = storage.record_iternext(Some(from)).unwrap();
            assert_eq!(record.as_ref().map(|r| (r.oid, r.tid, r.data.clone())), living.next());
            next = record.and_then(|r| r.next);
        }
        assert_eq!(living.next(), None);
    }
}

fn vote(storage: &FileStorage, tid: Option<Tid>, ops: Vec<Op>) -> Result<VotedTxn, StorageError> {
    let meta = TxnMeta { description: Bytes::from_static(b"a step"), ..Default::default() };
    match storage.vote(StagedTxn { meta, tid, status: b' ', ops }, &NoResolution)? {
        VoteOutcome::Ready(voted) => Ok(voted),
        VoteOutcome::Conflicts(_) => panic!("nobody asked"),
    }
}

/// Does one step (all but `Reopen`) on both; answers whether anything was committed.
pub(crate) fn run(storage: &FileStorage, model: &mut Model, step: &Step) -> Result<bool, StorageError> {
    match step {
        Step::Commit(group) => {
            let (mut taken, mut voted, mut writes) = (Vec::new(), Vec::new(), Vec::new());
            let mut tid = storage.last_tid();
            for txn in group {
                let mut ops = model.ops(txn);
                ops.retain(|(oid, _)| !taken.contains(oid));
                taken.extend(ops.iter().map(|(oid, _)| *oid));
                // Restored records say their own tid, so it must be known: every transaction of the group gets one.
                tid = Tid::from_unix(1.7e9).unwrap().later_than(tid);
                for (_, op) in &mut ops {
                    if let Op::Restore { serial, .. } = op {
                        *serial = tid;
                    }
                }
                voted.push(vote(storage, Some(tid), ops.iter().map(|(_, op)| op.clone()).collect())?);
                writes.push((tid, ops));
            }
            let mut published = Vec::new();
            storage.finish(voted, &mut |txn| {
                // Loads show it when it is published.
                for oid in &*txn.oids {
                    assert_eq!(storage.history(*oid, 1).unwrap()[0].tid, txn.tid);
                }
                published.push((txn.index, txn.tid));
            })?;
            assert_eq!(published, writes.iter().enumerate().map(|(i, t)| (i, t.0)).collect::<Vec<_>>());
            for (tid, ops) in writes {
                model.transactions.push((tid, ops.iter().map(|(oid, _)| *oid).collect()));
                for (oid, op) in ops {
                    let data = match op {
                        Op::Store { data, .. } | Op::Restore { data: Some(data), .. } => {
                            Some(data.to_bytes()?)
                        }
                        _ => None,
                    };
                    model.add(oid, tid, data, None);
                }
            }
        }
        Step::Undo(n) => {
            let Some(index) = model.transactions.len().checked_sub(n + 1) else { return Ok(false) };
            let undone = model.transactions[index].0;
            match (vote(storage, None, vec![Op::Undo { tid: undone }]), model.undone(index)) {
                (Ok(voted), Some(writes)) => {
                    let mut tid = Tid::ZERO;
                    storage.finish(vec![voted], &mut |txn| tid = txn.tid)?;
                    model.transactions.push((tid, writes.iter().map(|(oid, ..)| *oid).collect()));
                    for (oid, data, back) in writes {
                        model.add(oid, tid, data, back);
                    }
                }
                (Err(StorageError::MultipleUndo(_)), None) => return Ok(false),
                (Err(error), Some(_)) => return Err(error),
                (other, expected) => panic!("undo: {:?}, expected {expected:?}", other.map(|v| v.oids)),
            }
        }
        Step::Stale(oid) => {
            let oid = Oid(u64::from(*oid));
            let serial = Tid(1);
            let result =
                vote(storage, None, vec![Op::Store { oid, serial, data: data(9, 9).into(), blob: None }]);
            match model.newest(oid) {
                Some(newest) => {
                    let Err(StorageError::Conflict(conflict)) = result else { panic!("no conflict") };
                    assert_eq!((conflict.committed, conflict.read), (newest.tid, serial));
                }
                None => drop(result?),
            }
            return Ok(false);
        }
        Step::Abort(oid) => {
            let oid = Oid(u64::from(*oid));
            let op = Op::Store { oid, serial: model.serial(oid), data: data(8, 8).into(), blob: None };
            storage.abort(vote(storage, None, vec![op])?);
            return Ok(false);
        }
        Step::Checkpoint => {
            storage.checkpoint()?;
            return Ok(false);
        }
        Step::Reopen(_) => return Ok(false),
    }
    Ok(true)
}

fn open(path: &Path) -> FileStorage {
    FileStorage::open(path, FileStorageOptions::default()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn histories_are_as_in_the_model(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Data.fs");
        let mut storage = open(&path);
        let mut model = Model::default();
        for step in &steps {
            if let Step::Reopen(with_index) = step {
                drop(storage);
                if !with_index {
                    std::fs::remove_file(dir.path().join("Data.fs.index")).unwrap();
                }
                storage = open(&path);
                // An index of less than 100 bytes of file need not be used.
                prop_assert!(!with_index || storage.used_index() || model.transactions.is_empty());
                model.check(&storage);
            } else {
                run(&storage, &mut model, step).unwrap();
            }
        }
        model.check(&storage);
        storage.close().unwrap();
        prop_assert_eq!(std::fs::metadata(&path).unwrap().len(), storage.size());
    }
}
