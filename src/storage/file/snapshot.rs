//! [`Snapshot`]: a data file with its index, and how records are read from it.
//!
//! Cost of a load of a current record: one atomic pointer load (`ArcSwap`), an index lookup (no lock for sequential
//! oids), one `pread` of [`FIRST_READ`] bytes into a buffer that the thread keeps, one copy into the answer. Larger
//! records cost a second `pread`, older revisions one for each step back. No lock is taken and no writer is waited for.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::file::StorageFile;
use super::format::{DATA_HEADER_LEN, DataHeader, TXN_HEADER_LEN, TxnHeader, be64};
use super::index::Index;
use super::samples::Samples;
use crate::ids::{Oid, Tid};
use crate::limits::MAX_PREALLOCATE;
use crate::storage::{Result, StorageError, TxnMeta};

/// Bytes read at a record's position: the header and the payload of most records (usual averages are 150 to 300).
const FIRST_READ: usize = 1024;
/// A thread keeps a buffer of at most this size between loads.
const KEEP_BUFFER: usize = 64 << 10;

/// What readers need: a file, the index into it and its end. A pack replaces all of it at once; whoever holds the old
/// one goes on reading the old file.
pub struct Snapshot {
    pub file: Arc<dyn StorageFile>,
    pub index: Index,
    /// End of the last published transaction.
    end: AtomicU64,
    pub(super) samples: Mutex<Samples>,
    /// Path of the file, for errors.
    name: Arc<str>,
}

/// Whether a read may wait for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    Yes,
    No,
}

/// A record's header and where its data are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordHead {
    pub(crate) header: DataHeader,
    /// Position of the record that holds the data; 0 for a record with data of its own and for tombstones.
    pub(crate) back: u64,
}

impl RecordHead {
    pub(crate) fn is_tombstone(&self) -> bool {
        self.header.plen == 0 && self.back == 0
    }
}

/// A payload in the thread's buffer, or in one of its own when it is large.
pub(super) enum Payload<'a> {
    Borrowed(&'a [u8]),
    Owned(Vec<u8>),
}

impl Payload<'_> {
    pub(super) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }

    pub(super) fn into_bytes(self) -> Bytes {
        match self {
            Self::Borrowed(bytes) => Bytes::copy_from_slice(bytes),
            Self::Owned(bytes) => bytes.into(),
        }
    }
}

/// The thread's read buffer, taken out while it is used: a load within a load gets a fresh one.
pub(super) struct Scratch {
    buf: Vec<u8>,
    /// Position and number of the valid bytes.
    pos: u64,
    filled: usize,
}

thread_local! {
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Scratch {
    pub(super) fn take() -> Self {
        let mut buf = SPARE.take();
        buf.resize(buf.len().max(FIRST_READ), 0);
        Self { buf, pos: 0, filled: 0 }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.buf.len() <= KEEP_BUFFER {
            SPARE.set(std::mem::take(&mut self.buf));
        }
    }
}

impl Snapshot {
    pub(super) fn new(
        file: Arc<dyn StorageFile>,
        index: Index,
        end: u64,
        samples: Samples,
        name: Arc<str>,
    ) -> Self {
        Self { file, index, end: AtomicU64::new(end), samples: Mutex::new(samples), name }
    }

    /// End of the last published transaction: what is below never changes.
    pub fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    pub(super) fn set_end(&self, end: u64) {
        self.end.store(end, Ordering::Release);
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(crate) fn corrupted(&self, pos: u64, what: impl Into<String>) -> StorageError {
        StorageError::Corrupted { path: self.name.to_string(), pos, what: what.into() }
    }

    pub(crate) fn io(&self, error: std::io::Error) -> StorageError {
        StorageError::io(format!("cannot read {}", self.name), error)
    }

    fn read(&self, buf: &mut [u8], pos: u64, wait: Wait) -> Result<usize> {
        match wait {
            Wait::Yes => self.file.read_at(buf, pos).map_err(|e| self.io(e)),
            Wait::No => {
                let read = self.file.try_read_at(buf, pos).map_err(|e| self.io(e))?;
                read.ok_or_else(|| StorageError::WouldBlock)
            }
        }
    }

    /// Reads the record at `pos`. Leaves the first [`FIRST_READ`] bytes in `scratch` for [`Self::payload`].
    pub(super) fn head_into(&self, pos: u64, wait: Wait, scratch: &mut Scratch) -> Result<RecordHead> {
        scratch.filled = 0;
        scratch.pos = pos;
        let window = scratch.buf.get_mut(..FIRST_READ).unwrap_or_default();
        scratch.filled = self.read(window, pos, wait)?;
        let bytes = scratch.buf.get(..scratch.filled).unwrap_or_default();
        self.parse_head(pos, bytes)
    }

    fn parse_head(&self, pos: u64, bytes: &[u8]) -> Result<RecordHead> {
        let header =
            DataHeader::parse(bytes).ok_or_else(|| self.corrupted(pos, "data record beyond the end"))?;
        if header.version_len != 0 {
            return Err(self.corrupted(pos, "data record of a version"));
        }
        let back = match header.plen {
            0 => be64(bytes, DATA_HEADER_LEN)
                .ok_or_else(|| self.corrupted(pos, "back-pointer beyond the end"))?,
            _ => 0,
        };
        Ok(RecordHead { header, back })
    }

    /// Header and back-pointer of the record at `pos`. One `pread` of 50 bytes.
    pub(crate) fn head(&self, pos: u64) -> Result<RecordHead> {
        let mut buf = [0; DATA_HEADER_LEN + 8];
        let n = self.read(&mut buf, pos, Wait::Yes)?;
        self.parse_head(pos, buf.get(..n).unwrap_or_default())
    }

    /// As [`Self::head`], of a record that must be of `oid`.
    pub(crate) fn head_of(&self, oid: Oid, pos: u64) -> Result<RecordHead> {
        let head = self.head(pos)?;
        self.check_oid(oid, pos, &head)?;
        Ok(head)
    }

    fn check_oid(&self, oid: Oid, pos: u64, head: &RecordHead) -> Result<()> {
        if head.header.oid == oid {
            return Ok(());
        }
        Err(self.corrupted(pos, format!("record of {} where {oid} was expected", head.header.oid)))
    }

    /// The data of the record that `head_into` has just read.
    pub(super) fn payload<'a>(
        &self,
        head: &RecordHead,
        wait: Wait,
        scratch: &'a Scratch,
    ) -> Result<Payload<'a>> {
        let short = || self.corrupted(scratch.pos, "data record beyond the end");
        let plen = usize::try_from(head.header.plen).map_err(|_| short())?;
        let body = scratch.buf.get(DATA_HEADER_LEN..scratch.filled).unwrap_or_default();
        if let Some(data) = body.get(..plen) {
            return Ok(Payload::Borrowed(data));
        }
        let start = scratch.pos + DATA_HEADER_LEN as u64;
        if plen > MAX_PREALLOCATE {
            let len = self.file.len().map_err(|e| self.io(e))?;
            if start.checked_add(plen as u64).is_none_or(|end| end > len) {
                return Err(short());
            }
        }
        let mut data = vec![0; plen];
        let (have, rest) = data.split_at_mut(body.len());
        have.copy_from_slice(body);
        if self.read(rest, start + body.len() as u64, wait)? < rest.len() {
            return Err(short());
        }
        Ok(Payload::Owned(data))
    }

    /// Follows back-pointers from `back` until a record with data. `NotFound(oid)` if the chain ends in a tombstone.
    /// Chains may be long (undo of undo of …); each step must go towards the start, so damaged ones end.
    pub(super) fn resolve<'a>(
        &self,
        oid: Oid,
        from: u64,
        back: u64,
        wait: Wait,
        scratch: &'a mut Scratch,
    ) -> Result<(Payload<'a>, Tid, u64)> {
        let (mut from, mut back) = (from, back);
        loop {
            if back == 0 {
                return Err(StorageError::NotFound(oid));
            }
            if back >= from {
                return Err(self.corrupted(from, "back-pointer that does not point back"));
            }
            let head = self.head_into(back, wait, scratch)?;
            if head.header.plen > 0 {
                return Ok((self.payload(&head, wait, scratch)?, head.header.tid, back));
            }
            (from, back) = (back, head.back);
        }
    }

    /// Data, tid and position of the record that the record at `pos` takes its data from (itself, if it has any).
    /// `None` if that is a tombstone.
    pub(crate) fn data_at(&self, pos: u64) -> Result<Option<(Bytes, Tid, u64)>> {
        let mut scratch = Scratch::take();
        let head = self.head_into(pos, Wait::Yes, &mut scratch)?;
        if head.header.plen > 0 {
            let data = self.payload(&head, Wait::Yes, &scratch)?.into_bytes();
            return Ok(Some((data, head.header.tid, pos)));
        }
        match self.resolve(head.header.oid, pos, head.back, Wait::Yes, &mut scratch) {
            Ok((data, tid, pos)) => Ok(Some((data.into_bytes(), tid, pos))),
            Err(StorageError::NotFound(_)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The revision of `oid` with the greatest tid < `before`: calls `with` with data, tid and the tid of the next
    /// newer revision.
    pub(super) fn load_before<R>(
        &self,
        oid: Oid,
        before: Tid,
        wait: Wait,
        with: impl FnOnce(Payload<'_>, Tid, Option<Tid>) -> R,
    ) -> Result<Option<R>> {
        let mut pos = self.index.get(oid).ok_or_else(|| StorageError::NotFound(oid))?;
        let mut scratch = Scratch::take();
        let mut end_tid = None;
        loop {
            let head = self.head_into(pos, wait, &mut scratch)?;
            self.check_oid(oid, pos, &head)?;
            let tid = head.header.tid;
            if tid < before {
                let data = match head.header.plen {
                    0 => self.resolve(oid, pos, head.back, wait, &mut scratch)?.0,
                    _ => self.payload(&head, wait, &scratch)?,
                };
                return Ok(Some(with(data, tid, end_tid)));
            }
            end_tid = Some(tid);
            if head.header.prev == 0 {
                return Ok(None);
            }
            pos = self.previous(pos, &head)?;
        }
    }

    /// `prev` of a record, which must lie before it.
    pub(crate) fn previous(&self, pos: u64, head: &RecordHead) -> Result<u64> {
        if head.header.prev < pos {
            return Ok(head.header.prev);
        }
        Err(self.corrupted(pos, "previous record that does not come before"))
    }

    /// The revision of `oid` that `serial` wrote.
    pub(super) fn load_serial(&self, oid: Oid, serial: Tid) -> Result<Bytes> {
        let mut pos = self.index.get(oid).ok_or_else(|| StorageError::NotFound(oid))?;
        loop {
            let head = self.head_of(oid, pos)?;
            if head.header.tid == serial {
                return self.data_at(pos)?.map(|(data, ..)| data).ok_or(StorageError::NotFound(oid));
            }
            if head.header.tid < serial || head.header.prev == 0 {
                return Err(StorageError::NotFound(oid));
            }
            pos = self.previous(pos, &head)?;
        }
    }

    /// Header of the transaction at `pos`.
    pub(crate) fn txn_header(&self, pos: u64) -> Result<TxnHeader> {
        let mut buf = [0; TXN_HEADER_LEN];
        let n = self.read(&mut buf, pos, Wait::Yes)?;
        let header = TxnHeader::parse(buf.get(..n).unwrap_or_default());
        header.ok_or_else(|| self.corrupted(pos, "transaction header beyond the end"))
    }

    /// User, description and extension of the transaction at `pos`.
    pub(crate) fn txn_meta(&self, pos: u64, header: &TxnHeader) -> Result<TxnMeta> {
        let mut buf = vec![0; header.meta_len()];
        if self.read(&mut buf, pos + TXN_HEADER_LEN as u64, Wait::Yes)? < buf.len() {
            return Err(self.corrupted(pos, "transaction metadata beyond the end"));
        }
        Ok(split_meta(header, buf.into()))
    }
}

/// Cuts the metadata of a transaction in its three parts. `bytes` has at least `header.meta_len()` bytes, else the
/// missing ones are missing from the last parts.
pub(super) fn split_meta(header: &TxnHeader, mut bytes: Bytes) -> TxnMeta {
    let mut part = |len: u16| bytes.split_to(usize::from(len).min(bytes.len()));
    TxnMeta {
        user: part(header.user_len),
        description: part(header.description_len),
        extension: part(header.extension_len),
    }
}
