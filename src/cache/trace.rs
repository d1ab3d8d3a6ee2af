//! Traces: every use of a cache, in ZEO's format, so that the tools for either read both.
//!
//! A record is 26 bytes and an oid, big-endian: seconds since 1970 (u32); length of the data (24 bits, at most 2^23-1) and
//! a code (8 bits); length of the oid (u16); first tid; end tid or zeros; oid.
//!
//! ZEO's own cache cannot write one any more where a load misses (release 6.2 ends that load with an error), hence no trace of it
//! has the codes that need a second tid.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::ids::{Oid, Tid};

pub(super) const RESTART: u8 = 0x00;
pub(super) const INVALIDATE_MISS: u8 = 0x10;
pub(super) const INVALIDATE_HIT: u8 = 0x1c;
pub(super) const FORGET_HIT: u8 = 0x1e;
pub(super) const LOAD_MISS: u8 = 0x20;
pub(super) const LOAD_HIT: u8 = 0x22;
pub(super) const LOAD_OLD_MISS: u8 = 0x24;
pub(super) const LOAD_OLD_HIT: u8 = 0x26;
pub(super) const STORE: u8 = 0x52;
pub(super) const STORE_OLD: u8 = 0x54;

const HEAD: usize = 26;
const MAX_LENGTH: usize = (1 << 23) - 1;

/// A file that uses are appended to. Costs a lock and a copy for each, and a write a second.
pub(super) struct Trace(Mutex<Out>);

struct Out {
    file: BufWriter<File>,
    /// Second of the last record.
    second: u32,
}

impl Trace {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        Ok(Self(Mutex::new(Out { file: BufWriter::with_capacity(64 << 10, file), second: 0 })))
    }

    /// Errors are not worth more than a gap in the trace.
    pub(super) fn record(&self, code: u8, oid: Oid, tid: Tid, end: Tid, length: usize) {
        let second = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs() as u32);
        let mut record = Vec::with_capacity(HEAD + 8);
        record.extend_from_slice(&second.to_be_bytes());
        record.extend_from_slice(&(((length.min(MAX_LENGTH) as u32) << 8) | u32::from(code)).to_be_bytes());
        // A restart is of no object.
        let oid_length: u16 = if code == RESTART { 0 } else { 8 };
        record.extend_from_slice(&oid_length.to_be_bytes());
        record.extend_from_slice(&tid.0.to_be_bytes());
        record.extend_from_slice(&end.0.to_be_bytes());
        if oid_length > 0 {
            record.extend_from_slice(&oid.0.to_be_bytes());
        }
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if out.second != second {
            let _ = out.file.flush();
            out.second = second;
        }
        let _ = out.file.write_all(&record);
    }

    pub(super) fn flush(&self) {
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).file.flush();
    }
}

/// One use of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceRecord {
    pub second: u32,
    /// As in ZEO's `cache_stats`: 0x2_ loads, 0x5_ stores, 0x1_ invalidations, 0 a restart.
    pub code: u8,
    /// Bytes of the data, if known.
    pub length: u32,
    pub oid: Oid,
    pub tid: Tid,
    /// Zero: none, or unknown.
    pub end: Tid,
}

/// The records of a trace. Ends at the first that is not whole.
pub struct TraceReader<R>(pub R);

impl<R: Read> Iterator for TraceReader<R> {
    type Item = TraceRecord;

    fn next(&mut self) -> Option<TraceRecord> {
        let mut head = [0; HEAD];
        self.0.read_exact(&mut head).ok()?;
        let word = |at: usize| {
            head.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |b| u32::from_be_bytes(*b))
        };
        let long = |at: usize| (u64::from(word(at)) << 32) | u64::from(word(at + 4));
        let (second, what) = (word(0), word(4));
        let oid_length = word(8) >> 16;
        let (tid, end) = (Tid(long(10)), Tid(long(18)));
        let oid = match oid_length {
            0 => Oid(0),
            8 => {
                let mut oid = [0; 8];
                self.0.read_exact(&mut oid).ok()?;
                Oid(u64::from_be_bytes(oid))
            }
            _ => return None,
        };
        // A real one has a time; the highest bits were for versions and a second file.
        let code = (what & 0x7e) as u8;
        (second != 0).then_some(TraceRecord {
            second,
            code,
            length: (what & 0x7fff_ff00) >> 8,
            oid,
            tid,
            end,
        })
    }
}
