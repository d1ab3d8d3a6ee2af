//! [`Output`]: the packed file while it is written, front to back.
//!
//! Costs four `pwrite` and one `fadvise` a mebibyte: in small pieces, because the system lets a load that waits for the processor have
//! it between two of them only. What has been written is on its way to the disk at once, and there every 64 MiB, so that the last
//! sync, and the syncs of commits meanwhile, do not wait for gigabytes.

use std::sync::Arc;

use super::super::file::StorageFile;
use crate::storage::write_behind::PIECE;
use crate::storage::{Result, StorageError, WriteBehind};

const BUFFER: usize = PIECE;
const SYNC_EVERY: u64 = 64 << 20;

pub(super) struct Output {
    file: Arc<dyn StorageFile>,
    name: String,
    buf: Vec<u8>,
    /// Position of `buf[0]`: what is before it has been written.
    written: u64,
    behind: WriteBehind,
    synced: u64,
}

impl Output {
    pub(super) fn new(file: Arc<dyn StorageFile>, name: String) -> Self {
        Self {
            file,
            name,
            buf: Vec::with_capacity(BUFFER),
            written: 0,
            behind: WriteBehind::new(0),
            synced: 0,
        }
    }

    pub(super) fn file(&self) -> &Arc<dyn StorageFile> {
        &self.file
    }

    /// Where the next byte goes.
    pub(super) fn pos(&self) -> u64 {
        self.written + self.buf.len() as u64
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.buf.len() == BUFFER {
                self.flush()?;
                self.behind.wrote(self.written, |from, to| self.file.begin_sync(from, to));
                if self.written - self.synced >= SYNC_EVERY {
                    self.sync()?;
                }
            }
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER - self.buf.len()));
            self.buf.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    /// Overwrites 8 bytes written earlier.
    pub(super) fn patch(&mut self, pos: u64, value: u64) -> Result<()> {
        let bytes = value.to_be_bytes();
        if pos + 8 <= self.written {
            return self.file.write_at(&bytes, pos).map_err(|e| self.failed(e));
        }
        for (at, byte) in (pos..).zip(bytes) {
            match at.checked_sub(self.written).and_then(|at| self.buf.get_mut(at as usize)) {
                Some(buffered) => *buffered = byte,
                None => self.file.write_at(&[byte], at).map_err(|e| self.failed(e))?,
            }
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        self.file.write_at(&self.buf, self.written).map_err(|e| self.failed(e))?;
        self.written += self.buf.len() as u64;
        self.buf.clear();
        Ok(())
    }

    /// Everything is on the disk afterwards.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.flush()?;
        self.file.sync_data().map_err(|e| self.failed(e))?;
        self.synced = self.written;
        Ok(())
    }

    fn failed(&self, source: std::io::Error) -> StorageError {
        StorageError::io(format!("cannot write {}; the storage is as it was", self.name), source)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::file::OsFile;
    use super::*;

    #[test]
    fn patches_reach_what_is_written_and_what_is_not() {
        let file: Arc<dyn StorageFile> = Arc::new(OsFile(tempfile::tempfile().unwrap()));
        let mut out = Output::new(file.clone(), "x".into());
        let bytes: Vec<u8> = (0..BUFFER * 2 + 100).map(|i| i as u8).collect();
        out.write(&bytes).unwrap();
        assert_eq!((out.pos(), out.written), (bytes.len() as u64, 2 * BUFFER as u64));
        let mut expected = bytes;
        for pos in [5, BUFFER - 4, 2 * BUFFER - 3, 2 * BUFFER + 50] {
            let value = u64::MAX - pos as u64;
            out.patch(pos as u64, value).unwrap();
            expected[pos..pos + 8].copy_from_slice(&value.to_be_bytes());
        }
        out.sync().unwrap();
        let mut read = vec![0; expected.len()];
        file.read_at(&mut read, 0).unwrap();
        assert!(read == expected);
    }
}
