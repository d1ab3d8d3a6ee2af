//! Finish: a group of voted transactions becomes part of the file.
//!
//! 1. Blob files get their names (durably), now that the tids are known.
//! 2. All transactions are encoded with their final positions and appended, status byte and trailing lengths included.
//! 3. One `fdatasync`.
//! 4. For each in order: index, end of file, `publish`, last tid.
//!
//! Readers take no part in it: what is not published lies beyond what the index points to. A crash before the end of 3
//! leaves a beginning of the append (perhaps followed by zeros), which the scan on opening recognises and cuts off: a
//! transaction is there whole or not at all, and nobody was told of it. After an error in 1 to 3 the append is cut off
//! again and the storage takes no more writes: after a failed sync nobody knows what the disk has.
//!
//! Cost: one mutex, one `lseek`, one `pwrite` for each [`SPILL`] bytes, one `fdatasync` for the group; an index lookup and an
//! update for each record; one copy of the data, and a `pread` for each record that was spilled to disk.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rustc_hash::FxHashMap;

use super::file::StorageFile;
use super::format::{DataHeader, TxnHeader, status};
use super::pending::{Body, Voted};
use super::snapshot::Snapshot;
use super::{FileStorage, lock};
use crate::ids::{Oid, Tid};
use crate::storage::blob::BlobDir;
use crate::storage::staged::Spilled;
use crate::storage::write_behind::PIECE;
use crate::storage::{Committed, Result, StagedData, StorageError, VotedTxn, WriteBehind};

/// The append is written in pieces of about this size; payloads larger than it are not copied.
const SPILL: usize = PIECE;

/// A transaction of the group with its place in the file.
struct Placed {
    tid: Tid,
    start: u64,
    end: u64,
    oids: Arc<[Oid]>,
    positions: Vec<(Oid, u64)>,
}

impl FileStorage {
    /// See [`crate::storage::Storage::finish`] and the module documentation.
    pub(super) fn finish_group(
        &self,
        group: Vec<VotedTxn>,
        publish: &mut dyn FnMut(&Committed),
    ) -> Result<()> {
        self.finish_confirmed(group, &mut |_| true, publish).map(drop)
    }

    /// Finishes one transaction if `confirm` agrees: it is called with the tid when the transaction is durable and nobody
    /// can see it yet. Where it does not, the transaction is taken back (cut off, and that synced; its blob files
    /// removed), `None` is answered, and the storage goes on as if it had been aborted. Only a crash in between leaves it
    /// committed. If the cut fails, the storage takes no more writes, as after any I/O error.
    pub fn finish_if(&self, txn: VotedTxn, confirm: &mut dyn FnMut(Tid) -> bool) -> Result<Option<Tid>> {
        let mut tid = None;
        let done = self.finish_confirmed(vec![txn], confirm, &mut |committed| tid = Some(committed.tid))?;
        Ok(tid.filter(|_| done))
    }

    /// `confirm`: of the last tid of the group. Answers whether it agreed.
    fn finish_confirmed(
        &self,
        group: Vec<VotedTxn>,
        confirm: &mut dyn FnMut(Tid) -> bool,
        publish: &mut dyn FnMut(&Committed),
    ) -> Result<bool> {
        let mut voted = Vec::with_capacity(group.len());
        for VotedTxn { oids, state, .. } in group {
            let state = state.downcast::<Voted>();
            let state = state.map_err(|_| StorageError::Transaction("voted by another storage".into()))?;
            voted.push((Arc::<[Oid]>::from(oids), *state));
        }
        let _writer = self.writable()?;
        let snapshot = self.reading()?;
        let old_end = snapshot.end();
        self.check_end(&snapshot)?;
        let mut named = Vec::new();
        let result = self.append(&snapshot, &mut voted, &mut named);
        let placed = result.inspect_err(|error| self.fail(&snapshot, old_end, &named, error))?;
        if let Some(last) = placed.last()
            && !confirm(last.tid)
        {
            let cut = snapshot.file.set_len(old_end).and_then(|()| snapshot.file.sync_data());
            cut.map_err(|e| self.cannot_write(e))
                .inspect_err(|error| self.fail(&snapshot, old_end, &named, error))?;
            self.forget_append(&named);
            return Ok(false);
        }
        for (index, placed) in placed.into_iter().enumerate() {
            // Before the end moves: whoever sees the new end knows the order up to it.
            snapshot.note_appended(placed.tid, placed.start);
            for (oid, pos) in placed.positions {
                snapshot.index.insert(oid, pos);
            }
            snapshot.set_end(placed.end);
            publish(&Committed { index, tid: placed.tid, oids: placed.oids });
            self.last_tid.store(placed.tid.0, Ordering::Release);
        }
        Ok(true)
    }

    /// Steps 1 to 3. `named` collects the blob files that got their names.
    fn append(
        &self,
        snapshot: &Snapshot,
        group: &mut [(Arc<[Oid]>, Voted)],
        named: &mut Vec<(Oid, Tid)>,
    ) -> Result<Vec<Placed>> {
        let mut append = Append {
            file: &*snapshot.file,
            buf: Vec::new(),
            pos: snapshot.end(),
            behind: WriteBehind::new(snapshot.end()),
        };
        let mut placed: Vec<Placed> = Vec::with_capacity(group.len());
        // Where earlier transactions of the group put an object: its previous record, before the index knows.
        let mut earlier: FxHashMap<Oid, u64> = FxHashMap::default();
        let several = group.len() > 1;
        for (oids, txn) in group {
            let tid = self.tid_for(txn.tid);
            if let Some(dir) = txn.blobs.dir.clone() {
                for (oid, serial, file) in txn.blobs.files.drain(..) {
                    let serial = serial.unwrap_or(tid);
                    name_blob(&dir, &file, oid, serial)?;
                    named.push((oid, serial));
                }
            }
            let start = append.pos;
            let previous = |oid| earlier.get(&oid).copied().or_else(|| snapshot.index.get(oid)).unwrap_or(0);
            let positions = append.transaction(txn, tid, &previous).map_err(|e| self.cannot_write(e))?;
            // Records of an obsolete undone transaction do not count, now as after the next opening.
            let counted = if txn.status == status::UNDONE { Vec::new() } else { positions };
            if several {
                earlier.extend(counted.iter().copied());
            }
            placed.push(Placed { tid, start, end: append.pos, oids: oids.clone(), positions: counted });
        }
        append.flush().map_err(|e| self.cannot_write(e))?;
        let began = Instant::now();
        snapshot.file.sync_data().map_err(|e| self.cannot_write(e))?;
        let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last_sync.store(took, Ordering::Relaxed);
        Ok(placed)
    }

    fn cannot_write(&self, error: std::io::Error) -> StorageError {
        StorageError::io(format!("cannot write {}", self.path.display()), error)
    }

    /// Takes back an append that failed, as far as possible, and stops the storage from writing.
    fn fail(&self, snapshot: &Snapshot, end: u64, named: &[(Oid, Tid)], error: &StorageError) {
        let cut = snapshot.file.set_len(end).and_then(|()| snapshot.file.sync_data());
        let mut text = match error {
            StorageError::Io { source, .. } => format!("{error}: {source}"),
            _ => error.to_string(),
        };
        tracing::error!("{}: no more writes: {text}", self.path.display());
        match cut {
            Ok(()) => self.forget_append(named),
            // The next opening may find the transactions whole: then it must find their blobs, too.
            Err(e) => {
                text = format!(
                    "{text}; the bytes from {end} on belong to no transaction and could not be cut off: {e}"
                );
            }
        }
        // Only the first failure is reported: after it nothing is tried.
        let _ = self.failed.set(text);
    }

    /// What was cut off leaves no blob files; with it went the space reserved behind it.
    fn forget_append(&self, named: &[(Oid, Tid)]) {
        self.space.forget();
        if let Some(dir) = &self.blobs {
            for &(oid, tid) in named {
                if let Err(e) = dir.remove(oid, tid) {
                    tracing::warn!("a blob file of an unfinished transaction stays: {e}");
                }
            }
        }
    }
}

/// A failure leaves the file to be discarded.
fn name_blob(dir: &BlobDir, file: &std::path::Path, oid: Oid, tid: Tid) -> Result<()> {
    dir.publish(file, oid, tid).inspect_err(|_| dir.discard(file))
}

impl FileStorage {
    /// The given tid, or the present time, but later than every tid before.
    pub(super) fn tid_for(&self, given: Option<Tid>) -> Tid {
        let mut last = lock(&self.last_generated);
        let tid = given.unwrap_or_else(|| now().later_than(*last));
        *last = tid.max(*last);
        tid
    }
}

pub(super) fn now() -> Tid {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    // A clock that no tid can tell: one above the last.
    Tid::from_unix(seconds).unwrap_or(Tid::ZERO)
}

/// Bytes on their way to the end of the file.
struct Append<'a> {
    file: &'a dyn StorageFile,
    /// Not written yet; they end at `pos`.
    buf: Vec<u8>,
    pos: u64,
    behind: WriteBehind,
}

impl Append<'_> {
    /// Encodes a transaction; answers where its records are.
    fn transaction(
        &mut self,
        txn: &Voted,
        tid: Tid,
        previous: &dyn Fn(Oid) -> u64,
    ) -> std::io::Result<Vec<(Oid, u64)>> {
        let start = self.pos;
        // Without the trailing copy of the length.
        let tlen = txn.space.len - 8;
        // At most 65535 each, checked at begin.
        let len = |part: &Bytes| part.len() as u16;
        let header = TxnHeader {
            tid,
            tlen,
            status: txn.status,
            user_len: len(&txn.meta.user),
            description_len: len(&txn.meta.description),
            extension_len: len(&txn.meta.extension),
        };
        self.put(&header.encode())?;
        for part in [&txn.meta.user, &txn.meta.description, &txn.meta.extension] {
            self.put(part)?;
        }
        let mut positions = Vec::with_capacity(txn.records.len());
        for record in &txn.records {
            positions.push((record.oid, self.pos));
            let plen = match &record.body {
                Body::Data(data) => data.len() as u64,
                Body::Back(_) | Body::Tombstone => 0,
            };
            let header = DataHeader {
                oid: record.oid,
                tid: record.tid.unwrap_or(tid),
                prev: previous(record.oid),
                tloc: start,
                version_len: 0,
                plen,
            };
            self.put(&header.encode())?;
            match &record.body {
                Body::Data(StagedData::Memory(data)) => self.put(data)?,
                Body::Data(StagedData::Spilled(data)) => self.put_spilled(data)?,
                Body::Back(pos) => self.put(&pos.to_be_bytes())?,
                Body::Tombstone => self.put(&[0; 8])?,
            }
        }
        self.put(&tlen.to_be_bytes())?;
        debug_assert_eq!(self.pos - start, txn.space.len);
        Ok(positions)
    }

    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.buf.len() + bytes.len() > SPILL {
            self.flush()?;
        }
        if bytes.len() > SPILL {
            self.file.write_at(bytes, self.pos)?;
        } else {
            self.buf.extend_from_slice(bytes);
        }
        self.pos += bytes.len() as u64;
        Ok(())
    }

    /// Reads a record back into the buffer, in pieces.
    fn put_spilled(&mut self, data: &Spilled) -> std::io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            if self.buf.len() >= SPILL {
                self.flush()?;
            }
            let start = self.buf.len();
            let count = (data.len() - done).min(SPILL - start);
            self.buf.resize(start + count, 0);
            let read = self.buf.get_mut(start..).map_or(Ok(()), |piece| data.read_at(piece, done));
            if let Err(error) = read {
                self.buf.truncate(start);
                return Err(error);
            }
            self.pos += count as u64;
            done += count;
        }
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if !self.buf.is_empty() {
            self.file.write_at(&self.buf, self.pos - self.buf.len() as u64)?;
            self.buf.clear();
            self.behind.wrote(self.pos, |from, to| self.file.begin_sync(from, to));
        }
        Ok(())
    }
}
