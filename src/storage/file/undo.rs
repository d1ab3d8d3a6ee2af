//! Undo: writes, for each object that a transaction changed, the state before it.
//!
//! Normally that is a back-pointer to the previous record, or a tombstone for an object that the transaction created.
//! An object that was changed again since can be undone if the later change left the same data, or if conflict
//! resolution can take the change out (old = what the undone transaction wrote, committed = what is there now, new =
//! what was there before).

use bytes::Bytes;
use rustc_hash::FxHashSet;

use super::FileStorage;
use super::format::{TxnHeader, status};
use super::pending::{BlobSource, Body, NewRecord, Newest, Pending};
use super::snapshot::Snapshot;
use crate::ids::{Oid, Tid};
use crate::storage::{Conflict, ConflictResolver, Resolution, Result, StorageError};

const LOST: &str = "the data of a revision that is needed are gone";

impl FileStorage {
    /// Adds to `txn` what undoes the transaction at `txn_pos`; answers the oids. Either all of it or nothing.
    ///
    /// Errors: `MultipleUndo` naming each object that cannot be undone, `Undo` for a transaction that never can.
    pub(super) fn undo(
        &self,
        snapshot: &Snapshot,
        txn: &mut Pending,
        txn_pos: u64,
        header: &TxnHeader,
        resolver: &dyn ConflictResolver,
    ) -> Result<Vec<Oid>> {
        if header.status != status::NORMAL {
            return Err(StorageError::Undo { reason: "non-undoable transaction".into(), oid: None });
        }
        let mut places = Vec::new();
        snapshot.for_each_record(txn_pos, header, &mut |pos, record| {
            places.push((pos, *record));
            Ok(())
        })?;
        let mut new: Vec<NewRecord> = Vec::new();
        let mut failures: Vec<(Oid, String)> = Vec::new();
        for (pos, record) in places {
            let undone = Undone { oid: record.oid, pos, tid: record.tid, prev: record.prev };
            match self.undo_record(snapshot, txn, &undone, resolver)? {
                Ok(body) => {
                    // Of two records of one object the later one decides.
                    failures.retain(|(oid, _)| *oid != record.oid);
                    new.push(NewRecord { oid: record.oid, tid: None, body });
                }
                Err(reason) => failures.push((record.oid, reason)),
            }
        }
        if !failures.is_empty() {
            return Err(StorageError::MultipleUndo(failures));
        }
        let (mut oids, mut seen) = (Vec::new(), FxHashSet::default());
        for record in new {
            let oid = record.oid;
            let blob = self.blob_of(snapshot, &record)?;
            txn.push(record);
            self.add_blob(txn, oid, None, blob.map(BlobSource::Revision))?;
            if seen.insert(oid) {
                oids.push(oid);
            }
        }
        Ok(oids)
    }

    /// What to write for one record of the undone transaction; the inner error is the reason why it cannot be undone.
    fn undo_record(
        &self,
        snapshot: &Snapshot,
        txn: &Pending,
        undone: &Undone,
        resolver: &dyn ConflictResolver,
    ) -> Result<Result<Body, String>> {
        let current = match txn.newest(snapshot, undone.oid) {
            Newest::Committed(pos) if pos == undone.pos => return Ok(Ok(undone.before())),
            Newest::Committed(pos) => {
                let head = snapshot.head_of(undone.oid, pos)?;
                let source = if head.header.plen > 0 { pos } else { head.back };
                Current { tid: head.header.tid, source, data: None }
            }
            Newest::Pending(record) => {
                let (source, data) = match &record.body {
                    Body::Data(data) => (0, Some(data.to_bytes()?)),
                    Body::Back(pos) => (*pos, None),
                    Body::Tombstone => (0, None),
                };
                Current { tid: record.tid.or(txn.tid).unwrap_or(Tid::ZERO), source, data }
            }
            Newest::None => return Ok(Err(LOST.into())),
        };
        if current.source == undone.pos {
            // Changed since, by copying what is undone here.
            return Ok(Ok(undone.before()));
        }
        let Some((undone_data, ..)) = snapshot.data_at(undone.pos)? else { return Ok(Err(LOST.into())) };
        let current_data = match current.data {
            Some(data) => data,
            None if current.source == 0 => return Ok(Err(LOST.into())),
            None => match snapshot.data_at(current.source)? {
                Some((data, ..)) => data,
                None => return Ok(Err(LOST.into())),
            },
        };
        if undone_data == current_data {
            return Ok(Ok(undone.before()));
        }
        if undone.prev == 0 {
            let reason = "Can't undo an add transaction followed by conflicting transactions.";
            return Ok(Err(reason.into()));
        }
        let Some((before, ..)) = snapshot.data_at(undone.prev)? else { return Ok(Err(LOST.into())) };
        let conflict = Conflict { oid: undone.oid, committed: current.tid, read: undone.tid, data: before };
        Ok(match resolver.resolve(self, &conflict, Some(current_data)) {
            Resolution::Resolved(data) if !data.is_empty() => Ok(Body::Data(data.into())),
            _ => Err("Some data were modified by a later transaction".into()),
        })
    }

    /// The revision whose blob file the new record shares. Told by the file: whatever a wrapper does to records
    /// (compression), a committed blob has one.
    fn blob_of(&self, snapshot: &Snapshot, record: &NewRecord) -> Result<Option<Tid>> {
        let (Some(dir), Body::Back(pos)) = (&self.blobs, &record.body) else { return Ok(None) };
        // The record itself may be a copy with a file of its own, so the nearest one counts.
        let head = snapshot.head_of(record.oid, *pos)?;
        let data_tid = snapshot.data_at(*pos)?.map(|(_, tid, _)| tid);
        let tids = [Some(head.header.tid), data_tid];
        Ok(tids.into_iter().flatten().find(|&tid| dir.existing_path(record.oid, tid).is_ok()))
    }
}

/// A record of the undone transaction.
struct Undone {
    oid: Oid,
    pos: u64,
    tid: Tid,
    prev: u64,
}

impl Undone {
    /// The state before it: its previous record, whatever that is, or none.
    fn before(&self) -> Body {
        if self.prev == 0 { Body::Tombstone } else { Body::Back(self.prev) }
    }
}

/// The object's state that the undo changes.
struct Current {
    tid: Tid,
    /// Position of the record with its data; 0: none, or not in the file.
    source: u64,
    data: Option<Bytes>,
}
