//! [`Storage`] of a [`FileStorage`]: each method says what is read; how is in the files beside.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;

use super::FileStorage;
use super::iterate::Transactions;
use super::snapshot::{Payload, Snapshot, Wait};
use crate::ids::{Oid, Tid};
use crate::storage::blob::BlobDir;
use crate::storage::{
    Capabilities, Committed, ConflictResolver, HistoryEntry, Loaded, NextRecord, PackOptions, Result,
    StagedTxn, Storage, StorageError, TxnIterator, UndoEntry, VoteOutcome, VotedTxn, WholeStorageLock,
};

impl FileStorage {
    /// `try_load_before` without a copy of its own: `with` gets the data in the thread's read buffer, the tid and the tid
    /// of the next newer revision.
    pub fn try_load_before_with<R>(
        &self,
        oid: Oid,
        before: Tid,
        with: impl FnOnce(&[u8], Tid, Option<Tid>) -> R,
    ) -> Result<Option<R>> {
        let with = |data: Payload<'_>, tid, end_tid| with(data.as_slice(), tid, end_tid);
        self.reading()?.load_before(oid, before, Wait::No, with)
    }

    fn loaded(&self, oid: Oid, before: Tid, wait: Wait) -> Result<Option<Loaded>> {
        let with = |data: Payload<'_>, tid, end_tid| Loaded { data: data.into_bytes(), tid, end_tid };
        self.reading()?.load_before(oid, before, wait, with)
    }

    /// ZODB's `getTid`: the tid of the newest record. It tests that record only: a copy of a deleted state counts as
    /// existing.
    pub(super) fn tid_of(&self, snapshot: &Snapshot, oid: Oid) -> Result<Tid> {
        let pos = snapshot.index.get(oid).ok_or(StorageError::NotFound(oid))?;
        let head = snapshot.head_of(oid, pos)?;
        if head.is_tombstone() { Err(StorageError::NotFound(oid)) } else { Ok(head.header.tid) }
    }

    fn blobs(&self) -> Result<&BlobDir> {
        self.blobs.as_deref().ok_or(StorageError::Unsupported("blobs"))
    }
}

/// After so many operations of a vote the processor is offered to others: some 100 us.
const YIELD: usize = 128;

impl Storage for FileStorage {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    fn capabilities(&self) -> Capabilities {
        let blobs = self.blobs.is_some();
        let own = [
            "IStorageRestoreable",
            "IStorageIteration",
            "IStorageUndoable",
            "IStorageCurrentRecordIteration",
            "IExternalGC",
            "IStorage",
        ];
        let names = ["IBlobStorageRestoreable", "IBlobStorage"].into_iter().filter(|_| blobs).chain(own);
        let mut interfaces: Vec<_> = names.map(|name| ("ZODB.interfaces".into(), name.into())).collect();
        interfaces.push(("zope.interface".into(), "Interface".into()));
        Capabilities {
            undo: true,
            record_iternext: true,
            delete_object: true,
            restore: true,
            blobs,
            concurrent_votes: true,
            interfaces,
            ..Capabilities::default()
        }
    }

    fn object_count(&self) -> u64 {
        self.current.load().index.len()
    }

    fn size(&self) -> u64 {
        self.current.load().end()
    }

    fn last_tid(&self) -> Tid {
        Tid(self.last_tid.load(Ordering::Acquire))
    }

    fn load_before(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>> {
        self.loaded(oid, before, Wait::Yes)
    }

    fn try_load_before(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>> {
        self.loaded(oid, before, Wait::No)
    }

    fn load_serial(&self, oid: Oid, serial: Tid) -> Result<Bytes> {
        self.reading()?.load_serial(oid, serial)
    }

    fn current_tid(&self, oid: Oid) -> Result<Tid> {
        self.tid_of(&*self.reading()?, oid)
    }

    fn history(&self, oid: Oid, size: usize) -> Result<Vec<HistoryEntry>> {
        let snapshot = self.reading()?;
        let mut entries = Vec::new();
        let mut pos = snapshot.index.get(oid).ok_or(StorageError::NotFound(oid))?;
        while pos != 0 && entries.len() < size {
            let head = snapshot.head_of(oid, pos)?;
            let txn = snapshot.txn_header(head.header.tloc)?;
            let meta = snapshot.txn_meta(head.header.tloc, &txn)?;
            entries.push(HistoryEntry { tid: head.header.tid, size: head.header.plen, meta });
            pos = snapshot.previous(pos, &head)?;
        }
        Ok(entries)
    }

    fn record_iternext(&self, next: Option<Oid>) -> Result<Option<NextRecord>> {
        let snapshot = self.reading()?;
        let mut from = next.unwrap_or(Oid(0));
        while let Some((oid, _)) = snapshot.index.first_from(from) {
            let following = oid.0.checked_add(1).map(Oid);
            match self.loaded(oid, Tid(u64::MAX), Wait::Yes) {
                Ok(Some(Loaded { data, tid, .. })) => {
                    let next = following.and_then(|oid| snapshot.index.first_from(oid)).map(|(oid, _)| oid);
                    return Ok(Some(NextRecord { oid, tid, data, next }));
                }
                // A deleted object: ZODB's loop ends here; this one goes on.
                Ok(None) | Err(StorageError::NotFound(_)) => {}
                Err(e) => return Err(e),
            }
            let Some(following) = following else { break };
            from = following;
        }
        Ok(None)
    }

    fn iterate(&self, start: Option<Tid>, stop: Option<Tid>) -> Result<Box<dyn TxnIterator>> {
        drop(self.reading()?);
        Ok(Box::new(Transactions::new(self.snapshot(), start, stop)?))
    }

    fn last_invalidations(&self, count: usize) -> Result<Vec<(Tid, Vec<Oid>)>> {
        self.reading()?.last_invalidations(count)
    }

    fn undo_log(
        &self,
        first: usize,
        last: usize,
        accept: &mut dyn FnMut(&UndoEntry) -> bool,
    ) -> Result<Vec<UndoEntry>> {
        self.reading()?.undo_log(first, last, accept)
    }

    fn new_oids(&self, count: usize) -> Result<Vec<Oid>> {
        if self.options.read_only {
            return Err(StorageError::ReadOnly);
        }
        self.check_process()?;
        drop(self.reading()?);
        self.oids.take(count)
    }

    fn vote(&self, txn: StagedTxn, resolver: &dyn ConflictResolver) -> Result<VoteOutcome> {
        let StagedTxn { meta, tid, status, ops } = txn;
        let mut pending = self.begin(meta, tid, status)?;
        let mut conflicts = Vec::new();
        let mut undone = Vec::new();
        for (number, op) in ops.into_iter().enumerate() {
            if number % YIELD == YIELD - 1 {
                std::thread::yield_now();
            }
            let applied = self.apply(&mut pending, op, resolver)?;
            undone.extend(applied.undone);
            conflicts.extend(applied.conflict);
        }
        if !conflicts.is_empty() {
            return Ok(VoteOutcome::Conflicts(conflicts));
        }
        let mut voted = self.vote_pending(pending)?;
        voted.resolved.extend(undone);
        Ok(VoteOutcome::Ready(voted))
    }

    fn finish(&self, group: Vec<VotedTxn>, publish: &mut dyn FnMut(&Committed)) -> Result<()> {
        self.finish_group(group, publish)
    }

    /// Gives up the reserved space and removes the blob files.
    fn abort(&self, txn: VotedTxn) {
        drop(txn);
    }

    fn last_sync(&self) -> Option<Duration> {
        Some(Duration::from_nanos(self.last_sync.load(Ordering::Relaxed)))
    }

    fn pack(&self, options: PackOptions<'_>, switch_lock: &dyn WholeStorageLock) -> Result<()> {
        self.pack_file(options, switch_lock)
    }

    fn blob_path(&self, oid: Oid, serial: Tid) -> Result<PathBuf> {
        self.blobs()?.existing_path(oid, serial)
    }

    fn temporary_directory(&self) -> Result<PathBuf> {
        Ok(self.blobs()?.temp_dir())
    }

    fn scratch_directory(&self) -> Option<PathBuf> {
        let parent = self.path.parent()?;
        Some(if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent.to_owned() })
    }

    fn blob_oid_directory(&self, oid: Oid) -> Result<PathBuf> {
        Ok(self.blobs()?.oid_dir(oid))
    }

    fn write_failure(&self) -> Option<String> {
        self.failed.get().cloned()
    }

    fn checkpoint(&self) -> Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        drop(self.reading()?);
        self.save_index()
    }

    fn close(&self) -> Result<()> {
        self.close_files()
    }
}
