//! [`StorageFile`]: everything the engine does to Data.fs goes through this trait, so that a test can crash it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

use crate::storage::write_behind::begin_sync;

/// A file read and written at positions, by many threads at once. No shared file position, no buffer.
pub trait StorageFile: Send + Sync {
    fn len(&self) -> io::Result<u64>;

    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads until `buf` is full or the file ends; returns the number of bytes read.
    fn read_at(&self, buf: &mut [u8], pos: u64) -> io::Result<usize>;

    /// As `read_at`, but `None` if it would have to wait for the disk.
    fn try_read_at(&self, buf: &mut [u8], pos: u64) -> io::Result<Option<usize>>;

    /// Writes all of `buf`.
    fn write_at(&self, buf: &[u8], pos: u64) -> io::Result<()>;

    /// [`begin_sync`].
    fn begin_sync(&self, _from: u64, _to: u64) {}

    /// Cuts or extends the file; also gives back what was reserved beyond `len`.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes everything written so far survive a power loss, the file size included.
    fn sync_data(&self) -> io::Result<()>;

    /// Reserves disk space for the bytes `from..to` without changing the file's size. File systems that cannot do it
    /// answer `Ok`.
    fn reserve(&self, from: u64, to: u64) -> io::Result<()>;

    /// Takes the exclusive lock of the file (`flock`); `false` if another holder has it.
    fn try_lock(&self) -> io::Result<bool>;

    fn unlock(&self) -> io::Result<()>;
}

/// A file of the operating system.
#[derive(Debug)]
pub struct OsFile(pub File);

impl StorageFile for OsFile {
    /// By `lseek`, a fraction of an `fstat`: nobody uses the file's position.
    fn len(&self) -> io::Result<u64> {
        Ok(rustix::fs::seek(&self.0, rustix::fs::SeekFrom::End(0))?)
    }

    fn read_at(&self, buf: &mut [u8], pos: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.0.read_at(&mut buf[done..], pos + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn try_read_at(&self, buf: &mut [u8], pos: u64) -> io::Result<Option<usize>> {
        let want = buf.len();
        let mut slices = [io::IoSliceMut::new(buf)];
        match rustix::io::preadv2(&self.0, &mut slices, pos, ReadWriteFlags::NOWAIT) {
            // Short: the end of the file, or a page that is not in memory.
            Ok(n) if n < want && pos + (n as u64) < self.len()? => Ok(None),
            Ok(n) => Ok(Some(n)),
            Err(Errno::AGAIN) => Ok(None),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INTR) => self.read_at(buf, pos).map(Some),
            Err(e) => Err(e.into()),
        }
    }

    fn write_at(&self, buf: &[u8], pos: u64) -> io::Result<()> {
        self.0.write_all_at(buf, pos)
    }

    fn begin_sync(&self, from: u64, to: u64) {
        begin_sync(&self.0, from, to);
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn reserve(&self, from: u64, to: u64) -> io::Result<()> {
        if to <= from {
            return Ok(());
        }
        loop {
            return match rustix::fs::fallocate(&self.0, FallocateFlags::KEEP_SIZE, from, to - from) {
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS) | Ok(()) => Ok(()),
                Err(e) => Err(e.into()),
            };
        }
    }

    fn try_lock(&self) -> io::Result<bool> {
        try_flock(&self.0)
    }

    fn unlock(&self) -> io::Result<()> {
        Ok(rustix::fs::flock(&self.0, rustix::fs::FlockOperation::Unlock)?)
    }
}

/// `flock(LOCK_EX | LOCK_NB)`; `false` if somebody else holds it. File systems without locks answer `true`.
pub(crate) fn try_flock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Reads a file front to back in large pieces. Costs one `pread` for every `capacity` bytes.
pub struct Reader<'a> {
    file: &'a dyn StorageFile,
    buf: Vec<u8>,
    /// Position of `buf[0]`.
    start: u64,
    /// Bytes of `buf` that are valid.
    filled: usize,
}

impl<'a> Reader<'a> {
    pub fn new(file: &'a dyn StorageFile, capacity: usize) -> Self {
        Self { file, buf: vec![0; capacity], start: 0, filled: 0 }
    }

    /// The bytes `pos..pos + len`, fewer only at the end of the file. `len` is at most the capacity.
    pub fn bytes(&mut self, pos: u64, len: usize) -> io::Result<&[u8]> {
        let len = len.min(self.buf.len());
        let inside = pos.checked_sub(self.start).filter(|&at| at + len as u64 <= self.filled as u64);
        let at = match inside {
            Some(at) => at as usize,
            None => {
                self.filled = 0;
                self.start = pos;
                self.filled = self.file.read_at(&mut self.buf, pos)?;
                0
            }
        };
        Ok(&self.buf[at..(at + len).min(self.filled).max(at)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> OsFile {
        let f = OsFile(tempfile::tempfile().unwrap());
        f.write_at(bytes, 0).unwrap();
        f
    }

    #[test]
    fn reads_stop_at_the_end() {
        let f = file(b"0123456789");
        let mut buf = [0; 8];
        assert_eq!(f.read_at(&mut buf, 6).unwrap(), 4);
        assert_eq!(&buf[..4], b"6789");
        assert_eq!(f.try_read_at(&mut buf, 6).unwrap(), Some(4));
        assert_eq!(f.read_at(&mut buf, 60).unwrap(), 0);
    }

    #[test]
    fn reserving_does_not_change_the_size() {
        let f = file(b"0123456789");
        f.reserve(10, 1 << 20).unwrap();
        assert_eq!(f.len().unwrap(), 10);
    }

    #[test]
    fn reader_crosses_its_pieces() {
        let f = file(b"0123456789");
        let mut r = Reader::new(&f, 4);
        assert_eq!(r.bytes(0, 2).unwrap(), b"01");
        assert_eq!(r.bytes(3, 3).unwrap(), b"345");
        assert_eq!(r.bytes(1, 4).unwrap(), b"1234");
        assert_eq!(r.bytes(8, 4).unwrap(), b"89");
        assert_eq!(r.bytes(12, 4).unwrap(), b"");
    }
}
