//! Blobs up and down, in chunks: neither direction holds more than a buffer of a file in memory, and neither touches
//! the disk on the event loop.
//!
//! Up: chunks are collected and written by a worker thread; the client's next requests wait for each write. Down: a
//! worker thread reads ahead by one buffer; nothing else is written to the connection until the file is through, as
//! clients rely on the sequence being contiguous.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::fault;
use super::hub::Hub;
use super::session::{Outcome, ReplyTo, Served, Session};
use super::transaction::TemporaryFile;
use crate::ids::{Oid, Tid};
use crate::pickle::Value;
use crate::storage::{Storage, StorageError};
use crate::wire::{Fault, Notice, TxnKey};

/// What ZEO sends, and so what its clients are known to take.
const CHUNK: usize = 59_000;
/// Read or written at a time.
const BUFFER: usize = CHUNK * 16;

/// A blob that is being received.
pub(crate) struct Upload {
    storage: Arc<dyn Storage>,
    file: Option<(File, TemporaryFile)>,
    buffer: Vec<u8>,
}

impl Upload {
    /// Writes out the buffer; creates the file first, if it is not there.
    fn write(&mut self) -> Result<(), StorageError> {
        if self.file.is_none() {
            let directory = self.storage.temporary_directory()?;
            self.file = Some(create_temporary(&directory).map_err(|error| {
                StorageError::io(format!("cannot create a file in {}", directory.display()), error)
            })?);
        }
        let Some((file, _)) = &mut self.file else { return Ok(()) };
        file.write_all(&self.buffer).map_err(|error| StorageError::io("cannot write a blob", error))?;
        self.buffer.clear();
        Ok(())
    }
}

fn create_temporary(directory: &Path) -> io::Result<(File, TemporaryFile)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("zeo-{}-{number}.tmp", std::process::id()));
        match File::options().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, TemporaryFile(path))),
            // Left behind by a process of the same id.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// A blob that is being sent. The session writes nothing else while it has one.
pub(crate) struct BlobStream {
    oid: Oid,
    serial: Tid,
    to: ReplyTo,
    /// Reads the next buffer.
    pub(crate) read: JoinHandle<io::Result<(File, Vec<u8>)>>,
}

fn read_ahead(mut file: File) -> io::Result<(File, Vec<u8>)> {
    let mut buffer = Vec::with_capacity(BUFFER);
    (&mut file).take(BUFFER as u64).read_to_end(&mut buffer)?;
    Ok((file, buffer))
}

impl Session {
    pub(crate) fn store_blob_start(&mut self, hub: &Hub) -> Served {
        if !hub.capabilities.blobs {
            return Err(Fault::type_error("Blobs are not supported"));
        }
        if self.upload.is_some() {
            return Err(Fault::new("builtins.AssertionError", "a blob upload is already in progress"));
        }
        self.upload = Some(Upload { storage: Arc::clone(&hub.storage), file: None, buffer: Vec::new() });
        Ok(Outcome::Reply(Value::None))
    }

    pub(crate) fn store_blob_chunk(&mut self, chunk: &[u8]) -> Served {
        let Some(upload) = &mut self.upload else {
            return Err(Fault::new("builtins.AssertionError", "a blob chunk without storeBlobStart"));
        };
        upload.buffer.extend_from_slice(chunk);
        if upload.buffer.len() >= BUFFER
            && let Some(mut upload) = self.upload.take()
        {
            self.background_in_order(
                move || upload.write().map(|()| upload),
                |session, written| match written {
                    Ok(upload) => session.upload = Some(upload),
                    Err(error) => session.close(format!("storeBlobChunk failed: {error}")),
                },
            );
        }
        Ok(Outcome::Reply(Value::None))
    }

    pub(crate) fn store_blob_end(
        &mut self,
        to: &mut ReplyTo,
        oid: Oid,
        serial: Tid,
        data: Bytes,
        key: TxnKey,
    ) -> Served {
        let Some(mut upload) = self.upload.take() else {
            return Err(Fault::new("builtins.AssertionError", "storeBlobEnd without storeBlobStart"));
        };
        let to = to.take();
        self.background_in_order(
            move || upload.write().map(|()| upload),
            move |session, written| {
                let served = match written.map(|upload| upload.file) {
                    Ok(Some((_, file))) => session.stage_blob(oid, serial, data, file, &key),
                    Ok(None) => Ok(Outcome::Reply(Value::None)),
                    Err(error) => Err(fault::of(&error)),
                };
                session.answer(to, served);
            },
        );
        Ok(Outcome::Later)
    }

    /// The client has put the file into the shared blob directory itself; only its name is checked, and that it stays
    /// inside the directory of its object.
    pub(crate) fn store_blob_shared(
        &mut self,
        hub: &Hub,
        oid: Oid,
        serial: Tid,
        data: Bytes,
        filename: &str,
        key: &TxnKey,
    ) -> Served {
        let is_plain = !filename.contains(['/', '\\', '\0']) && !filename.starts_with('.');
        let stem = filename.strip_suffix(".tmp").or_else(|| {
            let mut characters = filename.chars();
            characters.next_back()?;
            characters.as_str().strip_suffix(".tmp")
        });
        if !is_plain || stem.is_none() {
            tracing::error!(client = %self.who(), filename, "storeBlobShared with a name that is not allowed");
            return Err(Fault::value_error(format!("{filename:?} is no name of an uncommitted blob")));
        }
        let path = hub.storage.blob_oid_directory(oid).map_err(|error| fault::of(&error))?.join(filename);
        self.stage_blob(oid, serial, data, TemporaryFile(path), key)
    }

    pub(crate) fn send_blob(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, oid: Oid, serial: Tid) -> Served {
        if !hub.capabilities.blobs {
            return Err(Fault::type_error("Blobs are not supported"));
        }
        let storage = Arc::clone(&hub.storage);
        let to = to.take();
        self.background_in_order(
            move || open_blob(&*storage, oid, serial),
            move |session, opened| match opened {
                Err(error) => session.answer(to, Err(fault::of(&error))),
                Ok(_) if to.is_async => {}
                Ok(file) => {
                    session.notify(&Notice::ReceiveBlobStart { oid, serial });
                    let read = session.runtime.spawn_blocking(move || read_ahead(file));
                    session.stream = Some(BlobStream { oid, serial, to, read });
                }
            },
        );
        Ok(Outcome::Later)
    }

    /// Writes a buffer that was read, and starts reading the next.
    pub(crate) fn stream_on(&mut self, read: io::Result<(File, Vec<u8>)>) {
        let Some(BlobStream { oid, serial, to, .. }) = self.stream.take() else { return };
        let (file, buffer) = match read {
            Ok(read) => read,
            // The client cannot be told in the middle of the file.
            Err(error) => {
                return self.close(format!("the blob of {oid} at {serial} cannot be read: {error}"));
            }
        };
        let at_end = buffer.len() < BUFFER;
        self.write_chunks(oid, serial, buffer);
        if !at_end {
            let read = self.runtime.spawn_blocking(move || read_ahead(file));
            self.stream = Some(BlobStream { oid, serial, to, read });
            return;
        }
        self.notify(&Notice::ReceiveBlobStop { oid, serial });
        self.answer(to, Ok(Outcome::Reply(Value::None)));
    }

    fn write_chunks(&mut self, oid: Oid, serial: Tid, buffer: Vec<u8>) {
        let mut rest = Bytes::from(buffer);
        while !rest.is_empty() {
            let chunk = rest.split_to(rest.len().min(CHUNK));
            self.notify(&Notice::ReceiveBlobChunk { oid, serial, chunk });
        }
    }
}

fn open_blob(storage: &dyn Storage, oid: Oid, serial: Tid) -> Result<File, StorageError> {
    let path: PathBuf = storage.blob_path(oid, serial)?;
    File::open(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => StorageError::NoBlob { oid, serial },
        _ => StorageError::io(format!("cannot open {}", path.display()), error),
    })
}
