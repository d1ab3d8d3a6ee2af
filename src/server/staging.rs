//! [`Staging`]: what a client has sent of its transaction before the vote; large ones mostly on disk.
//!
//! Records are kept in memory up to [`ServerConfig::staging_memory`](super::ServerConfig), and go to a file without a name
//! beyond it ([`SpillFile`]), written by a worker thread; the client's next requests wait for that. So a transaction of
//! any size takes that much memory, and about 200 bytes for each record. If many transactions are open, all of them
//! together keep four times as much in memory before the larger ones go to disk.
//!
//! If the disk is full, the transaction is lost and its vote says why. Nobody else notices.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use super::session::Session;
use crate::ids::{Oid, Tid};
use crate::storage::{Op, Result, SpillFile, StagedData, StagedTxn, StorageError};

/// What an operation takes beside its data.
const PER_OP: usize = 64;
/// Transactions that keep less than this in memory are left alone, however many there are.
const FEW: usize = 1 << 20;
/// Once a transaction has a file, this much goes there at a time.
const BATCH: usize = 4 << 20;

/// See the module documentation.
pub(super) struct Staging {
    pub(super) txn: StagedTxn,
    /// Where the last `Store` of an oid is in `txn.ops`.
    stores: HashMap<Oid, usize>,
    /// Counts to the limit: what is in memory and in the file.
    bytes: usize,
    in_memory: usize,
    /// Operations whose data are in memory.
    resident: Vec<usize>,
    file: Option<Arc<SpillFile>>,
    /// Why it is lost.
    failed: Option<StorageError>,
    /// What all transactions of the server keep in memory.
    total: Arc<AtomicUsize>,
}

/// Records on their way to the disk.
struct Batch {
    file: Option<Arc<SpillFile>>,
    directory: PathBuf,
    records: Vec<Bytes>,
}

impl Staging {
    pub(super) fn new(txn: StagedTxn, total: &Arc<AtomicUsize>) -> Self {
        Self {
            txn,
            stores: HashMap::new(),
            bytes: 0,
            in_memory: 0,
            resident: Vec::new(),
            file: None,
            failed: None,
            total: Arc::clone(total),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a store. One of the same object takes the place of an earlier one and keeps its blob, so that a record that
    /// was stored with and without its blob (as ZEO's client does), or again after its conflict was resolved, is one.
    pub(super) fn store(&mut self, oid: Oid, serial: Tid, data: Bytes, blob: Option<PathBuf>) {
        if self.failed.is_some() {
            return;
        }
        let at = self.stores.get(&oid).copied();
        let old = at.and_then(|at| Some((at, self.txn.ops.get_mut(at)?)));
        self.bytes += PER_OP;
        if let Some((at, Op::Store { serial: old_serial, data: old_data, blob: old_blob, .. })) = old {
            let added = data.len();
            *old_serial = serial;
            *old_blob = blob.or(old_blob.take());
            match std::mem::replace(old_data, data.into()) {
                StagedData::Memory(old) => {
                    self.bytes -= old.len();
                    self.forget(old.len());
                }
                // Its bytes stay in the file.
                StagedData::Spilled(_) => self.resident.push(at),
            }
            return self.remember(added);
        }
        self.stores.insert(oid, self.txn.ops.len());
        self.keep(data.len());
        self.txn.ops.push(Op::Store { oid, serial, data: data.into(), blob });
    }

    /// Adds any other operation.
    pub(super) fn push(&mut self, op: Op) {
        if self.failed.is_some() {
            return;
        }
        self.bytes += PER_OP;
        match &op {
            Op::Restore { data: Some(data), .. } => self.keep(data.len()),
            // What is stored after an undo is another record than what was stored before it.
            Op::Undo { .. } => self.stores.clear(),
            _ => {}
        }
        self.txn.ops.push(op);
    }

    /// The next operation has data in memory.
    fn keep(&mut self, len: usize) {
        self.resident.push(self.txn.ops.len());
        self.remember(len);
    }

    fn remember(&mut self, len: usize) {
        self.bytes += len;
        self.in_memory += len;
        self.total.fetch_add(len, Ordering::Relaxed);
    }

    fn forget(&mut self, len: usize) {
        self.in_memory -= len;
        self.total.fetch_sub(len, Ordering::Relaxed);
    }

    /// The transaction is lost: nothing more of it is kept.
    pub(super) fn fail(&mut self, error: StorageError) {
        self.clear();
        self.txn.ops = Vec::new();
        self.failed = Some(error);
    }

    /// Why the transaction cannot be voted.
    pub(super) fn failure(&mut self) -> Option<StorageError> {
        self.failed.take()
    }

    /// Moves the operations out, to be voted: they are the engine's from now on.
    pub(super) fn take(&mut self) -> StagedTxn {
        self.clear();
        std::mem::take(&mut self.txn)
    }

    fn clear(&mut self) {
        self.forget(self.in_memory);
        self.stores = HashMap::new();
        self.resident = Vec::new();
        self.file = None;
    }

    fn is_large(&self, limit: usize) -> bool {
        let limit = if self.file.is_some() { limit.min(BATCH) } else { limit };
        self.in_memory > limit
            || self.in_memory > FEW && self.total.load(Ordering::Relaxed) > limit.saturating_mul(4)
    }

    /// The records in memory. They stay where they are until [`Self::spilled`].
    fn batch(&self, directory: PathBuf) -> Batch {
        let data = |at: &usize| match self.txn.ops.get(*at).and_then(data_of) {
            Some(StagedData::Memory(data)) => data.clone(),
            _ => Bytes::new(),
        };
        Batch { file: self.file.clone(), directory, records: self.resident.iter().map(data).collect() }
    }

    /// The records of the batch are on disk, or the transaction is lost.
    fn spilled(&mut self, written: Result<(Arc<SpillFile>, Vec<StagedData>)>) {
        match written {
            Ok((file, places)) => {
                for (at, place) in std::mem::take(&mut self.resident).into_iter().zip(places) {
                    if let Some(data) = self.txn.ops.get_mut(at).and_then(data_of_mut) {
                        *data = place;
                    }
                }
                self.forget(self.in_memory);
                self.file = Some(file);
            }
            Err(error) => self.fail(error),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.forget(self.in_memory);
    }
}

impl Batch {
    fn write(self) -> Result<(Arc<SpillFile>, Vec<StagedData>)> {
        let file = match self.file {
            Some(file) => file,
            None => Arc::new(SpillFile::create(&self.directory)?),
        };
        let places = file.append(&self.records)?;
        Ok((file, places))
    }
}

fn data_of(op: &Op) -> Option<&StagedData> {
    match op {
        Op::Store { data, .. } | Op::Restore { data: Some(data), .. } => Some(data),
        _ => None,
    }
}

fn data_of_mut(op: &mut Op) -> Option<&mut StagedData> {
    match op {
        Op::Store { data, .. } | Op::Restore { data: Some(data), .. } => Some(data),
        _ => None,
    }
}

impl Session {
    /// Writes the records of the open transaction to disk, if it keeps too many in memory.
    pub(super) fn spill_if_large(&mut self) {
        let config = &self.server.config;
        let Some(staging) = self.txn.as_ref().map(|txn| &txn.staging) else { return };
        if !staging.is_large(config.staging_memory) {
            return;
        }
        let hub = self.registration.as_ref().map(|registration| &registration.hub);
        let directory = config
            .staging_directory
            .clone()
            .or_else(|| hub?.storage.scratch_directory())
            .unwrap_or_else(std::env::temp_dir);
        let batch = staging.batch(directory);
        self.background_in_order(
            move || batch.write(),
            |session, written| {
                if let Err(error) = &written {
                    tracing::error!(client = %session.who(), %error, "a large transaction is lost");
                }
                // No request was served meanwhile: it is the same transaction, if there is one.
                if let Some(txn) = &mut session.txn {
                    txn.staging.spilled(written);
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staging(total: &Arc<AtomicUsize>) -> Staging {
        Staging::new(StagedTxn::default(), total)
    }

    fn data(staging: &Staging, at: usize) -> Bytes {
        data_of(&staging.txn.ops[at]).unwrap().to_bytes().unwrap()
    }

    #[test]
    fn spilled_records_are_counted_replaced_and_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let total = Arc::new(AtomicUsize::new(0));
        let mut staging = staging(&total);
        staging.store(Oid(1), Tid(1), "one".into(), None);
        staging.push(Op::CheckCurrent { oid: Oid(9), serial: Tid(1) });
        let restore = Some(Bytes::from("two").into());
        staging.push(Op::Restore { oid: Oid(2), serial: Tid(1), data: restore, prev_txn: None, blob: None });
        assert!(staging.is_large(5) && !staging.is_large(6));
        assert_eq!((staging.in_memory, total.load(Ordering::Relaxed)), (6, 6));
        staging.spilled(staging.batch(directory.path().into()).write());
        assert_eq!((staging.in_memory, total.load(Ordering::Relaxed)), (0, 0));
        // One that is on disk, twice, and one that never was.
        staging.store(Oid(1), Tid(1), "other".into(), None);
        staging.store(Oid(1), Tid(1), "another".into(), None);
        staging.store(Oid(3), Tid(1), "three".into(), None);
        assert_eq!((staging.in_memory, staging.resident.as_slice()), (12, &[0, 3][..]));
        staging.spilled(staging.batch(directory.path().into()).write());
        assert_eq!([0, 2, 3].map(|at| data(&staging, at)), ["another", "two", "three"].map(Bytes::from));
        assert_eq!(staging.bytes(), 6 * PER_OP + 3 + 3 + 7 + 5);
        drop(staging);
        assert_eq!(total.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn many_transactions_together_go_to_disk_earlier() {
        let total = Arc::new(AtomicUsize::new(0));
        let mut one = staging(&total);
        one.store(Oid(1), Tid(1), vec![0; FEW + 1].into(), None);
        assert!(!one.is_large(2 * FEW));
        let others: Vec<_> = (0..8).map(|_| staging(&total)).collect();
        let mut others = others;
        others.iter_mut().for_each(|other| other.store(Oid(1), Tid(1), vec![0; FEW].into(), None));
        assert!(one.is_large(2 * FEW) && !others[0].is_large(2 * FEW));
        drop(others);
        assert!(!one.is_large(2 * FEW));
    }

    #[test]
    fn a_full_disk_loses_the_transaction_and_says_so() {
        let total = Arc::new(AtomicUsize::new(0));
        let mut staging = staging(&total);
        staging.store(Oid(1), Tid(1), "one".into(), None);
        staging.spilled(staging.batch("/nonexistent".into()).write());
        staging.store(Oid(2), Tid(1), "two".into(), None);
        assert_eq!((staging.txn.ops.len(), total.load(Ordering::Relaxed)), (0, 0));
        assert!(matches!(staging.failure(), Some(StorageError::Io { .. })));
    }
}
