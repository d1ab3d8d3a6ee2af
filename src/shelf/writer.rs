//! [`Shelf`]: the server's side.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use super::{BUCKET, ENTRY, Entry, LABEL, Layout, MAX_DATA, WAYS};
use crate::ids::{Oid, Tid};

/// Counters of changes; objects share them.
const EPOCHS: usize = 1024;

/// See the module documentation. Never reads the file: it knows what it has written.
pub(crate) struct Shelf {
    file: File,
    /// The same, for readers.
    for_readers: OwnedFd,
    layout: Layout,
    /// See [`Self::prepare`].
    is_ready: AtomicBool,
    /// Something may be on it.
    is_filled: AtomicBool,
    /// How often an object with this hash has changed.
    epochs: Box<[AtomicU64]>,
    puts: AtomicU64,
    state: Mutex<State>,
}

struct State {
    /// What the table says, once it is ready; the position is where the data began in a ring without an end.
    entries: Vec<Entry>,
    /// Where the next data goes, in a ring without an end.
    head: u64,
    /// To put a label before the data.
    buffer: Vec<u8>,
    /// Nothing is put there any more: what was there could not be taken away otherwise.
    broken: bool,
}

/// Says that its holder has begun to look for the current revision, see [`Shelf::ticket`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket(u64);

impl Shelf {
    /// An empty one. It takes memory as it fills.
    ///
    /// # Errors
    /// `InvalidInput`: a capacity below 1 MB or above 1 TB. The system's; `Unsupported` where there are no files without a name in memory.
    pub(crate) fn new(capacity: u64) -> io::Result<Self> {
        let layout = Layout::new(capacity).ok_or(io::ErrorKind::InvalidInput)?;
        let (file, for_readers) = file_in_memory()?;
        file.set_len(capacity)?;
        let state = State { entries: Vec::new(), head: 0, buffer: Vec::new(), broken: false };
        Ok(Self {
            file,
            for_readers,
            layout,
            is_ready: AtomicBool::new(false),
            is_filled: AtomicBool::new(false),
            epochs: (0..EPOCHS).map(|_| AtomicU64::new(0)).collect(),
            puts: AtomicU64::new(0),
            state: Mutex::new(state),
        })
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.layout.capacity
    }

    /// Revisions that were put there so far.
    pub(crate) fn puts(&self) -> u64 {
        self.puts.load(Ordering::Relaxed)
    }

    /// For a reader.
    pub(crate) fn reader(&self) -> BorrowedFd<'_> {
        self.for_readers.as_fd()
    }

    /// Whether [`Self::prepare`] has been called.
    pub(crate) fn is_ready(&self) -> bool {
        self.is_ready.load(Ordering::Relaxed)
    }

    /// There will be readers. Takes the memory for the table, on both sides, which takes some milliseconds: loads would have to, page by
    /// page. Nothing is put there before.
    pub(crate) fn prepare(&self) {
        let mut state = self.state();
        if state.entries.is_empty() {
            state.entries = vec![Entry::default(); self.layout.buckets() * WAYS];
            self.empty(&mut state);
            self.is_ready.store(true, Ordering::Relaxed);
        }
    }

    /// To be taken before the storage is asked for the current revision of `oid`. `None`: it is not ready, nobody would read it.
    pub(crate) fn ticket(&self, oid: Oid) -> Option<Ticket> {
        self.is_ready().then(|| Ticket(self.epoch(oid).load(Ordering::SeqCst)))
    }

    /// `oid` is, or was when the ticket was taken, at `tid`, with this data. Not put there if it has changed since, nor if somebody
    /// else is just at it: a load waits for nobody, least of all for the removal of a million objects.
    ///
    /// Cost: one mutex; two `pwrite` and a copy if it is not there yet.
    pub(crate) fn put(&self, ticket: Ticket, oid: Oid, tid: Tid, data: &[u8]) {
        if data.is_empty() || data.len() > MAX_DATA {
            return;
        }
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        // First say that there may be something, then look whether it has changed; `remove` does it the other way around.
        self.is_filled.store(true, Ordering::SeqCst);
        if state.broken || self.epoch(oid).load(Ordering::SeqCst) != ticket.0 {
            return;
        }
        let size = self.layout.capacity - self.layout.ring();
        let length = (LABEL + data.len()) as u64;
        let bucket = self.layout.bucket(oid);
        let Some(entries) = state.entries.get(bucket * WAYS..(bucket + 1) * WAYS) else { return };
        let is_there = |entry: &Entry, head: u64| entry.length > 0 && head - entry.position <= size;
        let head = state.head;
        let known = |entry: &&Entry| entry.oid == oid && entry.tid == tid && is_there(entry, head);
        if entries.iter().any(|entry| known(&entry)) {
            return;
        }
        // Its own place, an empty one, or that of what has been there longest.
        let age = |entry: &Entry| match entry {
            Entry { oid: of, length: 1.., .. } if *of == oid => (0, 0),
            entry if !is_there(entry, head) => (1, 0),
            entry => (2, entry.position),
        };
        let Some(way) = (0..WAYS).min_by_key(|way| entries.get(*way).map(age)) else { return };
        let begin = if head % size + length > size { head.next_multiple_of(size) } else { head };
        let position = self.layout.ring() + begin % size;
        let entry = Entry::new(oid, tid, position, data);
        let place = bucket * WAYS + way;
        let mut buffer = std::mem::take(&mut state.buffer);
        buffer.clear();
        buffer.extend_from_slice(&entry.label());
        buffer.extend_from_slice(data);
        let written = self
            .file
            .write_all_at(&buffer, position)
            .and_then(|()| self.file.write_all_at(&entry.encode(), (place * ENTRY) as u64));
        state.buffer = buffer;
        state.head = begin + length;
        if let Some(known) = state.entries.get_mut(place) {
            *known = Entry { position: begin, ..entry };
        }
        match written {
            Ok(()) => {
                self.puts.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => self.give_up(&mut state, &error),
        }
    }

    /// These objects have changed: the storage says so already, and nobody has been told yet.
    ///
    /// Cost for each: an atomic addition; as long as nothing is there, no more. Then a lookup, and a `pwrite` if it is there; and one mutex for all.
    pub(crate) fn remove(&self, oids: &[Oid]) {
        for oid in oids {
            self.epoch(*oid).fetch_add(1, Ordering::SeqCst);
        }
        if !self.is_filled.load(Ordering::SeqCst) {
            return;
        }
        let mut state = self.state();
        for oid in oids {
            let bucket = self.layout.bucket(*oid);
            for place in bucket * WAYS..(bucket + 1) * WAYS {
                match state.entries.get_mut(place) {
                    Some(entry) if entry.oid == *oid && entry.length > 0 => *entry = Entry::default(),
                    _ => continue,
                }
                if let Err(error) = self.file.write_all_at(&[0; ENTRY], (place * ENTRY) as u64) {
                    self.give_up(&mut state, &error);
                }
            }
        }
    }

    /// Anything may have changed.
    pub(crate) fn clear(&self) {
        for epoch in &self.epochs {
            epoch.fetch_add(1, Ordering::SeqCst);
        }
        let mut state = self.state();
        if !state.entries.is_empty() {
            self.empty(&mut state);
        }
    }

    /// Empties the table, and keeps its memory.
    fn empty(&self, state: &mut State) {
        state.entries.fill(Entry::default());
        let zeros = vec![0; 64 << 10];
        for at in (0..self.layout.ring()).step_by(zeros.len()) {
            let count = zeros.len().min((self.layout.ring() - at) as usize);
            if let Err(error) = self.file.write_all_at(&zeros[..count], at) {
                return self.give_up(state, &error);
            }
        }
    }

    /// Without memory for it (or whatever it is), there is nothing on it any more, and never will be.
    fn give_up(&self, state: &mut State, error: &io::Error) {
        state.broken = true;
        state.entries.fill(Entry::default());
        match self.file.set_len(0) {
            Ok(()) => tracing::warn!(%error, "the shared cache cannot be written, clients do without"),
            // Readers may find there what is not current any more.
            Err(second) => tracing::error!(%error, %second, "the shared cache cannot be written nor emptied"),
        }
    }

    fn epoch(&self, oid: Oid) -> &AtomicU64 {
        &self.epochs[oid.0 as usize % EPOCHS]
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl Shelf {
    /// As what is put later does, at a place of the ring.
    pub(super) fn overwrite(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, self.layout.ring() + at).unwrap();
    }

    /// While it lives, somebody is at it.
    pub(super) fn busy(&self) -> impl Sized + '_ {
        self.state()
    }
}

/// A file without a name, and the same to be read only, also by who has another user's rights and opens it anew.
#[cfg(target_os = "linux")]
fn file_in_memory() -> io::Result<(File, OwnedFd)> {
    use std::os::fd::AsRawFd;

    use rustix::fs::{MemfdFlags, Mode, fchmod, memfd_create};

    let file = File::from(memfd_create("zeo-rs shared cache", MemfdFlags::CLOEXEC)?);
    fchmod(&file, Mode::RUSR)?;
    let for_readers = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok((file, for_readers.into()))
}

#[cfg(not(target_os = "linux"))]
fn file_in_memory() -> io::Result<(File, OwnedFd)> {
    Err(io::ErrorKind::Unsupported.into())
}

const _: () = assert!(BUCKET == WAYS * ENTRY);
