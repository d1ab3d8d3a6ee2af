//! Blobs up and down, in chunks: neither direction holds more than some megabytes of a file in memory, and neither
//! touches the disk on the event loop.
//!
//! Up: chunks are collected and written by a worker thread while the next ones are received; the client waits only if
//! the disk cannot keep up. What is written is on its way to the disk at once, so that the sync before the vote has little
//! left to wait for. Down: a worker thread reads ahead by one buffer; nothing else is written to the connection until the
//! file is through, as clients rely on the sequence being contiguous.
//!
//! Cost of an upload beside the socket's: two copies (into a buffer that is used again and again, and into the page cache), a
//! thread switch for about a megabyte.

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
use crate::storage::blob::RECEIVED;
use crate::storage::write_behind::{PIECE, begin_sync};
use crate::storage::{Storage, StorageError, WriteBehind};
use crate::wire::{Fault, Notice, TxnKey};

/// What ZEO sends, and so what its clients are known to take.
const CHUNK: usize = 59_000;
/// Read at a time.
const BUFFER: usize = CHUNK * 16;
/// Received before it is written.
const WRITE: usize = 1 << 20;
/// Received while something else is written; a client that sends more waits.
const WAITING: usize = 4 << 20;

/// A blob that is being received.
pub(crate) struct Upload {
    /// Tells it from others of its session, when news of a write comes.
    number: u64,
    buffer: Vec<u8>,
    /// The buffer that was written last: memory that is in the processor's cache is worth a copy.
    spare: Vec<u8>,
    writer: Writer,
    /// Everything has been received.
    end: Option<End>,
    _counted: Counted,
}

/// The arguments of `storeBlobShared`.
pub(crate) struct SharedBlob {
    pub(crate) oid: Oid,
    pub(crate) serial: Tid,
    pub(crate) data: Bytes,
    pub(crate) filename: String,
    pub(crate) key: TxnKey,
}

/// A transfer as the statistics see it, while it lives.
struct Counted(Arc<AtomicU64>);

impl Counted {
    fn new(gauge: &Arc<AtomicU64>) -> Self {
        gauge.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(gauge))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Writer {
    Idle(Option<UploadFile>),
    Busy,
    /// The transaction will hear of it in its vote.
    Failed(StorageError),
}

struct End {
    to: ReplyTo,
    oid: Oid,
    serial: Tid,
    data: Bytes,
    key: TxnKey,
}

struct UploadFile {
    file: File,
    temporary: TemporaryFile,
    len: u64,
    behind: WriteBehind,
}

impl Upload {
    /// Whether later requests of the client have to wait.
    pub(crate) fn is_full(&self) -> bool {
        self.buffer.len() >= WAITING || self.end.is_some()
    }
}

impl UploadFile {
    /// `ending`: of the file's name.
    fn create(storage: &dyn Storage, ending: &str) -> Result<Self, StorageError> {
        let directory = storage.temporary_directory()?;
        let (file, temporary) = create_temporary(&directory, ending).map_err(|error| {
            StorageError::io(format!("cannot create a file in {}", directory.display()), error)
        })?;
        Ok(Self { file, temporary, len: 0, behind: WriteBehind::new(0) })
    }

    fn write(&mut self, data: &[u8]) -> Result<(), StorageError> {
        self.append(data).map_err(|error| {
            StorageError::io(format!("cannot write a blob to {}", self.temporary.0.display()), error)
        })
    }

    fn append(&mut self, data: &[u8]) -> io::Result<()> {
        for piece in data.chunks(PIECE) {
            self.file.write_all(piece)?;
            self.len += piece.len() as u64;
            self.behind.wrote(self.len, |from, to| begin_sync(&self.file, from, to));
        }
        Ok(())
    }
}

fn create_temporary(directory: &Path, ending: &str) -> io::Result<(File, TemporaryFile)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("zeo-{}-{number}{ending}", std::process::id()));
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
    hub: Arc<Hub>,
    counted: Counted,
    /// Reads the next buffer.
    pub(crate) read: JoinHandle<io::Result<(File, Vec<u8>)>>,
}

/// Into a buffer that was used before: memory that is in the processor's cache, and that the system need not find.
fn read_ahead(mut file: File, mut buffer: Vec<u8>) -> io::Result<(File, Vec<u8>)> {
    buffer.clear();
    buffer.reserve_exact(BUFFER);
    (&mut file).take(BUFFER as u64).read_to_end(&mut buffer)?;
    Ok((file, buffer))
}

impl Session {
    pub(crate) fn store_blob_start(&mut self, hub: &Hub) -> Served {
        if !hub.capabilities.blobs {
            return Err(Fault::type_error("Blobs are not supported"));
        }
        self.may_write()?;
        // Else anybody could fill the disk with what no abort removes.
        if self.txn.is_none() {
            return Err(Fault::new("builtins.AssertionError", "storeBlobStart without tpc_begin"));
        }
        if self.upload.is_some() {
            return Err(Fault::new("builtins.AssertionError", "a blob upload is already in progress"));
        }
        self.uploads += 1;
        self.upload = Some(Upload {
            number: self.uploads,
            buffer: Vec::new(),
            spare: Vec::new(),
            writer: Writer::Idle(None),
            end: None,
            _counted: Counted::new(&hub.stats.uploads),
        });
        Ok(Outcome::Reply(Value::None))
    }

    pub(crate) fn store_blob_chunk(&mut self, hub: &Hub, chunk: &[u8]) -> Served {
        let Some(upload) = &mut self.upload else {
            return Err(Fault::new("builtins.AssertionError", "a blob chunk without storeBlobStart"));
        };
        hub.stats.blob_bytes_received.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        if !matches!(upload.writer, Writer::Failed(_)) {
            upload.buffer.extend_from_slice(chunk);
            if upload.buffer.len() >= WRITE {
                self.write_upload(hub);
            }
        }
        Ok(Outcome::Reply(Value::None))
    }

    pub(crate) fn store_blob_end(
        &mut self,
        hub: &Hub,
        to: &mut ReplyTo,
        oid: Oid,
        serial: Tid,
        data: Bytes,
        key: TxnKey,
    ) -> Served {
        let Some(upload) = &mut self.upload else {
            return Err(Fault::new("builtins.AssertionError", "storeBlobEnd without storeBlobStart"));
        };
        upload.end = Some(End { to: to.take(), oid, serial, data, key });
        self.write_upload(hub);
        Ok(Outcome::Later)
    }

    /// Writes what was received, or ends the upload if that was everything; not while a write is on its way.
    fn write_upload(&mut self, hub: &Hub) {
        let Some(upload) = &mut self.upload else { return };
        let number = upload.number;
        let file = match &mut upload.writer {
            Writer::Busy => return,
            Writer::Failed(_) => return self.end_upload(),
            Writer::Idle(Some(_)) if upload.buffer.is_empty() => return self.end_upload(),
            Writer::Idle(file) => file.take(),
        };
        upload.writer = Writer::Busy;
        let mut buffer = std::mem::replace(&mut upload.buffer, std::mem::take(&mut upload.spare));
        let storage = Arc::clone(&hub.storage);
        // A directory that is the storage's own is cleaned when it is opened. That of a Python storage may be shared with others.
        let ending = if hub.capabilities.slow_calls { ".tmp" } else { RECEIVED };
        let work = move || {
            let mut file = match file {
                Some(file) => file,
                None => UploadFile::create(&*storage, ending)?,
            };
            file.write(&buffer)?;
            buffer.clear();
            Ok((file, buffer))
        };
        self.background(work, move |session, written| session.upload_written(number, written));
    }

    fn upload_written(&mut self, number: u64, written: Result<(UploadFile, Vec<u8>), StorageError>) {
        let Some(upload) = self.upload.as_mut().filter(|upload| upload.number == number) else {
            // Aborted meanwhile.
            return self.discard(written);
        };
        upload.writer = match written {
            Ok((file, buffer)) => {
                upload.spare = buffer;
                Writer::Idle(Some(file))
            }
            Err(error) => {
                upload.buffer = Vec::new();
                Writer::Failed(error)
            }
        };
        if (upload.buffer.len() >= WRITE || upload.end.is_some())
            && let Some(hub) = self.registration.as_ref().map(|registration| Arc::clone(&registration.hub))
        {
            self.write_upload(&hub);
        }
    }

    /// The file is complete, or could not be written.
    fn end_upload(&mut self) {
        let Some(Upload { writer, end: Some(end), .. }) = self.upload.take() else { return };
        let End { to, oid, serial, data, key } = end;
        let served = match writer {
            Writer::Idle(Some(file)) => self.stage_blob(oid, serial, data, file.temporary, &key),
            Writer::Idle(None) | Writer::Busy => Ok(Outcome::Reply(Value::None)),
            Writer::Failed(error) => {
                if let Some(not_logged) = self.chatter.spend(std::time::Instant::now()) {
                    tracing::error!(client = %self.who(), %error, not_logged, "a blob could not be received");
                }
                self.fail_transaction(&key, error)
            }
        };
        self.answer(to, served);
    }

    /// Gives up an upload that its client has given up.
    pub(crate) fn abort_upload(&mut self) {
        if let Some(upload) = self.upload.take() {
            self.discard(upload);
        }
    }

    /// Drops, on a worker thread, what may remove a large file or ask a Python storage.
    pub(crate) fn discard<T: Send + 'static>(&self, files: T) {
        self.runtime.spawn_blocking(move || drop(files));
    }

    /// The client has put the file into the shared blob directory itself; only its name is checked, and that it stays
    /// inside the directory of its object.
    pub(crate) fn store_blob_shared(
        &mut self,
        hub: &Hub,
        to: &mut ReplyTo,
        SharedBlob { oid, serial, data, filename, key }: SharedBlob,
    ) -> Served {
        let is_plain = !filename.contains(['/', '\\', '\0']) && !filename.starts_with('.');
        let stem = filename.strip_suffix(".tmp").or_else(|| {
            let mut characters = filename.chars();
            characters.next_back()?;
            characters.as_str().strip_suffix(".tmp")
        });
        if !is_plain || stem.is_none() {
            if let Some(not_logged) = self.chatter.spend(std::time::Instant::now()) {
                let filename: String = filename.chars().take(200).collect();
                tracing::error!(client = %self.who(), filename, not_logged, "storeBlobShared with a name that is not allowed");
            }
            return Err(Fault::value_error(format!("{filename:?} is no name of an uncommitted blob")));
        }
        let stage = move |session: &mut Self, directory: Result<PathBuf, StorageError>| {
            let path = directory.map_err(|error| fault::of(&error))?.join(filename);
            session.stage_blob(oid, serial, data, TemporaryFile(path), &key)
        };
        if !hub.capabilities.slow_calls {
            return stage(self, hub.storage.blob_oid_directory(oid));
        }
        let (to, storage) = (to.take(), Arc::clone(&hub.storage));
        self.background_in_order(
            move || storage.blob_oid_directory(oid),
            move |session, directory| {
                let served = stage(session, directory);
                session.answer(to, served);
            },
        );
        Ok(Outcome::Later)
    }

    pub(crate) fn send_blob(&mut self, hub: &Arc<Hub>, to: &mut ReplyTo, oid: Oid, serial: Tid) -> Served {
        if !hub.capabilities.blobs {
            return Err(Fault::type_error("Blobs are not supported"));
        }
        let storage = Arc::clone(&hub.storage);
        let hub = Arc::clone(hub);
        let to = to.take();
        self.background_in_order(
            move || open_blob(&*storage, oid, serial),
            move |session, opened| match opened {
                Err(error) => session.answer(to, Err(fault::of(&error))),
                Ok(_) if to.is_async => {}
                Ok(file) => {
                    session.notify(&Notice::ReceiveBlobStart { oid, serial });
                    let read = session.runtime.spawn_blocking(move || read_ahead(file, Vec::new()));
                    let counted = Counted::new(&hub.stats.downloads);
                    session.stream = Some(BlobStream { oid, serial, to, hub, counted, read });
                }
            },
        );
        Ok(Outcome::Later)
    }

    /// Writes a buffer that was read, and starts reading the next.
    pub(crate) fn stream_on(&mut self, read: io::Result<(File, Vec<u8>)>) {
        let Some(BlobStream { oid, serial, to, hub, counted, .. }) = self.stream.take() else { return };
        let (file, buffer) = match read {
            Ok(read) => read,
            // The client cannot be told in the middle of the file.
            Err(error) => {
                return self.close(format!("the blob of {oid} at {serial} cannot be read: {error}"));
            }
        };
        let at_end = buffer.len() < BUFFER;
        hub.stats.blob_bytes_sent.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        let buffer = self.write_chunks(oid, serial, buffer);
        if !at_end {
            let read = self.runtime.spawn_blocking(move || read_ahead(file, buffer));
            self.stream = Some(BlobStream { oid, serial, to, hub, counted, read });
            return;
        }
        self.notify(&Notice::ReceiveBlobStop { oid, serial });
        self.answer(to, Ok(Outcome::Reply(Value::None)));
    }

    /// Gives the buffer back.
    fn write_chunks(&mut self, oid: Oid, serial: Tid, buffer: Vec<u8>) -> Vec<u8> {
        let whole = Bytes::from(buffer);
        for start in (0..whole.len()).step_by(CHUNK) {
            let chunk = whole.slice(start..whole.len().min(start + CHUNK));
            self.notify(&Notice::ReceiveBlobChunk { oid, serial, chunk });
        }
        // The same memory, as nobody else has it any more.
        whole.into()
    }
}

fn open_blob(storage: &dyn Storage, oid: Oid, serial: Tid) -> Result<File, StorageError> {
    let path: PathBuf = storage.blob_path(oid, serial)?;
    File::open(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => StorageError::NoBlob { oid, serial },
        _ => StorageError::io(format!("cannot open {}", path.display()), error),
    })
}
