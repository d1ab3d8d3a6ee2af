//! Iteration over transactions and their records, in file order, as of the moment it began.
//!
//! Cost: one `pread` of [`READ_AHEAD`] bytes for as many transactions as fit, and no copy: a record's data share the piece
//! that was read (so whoever keeps them for long should copy them). A record iterator shares it with its transaction
//! iterator, too, and goes on by itself where it ends.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::format::{DATA_HEADER_LEN, DataHeader, FIRST_TXN, TXN_HEADER_LEN, TxnHeader, be64, status};
use super::snapshot::{Snapshot, split_meta};
use crate::ids::Tid;
use crate::limits::MAX_PREALLOCATE;
use crate::storage::{RecordInfo, RecordIterator, Result, TxnInfo, TxnIterator};

const READ_AHEAD: usize = 256 << 10;

/// See [`crate::storage::Storage::iterate`].
pub(super) struct Transactions {
    ahead: ReadAhead,
    pos: u64,
    /// End of the file when the iteration began.
    end: u64,
    stop: Tid,
}

impl Transactions {
    /// Those with `start <= tid <= stop`.
    pub(super) fn new(snapshot: Arc<Snapshot>, start: Option<Tid>, stop: Option<Tid>) -> Result<Self> {
        let end = snapshot.end();
        let pos = match start {
            Some(tid) => snapshot.first_from(tid)?.min(end),
            None => FIRST_TXN,
        };
        let ahead = ReadAhead { snapshot, piece: Bytes::new(), start: 0 };
        Ok(Self { ahead, pos, end, stop: stop.unwrap_or(Tid(u64::MAX)) })
    }
}

impl TxnIterator for Transactions {
    fn next_txn(&mut self) -> Result<Option<(TxnInfo, Box<dyn RecordIterator>)>> {
        while self.pos < self.end {
            let pos = self.pos;
            let header = TxnHeader::parse(self.ahead.peek(pos, TXN_HEADER_LEN, self.end)?);
            let header = header
                .ok_or_else(|| self.ahead.snapshot.corrupted(pos, "transaction header beyond the end"))?;
            let next = self.ahead.snapshot.txn_end(pos, &header, self.end)?;
            if header.tid > self.stop {
                self.pos = self.end;
                break;
            }
            self.pos = next;
            if header.status == status::UNDONE {
                continue;
            }
            let meta = self.ahead.peek(pos + TXN_HEADER_LEN as u64, header.meta_len(), self.end)?;
            // A copy: the entry may be kept long after the piece that was read.
            let meta = split_meta(&header, Bytes::copy_from_slice(meta));
            let info = TxnInfo { tid: header.tid, status: header.status, meta };
            let records = Records {
                ahead: self.ahead.clone(),
                txn: pos,
                first: pos + header.full_len(),
                at: pos + header.full_len(),
                end: pos + header.tlen,
            };
            return Ok(Some((info, Box::new(records))));
        }
        Ok(None)
    }
}

struct Records {
    ahead: ReadAhead,
    /// Position of the transaction.
    txn: u64,
    first: u64,
    at: u64,
    /// End of its records.
    end: u64,
}

impl RecordIterator for Records {
    fn next_record(&mut self) -> Result<Option<RecordInfo>> {
        if self.at >= self.end {
            return Ok(None);
        }
        let at = self.at;
        let head = self.ahead.peek(at, DATA_HEADER_LEN + 8, self.end)?;
        let (header, back) = (DataHeader::parse(head), be64(head, DATA_HEADER_LEN).unwrap_or(0));
        let snapshot = &self.ahead.snapshot;
        let header = header.ok_or_else(|| snapshot.corrupted(at, "data record beyond the end"))?;
        let next = header.end(at).filter(|&e| e <= self.end && header.tloc == self.txn);
        let next = next.ok_or_else(|| snapshot.corrupted(at, "data record does not fit its transaction"))?;
        let (data, data_txn) = match header.plen {
            0 => match back {
                0 => (None, None),
                back if back >= at => {
                    return Err(snapshot.corrupted(at, "back-pointer that does not point back"));
                }
                back => {
                    let target = snapshot.head_of(header.oid, back)?;
                    (snapshot.data_at(back)?.map(|(data, ..)| data), Some(target.header.tid))
                }
            },
            plen => {
                // Within the transaction, hence within the file.
                (Some(self.ahead.bytes(at + DATA_HEADER_LEN as u64, plen as usize, self.end)?), None)
            }
        };
        self.at = next;
        Ok(Some(RecordInfo { oid: header.oid, tid: header.tid, data, data_txn }))
    }

    /// Of the same file at the same position: a pack meanwhile, or tids that are there twice, make no difference.
    fn again(&self) -> Option<Box<dyn RecordIterator>> {
        // Without the piece, which would be kept for as long as this is.
        let ahead = ReadAhead { snapshot: self.ahead.snapshot.clone(), piece: Bytes::new(), start: 0 };
        let Self { txn, first, end, .. } = *self;
        Some(Box::new(Self { ahead, txn, first, at: first, end }))
    }
}

/// The piece of the file that was read last.
#[derive(Clone)]
struct ReadAhead {
    snapshot: Arc<Snapshot>,
    piece: Bytes,
    /// Position of the piece.
    start: u64,
}

impl ReadAhead {
    /// The bytes `pos..pos + len`, fewer if the file ends before. Reads ahead up to `limit`.
    fn peek(&mut self, pos: u64, len: usize, limit: u64) -> Result<&[u8]> {
        let range = self.range(pos, len, limit)?;
        Ok(self.piece.get(range).unwrap_or_default())
    }

    /// As [`Self::peek`], to be kept for a while.
    fn bytes(&mut self, pos: u64, len: usize, limit: u64) -> Result<Bytes> {
        let range = self.range(pos, len, limit)?;
        Ok(self.piece.slice(range))
    }

    /// Where in the piece these bytes are, after reading the next one if they are not in this.
    fn range(&mut self, pos: u64, len: usize, limit: u64) -> Result<Range<usize>> {
        let from = pos.checked_sub(self.start).and_then(|from| usize::try_from(from).ok());
        let inside = from.and_then(|from| Some(from..from.checked_add(len)?));
        if let Some(inside) = inside.filter(|inside| inside.end <= self.piece.len()) {
            return Ok(inside);
        }
        let left = usize::try_from(limit.saturating_sub(pos)).unwrap_or(usize::MAX);
        let want = len.max(READ_AHEAD.min(left));
        let snapshot = &self.snapshot;
        if want > MAX_PREALLOCATE && pos.saturating_add(want as u64) > snapshot.end() {
            return Err(snapshot.corrupted(pos, "data beyond the end"));
        }
        let mut buf = vec![0; want];
        let n = snapshot.file.read_at(&mut buf, pos).map_err(|e| snapshot.io(e))?;
        buf.truncate(n);
        (self.piece, self.start) = (buf.into(), pos);
        Ok(0..len.min(n))
    }
}
