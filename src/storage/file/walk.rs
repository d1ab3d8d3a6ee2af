//! [`Walk`]: the transactions and records of a stretch of Data.fs, front to back, each checked before it is given out.
//!
//! What is checked is what pack relies on: lengths, status, locations, and pointers that point backwards. A file that
//! fails is not packed. Costs one `pread` a mebibyte; a payload larger than that is read into a buffer of its own.

use std::io;

use super::file::{Reader, StorageFile};
use super::format::{DATA_HEADER_LEN, DataHeader, TXN_HEADER_LEN, TxnHeader, be64, status};
use crate::ids::Tid;
use crate::storage::{Result, StorageError};

/// Read at a time; the longest transaction metadata (3 × 64 KiB) fits.
const PIECE: usize = 1 << 20;

pub(super) struct Walk<'a> {
    reader: Reader<'a>,
    file: &'a dyn StorageFile,
    name: &'a str,
    to: u64,
    /// Where the next transaction is.
    next: u64,
    /// The current transaction, its next record, and where its records end.
    txn_pos: u64,
    pos: u64,
    txn_end: u64,
    last_tid: Option<Tid>,
    any_status: bool,
    large: Vec<u8>,
}

#[derive(Clone, Copy)]
pub(super) struct TxnAt {
    pub pos: u64,
    pub header: TxnHeader,
}

#[derive(Clone, Copy)]
pub(super) struct RecordAt {
    pub pos: u64,
    pub header: DataHeader,
    /// Position of the record with the data, 0 for a tombstone or where there is a payload.
    pub back: u64,
}

impl<'a> Walk<'a> {
    /// Walks `from..to`, both transaction boundaries. `strict`: tids must increase.
    pub(super) fn new(file: &'a dyn StorageFile, name: &'a str, from: u64, to: u64, strict: bool) -> Self {
        let last_tid = strict.then_some(Tid::ZERO);
        let reader = Reader::new(file, PIECE);
        Self {
            reader,
            file,
            name,
            to,
            next: from,
            txn_pos: from,
            pos: from,
            txn_end: from,
            last_tid,
            any_status: false,
            large: vec![],
        }
    }

    /// Takes transactions with a status that means nothing, as ZODB's iterators do; not unfinished ones.
    pub(super) fn with_any_status(self) -> Self {
        Self { any_status: true, ..self }
    }

    /// The next transaction; what is left of the current one is skipped unchecked.
    pub(super) fn next_txn(&mut self) -> Result<Option<TxnAt>> {
        let pos = self.next;
        if pos >= self.to {
            return Ok(None);
        }
        let bytes = self.read(pos, TXN_HEADER_LEN)?;
        let Some(header) = TxnHeader::parse(bytes) else {
            return Err(self.corrupted(pos, "transaction header is cut off"));
        };
        if self.last_tid.is_some_and(|last| header.tid <= last) {
            return Err(self.corrupted(pos, format!("tid {} is not after the one before", header.tid)));
        }
        let known = matches!(header.status, status::NORMAL | status::PACKED | status::UNDONE);
        if !known && (!self.any_status || header.status == status::CHECKPOINT) {
            return Err(
                self.corrupted(pos, format!("transaction has status {:?}", char::from(header.status)))
            );
        }
        if header.tlen < header.full_len() {
            return Err(self.corrupted(pos, "transaction is shorter than its header"));
        }
        let Some(next) = header.end(pos).filter(|&end| end <= self.to) else {
            return Err(self.corrupted(pos, "transaction is longer than the file"));
        };
        if self.last_tid.is_some() {
            self.last_tid = Some(header.tid);
        }
        (self.txn_pos, self.pos, self.txn_end, self.next) = (pos, pos + header.full_len(), next - 8, next);
        Ok(Some(TxnAt { pos, header }))
    }

    /// The next record of the current transaction.
    pub(super) fn next_record(&mut self) -> Result<Option<RecordAt>> {
        let (pos, end) = (self.pos, self.txn_end);
        if pos == end {
            if be64(self.read(end, 8)?, 0) != Some(end - self.txn_pos) {
                return Err(self.corrupted(end, "the two lengths of the transaction differ"));
            }
            return Ok(None);
        }
        let bytes = self.read(pos, DATA_HEADER_LEN + 8)?;
        let Some(header) = DataHeader::parse(bytes) else {
            return Err(self.corrupted(pos, "record header is cut off"));
        };
        let back = if header.plen == 0 { be64(bytes, DATA_HEADER_LEN).unwrap_or(u64::MAX) } else { 0 };
        let what = match header.end(pos) {
            _ if header.tloc != self.txn_pos => "record names another transaction",
            _ if header.version_len != 0 => "record has a version",
            _ if header.prev >= pos => "record's previous one is not before it",
            _ if back >= pos => "back-pointer does not point backwards",
            Some(after) if after <= end => {
                self.pos = after;
                return Ok(Some(RecordAt { pos, header, back }));
            }
            _ => "record is longer than its transaction",
        };
        Err(self.corrupted(pos, format!("{what} (oid {})", header.oid)))
    }

    /// User, description and extension of a transaction, one after the other.
    pub(super) fn meta(&mut self, txn: &TxnAt) -> Result<&[u8]> {
        let (at, len) = (txn.pos + TXN_HEADER_LEN as u64, txn.header.meta_len());
        self.exactly(at, len)
    }

    /// The payload of a record (empty for a back-pointer or tombstone).
    pub(super) fn payload(&mut self, record: &RecordAt) -> Result<&[u8]> {
        let at = record.pos + DATA_HEADER_LEN as u64;
        let len = usize::try_from(record.header.plen).unwrap_or(usize::MAX);
        if len <= PIECE {
            return self.exactly(at, len);
        }
        // The record lies within the file, so its length is not just announced.
        self.large.resize(len, 0);
        let read = self.file.read_at(&mut self.large, at).map_err(|e| self.failed(e))?;
        if read < len { Err(self.corrupted(at, "the file ends in a record")) } else { Ok(&self.large) }
    }

    /// Calls `visit` with the payload in pieces, so that a large one is never in memory as a whole.
    pub(super) fn payload_pieces(
        &mut self,
        record: &RecordAt,
        visit: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (mut at, mut left) = (record.pos + DATA_HEADER_LEN as u64, record.header.plen);
        while left > 0 {
            let len = left.min(PIECE as u64);
            visit(self.exactly(at, len as usize)?)?;
            at += len;
            left -= len;
        }
        Ok(())
    }

    pub(super) fn corrupted(&self, pos: u64, what: impl Into<String>) -> StorageError {
        StorageError::Corrupted { path: self.name.to_owned(), pos, what: what.into() }
    }

    fn failed(&self, source: io::Error) -> StorageError {
        StorageError::io(format!("cannot read {}", self.name), source)
    }

    fn exactly(&mut self, pos: u64, len: usize) -> Result<&[u8]> {
        if self.read(pos, len)?.len() < len {
            return Err(self.corrupted(pos, "the file ends here"));
        }
        // Served from the reader's buffer: just read.
        self.read(pos, len)
    }

    fn read(&mut self, pos: u64, len: usize) -> Result<&[u8]> {
        let name = self.name;
        self.reader.bytes(pos, len).map_err(|e| StorageError::io(format!("cannot read {name}"), e))
    }
}
