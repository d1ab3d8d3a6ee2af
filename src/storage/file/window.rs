//! [`Window`]: records at positions that mostly ascend, wherever their back-pointers lead.

use super::file::StorageFile;
use super::format::{DATA_HEADER_LEN, DataHeader, be64};
use crate::ids::Oid;
use crate::storage::{Result, StorageError};

/// Read for a record that stands alone: most are smaller.
const SMALL_READ: usize = 2 << 10;
/// Read where others follow close behind.
const LARGE_READ: usize = 128 << 10;

/// One read for a record that stands alone, few for records close to each other.
pub(super) struct Window<'a> {
    file: &'a dyn StorageFile,
    name: &'a str,
    buf: Vec<u8>,
    start: u64,
    filled: usize,
}

impl<'a> Window<'a> {
    pub(super) fn new(file: &'a dyn StorageFile, name: &'a str) -> Self {
        Self { file, name, buf: Vec::new(), start: 0, filled: 0 }
    }

    /// Object and data of the record at `pos`, wherever its back-pointers lead; `None` for what does not exist.
    /// `near`: the next call will be about a record close behind.
    pub(super) fn data(&mut self, mut pos: u64, near: bool) -> Result<Option<(Oid, &[u8])>> {
        let mut first = None;
        loop {
            let (header, back) = self.header(pos, near)?;
            let oid = *first.get_or_insert(header.oid);
            if header.plen > 0 {
                let len = usize::try_from(header.plen).unwrap_or(usize::MAX);
                return Ok(Some((oid, self.bytes(pos + DATA_HEADER_LEN as u64, len, near)?)));
            }
            match back {
                0 => return Ok(None),
                back if back < pos => pos = back,
                _ => return Err(self.corrupted(pos, "back-pointer does not point backwards")),
            }
        }
    }

    fn header(&mut self, pos: u64, near: bool) -> Result<(DataHeader, u64)> {
        let bytes = self.bytes(pos, DATA_HEADER_LEN + 8, near)?;
        match (DataHeader::parse(bytes), be64(bytes, DATA_HEADER_LEN)) {
            (Some(header), Some(back)) => Ok((header, back)),
            _ => Err(self.corrupted(pos, "record header is cut off")),
        }
    }

    /// A record is followed by at least 8 bytes (the transaction's length), so 8 bytes more than a header exist.
    fn bytes(&mut self, pos: u64, len: usize, near: bool) -> Result<&[u8]> {
        let inside = |start: u64, have: usize| {
            let at = usize::try_from(pos.checked_sub(start)?).ok()?;
            (at.checked_add(len)? <= have).then_some(at)
        };
        let at = match inside(self.start, self.filled) {
            Some(at) => at,
            None => {
                self.fill(pos, len.max(if near { LARGE_READ } else { SMALL_READ }))?;
                inside(self.start, self.filled)
                    .ok_or_else(|| self.corrupted(pos, "the file ends in a record"))?
            }
        };
        Ok(self.buf.get(at..at + len).unwrap_or_default())
    }

    /// Reads `want` bytes, growing the buffer piece by piece: the length may be nonsense.
    fn fill(&mut self, pos: u64, want: usize) -> Result<()> {
        (self.start, self.filled) = (pos, 0);
        while self.filled < want {
            let end = want.min(self.filled + self.filled.max(LARGE_READ));
            if self.buf.len() < end {
                self.buf.resize(end, 0);
            }
            let piece = self.buf.get_mut(self.filled..end).unwrap_or_default();
            let read = self.file.read_at(piece, pos + self.filled as u64);
            let read = read.map_err(|e| StorageError::io(format!("cannot read {}", self.name), e))?;
            self.filled += read;
            if self.filled < end {
                break;
            }
        }
        Ok(())
    }

    fn corrupted(&self, pos: u64, what: &str) -> StorageError {
        StorageError::Corrupted { path: self.name.to_owned(), pos, what: what.into() }
    }
}
