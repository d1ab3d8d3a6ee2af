//! The cache's file: what happened to the cache, in order, so that another process can go on with it.
//!
//! # Format
//! `ZRC1` and 4 zero bytes, then records: length of the body (u32), CRC-32 of the body (u32), body. Integers are
//! big-endian. A body is a kind and its fields:
//!
//! | kind | fields | meaning |
//! | --- | --- | --- |
//! | `R` | oid, tid, end, data | a revision; end all ones: current |
//! | `I` | oid, tid | its current revision ended at tid; 0: is forgotten |
//! | `T` | tid | everything up to tid is above |
//! | `C` | | everything is forgotten |
//!
//! # Why a wrong revision is never served
//! The file only grows, in the order in which the client applied what the server sent. Whatever is left after a kill at any byte
//! (or after a crash of the system, which may leave holes) is read up to the first record that is not whole, so it is what the
//! cache was at some earlier moment; and at every such moment everything that changed after the last `T` may be stale, and
//! nothing else. Verification asks the server for exactly that.
//!
//! When the file has grown to twice the cache, a new one is written from the cache's content and takes its place by rename.
//! That content may be newer than its `T`, never older.
//!
//! # Cost
//! The caller sends a message to the file's thread; no system call. If the thread falls behind, revisions are
//! left out (they will be loaded again), never the rest.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::FlockOperation;

use super::Cache;
use crate::ids::{Oid, Tid};

const MAGIC: [u8; 8] = *b"ZRC1\0\0\0\0";
/// One body: a revision of the largest size ZEO could cache, and its fields.
const MAX_BODY: usize = (1 << 31) + 64;
/// Revisions waiting to be written; more are left out.
const MAX_QUEUED: usize = 32 << 20;
/// Written with one system call.
const BATCH: usize = 256 << 10;
/// A file is not worth rewriting below this.
const MIN_REWRITE: u64 = 1 << 20;
/// How long closing waits for the last writes.
const CLOSE: Duration = Duration::from_secs(1);

pub(super) enum Event {
    Revision { oid: Oid, tid: Tid, end: Option<Tid>, data: Bytes },
    Invalidate { oid: Oid, tid: Option<Tid> },
    LastTid(Tid),
    Clear,
    MoveAside,
    Close(SyncSender<()>),
}

/// What was found when a file was opened.
#[derive(Debug)]
pub enum Opened {
    /// The last tid of the file.
    Warm(Tid),
    Empty,
    /// Another process has it: this cache is temporary.
    InUse(PathBuf),
}

/// The sending end.
pub(super) struct Journal {
    events: Mutex<Sender<Event>>,
    queued: Arc<AtomicUsize>,
}

impl Journal {
    pub(super) fn send(&self, event: Event) {
        if let Event::Revision { data, .. } = &event {
            if self.queued.load(Relaxed) > MAX_QUEUED {
                return;
            }
            self.queued.fetch_add(data.len(), Relaxed);
        }
        let _ = self.events.lock().unwrap_or_else(PoisonError::into_inner).send(event);
    }

    /// Waits a moment for what was sent to be written.
    pub(super) fn close(&self) {
        let (done, wait) = sync_channel(1);
        self.send(Event::Close(done));
        let _ = wait.recv_timeout(CLOSE);
    }
}

/// Opens or makes the file, fills `cache` from it, and starts its thread.
pub(super) fn open(cache: &Arc<Cache>, path: &Path) -> io::Result<(Option<Journal>, Opened)> {
    let Some(lock) = lock(path)? else { return Ok((None, Opened::InUse(path.to_owned()))) };
    let (length, last_tid) = read_or_discard(cache, path)?;
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    if length == 0 {
        file.set_len(0)?;
        file.write_all(&MAGIC)?;
    } else {
        // Off with a record that is not whole.
        file.set_len(length)?;
    }
    let queued = Arc::new(AtomicUsize::new(0));
    let (sender, events) = channel();
    let writer = Writer {
        cache: Arc::downgrade(cache),
        path: path.to_owned(),
        file,
        length: length.max(MAGIC.len() as u64),
        rewrite_at: 2 * cache.max_bytes() as u64 + MIN_REWRITE,
        last_tid,
        buffer: Vec::new(),
        queued: queued.clone(),
        broken: false,
        _lock: lock,
    };
    std::thread::Builder::new().name("zeo cache".into()).spawn(move || writer.run(&events))?;
    let opened = if last_tid == Tid::ZERO { Opened::Empty } else { Opened::Warm(last_tid) };
    Ok((Some(Journal { events: Mutex::new(sender), queued }), opened))
}

/// Holds `<path>.lock` while it lives; `None` if another process does.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(name)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Length of the whole records, and their last tid. A file that is none of ours is moved aside.
fn read_or_discard(cache: &Cache, path: &Path) -> io::Result<(u64, Tid)> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((0, Tid::ZERO)),
        Err(error) => return Err(error),
    };
    let size = file.metadata()?.len();
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut magic = [0; MAGIC.len()];
    if reader.read_exact(&mut magic).is_err() || magic != MAGIC {
        if size > 0 {
            tracing::warn!(path = %path.display(), "this is no cache file of zeo_rs: moved aside");
            move_aside(path)?;
        }
        return Ok((0, Tid::ZERO));
    }
    let (length, last_tid) = replay(cache, &mut reader, size, |_| {})?;
    if length < size {
        tracing::info!(path = %path.display(), at = length, of = size, "the cache file ends in the middle of a record");
    }
    if last_tid == Tid::ZERO {
        // Without a last tid nobody can tell what is stale.
        cache.remove_all();
        return Ok((0, last_tid));
    }
    Ok((length, last_tid))
}

/// Does to `cache` what the records say, up to the first that is not whole. Their length with the magic, their last tid.
fn replay(
    cache: &Cache,
    reader: &mut impl Read,
    size: u64,
    mut seen: impl FnMut(&Event),
) -> io::Result<(u64, Tid)> {
    let (mut length, mut last_tid) = (MAGIC.len() as u64, Tid::ZERO);
    while let Some((body, whole)) = read_record(reader, size - length)? {
        let Some(event) = parse(body) else { break };
        length += whole;
        seen(&event);
        match event {
            Event::Revision { oid, tid, end, data } => {
                cache.insert(oid, tid, end, data);
            }
            Event::Invalidate { oid, tid } => cache.end(oid, tid),
            Event::LastTid(tid) => last_tid = tid,
            Event::Clear => cache.remove_all(),
            Event::MoveAside | Event::Close(_) => {}
        }
    }
    Ok((length, last_tid))
}

/// What a cache file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileStats {
    pub file_bytes: u64,
    /// Up to the first record that is not whole.
    pub whole_bytes: u64,
    pub last_tid: Tid,
    /// Revisions and invalidations written since the file was last rewritten.
    pub stores: u64,
    pub invalidations: u64,
    pub objects: u64,
    pub revisions: u64,
    pub current: u64,
    pub data_bytes: u64,
    pub largest: u64,
    /// What a cache needs to keep all of it.
    pub cache_bytes: u64,
}

/// Reads a cache file, also one in use; changes nothing. `None`: it is none of ours.
///
/// # Errors
/// The file cannot be read.
pub fn inspect(path: &Path) -> io::Result<Option<FileStats>> {
    let file = File::open(path)?;
    let mut stats = FileStats { file_bytes: file.metadata()?.len(), ..FileStats::default() };
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut magic = [0; MAGIC.len()];
    if reader.read_exact(&mut magic).is_err() || magic != MAGIC {
        return Ok(None);
    }
    let cache = Cache::new(usize::MAX / 2);
    let (mut stores, mut invalidations) = (0, 0);
    (stats.whole_bytes, stats.last_tid) =
        replay(&cache, &mut reader, stats.file_bytes, |event| match event {
            Event::Revision { .. } => stores += 1,
            Event::Invalidate { .. } => invalidations += 1,
            _ => {}
        })?;
    (stats.stores, stats.invalidations) = (stores, invalidations);
    let mut objects = rustc_hash::FxHashSet::default();
    cache.for_each(|oid, _, end, data| {
        objects.insert(oid);
        stats.revisions += 1;
        stats.current += u64::from(end.is_none());
        stats.data_bytes += data.len() as u64;
        stats.largest = stats.largest.max(data.len() as u64);
    });
    stats.objects = objects.len() as u64;
    stats.cache_bytes = cache.bytes() as u64;
    Ok(Some(stats))
}

/// The next whole record: its body, and its length in the file. `left` bounds what a damaged length can ask for.
fn read_record(reader: &mut impl Read, left: u64) -> io::Result<Option<(Bytes, u64)>> {
    const HEAD: u64 = 8;
    if left < HEAD {
        return Ok(None);
    }
    let (mut length, mut crc) = ([0; 4], [0; 4]);
    reader.read_exact(&mut length)?;
    reader.read_exact(&mut crc)?;
    let length = u32::from_be_bytes(length) as usize;
    if length == 0 || length > MAX_BODY || length as u64 > left - HEAD {
        return Ok(None);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    if checksum(&body) != u32::from_be_bytes(crc) {
        return Ok(None);
    }
    Ok(Some((body.into(), HEAD + length as u64)))
}

fn parse(body: Bytes) -> Option<Event> {
    let number = |at: usize| Some(u64::from_be_bytes(*body.get(at..)?.first_chunk()?));
    Some(match *body.first()? {
        b'R' => {
            let end = number(17)?;
            Event::Revision {
                oid: Oid(number(1)?),
                tid: Tid(number(9)?),
                end: (end != u64::MAX).then_some(Tid(end)),
                data: body.slice(25..),
            }
        }
        b'I' => {
            let tid = number(9)?;
            Event::Invalidate { oid: Oid(number(1)?), tid: (tid != 0).then_some(Tid(tid)) }
        }
        b'T' => Event::LastTid(Tid(number(1)?)),
        b'C' => Event::Clear,
        _ => return None,
    })
}

fn put(out: &mut Vec<u8>, kind: u8, numbers: &[u64], data: &[u8]) {
    let start = out.len();
    out.extend_from_slice(&[0; 8]);
    out.push(kind);
    for number in numbers {
        out.extend_from_slice(&number.to_be_bytes());
    }
    out.extend_from_slice(data);
    let crc = checksum(out.get(start + 8..).unwrap_or_default());
    let length = (out.len() - start - 8) as u32;
    if let Some(head) = out.get_mut(start..start + 8) {
        head[..4].copy_from_slice(&length.to_be_bytes());
        head[4..].copy_from_slice(&crc.to_be_bytes());
    }
}

fn put_revision(out: &mut Vec<u8>, oid: Oid, tid: Tid, end: Option<Tid>, data: &[u8]) {
    put(out, b'R', &[oid.0, tid.0, end.map_or(u64::MAX, |end| end.0)], data);
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// `<path>.aside`, `<path>.aside-1`, ... so that an earlier one is kept.
fn move_aside(path: &Path) -> io::Result<PathBuf> {
    let mut number = 0;
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(if number == 0 { ".aside".to_owned() } else { format!(".aside-{number}") });
        let target = PathBuf::from(name);
        if !target.exists() || number == 9 {
            fs::rename(path, &target)?;
            return Ok(target);
        }
        number += 1;
    }
}

/// The file's thread.
struct Writer {
    cache: std::sync::Weak<Cache>,
    path: PathBuf,
    file: File,
    length: u64,
    rewrite_at: u64,
    /// As of the events written.
    last_tid: Tid,
    buffer: Vec<u8>,
    queued: Arc<AtomicUsize>,
    /// After an error nothing is written any more.
    broken: bool,
    _lock: File,
}

impl Writer {
    fn run(mut self, events: &Receiver<Event>) {
        while let Ok(event) = events.recv() {
            let mut closing = self.take(event);
            while self.buffer.len() < BATCH
                && let Ok(event) = events.try_recv()
            {
                closing = self.take(event).or(closing);
            }
            self.write();
            if self.length > self.rewrite_at {
                self.rewrite();
            }
            if let Some(done) = closing {
                // The lock goes first: who waited may open the file again.
                drop(self);
                let _ = done.send(());
                return;
            }
        }
        self.write();
    }

    fn take(&mut self, event: Event) -> Option<SyncSender<()>> {
        match event {
            Event::Revision { oid, tid, end, data } => {
                self.queued.fetch_sub(data.len(), Relaxed);
                put_revision(&mut self.buffer, oid, tid, end, &data);
            }
            Event::Invalidate { oid, tid } => {
                put(&mut self.buffer, b'I', &[oid.0, tid.map_or(0, |tid| tid.0)], &[]);
            }
            Event::LastTid(tid) => {
                self.last_tid = tid;
                put(&mut self.buffer, b'T', &[tid.0], &[]);
            }
            Event::Clear => put(&mut self.buffer, b'C', &[], &[]),
            Event::MoveAside => self.move_aside(),
            Event::Close(done) => return Some(done),
        }
        None
    }

    fn write(&mut self) {
        if !self.broken && !self.buffer.is_empty() {
            match self.file.write_all(&self.buffer) {
                Ok(()) => self.length += self.buffer.len() as u64,
                Err(error) => self.give_up("write", &error),
            }
        }
        self.buffer.clear();
        self.buffer.shrink_to(BATCH * 2);
    }

    /// A new file with what the cache holds.
    fn rewrite(&mut self) {
        let Some(cache) = self.cache.upgrade() else { return };
        if self.broken {
            return;
        }
        let mut temporary = self.path.as_os_str().to_owned();
        temporary.push(".new");
        let temporary = PathBuf::from(temporary);
        match self.write_new(&cache, &temporary).and_then(|file| {
            fs::rename(&temporary, &self.path)?;
            Ok(file)
        }) {
            Ok((file, length)) => (self.file, self.length) = (file, length),
            Err(error) => self.give_up("rewrite", &error),
        }
    }

    fn write_new(&self, cache: &Cache, path: &Path) -> io::Result<(File, u64)> {
        let _ = fs::remove_file(path);
        let mut file = OpenOptions::new().append(true).create_new(true).open(path)?;
        let mut buffer = MAGIC.to_vec();
        let (mut length, mut failed) = (0, None);
        cache.for_each(|oid, tid, end, data| {
            put_revision(&mut buffer, oid, tid, end, data);
            if buffer.len() >= BATCH && failed.is_none() {
                failed = file.write_all(&buffer).err();
                length += buffer.len() as u64;
                buffer.clear();
            }
        });
        put(&mut buffer, b'T', &[self.last_tid.0], &[]);
        file.write_all(&buffer)?;
        match failed {
            Some(error) => Err(error),
            None => Ok((file, length + buffer.len() as u64)),
        }
    }

    fn move_aside(&mut self) {
        self.write();
        self.buffer.clear();
        self.last_tid = Tid::ZERO;
        let moved = move_aside(&self.path).and_then(|aside| {
            let mut file = OpenOptions::new().append(true).create_new(true).open(&self.path)?;
            file.write_all(&MAGIC)?;
            Ok((aside, file))
        });
        match moved {
            Ok((aside, file)) => {
                tracing::warn!(path = %self.path.display(), aside = %aside.display(), "the cache file was moved aside");
                (self.file, self.length) = (file, MAGIC.len() as u64);
            }
            Err(error) => self.give_up("move aside", &error),
        }
    }

    /// A file that misses something must not be used again.
    fn give_up(&mut self, doing: &str, error: &io::Error) {
        tracing::error!(path = %self.path.display(), %error, "cannot {doing} the cache file: the cache is no longer saved");
        self.broken = true;
        let _ = self.file.set_len(0);
    }
}
