//! [`StagedData`]: the data of a record that is not committed yet, in memory or in a transaction's [`SpillFile`].
//!
//! A transaction may be larger than the memory that a server can spare: beyond a threshold its records go to a file
//! without a name, and from there, piece by piece, to where the engine puts them. The file is gone with the last record
//! that refers to it, also when the process is killed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rustix::fs::{Mode, OFlags};

use super::{Result, StorageError};

/// Data of one staged record.
#[derive(Clone, Debug)]
pub enum StagedData {
    Memory(Bytes),
    Spilled(Spilled),
}

/// A piece of a [`SpillFile`].
#[derive(Clone, Debug)]
pub struct Spilled {
    file: Arc<SpillFile>,
    pos: u64,
    len: usize,
}

impl StagedData {
    pub fn len(&self) -> usize {
        match self {
            Self::Memory(data) => data.len(),
            Self::Spilled(spilled) => spilled.len,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of it, in memory. Cost: nothing, or for spilled data one `pread` and an allocation.
    ///
    /// # Errors
    /// `Io` if the file cannot be read back.
    pub fn to_bytes(&self) -> Result<Bytes> {
        match self {
            Self::Memory(data) => Ok(data.clone()),
            Self::Spilled(Spilled { file, pos, len }) => {
                let mut data = vec![0; *len];
                file.read_at(&mut data, *pos)
                    .map_err(|error| StorageError::io("cannot read back a staged record", error))?;
                Ok(data.into())
            }
        }
    }
}

impl Spilled {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads the bytes from `offset` on into the whole of `buf`.
    ///
    /// # Errors
    /// `UnexpectedEof` beyond the end of the piece; those of the file.
    pub fn read_at(&self, buf: &mut [u8], offset: usize) -> io::Result<()> {
        if offset.saturating_add(buf.len()) > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.read_at(buf, self.pos + offset as u64)
    }
}

impl<T: Into<Bytes>> From<T> for StagedData {
    fn from(data: T) -> Self {
        Self::Memory(data.into())
    }
}

/// The temporary file of one transaction's records: appended to by one, read at positions by any.
#[derive(Debug)]
pub struct SpillFile {
    file: File,
    directory: PathBuf,
    len: AtomicU64,
}

impl SpillFile {
    /// A new file in `directory`, without a name there.
    ///
    /// # Errors
    /// `Io`, naming the directory.
    pub fn create(directory: &Path) -> Result<Self> {
        let file = unnamed(directory).map_err(|error| {
            let text = format!("cannot create a temporary file in {}", directory.display());
            StorageError::io(text, error)
        })?;
        Ok(Self { file, directory: directory.to_owned(), len: AtomicU64::new(0) })
    }

    /// Appends the records; answers where each is now. One caller at a time.
    ///
    /// Cost: a `write` for about each 256 KiB, one copy of smaller records.
    ///
    /// # Errors
    /// `Io`, naming the directory: most likely its disk is full.
    pub fn append(self: &Arc<Self>, records: &[Bytes]) -> Result<Vec<StagedData>> {
        const PIECE: usize = 256 << 10;
        let mut places = Vec::with_capacity(records.len());
        let mut end = self.len.load(Ordering::Relaxed);
        let mut piece = Vec::with_capacity(PIECE);
        let flush = |piece: &mut Vec<u8>, end: u64| {
            let written = self.file.write_all_at(piece, end - piece.len() as u64);
            piece.clear();
            // It is nobody's hurry; loads may wait for the processor.
            std::thread::yield_now();
            written
        };
        let mut write = || {
            for record in records {
                if piece.len() + record.len() > PIECE {
                    flush(&mut piece, end)?;
                }
                places.push(StagedData::Spilled(Spilled { file: self.clone(), pos: end, len: record.len() }));
                end += record.len() as u64;
                if record.len() > PIECE {
                    self.file.write_all_at(record, end - record.len() as u64)?;
                } else {
                    piece.extend_from_slice(record);
                }
            }
            flush(&mut piece, end)
        };
        write().map_err(|error| {
            let text =
                format!("cannot keep the records of a large transaction in {}", self.directory.display());
            StorageError::io(text, error)
        })?;
        self.len.store(end, Ordering::Relaxed);
        Ok(places)
    }

    fn read_at(&self, buf: &mut [u8], pos: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, pos)
    }
}

/// A file that has no name from the start, or where the file system cannot do that, loses it at once.
fn unnamed(directory: &Path) -> io::Result<File> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::TMPFILE;
    if let Ok(file) = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
        return Ok(file.into());
    }
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!(".zeo-staged-{}-{number}.tmp", std::process::id()));
        match File::options().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            // Left behind by a process of the same id that was killed in between.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spilled_is_read_back_and_leaves_no_name() {
        let directory = tempfile::tempdir().unwrap();
        let file = Arc::new(SpillFile::create(directory.path()).unwrap());
        let sizes = [0, 1, 300_000, 17, 256 << 10, 5];
        let records: Vec<Bytes> =
            sizes.iter().enumerate().map(|(i, &size)| vec![i as u8 + 1; size].into()).collect();
        let mut places = file.append(&records[..3]).unwrap();
        places.extend(file.append(&records[3..]).unwrap());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        drop(file);
        for (place, record) in places.iter().zip(&records) {
            assert_eq!(place.len(), record.len());
            assert_eq!(place.to_bytes().unwrap(), record);
        }
        let StagedData::Spilled(last) = &places[5] else { panic!() };
        let mut two = [0; 2];
        last.read_at(&mut two, 3).unwrap();
        assert_eq!(two, [6, 6]);
        assert!(last.read_at(&mut two, 4).is_err());
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let file = File::options().read(true).write(true).open("/dev/full").unwrap();
        let file = SpillFile { file, directory: "/here".into(), len: AtomicU64::new(0) };
        let error = Arc::new(file).append(&[Bytes::from("x")]).unwrap_err();
        assert!(error.to_string().contains("/here") && error.to_string().contains("No space"), "{error}");
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = SpillFile::create(Path::new("/nonexistent")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
