//! The cache's files: what happened to the cache, in order, so that another process can go on with it.
//!
//! # Format
//! The **index** `PATH` is a sequence of records (`record.rs`): revisions, invalidations, last tids. It does not hold the data: that
//! is appended to the **values**, `PATH.values-0` or `PATH.values-1` (`value.rs`), and a record says where, and its checksum. Both
//! begin with the same generation number, whose lowest bit says which of the two names is meant. So opening a cache of a
//! gigabyte reads its index only, some 45 bytes an object; data is read, and verified, when it is first used.
//!
//! # Why a wrong revision is never served
//! The index only grows, in the order in which the client applied what the server sent. Whatever is left after a kill at any byte
//! (or after a crash of the system, which may leave holes) is read up to the first record that is not whole, so it is what the
//! cache was at some earlier moment; and at every such moment everything that changed after the last `T` may be stale, and
//! nothing else. Verification asks the server for exactly that. Data is written before the record that names it; should it be
//! missing or damaged all the same, its checksum (over generation, oid, tid and data) does not match, and the object is loaded
//! from the server.
//!
//! When the files have grown to twice the cache, new ones are written from the cache's content: values under the other name,
//! then the index, which takes its place by rename. That content may be newer than its `T`, never older.
//!
//! # Cost
//! The caller sends a message to the file's thread; no system call. If the thread falls behind, revisions are
//! left out (they will be loaded again), never the rest. A batch is two writes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::lock::{Lock, lock};
use super::record::{self, Record};
use super::value::{self, Filed, Value, Values};
use super::{Cache, shard};
use crate::ids::{Oid, Tid};

/// Revisions waiting to be written; more are left out.
const MAX_QUEUED: usize = 32 << 20;
/// Written with one system call.
const BATCH: usize = 256 << 10;
/// A file is not worth rewriting below this.
const MIN_REWRITE: u64 = 1 << 20;
/// How long closing waits for the last writes: with the wait for the background thread not more than a second.
const CLOSE: Duration = Duration::from_millis(600);

pub(super) enum Event {
    Revision { oid: Oid, tid: Tid, end: Option<Tid>, data: Bytes },
    Invalidate { oid: Oid, tid: Option<Tid> },
    Forget { oid: Oid },
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

/// Opens or makes the files, fills `cache` from them, and starts their thread.
pub(super) fn open(cache: &Arc<Cache>, path: &Path) -> io::Result<(Option<Journal>, Opened)> {
    let Some(lock) = lock(path)? else { return Ok((None, Opened::InUse(path.to_owned()))) };
    let files = match read_or_discard(cache, path)? {
        Some(files) => files,
        None => Files::create(path)?,
    };
    let opened = if files.last_tid == Tid::ZERO { Opened::Empty } else { Opened::Warm(files.last_tid) };
    let queued = Arc::new(AtomicUsize::new(0));
    let (sender, events) = channel();
    let writer = Writer {
        cache: Arc::downgrade(cache),
        path: path.to_owned(),
        files,
        rewrite_at: 2 * cache.max_bytes() as u64 + MIN_REWRITE,
        index: Vec::new(),
        data: Vec::new(),
        queued: queued.clone(),
        broken: false,
        _lock: lock,
    };
    std::thread::Builder::new().name("zeo cache".into()).spawn(move || writer.run(&events))?;
    Ok((Some(Journal { events: Mutex::new(sender), queued }), opened))
}

/// The files as they are open for writing.
struct Files {
    index: File,
    index_length: u64,
    values: Arc<Values>,
    values_length: u64,
    generation: u64,
    /// As of the records written.
    last_tid: Tid,
}

impl Files {
    /// Empty ones, in place of whatever is there.
    fn create(path: &Path) -> io::Result<Self> {
        let generation = new_generation(0);
        let values = Values::create(&values_path(path, generation), generation)?;
        let _ = fs::remove_file(path);
        let mut index = OpenOptions::new().append(true).create_new(true).open(path)?;
        index.write_all(&record::header(generation))?;
        Ok(Self {
            index,
            index_length: record::HEADER,
            values: Arc::new(values),
            values_length: value::HEADER,
            generation,
            last_tid: Tid::ZERO,
        })
    }
}

/// Another one than `old`, with the other lowest bit, and than that of a file deleted since: hence the clock.
fn new_generation(old: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
    (now & !1) | (!old & 1)
}

fn values_path(path: &Path, generation: u64) -> PathBuf {
    beside(path, &format!(".values-{}", generation & 1))
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Fills `cache`; the files, if they can be gone on with. An index that is none of ours is moved aside.
fn read_or_discard(cache: &Cache, path: &Path) -> io::Result<Option<Files>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let size = file.metadata()?.len();
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let Some(generation) = record::read_header(&mut reader) else {
        if size > 0 {
            tracing::warn!(path = %path.display(), "this is no cache file of zeo_rs: moved aside");
            move_aside(path, 0)?;
        }
        return Ok(None);
    };
    let Some((values, values_length)) = Values::open(&values_path(path, generation), generation, true) else {
        tracing::warn!(path = %path.display(), "the cache's file of values is missing: starting with an empty cache");
        return Ok(None);
    };
    let values = Arc::new(values);
    // No more than there can be in a file of that size, so that the tables do not grow in steps.
    let most = (size / record::REVISION).min((cache.max_bytes() / super::NODE_OVERHEAD) as u64);
    cache.reserve(most as usize);
    let (index_length, last_tid) = replay(cache, &mut reader, generation, &values, values_length, |_| {})?;
    if index_length < size {
        tracing::info!(path = %path.display(), at = index_length, of = size, "the cache file ends in the middle of a record");
    }
    if last_tid == Tid::ZERO {
        // Without a last tid nobody can tell what is stale.
        cache.remove_all();
        return Ok(None);
    }
    let index = OpenOptions::new().append(true).open(path)?;
    // Off with a record that is not whole.
    index.set_len(index_length)?;
    Ok(Some(Files { index, index_length, values, values_length, generation, last_tid }))
}

/// Does to `cache` what the records say, up to the first that is not whole. Their length with the header, their last tid.
fn replay(
    cache: &Cache,
    reader: &mut impl Read,
    generation: u64,
    values: &Arc<Values>,
    values_length: u64,
    mut seen: impl FnMut(&Record),
) -> io::Result<(u64, Tid)> {
    let (mut at, mut last_tid) = (record::HEADER, Tid::ZERO);
    while let Some((record, length)) = record::read(reader, generation, at)? {
        at += length;
        seen(&record);
        match record {
            Record::Revision { oid, tid, end, offset, length, checksum } => {
                // Data that was never written counts as a revision left out.
                if offset.checked_add(length.into()).is_some_and(|end| end <= values_length) {
                    let place = Filed { file: Arc::clone(values), offset, length, checksum };
                    cache.insert(oid, tid, end, Value::Filed(place));
                }
            }
            Record::Invalidate { oid, tid } => {
                cache.end(oid, tid);
            }
            Record::Forget { oid } => cache.forget(oid),
            Record::LastTid(tid) => last_tid = tid,
            Record::Clear => cache.remove_all(),
        }
    }
    Ok((at, last_tid))
}

/// What a cache file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileStats {
    /// Of the index.
    pub file_bytes: u64,
    /// Of them, up to the first record that is not whole.
    pub whole_bytes: u64,
    /// Of the file of values.
    pub values_bytes: u64,
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

/// Reads a cache's index, also one in use; changes nothing. `None`: it is none of ours. Without its file of values
/// it holds nothing.
///
/// # Errors
/// The file cannot be read.
pub fn inspect(path: &Path) -> io::Result<Option<FileStats>> {
    let file = File::open(path)?;
    let mut stats = FileStats { file_bytes: file.metadata()?.len(), ..FileStats::default() };
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let Some(generation) = record::read_header(&mut reader) else { return Ok(None) };
    stats.whole_bytes = record::HEADER;
    let Some((values, length)) = Values::open(&values_path(path, generation), generation, false) else {
        return Ok(Some(stats));
    };
    stats.values_bytes = length;
    let cache = Cache::new(usize::MAX / 2);
    let (mut stores, mut invalidations) = (0, 0);
    (stats.whole_bytes, stats.last_tid) =
        replay(&cache, &mut reader, generation, &Arc::new(values), length, |record| match record {
            Record::Revision { .. } => stores += 1,
            Record::Invalidate { .. } => invalidations += 1,
            _ => {}
        })?;
    (stats.stores, stats.invalidations) = (stores, invalidations);
    let mut objects = rustc_hash::FxHashSet::default();
    cache.for_each(|oid, _, end, length| {
        objects.insert(oid);
        stats.revisions += 1;
        stats.current += u64::from(end.is_none());
        stats.data_bytes += length as u64;
        stats.largest = stats.largest.max(length as u64);
    });
    stats.objects = objects.len() as u64;
    stats.cache_bytes = cache.bytes() as u64;
    Ok(Some(stats))
}

/// `<path>.aside`, `<path>.aside-1`, ... so that an earlier one is kept; its values beside it.
fn move_aside(path: &Path, generation: u64) -> io::Result<PathBuf> {
    let mut number = 0;
    loop {
        let ending = if number == 0 { ".aside".to_owned() } else { format!(".aside-{number}") };
        let target = beside(path, &ending);
        if !target.exists() || number == 9 {
            fs::rename(path, &target)?;
            if generation != 0 {
                fs::rename(values_path(path, generation), values_path(&target, generation))?;
            }
            return Ok(target);
        }
        number += 1;
    }
}

/// The files' thread.
struct Writer {
    cache: std::sync::Weak<Cache>,
    path: PathBuf,
    files: Files,
    rewrite_at: u64,
    /// Records and data not written yet.
    index: Vec<u8>,
    data: Vec<u8>,
    queued: Arc<AtomicUsize>,
    /// After an error nothing is written any more.
    broken: bool,
    _lock: Lock,
}

impl Writer {
    fn run(mut self, events: &Receiver<Event>) {
        while let Ok(event) = events.recv() {
            let mut closing = self.take(event);
            while self.index.len() + self.data.len() < BATCH
                && let Ok(event) = events.try_recv()
            {
                closing = self.take(event).or(closing);
            }
            self.write();
            if self.files.index_length + self.files.values_length > self.rewrite_at {
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
                let record = Record::Revision {
                    oid,
                    tid,
                    end,
                    offset: self.files.values_length + self.data.len() as u64,
                    length: data.len() as u32,
                    checksum: self.files.values.checksum(oid, tid, &data),
                };
                self.data.extend_from_slice(&data);
                self.put(&record);
            }
            Event::Invalidate { oid, tid } => self.put(&Record::Invalidate { oid, tid }),
            Event::Forget { oid } => self.put(&Record::Forget { oid }),
            Event::LastTid(tid) => {
                self.files.last_tid = tid;
                self.put(&Record::LastTid(tid));
            }
            Event::Clear => self.put(&Record::Clear),
            Event::MoveAside => self.move_aside(),
            Event::Close(done) => return Some(done),
        }
        None
    }

    fn put(&mut self, record: &Record) {
        record::put(&mut self.index, self.files.generation, self.files.index_length, record);
    }

    /// The data first: a record never names what is not there.
    fn write(&mut self) {
        if !self.broken && !self.index.is_empty() {
            let written = self.files.values.append(&self.data);
            match written.and_then(|()| self.files.index.write_all(&self.index)) {
                Ok(()) => {
                    self.files.values_length += self.data.len() as u64;
                    self.files.index_length += self.index.len() as u64;
                }
                Err(error) => self.give_up("write", &error),
            }
        }
        for buffer in [&mut self.index, &mut self.data] {
            buffer.clear();
            buffer.shrink_to(BATCH * 2);
        }
    }

    /// New files with what the cache holds.
    fn rewrite(&mut self) {
        let Some(cache) = self.cache.upgrade() else { return };
        if self.broken {
            return;
        }
        let old = values_path(&self.path, self.files.generation);
        match self.write_new(&cache) {
            Ok((files, moved)) => {
                self.files = files;
                cache.move_to(moved);
                // What is being read from it right now still can be.
                let _ = fs::remove_file(old);
            }
            Err(error) => self.give_up("rewrite", &error),
        }
    }

    /// The new files, in place; and where the data of revisions is now that was not in memory.
    #[allow(clippy::type_complexity)]
    fn write_new(&self, cache: &Cache) -> io::Result<(Files, Vec<(Oid, Tid, Filed)>)> {
        let generation = new_generation(self.files.generation);
        let values = Arc::new(Values::create(&values_path(&self.path, generation), generation)?);
        let temporary = beside(&self.path, ".new");
        let _ = fs::remove_file(&temporary);
        let mut index = OpenOptions::new().append(true).create_new(true).open(&temporary)?;
        let (mut records, mut data, mut moved) = (record::header(generation), Vec::new(), Vec::new());
        let (mut index_length, mut values_length) = (0, value::HEADER);
        let mut failed = None;
        cache.for_each_revision(|shard::Revision { oid, tid, end, value }| {
            let in_memory = matches!(value, Value::Memory(_));
            let bytes = match value {
                Value::Memory(bytes) => Some(bytes),
                Value::Filed(place) => place.read(oid, tid),
            };
            let Some(bytes) = bytes.filter(|_| failed.is_none()) else { return };
            let offset = values_length + data.len() as u64;
            let (length, checksum) = (bytes.len() as u32, values.checksum(oid, tid, &bytes));
            data.extend_from_slice(&bytes);
            let record = Record::Revision { oid, tid, end, offset, length, checksum };
            record::put(&mut records, generation, index_length, &record);
            if !in_memory {
                moved.push((oid, tid, Filed { file: Arc::clone(&values), offset, length, checksum }));
            }
            if data.len() + records.len() >= BATCH {
                failed = values.append(&data).and_then(|()| index.write_all(&records)).err();
                values_length += data.len() as u64;
                index_length += records.len() as u64;
                data.clear();
                records.clear();
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let last_tid = self.files.last_tid;
        record::put(&mut records, generation, index_length, &Record::LastTid(last_tid));
        values.append(&data)?;
        index.write_all(&records)?;
        fs::rename(&temporary, &self.path)?;
        let files = Files {
            index,
            index_length: index_length + records.len() as u64,
            values,
            values_length: values_length + data.len() as u64,
            generation,
            last_tid,
        };
        Ok((files, moved))
    }

    fn move_aside(&mut self) {
        self.write();
        let moved = move_aside(&self.path, self.files.generation)
            .and_then(|aside| Ok((aside, Files::create(&self.path)?)));
        match moved {
            Ok((aside, files)) => {
                tracing::warn!(path = %self.path.display(), aside = %aside.display(), "the cache file was moved aside");
                self.files = files;
            }
            Err(error) => self.give_up("move aside", &error),
        }
    }

    /// A file that misses something must not be used again.
    fn give_up(&mut self, doing: &str, error: &io::Error) {
        tracing::error!(path = %self.path.display(), %error, "cannot {doing} the cache file: the cache is no longer saved");
        self.broken = true;
        let _ = self.files.index.set_len(0);
    }
}
