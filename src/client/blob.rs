//! Blobs on their way: downloads written as they arrive, uploads cut into chunks.
//!
//! Only whole files get their final name, and a download knows its own file, so interleaved ones do not mix.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustc_hash::FxHashMap;

use super::error::{ClientError, Result};
use crate::ids::{Oid, Tid};
use crate::wire::{Call, TxnKey};

/// Size of a chunk, as ZEO's client sends it.
pub(super) const CHUNK: usize = 59_000;

/// Downloads in progress, by the blob they are of.
#[derive(Default)]
pub(super) struct Downloads(Mutex<FxHashMap<(Oid, Tid), Download>>);

struct Download {
    partial: PathBuf,
    target: PathBuf,
    file: Option<File>,
    bytes: u64,
    /// `Some(Ok)`: the file has its final name.
    ended: Option<io::Result<u64>>,
}

impl Downloads {
    /// Says where the blob is to go, before it is asked for. The caller holds the lock of the directory.
    pub(super) fn expect(&self, oid: Oid, serial: Tid, target: &Path) {
        let mut partial = target.as_os_str().to_owned();
        partial.push(".dl");
        let download = Download {
            partial: partial.into(),
            target: target.to_owned(),
            file: None,
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
            file.write_all(chunk)?;
            download.bytes += chunk.len() as u64;
            Ok(())
        });
    }

    pub(super) fn stop(&self, oid: Oid, serial: Tid) {
        self.with(oid, serial, |download| {
            let Some(file) = download.file.take() else {
                return Err(io::Error::other("end before the start"));
            };
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The calls that upload `path` as the blob of a stored object: constant memory, whatever its size.
pub(super) struct Upload {
    file: File,
    path: PathBuf,
    state: State,
    end: Option<Call>,
}

enum State {
    Start,
    Chunks,
    Done,
}

impl Upload {
    pub(super) fn open(path: &Path, oid: Oid, serial: Tid, data: Bytes, txn: TxnKey) -> Result<Self> {
        let file =
            File::open(path).map_err(|error| ClientError::io(format!("blob {}", path.display()), error))?;
        let end = Some(Call::StoreBlobEnd { oid, serial, data, txn });
        Ok(Self { file, path: path.to_owned(), state: State::Start, end })
    }
}

impl Iterator for Upload {
    type Item = Result<Call>;

    fn next(&mut self) -> Option<Result<Call>> {
        match self.state {
            State::Start => {
                self.state = State::Chunks;
                Some(Ok(Call::StoreBlobStart))
            }
            State::Chunks => {
                let mut chunk = Vec::with_capacity(CHUNK);
                match (&mut self.file).take(CHUNK as u64).read_to_end(&mut chunk) {
                    Ok(0) => {
                        self.state = State::Done;
                        self.end.take().map(Ok)
                    }
                    Ok(_) => Some(Ok(Call::StoreBlobChunk { chunk: chunk.into() })),
                    Err(error) => {
                        self.state = State::Done;
                        Some(Err(ClientError::io(format!("blob {}", self.path.display()), error)))
                    }
                }
            }
            State::Done => None,
        }
    }
}
