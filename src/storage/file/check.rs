//! `zeo-rs check`: everything in a data file that can be verified, reported fault by fault.
//!
//! 1. *structure*, front to back: lengths, status, order of tids, locations, each object's chain of records, targets of
//!    back-pointers. After damage it goes on at the next bytes that make a whole transaction.
//! 2. *references*: every object's current record can be scanned and refers to existing objects only; older revisions can
//!    be scanned; every blob revision has its file, every blob file its revision.
//! 3. *index*: what NAME.index says, if it would be used.
//!
//! Nothing is written. A file in use may be checked: what is appended after the start is not looked at, and an unfinished
//! transaction at the end is no fault. Memory: 4 to 8 bytes an object and 1/344 of the file's size, 16 bytes a blob file.
//! Cost: two sequential reads of the file, one `pread` a back-pointer.

mod content;

use std::fs::File;
use std::path::Path;

use rustc_hash::{FxHashMap, FxHashSet};

use super::file::{OsFile, Reader, StorageFile};
use super::format::{DATA_HEADER_LEN, DataHeader, FIRST_TXN, TXN_HEADER_LEN, TxnHeader, be64, status};
use super::index::Index;
use super::pace::Pace;
use super::record_set::RecordSet;
use super::scan::check_magic;
use crate::ids::{Oid, Tid};
use crate::storage::blob::BlobDir;
use crate::storage::{PackProgress, References, Result, StorageError};

/// Read at a time when reading front to back.
const PIECE: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Data are lost, wrong, or will be.
    Error,
    /// Odd, but no data are concerned.
    Warning,
}

/// One fault, at the place where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub severity: Severity,
    /// Position in the file.
    pub pos: u64,
    /// The transaction.
    pub tid: Option<Tid>,
    pub oid: Option<Oid>,
    pub what: String,
}

impl std::fmt::Display for Fault {
    /// `error at 4711, oid 0x0c, tid 0x03f5…: what`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.severity == Severity::Error { "error" } else { "warning" })?;
        write!(f, " at {}", self.pos)?;
        if let Some(oid) = self.oid {
            write!(f, ", oid {oid}")?;
        }
        if let Some(tid) = self.tid {
            write!(f, ", tid {tid}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// What to check, and whom to tell.
pub struct CheckOptions<'a> {
    /// `None`: references are not checked.
    pub references: Option<&'a dyn References>,
    pub blobs: Option<&'a BlobDir>,
    pub fault: &'a mut dyn FnMut(&Fault),
    /// As of [`crate::storage::PackOptions`]; `false` ends the check with `Cancelled`.
    pub progress: &'a mut (dyn FnMut(&PackProgress) -> bool + Send),
}

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckSummary {
    pub transactions: u64,
    pub records: u64,
    /// Objects that exist.
    pub objects: u64,
    pub blobs: u64,
    /// End of the last whole transaction.
    pub end: u64,
    pub last_tid: Tid,
    pub errors: u64,
    pub warnings: u64,
}

/// Checks the data file at `path`, with its index file.
///
/// Errors: `Io` where reading fails, `Format` if it is no data file at all, `Cancelled`. Faults are not errors.
pub fn check_path(path: &Path, options: CheckOptions<'_>) -> Result<CheckSummary> {
    let file =
        File::open(path).map_err(|e| StorageError::io(format!("cannot open {}", path.display()), e))?;
    let file = OsFile(file);
    let mut check = Check::new(&file, path, options)?;
    check.structure()?;
    check.references()?;
    check.orphans()?;
    check.index_file()?;
    Ok(check.seen)
}

struct Check<'f, 'a> {
    file: &'f dyn StorageFile,
    path: &'f Path,
    size: u64,
    references: Option<&'a dyn References>,
    blobs: Option<&'a BlobDir>,
    report: &'a mut dyn FnMut(&Fault),
    pace: Pace<'a>,
    seen: CheckSummary,
    /// The newest record of each object, deleted ones included.
    index: Index,
    deleted: FxHashSet<Oid>,
    records: RecordSet,
    /// Stretches of whole transactions.
    whole: Vec<(u64, u64)>,
    blob_files: FxHashSet<(Oid, Tid)>,
}

/// The transaction being looked at.
#[derive(Clone, Copy)]
struct Txn {
    pos: u64,
    header: TxnHeader,
}

impl<'f, 'a> Check<'f, 'a> {
    fn new(file: &'f dyn StorageFile, path: &'f Path, options: CheckOptions<'a>) -> Result<Self> {
        let failed = |e| StorageError::io(format!("cannot read {}", path.display()), e);
        let size = file.len().map_err(failed)?;
        // A file of no bytes is an empty database, as for whoever opens it.
        check_magic(file, &path.display().to_string())?;
        Ok(Self {
            file,
            path,
            size,
            references: options.references,
            blobs: options.blobs,
            report: options.fault,
            pace: Pace::new(options.progress, None),
            seen: CheckSummary { end: FIRST_TXN, ..CheckSummary::default() },
            index: Index::new(),
            deleted: FxHashSet::default(),
            records: RecordSet::below(size),
            whole: Vec::new(),
            blob_files: FxHashSet::default(),
        })
    }

    /// Pass 1.
    fn structure(&mut self) -> Result<()> {
        self.pace.enter("structure", self.size, 0)?;
        let mut reader = Reader::new(self.file, PIECE);
        let mut pos = FIRST_TXN;
        let mut packed_until_now = true;
        while pos < self.size {
            let header = TxnHeader::parse(self.read(&mut reader, pos, TXN_HEADER_LEN)?);
            let fault = match header {
                None => Some("fewer bytes than a transaction header"),
                Some(header) if header.status == status::CHECKPOINT => {
                    Some("transaction that was not finished")
                }
                Some(header) if header.tlen < header.full_len() => {
                    Some("transaction shorter than its own header")
                }
                Some(header) if header.end(pos).is_none_or(|end| end > self.size) => {
                    Some("transaction longer than the file")
                }
                Some(_) => None,
            };
            if let (Some(what), header) = (fault, header) {
                match self.next_whole(&mut reader, pos)? {
                    Some(next) => {
                        let tid = header.map(|header| header.tid);
                        self.fault(Severity::Error, pos, tid, None, format!("{what}; going on at {next}"));
                        pos = next;
                        continue;
                    }
                    // A beginning of a transaction at the end: a commit in progress, or one that a crash cut off.
                    None => self.fault(
                        Severity::Warning,
                        pos,
                        None,
                        None,
                        format!("{what}, at the end of the file"),
                    ),
                }
                break;
            }
            let Some(txn) = header.map(|header| Txn { pos, header }) else { break };
            let end = pos + txn.header.tlen + 8;
            self.transaction(&mut reader, &txn, &mut packed_until_now)?;
            match self.whole.last_mut() {
                Some((_, last)) if *last == pos => *last = end,
                _ => self.whole.push((pos, end)),
            }
            self.seen.end = end;
            pos = end;
        }
        self.seen.objects = self.index.len() - self.deleted.len() as u64;
        if self.seen.objects > 0 && !self.exists(Oid::ROOT) {
            self.fault(Severity::Warning, 0, None, Some(Oid::ROOT), "there is no root object".into());
        }
        Ok(())
    }

    fn transaction(&mut self, reader: &mut Reader<'_>, txn: &Txn, packed_until_now: &mut bool) -> Result<()> {
        let Txn { pos, header } = *txn;
        self.seen.transactions += 1;
        let fault = |what: String| (pos, None, what);
        let mut faults: Vec<(u64, Option<Oid>, String)> = Vec::new();
        if header.tid <= self.seen.last_tid {
            faults.push(fault(format!("tid is not after {}, the one before", self.seen.last_tid)));
        }
        self.seen.last_tid = self.seen.last_tid.max(header.tid);
        let packed = header.status == status::PACKED;
        match header.status {
            status::PACKED if !*packed_until_now => {
                self.fault(
                    Severity::Warning,
                    pos,
                    Some(header.tid),
                    None,
                    "packed after one that is not".into(),
                );
            }
            status::PACKED | status::NORMAL | status::UNDONE => {}
            other => faults.push(fault(format!("status {:?}", char::from(other)))),
        }
        *packed_until_now &= packed;
        let end = pos + header.tlen;
        let mut written: FxHashMap<Oid, (u64, bool)> = FxHashMap::default();
        let mut at = pos + header.full_len();
        while at < end {
            let bytes = self.read(reader, at, DATA_HEADER_LEN + 8)?;
            let parsed = DataHeader::parse(bytes).zip(be64(bytes, DATA_HEADER_LEN));
            let Some((record, after, body)) = parsed
                .and_then(|(record, body)| Some((record, record.end(at)?, body)))
                .filter(|(_, after, _)| *after <= end)
            else {
                faults.push((
                    at,
                    None,
                    "record longer than its transaction; what follows it is not checked".into(),
                ));
                break;
            };
            self.seen.records += 1;
            let back = if record.plen == 0 { body } else { 0 };
            let tombstone = record.plen == 0 && back == 0;
            for what in self.record_faults(txn, at, &record, back) {
                faults.push((at, Some(record.oid), what));
            }
            self.records.insert(at);
            if header.status != status::UNDONE {
                let gone =
                    tombstone || (back != 0 && self.leads_to_nothing(record.oid, back, at, &mut faults)?);
                written.insert(record.oid, (at, gone));
            }
            self.pace.advance(after - at, 1)?;
            at = after;
        }
        if be64(self.read(reader, end, 8)?, 0) != Some(header.tlen) {
            faults.push(fault("the length after the transaction is not the one before it".into()));
        }
        for (oid, (pos, gone)) in written {
            self.index.insert(oid, pos);
            if gone {
                self.deleted.insert(oid)
            } else {
                self.deleted.remove(&oid)
            };
        }
        for (pos, oid, what) in faults {
            self.fault(Severity::Error, pos, Some(header.tid), oid, what);
        }
        Ok(())
    }

    /// What is wrong with one record, the target of its back-pointer apart.
    fn record_faults(&self, txn: &Txn, at: u64, record: &DataHeader, back: u64) -> Vec<String> {
        let mut faults = Vec::new();
        if record.version_len != 0 {
            faults.push("record of a version".into());
        }
        if record.tloc != txn.pos {
            faults.push(format!(
                "record names the transaction at {}, it is in the one at {}",
                record.tloc, txn.pos
            ));
        }
        if back >= at {
            faults.push(format!("back-pointer to {back}, which is not before it"));
        }
        let previous = self.index.get(record.oid).unwrap_or(0);
        let packed = txn.header.status == status::PACKED;
        if record.prev != previous && !(packed && record.prev == 0) {
            faults.push(format!("previous record is given as {}, it is {previous}", record.prev));
        }
        faults
    }

    /// Checks where a back-pointer leads. Answers whether it ends in a deletion.
    fn leads_to_nothing(
        &self,
        oid: Oid,
        mut back: u64,
        from: u64,
        faults: &mut Vec<(u64, Option<Oid>, String)>,
    ) -> Result<bool> {
        let mut at = from;
        while back != 0 {
            let mut bytes = [0; DATA_HEADER_LEN + 8];
            let n = match back < at && self.records.contains(back) {
                true => self.file.read_at(&mut bytes, back).map_err(|e| self.unreadable(e))?,
                false => 0,
            };
            let header = DataHeader::parse(bytes.get(..n).unwrap_or_default());
            let Some(header) = header.filter(|header| header.oid == oid) else {
                faults.push((
                    from,
                    Some(oid),
                    format!("back-pointer to {back}, where no record of the object is"),
                ));
                return Ok(false);
            };
            if header.plen > 0 {
                return Ok(false);
            }
            (at, back) = (back, be64(&bytes, DATA_HEADER_LEN).unwrap_or(0));
        }
        Ok(true)
    }

    /// After damage at `from`: the next position where a whole transaction is, later than all before.
    fn next_whole(&mut self, reader: &mut Reader<'_>, from: u64) -> Result<Option<u64>> {
        let mut pos = from + 1;
        while pos + TXN_HEADER_LEN as u64 + 8 <= self.size {
            let bytes = self.read(reader, pos, PIECE)?;
            let candidates = bytes.len().saturating_sub(TXN_HEADER_LEN - 1);
            let plausible = |header: &TxnHeader| {
                matches!(header.status, status::NORMAL | status::PACKED | status::UNDONE)
                    && header.tid > self.seen.last_tid
                    && header.tlen >= header.full_len()
            };
            let found: Vec<(u64, u64)> = (0..candidates)
                .filter_map(|i| Some((pos + i as u64, TxnHeader::parse(bytes.get(i..)?).filter(plausible)?)))
                .filter_map(|(start, header)| {
                    Some((start, header.end(start).filter(|&end| end <= self.size)?))
                })
                .collect();
            pos += candidates.max(1) as u64;
            for (start, end) in found {
                let mut length = [0; 8];
                let n = self.file.read_at(&mut length, end - 8).map_err(|e| self.unreadable(e))?;
                if n == 8 && u64::from_be_bytes(length) == end - 8 - start {
                    return Ok(Some(start));
                }
            }
            self.pace.advance(candidates as u64, 0)?;
        }
        Ok(None)
    }

    fn exists(&self, oid: Oid) -> bool {
        self.index.get(oid).is_some() && !self.deleted.contains(&oid)
    }

    fn fault(&mut self, severity: Severity, pos: u64, tid: Option<Tid>, oid: Option<Oid>, what: String) {
        match severity {
            Severity::Error => self.seen.errors += 1,
            Severity::Warning => self.seen.warnings += 1,
        }
        (self.report)(&Fault { severity, pos, tid, oid, what });
    }

    fn read<'r>(&self, reader: &'r mut Reader<'_>, pos: u64, len: usize) -> Result<&'r [u8]> {
        reader.bytes(pos, len).map_err(|e| self.unreadable(e))
    }

    fn unreadable(&self, source: std::io::Error) -> StorageError {
        StorageError::io(format!("cannot read {}", self.path.display()), source)
    }
}
