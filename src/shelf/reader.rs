//! [`ShelfReader`]: the client's side.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::io::preadv;

use super::{BUCKET, ENTRY, Entry, FORMAT, LABEL, Layout, MAX_DATA};
use crate::ids::{Oid, Tid};

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct ShelfReader {
    file: File,
    layout: Layout,
}

impl ShelfReader {
    /// The shelf of a server that says it has this format and capacity; `None` if it is none.
    pub(crate) fn open(file: OwnedFd, format: u64, capacity: u64) -> Option<Self> {
        let file = File::from(file);
        let layout = Layout::new(capacity).filter(|_| format == FORMAT && is_in_memory(&file))?;
        Some(Self { file, layout })
    }

    /// The revision of `oid` that is current now, if it is there. Costs two `pread`, one allocation and a checksum; one `pread` if it is not.
    pub(crate) fn load(&self, oid: Oid) -> Option<(Tid, Vec<u8>)> {
        let mut bucket = [0; BUCKET];
        self.file.read_exact_at(&mut bucket, (self.layout.bucket(oid) * BUCKET) as u64).ok()?;
        let (entries, _) = bucket.as_chunks::<ENTRY>();
        let mut entries = entries.iter().map(Entry::decode);
        let entry = entries.find(|entry| entry.oid == oid && entry.length > 0)?;
        let length = entry.length as usize;
        if length > MAX_DATA {
            return None;
        }
        let (mut label, mut data) = ([0; LABEL], vec![0; length]);
        let mut parts = [IoSliceMut::new(&mut label), IoSliceMut::new(&mut data)];
        let read = preadv(&self.file, &mut parts, entry.position).ok()?;
        let is_whole = read == LABEL + length && label == entry.label();
        (is_whole && entry.checksum_of(&data) == entry.checksum).then_some((entry.tid, data))
    }
}

/// Anything else might keep a reader waiting: a device, also a regular file of a file system that has gone away.
#[cfg(target_os = "linux")]
fn is_in_memory(file: &File) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
    is_file && rustix::fs::fstatfs(file).is_ok_and(|system| u64::try_from(system.f_type) == Ok(TMPFS))
}

#[cfg(not(target_os = "linux"))]
fn is_in_memory(_: &File) -> bool {
    false
}
