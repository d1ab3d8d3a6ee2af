//! The data of a revision: in memory, or still in the cache's file of values, to be read and verified when first used.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::ids::{Oid, Tid};

const MAGIC: [u8; 8] = *b"ZRV2\0\0\0\0";
/// Magic and generation.
pub(super) const HEADER: u64 = 16;

#[derive(Clone)]
pub(super) enum Value {
    Memory(Bytes),
    Filed(Filed),
}

impl Value {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Memory(data) => data.len(),
            Self::Filed(place) => place.length as usize,
        }
    }
}

/// Where data lies in a file of values.
#[derive(Clone)]
pub(super) struct Filed {
    pub(super) file: Arc<Values>,
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) checksum: u32,
}

impl Filed {
    /// The data, if it is there undamaged. One `pread`, one checksum.
    pub(super) fn read(&self, oid: Oid, tid: Tid) -> Option<Bytes> {
        // Bounded: that so much is in the file was looked at when it was opened.
        let mut data = vec![0; self.length as usize];
        self.file.file.read_exact_at(&mut data, self.offset).ok()?;
        (self.file.checksum(oid, tid, &data) == self.checksum).then(|| data.into())
    }
}

/// A file of values: a header, then data after data. What lies where is in the index file of the same generation.
pub(super) struct Values {
    file: File,
    generation: u64,
}

impl Values {
    /// An empty one, in place of whatever is there.
    pub(super) fn create(path: &Path, generation: u64) -> io::Result<Self> {
        let _ = std::fs::remove_file(path);
        let file = OpenOptions::new().read(true).append(true).create_new(true).open(path)?;
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&generation.to_be_bytes());
        (&file).write_all(&header)?;
        Ok(Self { file, generation })
    }

    /// The one of that generation and its length; `None` if the file is missing or another.
    pub(super) fn open(path: &Path, generation: u64, write: bool) -> Option<(Self, u64)> {
        let file = OpenOptions::new().read(true).append(write).open(path).ok()?;
        let mut header = [0; HEADER as usize];
        file.read_exact_at(&mut header, 0).ok()?;
        let length = file.metadata().ok()?.len();
        let right = header[..8] == MAGIC && header[8..] == generation.to_be_bytes();
        right.then_some((Self { file, generation }, length))
    }

    pub(super) fn append(&self, data: &[u8]) -> io::Result<()> {
        (&self.file).write_all(data)
    }

    /// Of the data and of everything that says whose it is: a value found in a wrong place is a damaged one.
    pub(super) fn checksum(&self, oid: Oid, tid: Tid, data: &[u8]) -> u32 {
        let mut crc = flate2::Crc::new();
        for number in [self.generation, oid.0, tid.0] {
            crc.update(&number.to_be_bytes());
        }
        crc.update(data);
        crc.sum()
    }
}
