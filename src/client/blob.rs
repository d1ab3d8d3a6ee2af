//! Blobs on their way: downloads written as they arrive, uploads cut into chunks.
//!
//! Only whole files get their final name, and a download knows its own file, so interleaved ones do not mix.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use rustc_hash::FxHashMap;

use super::error::{ClientError, Result};
use crate::ids::{Oid, Tid};
use crate::wire::{Call, TxnKey};

/// Size of a chunk. ZEO's client sends 59 000 bytes, its server takes any size. Large enough for the messages around
/// chunks not to count, small enough to be in the processor's cache when the server writes it to the disk.
pub(super) const CHUNK: usize = 256 << 10;

/// Received chunks are collected up to here before they are written: fewer system calls, and less that begins or ends in the middle of a page.
const WRITE: usize = 512 << 10;

/// How far a blob is on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobProgress {
    pub is_upload: bool,
    pub oid: Oid,
    pub bytes_done: u64,
    /// Unknown of a download.
    pub bytes_total: Option<u64>,
}

/// Blobs on their way, and how much has gone either way since the client was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlobStats {
    pub uploaded: u64,
    pub downloaded: u64,
    pub transfers: Vec<BlobProgress>,
}

/// The upload in progress; there is only one, as a client commits one transaction at a time.
#[derive(Default)]
pub(super) struct Uploads(Mutex<(u64, Option<BlobProgress>)>);

impl Uploads {
    /// `None`: nothing is uploaded any more.
    pub(super) fn set(&self, now: Option<BlobProgress>) {
        self.lock().1 = now;
    }

    pub(super) fn advance(&self, bytes: usize) {
        let mut uploads = self.lock();
        uploads.0 += bytes as u64;
        if let Some(now) = &mut uploads.1 {
            now.bytes_done += bytes as u64;
        }
    }

    fn lock(&self) -> MutexGuard<'_, (u64, Option<BlobProgress>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Downloads in progress, by the blob they are of.
#[derive(Default)]
pub(super) struct Downloads {
    by_blob: Mutex<FxHashMap<(Oid, Tid), Download>>,
    bytes: AtomicU64,
}

struct Download {
    partial: PathBuf,
    target: PathBuf,
    file: Option<File>,
    /// Received and not yet written.
    buffer: Vec<u8>,
    bytes: u64,
    /// `Some(Ok)`: the file has its final name.
    ended: Option<io::Result<u64>>,
}

impl Downloads {
    /// What is on its way in either direction.
    pub(super) fn stats(&self, uploads: &Uploads) -> BlobStats {
        let (uploaded, upload) = uploads.lock().clone();
        let downloads = self.lock();
        let downloads = downloads.iter().map(|((oid, _), download)| BlobProgress {
            is_upload: false,
            oid: *oid,
            bytes_done: download.bytes,
            bytes_total: None,
        });
        let transfers = upload.into_iter().chain(downloads).collect();
        BlobStats { uploaded, downloaded: self.bytes.load(Ordering::Relaxed), transfers }
    }

    /// Says where the blob is to go, before it is asked for. The caller holds the lock of the directory.
    pub(super) fn expect(&self, oid: Oid, serial: Tid, target: &Path) {
        let mut partial = target.as_os_str().to_owned();
        partial.push(".dl");
        let download = Download {
            partial: partial.into(),
            target: target.to_owned(),
            file: None,
            buffer: Vec::new(),
            bytes: 0,
            ended: None,
        };
        self.lock().insert((oid, serial), download);
    }

    /// How it ended: its size, or `None` if the server sent nothing.
    pub(super) fn take(&self, oid: Oid, serial: Tid) -> io::Result<Option<u64>> {
        let Some(download) = self.lock().remove(&(oid, serial)) else { return Ok(None) };
        match download.ended {
            Some(ended) => ended.map(Some),
            None => {
                if download.file.is_some() {
                    let _ = fs::remove_file(&download.partial);
                }
                Ok(None)
            }
        }
    }

    pub(super) fn start(&self, oid: Oid, serial: Tid) {
        self.with(oid, serial, |download| {
            let _ = fs::remove_file(&download.partial);
            download.file =
                Some(OpenOptions::new().write(true).create_new(true).mode(0o600).open(&download.partial)?);
            Ok(())
        });
    }

    pub(super) fn chunk(&self, oid: Oid, serial: Tid, chunk: &[u8]) {
        self.with(oid, serial, |download| {
            let Some(file) = &mut download.file else {
                return Err(io::Error::other("chunk before the start"));
            };
            if download.buffer.len() + chunk.len() > WRITE {
                file.write_all(&download.buffer)?;
                download.buffer.clear();
            }
            download.buffer.extend_from_slice(chunk);
            download.bytes += chunk.len() as u64;
            self.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            Ok(())
        });
    }

    pub(super) fn stop(&self, oid: Oid, serial: Tid) {
        self.with(oid, serial, |download| {
            let Some(mut file) = download.file.take() else {
                return Err(io::Error::other("end before the start"));
            };
            file.write_all(&std::mem::take(&mut download.buffer))?;
            file.set_permissions(fs::Permissions::from_mode(0o400))?;
            fs::rename(&download.partial, &download.target)?;
            download.ended = Some(Ok(download.bytes));
            Ok(())
        });
    }

    /// The first error ends a download; its caller gets it.
    fn with(&self, oid: Oid, serial: Tid, step: impl FnOnce(&mut Download) -> io::Result<()>) {
        let mut downloads = self.lock();
        let Some(download) = downloads.get_mut(&(oid, serial)) else {
            tracing::error!(%oid, %serial, "the server sent a blob that nobody asked for");
            return;
        };
        if download.ended.is_some() {
            return;
        }
        if let Err(error) = step(download) {
            download.file = None;
            let _ = fs::remove_file(&download.partial);
            download.ended = Some(Err(error));
        }
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<(Oid, Tid), Download>> {
        self.by_blob.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A blob on its way to the server: constant memory, whatever its size.
pub(super) struct Upload {
    file: File,
    pub(super) size: u64,
    path: PathBuf,
    pub(super) oid: Oid,
    /// The call that ends it.
    pub(super) end: Call,
}

impl Upload {
    pub(super) fn open(path: &Path, oid: Oid, serial: Tid, data: Bytes, txn: TxnKey) -> Result<Self> {
        let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (size, file) =
            opened.map_err(|error| ClientError::io(format!("blob {}", path.display()), error))?;
        let end = Call::StoreBlobEnd { oid, serial, data, txn };
        Ok(Self { file, size, path: path.to_owned(), oid, end })
    }

    /// Offset and length of each chunk; none of an empty file.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u64, usize)> + use<> {
        let size = self.size;
        (0..size.div_ceil(CHUNK as u64)).map(move |number| {
            let offset = number * CHUNK as u64;
            (offset, (size - offset).min(CHUNK as u64) as usize)
        })
    }

    /// Appends a chunk to `out`.
    pub(super) fn read(&self, offset: u64, length: usize, out: &mut BytesMut) -> Result<()> {
        let start = out.len();
        out.resize(start + length, 0);
        let place = out.get_mut(start..).unwrap_or_default();
        self.file.read_exact_at(place, offset).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: io::Error) -> ClientError {
        ClientError::io(format!("blob {}", self.path.display()), error)
    }
}
