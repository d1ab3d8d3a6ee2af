//! Walking over transactions: finding one by its tid, the undo log, the last invalidations.
//!
//! Transactions are chained both ways by their two lengths. A tid is looked for between the two nearest samples, from
//! both sides at once, so that finding one costs at most twice the way from the nearer side.

use std::sync::{MutexGuard, PoisonError};

use super::file::Reader;
use super::format::{DATA_HEADER_LEN, DataHeader, FIRST_TXN, TXN_HEADER_LEN, TxnHeader, status};
use super::samples::{Order, Samples};
use super::snapshot::Snapshot;
use crate::ids::{Oid, Tid};
use crate::storage::{Result, StorageError, UndoEntry};

/// Enough for a transaction header, or the headers of many small records.
const SMALL_READ: usize = 64 << 10;
/// Read at a time where only transaction headers are looked at.
const HEADER_READ: usize = 8 << 10;

impl Snapshot {
    fn samples(&self) -> MutexGuard<'_, Samples> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, tid: Tid, pos: u64) {
        self.samples().note(tid, pos);
    }

    /// A transaction comes behind all before.
    pub(super) fn note_appended(&self, tid: Tid, pos: u64) {
        self.samples().append(tid, pos);
    }

    /// Position after the transaction at `pos`, checked against `end`.
    pub(crate) fn txn_end(&self, pos: u64, header: &TxnHeader, end: u64) -> Result<u64> {
        let fits = header.end(pos).filter(|&e| e <= end && header.tlen >= header.full_len());
        fits.ok_or_else(|| self.corrupted(pos, "invalid transaction header"))
    }

    /// The transaction that ends at `end`; `None` at the start of the file.
    pub(crate) fn txn_before(&self, end: u64) -> Result<Option<(u64, TxnHeader)>> {
        if end <= FIRST_TXN {
            return Ok(None);
        }
        let mut length = [0; 8];
        let at = end.checked_sub(8).ok_or_else(|| self.corrupted(end, "misplaced transaction end"))?;
        if self.file.read_at(&mut length, at).map_err(|e| self.io(e))? < 8 {
            return Err(self.corrupted(at, "length beyond the end"));
        }
        let pos = at.checked_sub(u64::from_be_bytes(length)).filter(|&pos| pos >= FIRST_TXN);
        let pos = pos.ok_or_else(|| self.corrupted(at, "invalid length of a transaction"))?;
        let header = self.txn_header(pos)?;
        match self.txn_end(pos, &header, end)? == end {
            true => Ok(Some((pos, header))),
            false => Err(self.corrupted(pos, "the two lengths of the transaction differ")),
        }
    }

    /// Position of the first transaction, in file order, with tid >= `tid`; the end if there is none. Where tids do not ascend,
    /// smaller ones may follow it, but none that is not is before it.
    ///
    /// Cost: see [`Self::search`]; where tids do not ascend a walk from the start. Once after an opening with an index
    /// [`Self::ascends`].
    pub(crate) fn first_from(&self, tid: Tid) -> Result<u64> {
        let end = self.end();
        if self.ascends()? {
            return self.search(tid, end);
        }
        let mut reader = Reader::new(&*self.file, HEADER_READ);
        let mut at = FIRST_TXN;
        while at < end {
            let header = self.header_in(&mut reader, at)?;
            if header.tid >= tid {
                return Ok(at);
            }
            at = self.txn_end(at, &header, end)?;
        }
        Ok(end)
    }

    /// As [`Self::first_from`] where tids ascend; elsewhere the answer is some transaction's position, or the end.
    fn search(&self, tid: Tid, end: u64) -> Result<u64> {
        // The sample below must be strictly below, so that the one looked for is not before it.
        let (low, high) = self.samples().around(Tid(tid.0.saturating_sub(1)));
        // Invariant: transactions before `low` have smaller tids; `high` is the end, or has a tid that is not smaller.
        // A sample may be of a transaction that was appended after `end` was asked.
        let (mut low, mut high) = (low.unwrap_or(FIRST_TXN), high.unwrap_or(end).min(end));
        while low < high {
            let header = self.txn_header(low)?;
            if header.tid >= tid {
                return Ok(low);
            }
            self.note(header.tid, low);
            low = self.txn_end(low, &header, end)?;
            match self.txn_before(high)? {
                Some((pos, header)) if header.tid >= tid => {
                    self.note(header.tid, pos);
                    high = pos;
                }
                _ => return Ok(high),
            }
        }
        Ok(high)
    }

    /// Whether each tid is greater than the one before. What an index file covered at the opening is walked over when this
    /// is first asked: one read a transaction, or for each [`HEADER_READ`] bytes of smaller ones.
    fn ascends(&self) -> Result<bool> {
        let order = self.samples().order();
        let unknown_below = match order {
            Order::Ascending => return Ok(true),
            Order::Broken => return Ok(false),
            Order::UnknownBelow(pos) => pos,
        };
        let mut reader = Reader::new(&*self.file, HEADER_READ);
        let (mut at, mut last) = (FIRST_TXN, Tid::ZERO);
        while at < unknown_below {
            let header = self.header_in(&mut reader, at)?;
            if header.tid <= last {
                tracing::warn!(
                    "{}: tid {} at {at} is not above its predecessor {last}",
                    self.name(),
                    header.tid
                );
                self.samples().set_disordered();
                return Ok(false);
            }
            self.note(header.tid, at);
            last = header.tid;
            at = self.txn_end(at, &header, unknown_below)?;
        }
        let mut samples = self.samples();
        samples.set_ascending();
        Ok(samples.order() == Order::Ascending)
    }

    fn header_in(&self, reader: &mut Reader<'_>, at: u64) -> Result<TxnHeader> {
        let bytes = reader.bytes(at, TXN_HEADER_LEN).map_err(|e| self.io(e))?;
        TxnHeader::parse(bytes).ok_or_else(|| self.corrupted(at, "transaction header beyond the end"))
    }

    /// The transaction `tid`. One that is found by order is the one, whatever the order; only "there is none" needs it.
    pub(crate) fn find_txn(&self, tid: Tid) -> Result<Option<(u64, TxnHeader)>> {
        let end = self.end();
        let order = self.samples().order();
        if order != Order::Broken {
            let pos = self.search(tid, end)?;
            if pos < end {
                let header = self.txn_header(pos)?;
                if header.tid == tid {
                    return Ok(Some((pos, header)));
                }
            }
            if self.ascends()? {
                return Ok(None);
            }
        }
        let mut at = end;
        while let Some((pos, header)) = self.txn_before(at)? {
            if header.tid == tid {
                return Ok(Some((pos, header)));
            }
            at = pos;
        }
        Ok(None)
    }

    /// Headers of the records of the transaction at `pos`, in file order, with their positions.
    pub(crate) fn for_each_record(
        &self,
        pos: u64,
        header: &TxnHeader,
        visit: &mut dyn FnMut(u64, &DataHeader) -> Result<()>,
    ) -> Result<()> {
        let tend = self.txn_end(pos, header, self.end())? - 8;
        let mut reader = Reader::new(&*self.file, SMALL_READ.min(header.tlen as usize + 8));
        let mut at = pos + header.full_len();
        while at < tend {
            let bytes = reader.bytes(at, DATA_HEADER_LEN).map_err(|e| self.io(e))?;
            let record =
                DataHeader::parse(bytes).ok_or_else(|| self.corrupted(at, "data record beyond the end"))?;
            let end = record.end(at).filter(|&end| end <= tend && record.tloc == pos);
            let end = end.ok_or_else(|| self.corrupted(at, "data record does not fit its transaction"))?;
            visit(at, &record)?;
            at = end;
        }
        Ok(())
    }

    /// See [`crate::storage::Storage::last_invalidations`].
    pub(super) fn last_invalidations(&self, count: usize) -> Result<Vec<(Tid, Vec<Oid>)>> {
        let mut found = Vec::new();
        let mut end = self.end();
        while found.len() < count {
            let Some((pos, header)) = self.txn_before(end)? else { break };
            let mut oids = Vec::new();
            if header.status != status::UNDONE {
                self.for_each_record(pos, &header, &mut |_, record| {
                    oids.push(record.oid);
                    Ok(())
                })?;
            }
            self.note(header.tid, pos);
            found.push((header.tid, oids));
            end = pos;
        }
        found.reverse();
        Ok(found)
    }

    /// See [`crate::storage::Storage::undo_log`]. Stops at the packed part: what was packed cannot be undone.
    pub(super) fn undo_log(
        &self,
        first: usize,
        last: usize,
        accept: &mut dyn FnMut(&UndoEntry) -> bool,
    ) -> Result<Vec<UndoEntry>> {
        let mut entries = Vec::new();
        let (mut end, mut accepted) = (self.end(), 0);
        while accepted < last {
            let Some((pos, header)) = self.txn_before(end)? else { break };
            end = pos;
            match header.status {
                status::NORMAL => {}
                status::PACKED => break,
                _ => continue,
            }
            let entry = UndoEntry { tid: header.tid, size: header.tlen, meta: self.txn_meta(pos, &header)? };
            if accept(&entry) {
                if accepted >= first {
                    entries.push(entry);
                }
                accepted += 1;
            }
        }
        Ok(entries)
    }

    /// Position of the record of the transaction `prev_txn` that a restored record repeats: the last one of `oid`, if it
    /// is a back-pointer (trusted) or has the same data. `None`: there is none, the data must be written.
    pub(super) fn find_repeated(&self, oid: Oid, data: Option<&[u8]>, prev_txn: Tid) -> Result<Option<u64>> {
        let Some((pos, header)) = self.find_txn(prev_txn)? else { return Ok(None) };
        let mut last = None;
        self.for_each_record(pos, &header, &mut |at, record| {
            if record.oid == oid {
                last = Some((at, record.plen));
            }
            Ok(())
        })?;
        let Some((at, plen)) = last else { return Ok(None) };
        let same = match (plen, data) {
            (0, _) => true,
            (_, None) => false,
            (_, Some(data)) => {
                data.len() as u64 == plen && self.data_at(at)?.is_some_and(|(found, ..)| found == data)
            }
        };
        Ok(same.then_some(at))
    }
}

/// `UndoError("Invalid transaction id")`.
pub(super) fn no_such_transaction() -> StorageError {
    StorageError::Undo { reason: "Invalid transaction id".into(), oid: None }
}
