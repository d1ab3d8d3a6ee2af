//! The scan on opening: reads every transaction from a position to the end, fills the index, and finds where the file
//! ends in good order.
//!
//! What counts as a damaged *tail* (dropped: nothing in it was acknowledged, or ZODB drops it too) and what as a damaged
//! *file* (refused):
//!
//! | at the end of what is in order | is |
//! | --- | --- |
//! | nothing | the end |
//! | fewer than 23 bytes | tail, cut without a copy |
//! | a transaction that reaches beyond the end of the file, or has status `c` | tail, saved and cut |
//! | a header that cannot be one, and a file end that is no transaction's | tail, saved and cut |
//! | a last transaction whose trailing length was not written (a part of it, then zeros to the end) | tail, saved and cut |
//! | any other contradiction | error: `zeo-rs check` or `fsrecover` must look at it |
//!
//! A read error is an error, never an end. Only headers are parsed; data are skipped. Reads are of 4 MiB.

use super::file::{Reader, StorageFile};
use super::format::{DATA_HEADER_LEN, DataHeader, FIRST_TXN, MAGIC, TXN_HEADER_LEN, TxnHeader, be64, status};
use super::index::Index;
use super::samples::Samples;
use crate::ids::{Oid, Tid};
use crate::storage::{Result, StorageError};

const READ_SIZE: usize = 4 << 20;

/// Where the good part of the file ends and what follows it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Scanned {
    pub(super) end: u64,
    /// Tid of the last transaction in the good part.
    pub(super) last_tid: Tid,
    pub(super) tail: Tail,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tail {
    Clean,
    /// Less than a header.
    Stray,
    /// What cannot be part of the database; the reason.
    Damaged(&'static str),
    /// The rest is younger than the `stop` that was asked for.
    Stopped,
}

/// From where, and up to (not including) which tid.
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) last_tid: Tid,
    pub(super) stop: Option<Tid>,
}

/// Checks the magic number. `false`: the file is empty, or its creation was interrupted.
pub(super) fn check_magic(file: &dyn StorageFile, name: &str) -> Result<bool> {
    let mut start = [0; 5];
    let n = file.read_at(&mut start, 0).map_err(|e| StorageError::io(format!("cannot read {name}"), e))?;
    let start = start.get(..n).unwrap_or_default();
    if start.starts_with(&MAGIC) {
        return Ok(true);
    }
    let written = start.iter().zip(&MAGIC).take_while(|(a, b)| a == b).count();
    if n <= MAGIC.len() && start.iter().skip(written).all(|&b| b == 0) {
        return Ok(false);
    }
    Err(StorageError::Format(match start.starts_with(b"FS21") {
        true => format!("{name} was written by Python 2: convert it with zodbupdate"),
        false => format!("{name} is not a FileStorage data file"),
    }))
}

/// See the module documentation. The file begins with the magic number.
pub(super) fn scan(
    file: &dyn StorageFile,
    name: &str,
    range: Range,
    index: &Index,
    samples: &mut Samples,
) -> Result<Scanned> {
    let size = file.len().map_err(|e| StorageError::io(format!("cannot read {name}"), e))?;
    let reader = Reader::new(file, READ_SIZE);
    let mut scan = Scan { reader, name, size, index, found: Vec::new() };
    let Range { start, mut last_tid, stop } = range;
    let mut pos = start;
    loop {
        let done = |tail| Ok(Scanned { end: pos, last_tid, tail });
        let bytes = scan.bytes(pos, TXN_HEADER_LEN)?;
        if bytes.is_empty() {
            return done(Tail::Clean);
        }
        let Some(header) = TxnHeader::parse(bytes) else { return done(Tail::Stray) };
        let end = header.end(pos).filter(|&end| end <= size);
        let Some(end) = end else { return done(Tail::Damaged("an incomplete transaction")) };
        if header.status == status::CHECKPOINT {
            return done(Tail::Damaged("a transaction that was not finished"));
        }
        if header.tlen < header.full_len() {
            return match scan.ends_with_a_transaction(pos)? {
                true => Err(scan.corrupted(pos, "invalid transaction header")),
                false => done(Tail::Damaged("bytes that are no transaction")),
            };
        }
        if stop.is_some_and(|stop| header.tid >= stop) {
            return done(Tail::Stopped);
        }
        if let Err(error) = scan.transaction(pos, &header) {
            // A read error or damage elsewhere is reported as it is.
            return match scan.was_torn(end, header.tlen)? {
                true => done(Tail::Damaged("a transaction that was not written whole")),
                false => Err(error),
            };
        }
        if header.tid <= last_tid {
            tracing::warn!("{name}: tid {} at {pos} is not above its predecessor {last_tid}", header.tid);
            samples.set_disordered();
        }
        samples.append(header.tid, pos);
        last_tid = header.tid;
        scan.merge(pos);
        pos = end;
    }
}

struct Scan<'a> {
    reader: Reader<'a>,
    name: &'a str,
    size: u64,
    index: &'a Index,
    /// Records of the transaction being read: oid, position, previous position.
    found: Vec<(Oid, u64, u64)>,
}

impl Scan<'_> {
    fn bytes(&mut self, pos: u64, len: usize) -> Result<&[u8]> {
        let name = self.name;
        self.reader.bytes(pos, len).map_err(|e| StorageError::io(format!("cannot read {name}"), e))
    }

    fn corrupted(&self, pos: u64, what: impl Into<String>) -> StorageError {
        StorageError::Corrupted { path: self.name.to_owned(), pos, what: what.into() }
    }

    /// Checks the transaction at `pos`, which lies within the file, and collects its records in `found`.
    fn transaction(&mut self, pos: u64, header: &TxnHeader) -> Result<()> {
        self.found.clear();
        let tend = pos + header.tlen;
        if !b" up".contains(&header.status) {
            tracing::warn!(
                "{}: unknown status {:#04x} of the transaction at {pos}",
                self.name,
                header.status
            );
        }
        let mut at = pos + header.full_len();
        while at < tend && header.status != status::UNDONE {
            let record = DataHeader::parse(self.bytes(at, DATA_HEADER_LEN)?);
            let record = record.ok_or_else(|| self.corrupted(at, "data record beyond the end"))?;
            if record.version_len != 0 {
                return Err(self.corrupted(at, "data record of a version"));
            }
            let end = record.end(at).filter(|&end| end <= tend);
            let end = end.ok_or_else(|| self.corrupted(at, "data record exceeds its transaction"))?;
            if record.tloc != pos {
                return Err(self.corrupted(at, "data record that names another transaction"));
            }
            self.found.push((record.oid, at, record.prev));
            at = end;
        }
        let trailing = be64(self.bytes(tend, 8)?, 0);
        if trailing != Some(header.tlen) {
            return Err(self.corrupted(pos, "the two lengths of the transaction differ"));
        }
        Ok(())
    }

    /// Puts the records found into the index. Each one's `prev` should be what the index had: a difference is logged,
    /// as ZODB does (packed files have harmless ones).
    fn merge(&mut self, txn_pos: u64) {
        for (oid, pos, prev) in self.found.drain(..) {
            let old = self.index.insert(oid, pos).unwrap_or(0);
            // Of two records of one object in one transaction the second replaces the first here.
            if old != prev && old < txn_pos {
                tracing::warn!("{}: record of {oid} at {pos} has previous {prev}, not {old}", self.name);
            }
        }
    }

    /// Whether the last 8 bytes of the file can be the trailing length of a transaction that starts at `pos` or later.
    fn ends_with_a_transaction(&mut self, pos: u64) -> Result<bool> {
        let at = self.size.saturating_sub(8);
        let trailing = be64(self.bytes(at, 8)?, 0).unwrap_or(0);
        let plausible = trailing >= TXN_HEADER_LEN as u64;
        Ok(plausible && self.size.checked_sub(trailing).is_some_and(|start| start >= pos))
    }

    /// Whether the file breaks off before the end of a transaction's trailing length: from some byte of it on there
    /// are only zeros (and no complete length).
    fn was_torn(&mut self, end: u64, tlen: u64) -> Result<bool> {
        let length = tlen.to_be_bytes();
        let written = self.bytes(end - 8, 8)?;
        let same = written.iter().zip(&length).take_while(|(a, b)| a == b).count();
        if same == length.len() || written.iter().skip(same).any(|&b| b != 0) {
            return Ok(false);
        }
        let mut at = end;
        while at < self.size {
            let rest = self.bytes(at, 64 << 10)?;
            if rest.is_empty() || rest.iter().any(|&b| b != 0) {
                return Ok(false);
            }
            at += rest.len() as u64;
        }
        Ok(true)
    }
}

/// Checks an index that claims to cover the file up to `pos`: the newest transaction with records must be where the
/// index says. Answers the tid of the last transaction below `pos`; `None`: the index is not of this file.
///
/// Looks at more than ZODB: all records of that transaction, so that of two for one oid the last one counts. The walk
/// passes transactions without records and obsolete undone ones.
pub(super) fn check_index(file: &dyn StorageFile, index: &Index, pos: u64) -> std::io::Result<Option<Tid>> {
    let mut last_tid = None;
    let mut end = pos;
    if pos < FIRST_TXN || file.len()? < pos {
        return Ok(None);
    }
    while end > FIRST_TXN {
        let mut length = [0; 8];
        if end < FIRST_TXN + 8 || file.read_at(&mut length, end - 8)? < 8 {
            return Ok(None);
        }
        let tlen = u64::from_be_bytes(length);
        let start = tlen.checked_add(8).and_then(|len| end.checked_sub(len)).filter(|&p| p >= FIRST_TXN);
        let Some(start) = start else { return Ok(None) };
        let mut reader = Reader::new(file, 64 << 10);
        let Some(header) = TxnHeader::parse(reader.bytes(start, TXN_HEADER_LEN)?) else { return Ok(None) };
        let known = header.status == status::UNDONE || b" p".contains(&header.status);
        if header.tlen != tlen || tlen < header.full_len() || !known {
            return Ok(None);
        }
        last_tid.get_or_insert(header.tid);
        if header.status != status::UNDONE && tlen > header.full_len() {
            let ok = records_are_indexed(&mut reader, index, start, &header)?;
            return Ok(last_tid.filter(|_| ok));
        }
        end = start;
    }
    // Nothing but transactions without records: only an empty index fits.
    Ok(last_tid.filter(|_| index.is_empty()))
}

fn records_are_indexed(
    reader: &mut Reader<'_>,
    index: &Index,
    start: u64,
    header: &TxnHeader,
) -> std::io::Result<bool> {
    let tend = start + header.tlen;
    let mut at = start + header.full_len();
    let mut last: std::collections::HashMap<Oid, u64> = Default::default();
    // Enough to tell a wrong index; a transaction of millions of records need not be read whole.
    let mut budget = 10_000;
    while at < tend && budget > 0 {
        let Some(record) = DataHeader::parse(reader.bytes(at, DATA_HEADER_LEN)?) else { return Ok(false) };
        let Some(end) = record.end(at).filter(|&end| end <= tend) else { return Ok(false) };
        if record.tloc != start {
            return Ok(false);
        }
        last.insert(record.oid, at);
        at = end;
        budget -= 1;
    }
    // A record may be superseded by one that the budget did not reach, within the same transaction.
    let superseded = |pos: u64| at < tend && pos >= at && pos < tend;
    Ok(last.iter().all(|(&oid, &pos)| index.get(oid).is_some_and(|found| found == pos || superseded(found))))
}
