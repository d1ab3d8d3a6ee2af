//! Passes 2 and 3 of a check: what records say, and what lies beside the data file.

use super::super::file::Reader;
use super::super::format::{DATA_HEADER_LEN, DataHeader, FIRST_TXN, TXN_HEADER_LEN, TxnHeader, status};
use super::super::index_file;
use super::super::scan::check_index;
use super::super::window::Window;
use super::{Check, PIECE, Severity};
use crate::ids::Oid;
use crate::pickle::class_of::is_blob_record;
use crate::storage::transform::untransform;
use crate::storage::{Result, StorageError};

impl Check<'_, '_> {
    /// Pass 2.
    pub(super) fn references(&mut self) -> Result<()> {
        if self.references.is_none() && self.blobs.is_none() {
            return Ok(());
        }
        self.pace.enter("references", self.seen.end, 0)?;
        let mut reader = Reader::new(self.file, PIECE);
        let name = self.path.display().to_string();
        let mut window = Window::new(self.file, &name);
        let mut oids = Vec::new();
        for (from, to) in std::mem::take(&mut self.whole) {
            let mut pos = from;
            while pos < to {
                let Some(header) = TxnHeader::parse(self.read(&mut reader, pos, TXN_HEADER_LEN)?) else {
                    break;
                };
                let end = pos + header.tlen;
                let mut at = pos + header.full_len();
                while at < end && header.status != status::UNDONE {
                    let Some(record) = DataHeader::parse(self.read(&mut reader, at, DATA_HEADER_LEN)?) else {
                        break;
                    };
                    let Some(after) = record.end(at).filter(|&after| after <= end) else { break };
                    let current = self.index.get(record.oid) == Some(at);
                    // Damaged back-pointers have been reported.
                    let data = window.data(at, true);
                    if let Ok(Some((_, data))) = data {
                        self.record_data(at, &header, &record, data, current, &mut oids)?;
                    } else if let Err(e @ StorageError::Io { .. }) = data {
                        return Err(e);
                    }
                    self.pace.advance(after - at, 1)?;
                    at = after;
                }
                pos = end + 8;
            }
        }
        Ok(())
    }

    fn record_data(
        &mut self,
        at: u64,
        txn: &TxnHeader,
        record: &DataHeader,
        data: &[u8],
        current: bool,
        oids: &mut Vec<Oid>,
    ) -> Result<()> {
        let place = |what: String| (at, Some(txn.tid), Some(record.oid), what);
        let mut odd = None;
        let mut faults = Vec::new();
        if let Some(blobs) = self.blobs
            && untransform(data).is_ok_and(|data| is_blob_record(&data))
            && self.blob_files.insert((record.oid, record.tid))
        {
            self.seen.blobs += 1;
            match blobs.existing_path(record.oid, record.tid) {
                Ok(_) => {}
                Err(StorageError::NoBlob { .. }) => {
                    let path = blobs.path(record.oid, record.tid);
                    faults.push(place(format!("blob file {} is missing", path.display())));
                }
                Err(e) => return Err(e),
            }
        }
        if let Some(references) = self.references {
            oids.clear();
            match references.references(data, oids) {
                // What older revisions refer to may be gone.
                Ok(()) if !current => {}
                Err(e) if !current => {
                    odd = Some(format!("data of a revision that is not current cannot be read: {e}"))
                }
                Ok(()) => {
                    oids.sort_unstable();
                    oids.dedup();
                    for oid in oids.iter().filter(|oid| !self.exists(**oid)) {
                        let why =
                            if self.deleted.contains(oid) { "has been deleted" } else { "does not exist" };
                        faults.push(place(format!("refers to {oid}, which {why}")));
                    }
                }
                Err(e) => faults.push(place(format!("data cannot be read: {e}"))),
            }
        }
        for (pos, tid, oid, what) in faults {
            self.fault(Severity::Error, pos, tid, oid, what);
        }
        if let Some(what) = odd {
            self.fault(Severity::Warning, at, Some(txn.tid), Some(record.oid), what);
        }
        Ok(())
    }

    /// Blob files that no record has.
    pub(super) fn orphans(&mut self) -> Result<()> {
        let Some(blobs) = self.blobs else { return Ok(()) };
        let mut orphans = Vec::new();
        blobs.for_each(&mut |oid, tid, _| {
            // A younger one belongs to a transaction that was committed since.
            if tid <= self.seen.last_tid && !self.blob_files.contains(&(oid, tid)) {
                orphans.push((oid, tid));
            }
            Ok(())
        })?;
        for (oid, tid) in orphans {
            let what = format!("no record has the blob file {}", blobs.path(oid, tid).display());
            self.fault(Severity::Warning, 0, Some(tid), Some(oid), what);
        }
        Ok(())
    }

    /// Pass 3: an index that would be used must be right.
    pub(super) fn index_file(&mut self) -> Result<()> {
        let Some((saved, end)) = index_file::load(self.path) else { return Ok(()) };
        // Saved while there was nothing: opening scans, and nothing is wrong with that.
        if end <= FIRST_TXN || saved.is_empty() && self.index.is_empty() {
            return Ok(());
        }
        let usable = check_index(self.file, &saved, end).map_err(|e| self.unreadable(e))?;
        if usable.is_none() || end > self.seen.end {
            let what = "the index file is not of this file; opening will ignore it".into();
            self.fault(Severity::Warning, end, None, None, what);
            return Ok(());
        }
        let mut wrong = Vec::new();
        // An object written since may be anywhere before.
        saved.for_each_from(Oid(0), &mut |oid, pos| {
            let newest = self.index.get(oid);
            if newest != Some(pos) && newest.is_none_or(|newest| newest < end) {
                wrong.push((oid, pos));
            }
            true
        });
        self.index.for_each_from(Oid(0), &mut |oid, pos| {
            if pos < end && saved.get(oid).is_none() {
                wrong.push((oid, pos));
            }
            true
        });
        for (oid, pos) in wrong {
            let what = "the index file is wrong about this object: delete the index file".into();
            self.fault(Severity::Error, pos, None, Some(oid), what);
        }
        Ok(())
    }
}
