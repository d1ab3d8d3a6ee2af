//! [`MemoryStorage`]: every revision of every object in a map, nothing on disk (ZODB's `MappingStorage`).
//!
//! It is also the model that other engines and the server are tested against, so it is written to be obviously right
//! rather than fast: one lock, whole revisions, no sharing between them. Blobs, if it is given a directory, are files
//! named after oid and tid. One file: the whole of it is one map and the methods of the trait.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::{
    Capabilities, Committed, Conflict, ConflictResolver, HistoryEntry, Loaded, NextRecord, Op, PackOptions,
    RecordInfo, RecordIterator, Resolution, Result, StagedTxn, Storage, StorageError, TxnInfo, TxnIterator,
    TxnMeta, UndoEntry, VoteOutcome, VotedTxn, WholeStorageLock,
};
use crate::ids::{Oid, Tid};

/// One revision; `data` `None` is a deletion or undone creation.
#[derive(Clone, Debug)]
struct Revision {
    data: Option<Bytes>,
    /// Transaction that wrote the data first, where this revision only repeats it (undo, restore).
    data_txn: Option<Tid>,
}

#[derive(Clone, Debug)]
struct Transaction {
    status: u8,
    meta: TxnMeta,
    /// Oids in order of writing.
    oids: Vec<Oid>,
    packed: bool,
}

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<Oid, BTreeMap<Tid, Revision>>,
    transactions: BTreeMap<Tid, Transaction>,
    last_tid: Tid,
    next_oid: u64,
    size: u64,
    closed: bool,
}

impl Inner {
    fn current(&self, oid: Oid) -> Option<(Tid, &Revision)> {
        self.objects.get(&oid)?.last_key_value().map(|(tid, revision)| (*tid, revision))
    }
}

/// What a vote remembers until `finish`.
struct Prepared {
    tid: Option<Tid>,
    status: u8,
    meta: TxnMeta,
    writes: Vec<Write>,
}

struct Write {
    oid: Oid,
    revision: Revision,
    blob: Option<PathBuf>,
    /// Blob of an older revision that this one repeats (undo).
    blob_of: Option<Tid>,
}

/// See the module documentation.
#[derive(Debug)]
pub struct MemoryStorage {
    name: String,
    inner: Arc<RwLock<Inner>>,
    blobs: Option<PathBuf>,
    packing: Mutex<()>,
}

impl MemoryStorage {
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), inner: Arc::default(), blobs: None, packing: Mutex::new(()) }
    }

    /// With blobs, kept as files in `directory` (which exists).
    pub fn with_blobs(name: impl Into<String>, directory: impl Into<PathBuf>) -> Self {
        Self { blobs: Some(directory.into()), ..Self::new(name) }
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn blob_file(&self, oid: Oid, tid: Tid) -> Option<PathBuf> {
        self.blobs.as_ref().map(|directory| directory.join(format!("{:016x}-{:016x}.blob", oid.0, tid.0)))
    }

    /// A store: the new revision, or the conflict that stands against it.
    fn check_store(
        &self,
        conflict_of: impl FnOnce(Tid) -> Conflict,
        oid: Oid,
        serial: Tid,
        resolver: &dyn ConflictResolver,
    ) -> Result<Option<Result<Bytes, Conflict>>> {
        let committed = match self.read().current(oid) {
            Some((tid, _)) if tid != serial => tid,
            _ => return Ok(None),
        };
        let conflict = conflict_of(committed);
        match resolver.resolve(self, &conflict, None) {
            Resolution::Resolved(data) => Ok(Some(Ok(data))),
            Resolution::AskClient => Ok(Some(Err(conflict))),
            Resolution::Unresolved => Err(StorageError::Conflict(Box::new(conflict))),
        }
    }

    /// What undoing `tid` writes: the state before it, for each object that it is still the last to have changed.
    fn undo_writes(&self, tid: Tid) -> Result<Vec<Write>> {
        let inner = self.read();
        let refuse = |reason: &str, oid| StorageError::Undo { reason: reason.into(), oid };
        let transaction =
            inner.transactions.get(&tid).ok_or_else(|| refuse("Invalid transaction id", None))?;
        if transaction.packed {
            return Err(refuse("Can't undo", None));
        }
        let mut failed = Vec::new();
        let mut writes = Vec::new();
        for &oid in &transaction.oids {
            let Some(revisions) = inner.objects.get(&oid) else { continue };
            if revisions.last_key_value().is_some_and(|(last, _)| *last != tid) {
                failed.push((oid, "Some data were modified by a later transaction".to_owned()));
                continue;
            }
            let before = revisions.range(..tid).next_back();
            let data = before.and_then(|(_, revision)| revision.data.clone());
            let blob_of = before.map(|(tid, _)| *tid);
            let data_txn = before.map(|(tid, revision)| revision.data_txn.unwrap_or(*tid));
            writes.push(Write { oid, revision: Revision { data, data_txn }, blob: None, blob_of });
        }
        match failed.len() {
            0 => Ok(writes),
            1 => Err(failed.pop().map_or(refuse("Can't undo", None), |(oid, reason)| StorageError::Undo {
                reason,
                oid: Some(oid),
            })),
            _ => Err(StorageError::MultipleUndo(failed)),
        }
    }
}

fn now() -> Tid {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    Tid::from_unix(seconds).unwrap_or(Tid::ZERO)
}

impl Storage for MemoryStorage {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn capabilities(&self) -> Capabilities {
        let mut names = vec![
            "IStorageRestoreable",
            "IStorageIteration",
            "IStorageUndoable",
            "IStorageCurrentRecordIteration",
            "IExternalGC",
            "IStorage",
        ];
        if self.blobs.is_some() {
            names.insert(0, "IBlobStorage");
        }
        let mut interfaces: Vec<_> =
            names.into_iter().map(|name| ("ZODB.interfaces".to_owned(), name.to_owned())).collect();
        interfaces.push(("zope.interface".to_owned(), "Interface".to_owned()));
        Capabilities {
            undo: true,
            record_iternext: true,
            delete_object: true,
            restore: true,
            blobs: self.blobs.is_some(),
            concurrent_votes: true,
            interfaces,
            ..Capabilities::default()
        }
    }

    fn object_count(&self) -> u64 {
        self.read().objects.len() as u64
    }

    fn size(&self) -> u64 {
        self.read().size
    }

    fn last_tid(&self) -> Tid {
        self.read().last_tid
    }

    fn load_before(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>> {
        let inner = self.read();
        let revisions = inner.objects.get(&oid).ok_or(StorageError::NotFound(oid))?;
        let Some((tid, revision)) = revisions.range(..before).next_back() else { return Ok(None) };
        let data = revision.data.clone().ok_or(StorageError::NotFound(oid))?;
        let end_tid = revisions.range(tid.next()..).next().map(|(tid, _)| *tid);
        Ok(Some(Loaded { data, tid: *tid, end_tid }))
    }

    fn load_serial(&self, oid: Oid, serial: Tid) -> Result<Bytes> {
        let inner = self.read();
        let revision = inner.objects.get(&oid).and_then(|revisions| revisions.get(&serial));
        revision.and_then(|revision| revision.data.clone()).ok_or(StorageError::NotFound(oid))
    }

    fn current_tid(&self, oid: Oid) -> Result<Tid> {
        match self.read().current(oid) {
            Some((tid, Revision { data: Some(_), .. })) => Ok(tid),
            _ => Err(StorageError::NotFound(oid)),
        }
    }

    fn history(&self, oid: Oid, size: usize) -> Result<Vec<HistoryEntry>> {
        let inner = self.read();
        let revisions = inner.objects.get(&oid).ok_or(StorageError::NotFound(oid))?;
        let newest_first = revisions.iter().rev().take(size);
        Ok(newest_first
            .map(|(tid, revision)| HistoryEntry {
                tid: *tid,
                size: revision.data.as_ref().map_or(0, |data| data.len() as u64),
                meta: inner
                    .transactions
                    .get(tid)
                    .map(|transaction| transaction.meta.clone())
                    .unwrap_or_default(),
            })
            .collect())
    }

    fn record_iternext(&self, next: Option<Oid>) -> Result<Option<NextRecord>> {
        let inner = self.read();
        let mut living = inner.objects.range(next.unwrap_or(Oid::ROOT)..).filter_map(|(oid, revisions)| {
            let (tid, revision) = revisions.last_key_value()?;
            Some((*oid, *tid, revision.data.clone()?))
        });
        let Some((oid, tid, data)) = living.next() else { return Ok(None) };
        Ok(Some(NextRecord { oid, tid, data, next: living.next().map(|(oid, ..)| oid) }))
    }

    fn iterate(&self, start: Option<Tid>, stop: Option<Tid>) -> Result<Box<dyn TxnIterator>> {
        let inner = self.read();
        let (start, stop) = (start.unwrap_or(Tid::ZERO), stop.unwrap_or(Tid(u64::MAX)));
        let mut transactions = Vec::new();
        if start <= stop {
            for (tid, transaction) in inner.transactions.range(start..=stop) {
                let records = transaction.oids.iter().filter_map(|oid| {
                    let revision = inner.objects.get(oid)?.get(tid)?.clone();
                    Some(RecordInfo {
                        oid: *oid,
                        tid: *tid,
                        data: revision.data,
                        data_txn: revision.data_txn,
                    })
                });
                let info = TxnInfo { tid: *tid, status: transaction.status, meta: transaction.meta.clone() };
                transactions.push((info, records.collect()));
            }
        }
        Ok(Box::new(Transactions(transactions.into_iter())))
    }

    fn last_invalidations(&self, count: usize) -> Result<Vec<(Tid, Vec<Oid>)>> {
        let inner = self.read();
        let mut last: Vec<_> =
            inner.transactions.iter().rev().take(count).map(|(tid, txn)| (*tid, txn.oids.clone())).collect();
        last.reverse();
        Ok(last)
    }

    fn undo_log(
        &self,
        first: usize,
        last: usize,
        accept: &mut dyn FnMut(&UndoEntry) -> bool,
    ) -> Result<Vec<UndoEntry>> {
        let inner = self.read();
        let undoable = inner.transactions.iter().rev().take_while(|(_, txn)| !txn.packed);
        let entries = undoable.filter(|(_, txn)| txn.status == b' ').map(|(tid, txn)| UndoEntry {
            tid: *tid,
            size: txn.oids.len() as u64,
            meta: txn.meta.clone(),
        });
        Ok(entries.filter(|entry| accept(entry)).take(last).skip(first).collect())
    }

    fn new_oids(&self, count: usize) -> Result<Vec<Oid>> {
        let mut inner = self.write();
        let first = inner.next_oid.max(1);
        inner.next_oid = first + count as u64;
        Ok((first..inner.next_oid).map(Oid).collect())
    }

    fn vote(&self, txn: StagedTxn, resolver: &dyn ConflictResolver) -> Result<VoteOutcome> {
        if self.read().closed {
            return Err(StorageError::Closed);
        }
        let mut writes: Vec<Write> = Vec::new();
        let mut resolved = Vec::new();
        let mut conflicts = Vec::new();
        for op in txn.ops {
            match op {
                Op::Store { oid, serial, data, blob } => {
                    let data = data.to_bytes()?;
                    let conflict = |committed| Conflict { oid, committed, read: serial, data: data.clone() };
                    let data = match self.check_store(conflict, oid, serial, resolver)? {
                        None => data.clone(),
                        Some(Ok(merged)) => {
                            resolved.push(oid);
                            merged
                        }
                        Some(Err(conflict)) => {
                            conflicts.push(conflict);
                            continue;
                        }
                    };
                    let revision = Revision { data: Some(data), data_txn: None };
                    writes.push(Write { oid, revision, blob, blob_of: None });
                }
                Op::CheckCurrent { oid, serial } => {
                    let committed = self.current_tid(oid)?;
                    if committed != serial {
                        return Err(StorageError::ReadConflict { oid, committed, read: serial });
                    }
                }
                Op::Delete { oid, serial } => {
                    let committed = self.current_tid(oid)?;
                    if committed != serial {
                        let conflict = Conflict { oid, committed, read: serial, data: Bytes::new() };
                        return Err(StorageError::Conflict(Box::new(conflict)));
                    }
                    let revision = Revision { data: None, data_txn: None };
                    writes.push(Write { oid, revision, blob: None, blob_of: None });
                }
                Op::Restore { oid, data, prev_txn, blob, .. } => {
                    let data = data.map(|data| data.to_bytes()).transpose()?;
                    let repeats = |tid: &Tid| {
                        let inner = self.read();
                        let revision = inner.objects.get(&oid).and_then(|revisions| revisions.get(tid));
                        revision.is_some_and(|revision| revision.data == data)
                    };
                    let data_txn = prev_txn.filter(repeats);
                    writes.push(Write { oid, revision: Revision { data, data_txn }, blob, blob_of: None });
                }
                Op::Undo { tid } => {
                    let undone = self.undo_writes(tid)?;
                    resolved.extend(undone.iter().map(|write| write.oid));
                    writes.extend(undone);
                }
            }
        }
        if !conflicts.is_empty() {
            return Ok(VoteOutcome::Conflicts(conflicts));
        }
        let mut seen = BTreeSet::new();
        let oids = writes.iter().map(|write| write.oid).filter(|oid| seen.insert(*oid)).collect();
        let state = Prepared { tid: txn.tid, status: txn.status, meta: txn.meta, writes };
        Ok(VoteOutcome::Ready(VotedTxn { oids, resolved, state: Box::new(state) }))
    }

    fn finish(&self, group: Vec<VotedTxn>, publish: &mut dyn FnMut(&Committed)) -> Result<()> {
        for (index, voted) in group.into_iter().enumerate() {
            let oids: Arc<[Oid]> = voted.oids.into();
            let prepared = voted.state.downcast::<Prepared>();
            let prepared =
                prepared.map_err(|_| StorageError::Transaction("voted by another storage".into()))?;
            let mut inner = self.write();
            let tid = prepared.tid.unwrap_or_else(|| now().later_than(inner.last_tid));
            for write in prepared.writes {
                let source = write.blob.or_else(|| self.blob_file(write.oid, write.blob_of?));
                if let (Some(from), Some(to)) = (source, self.blob_file(write.oid, tid)) {
                    move_blob(&from, &to, write.blob_of.is_some())?;
                }
                inner.size += write.revision.data.as_ref().map_or(0, |data| data.len() as u64) + 24;
                inner.next_oid = inner.next_oid.max(write.oid.0.saturating_add(1));
                inner.objects.entry(write.oid).or_default().insert(tid, write.revision);
            }
            let transaction = Transaction {
                status: prepared.status,
                meta: prepared.meta,
                oids: oids.to_vec(),
                packed: false,
            };
            inner.transactions.insert(tid, transaction);
            inner.last_tid = tid;
            drop(inner);
            publish(&Committed { index, tid, oids });
        }
        Ok(())
    }

    fn abort(&self, _: VotedTxn) {}

    fn pack(&self, options: PackOptions<'_>, switch_lock: &dyn WholeStorageLock) -> Result<()> {
        let Ok(_packing) = self.packing.try_lock() else {
            return Err(StorageError::Invalid("Already packing".into()));
        };
        let mut outcome = Ok(());
        switch_lock.with_whole_storage(&mut || outcome = self.pack_now(&options));
        outcome
    }

    fn blob_path(&self, oid: Oid, serial: Tid) -> Result<PathBuf> {
        let path = self.blob_file(oid, serial).ok_or(StorageError::Unsupported("blobs"))?;
        if path.exists() { Ok(path) } else { Err(StorageError::NoBlob { oid, serial }) }
    }

    fn temporary_directory(&self) -> Result<PathBuf> {
        self.blobs.clone().ok_or(StorageError::Unsupported("blobs"))
    }

    fn blob_oid_directory(&self, _: Oid) -> Result<PathBuf> {
        self.temporary_directory()
    }

    fn checkpoint(&self) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.write().closed = true;
        Ok(())
    }
}

impl MemoryStorage {
    /// Drops what was not current at the pack time, then what the root does not reach.
    fn pack_now(&self, options: &PackOptions<'_>) -> Result<()> {
        let stop = options.stop()?;
        let mut inner = self.write();
        let inner = &mut *inner;
        for revisions in inner.objects.values_mut() {
            let kept_from = revisions.range(..=stop).next_back().map(|(tid, _)| *tid);
            revisions
                .retain(|tid, revision| *tid > stop || (Some(*tid) == kept_from && revision.data.is_some()));
        }
        if options.gc != Some(false) && inner.objects.contains_key(&Oid::ROOT) {
            let mut reached = BTreeSet::new();
            // Revisions newer than the pack time keep alive what they refer to, reachable or not.
            let mut todo = vec![Oid::ROOT];
            todo.extend(
                inner
                    .objects
                    .iter()
                    .filter(|(_, revisions)| revisions.keys().any(|tid| *tid > stop))
                    .map(|(o, _)| *o),
            );
            while let Some(oid) = todo.pop() {
                if !reached.insert(oid) {
                    continue;
                }
                for revision in inner.objects.get(&oid).into_iter().flat_map(BTreeMap::values) {
                    if let Some(data) = &revision.data {
                        options.references.references(data, &mut todo)?;
                    }
                }
            }
            inner.objects.retain(|oid, _| reached.contains(oid));
        }
        inner.objects.retain(|_, revisions| !revisions.is_empty());
        let objects = &inner.objects;
        for (tid, transaction) in inner.transactions.range_mut(..=stop) {
            transaction.packed = true;
            transaction
                .oids
                .retain(|oid| objects.get(oid).is_some_and(|revisions| revisions.contains_key(tid)));
        }
        inner.transactions.retain(|_, transaction| !transaction.packed || !transaction.oids.is_empty());
        let lengths = inner.objects.values().flat_map(BTreeMap::values);
        inner.size =
            lengths.map(|revision| revision.data.as_ref().map_or(0, |data| data.len() as u64) + 24).sum();
        Ok(())
    }
}

fn move_blob(from: &Path, to: &Path, copy: bool) -> Result<()> {
    if copy && !from.exists() {
        return Ok(());
    }
    let moved = if copy { std::fs::copy(from, to).map(drop) } else { std::fs::rename(from, to) };
    moved.map_err(|error| StorageError::io(format!("blob file {}", from.display()), error))
}

struct Transactions(std::vec::IntoIter<(TxnInfo, Vec<RecordInfo>)>);

impl TxnIterator for Transactions {
    fn next_txn(&mut self) -> Result<Option<(TxnInfo, Box<dyn RecordIterator>)>> {
        let next = self.0.next();
        Ok(next
            .map(|(info, records)| (info, Box::new(Records(records.into_iter())) as Box<dyn RecordIterator>)))
    }
}

struct Records(std::vec::IntoIter<RecordInfo>);

impl RecordIterator for Records {
    fn next_record(&mut self) -> Result<Option<RecordInfo>> {
        Ok(self.0.next())
    }
}
