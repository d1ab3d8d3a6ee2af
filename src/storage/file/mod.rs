//! The FileStorage engine: ZODB's Data.fs, byte for byte, both ways. See `docs/filestorage.md`.
//!
//! | file | what |
//! | --- | --- |
//! | `format`, `file`, `index`, `chunk` | headers; the file as the engine sees it; oid → position |
//! | `snapshot` | a file with its index, and reading records from it: the path of a load |
//! | `transactions`, `samples`, `iterate` | walking over transactions |
//! | `open`, `scan`, `index_file`, `lock`, `oids` | opening, recovery, the files beside Data.fs |
//! | `pending`, `undo`, `space`, `commit` | two-phase commit |
//! | `pack` | dropping what is no longer needed |
//! | `check`, `dump` | verifying a file, listing its content |
//! | `walk`, `window`, `record_set`, `pace` | tools of pack and check |
//!
//! # Locks
//! Readers take none (an atomic pointer to the [`Snapshot`]). `writer` is held by a finish and by pack's switch; beginning
//! and voting do not wait for it.
//! The others are held for moments (`saved_index` while an index is saved).

pub mod check;
mod chunk;
mod commit;
pub mod dump;
#[allow(clippy::module_inception)]
pub mod file;
pub mod format;
pub mod index;
mod index_file;
mod iterate;
mod lock;
mod oids;
mod open;
mod pace;
mod pack;
mod pending;
mod record_set;
mod samples;
mod scan;
mod snapshot;
mod space;
mod storage;
mod transactions;
mod undo;
mod walk;
mod window;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use arc_swap::ArcSwap;

use self::file::StorageFile;
use self::index::Index;
use self::lock::LockFile;
use self::oids::OidSupply;
pub use self::pending::{Applied, Pending};
use self::samples::Samples;
pub use self::snapshot::Snapshot;
use self::space::Space;
use crate::ids::{Oid, Tid};
use crate::storage::blob::{BlobDir, FileNames};
use crate::storage::{Owner, Result, StorageError};

/// How to open a [`FileStorage`]; ZODB's constructor arguments.
#[derive(Clone, Debug)]
pub struct FileStorageOptions {
    /// Start empty, deleting an existing file (and its blobs).
    pub create: bool,
    pub read_only: bool,
    /// Show the database as it was before this tid. Only with `read_only`.
    pub stop: Option<Tid>,
    /// Largest size of the file; records that begin beyond it are refused.
    pub quota: Option<u64>,
    /// Whether `pack` collects garbage when it is not told.
    pub pack_gc: bool,
    /// Whether `pack` keeps the previous file as NAME.old.
    pub pack_keep_old: bool,
    pub blob_dir: Option<PathBuf>,
}

impl Default for FileStorageOptions {
    fn default() -> Self {
        Self {
            create: false,
            read_only: false,
            stop: None,
            quota: None,
            pack_gc: true,
            pack_keep_old: true,
            blob_dir: None,
        }
    }
}

/// A packed file that is ready to replace the current one.
pub struct Packed {
    pub file: Arc<dyn StorageFile>,
    pub index: Index,
    samples: Samples,
    /// End of its last transaction.
    pub end: u64,
}

/// A ZODB FileStorage.
pub struct FileStorage {
    /// Its children have it, too, and may only read.
    owner: Owner,
    /// As it was given.
    name: String,
    /// Absolute, whatever the current directory becomes.
    path: PathBuf,
    options: FileStorageOptions,
    current: ArcSwap<Snapshot>,
    last_tid: AtomicU64,
    closed: AtomicBool,
    /// Held by whoever appends or replaces the file, through its sync.
    writer: Mutex<()>,
    /// Nanoseconds that the last finish waited for its sync.
    last_sync: AtomicU64,
    /// An I/O error after which nothing is written any more.
    failed: OnceLock<String>,
    /// The largest tid given or seen.
    last_generated: Mutex<Tid>,
    space: Space,
    oids: OidSupply,
    blobs: Option<Arc<BlobDir>>,
    /// What renames and removes files.
    operations: Arc<dyn FileNames>,
    lock: Mutex<Option<LockFile>>,
    /// What the saved index covers: the file, up to where. Held while one is saved.
    saved_index: Mutex<Option<(Weak<Snapshot>, u64)>>,
    used_index: bool,
    /// Held by a pack.
    packing: Mutex<()>,
    /// Held while the data file or its index file gets its name, so that no index comes beside another file.
    names: Mutex<()>,
}

impl FileStorage {
    /// Absolute path of the data file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn options(&self) -> &FileStorageOptions {
        &self.options
    }

    pub fn blob_dir(&self) -> Option<&Arc<BlobDir>> {
        self.blobs.as_ref()
    }

    /// Whether the last opening found a usable index file.
    pub fn used_index(&self) -> bool {
        self.used_index
    }

    /// The file and index of this moment. Costs an atomic pointer load and a reference count.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// The largest oid given or stored, ZODB's `_oid`.
    pub fn max_oid(&self) -> Oid {
        self.oids.last()
    }

    /// A client uses an oid of its own choice: oids given later are above it (ZODB's `set_max_oid`).
    pub fn note_oid(&self, oid: Oid) {
        self.oids.note_used(oid);
    }

    /// A tid later than all before, for a transaction whose tid must be known before it is finished. It must be finished
    /// before any other.
    pub fn new_tid(&self) -> Tid {
        self.tid_for(None)
    }

    /// Replaces file and index after a pack. `rename` puts the packed file in the old one's place; if it fails, nothing
    /// has changed. `sync` makes that durable; if it fails, the storage takes no more writes: nobody knows which file a
    /// crash would leave. The caller holds the whole storage: nothing is voted, nobody is putting a transaction together.
    pub(crate) fn switch(
        &self,
        packed: Packed,
        rename: &mut dyn FnMut() -> Result<()>,
        sync: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let _writer = self.writable()?;
        self.check_end(&self.current.load())?;
        let failed = |e| StorageError::io("cannot lock the packed file", e);
        if lock(&self.lock).is_some() && !packed.file.try_lock().map_err(failed)? {
            return Err(StorageError::Locked(format!(
                "the packed file of {} is locked",
                self.path.display()
            )));
        }
        let names = lock(&self.names);
        rename()?;
        let Packed { file, index, samples, end } = packed;
        let name = self.current.load().name().clone();
        self.current.store(Arc::new(Snapshot::new(file, index, end, samples, name)));
        drop(names);
        self.space.forget();
        sync().inspect_err(|e| drop(self.failed.set(e.to_string())))
    }

    /// Saves the index, unless the saved one is of this moment already. Commits go on meanwhile.
    pub(crate) fn save_index(&self) -> Result<()> {
        self.check_process()?;
        let mut saved = lock(&self.saved_index);
        let snapshot = self.snapshot();
        let same =
            |file: &Weak<Snapshot>, end| file.as_ptr() == Arc::as_ptr(&snapshot) && end == snapshot.end();
        if !saved.as_ref().is_some_and(|(file, end)| same(file, *end)) {
            let is_current = || Arc::ptr_eq(&self.current.load(), &snapshot);
            if let Some(end) = index_file::save(&self.path, &snapshot, &self.names, &is_current)? {
                *saved = Some((Arc::downgrade(&snapshot), end));
            }
        }
        Ok(())
    }

    /// Saves the index, gives back reserved space and oids, releases the locks. Loads fail from here on.
    ///
    /// In a child of the process that opened it only that: file and locks are the parent's.
    pub(crate) fn close_files(&self) -> Result<()> {
        if !self.owner.is_here() {
            // No lock: whoever held it at the fork is not here to give it back.
            self.closed.store(true, Ordering::Release);
            return Ok(());
        }
        let _writer = lock(&self.writer);
        if self.closed.swap(true, Ordering::AcqRel) || self.options.read_only {
            return Ok(());
        }
        let snapshot = self.snapshot();
        let end = snapshot.end();
        if self.space.is_reserved_beyond(end)
            && self.failed.get().is_none()
            && snapshot.file.len().is_ok_and(|len| len == end)
            && let Err(e) = snapshot.file.set_len(end)
        {
            tracing::warn!("cannot give back reserved space: {e}");
        }
        for result in [self.save_index(), self.oids.close()] {
            if let Err(e) = result {
                tracing::warn!("{e}");
            }
        }
        let unlocked = snapshot.file.unlock();
        drop(lock(&self.lock).take());
        unlocked.map_err(|e| StorageError::io("cannot unlock the data file", e))
    }

    /// The current snapshot, for reading.
    fn reading(&self) -> Result<arc_swap::Guard<Arc<Snapshot>>> {
        if self.closed.load(Ordering::Acquire) {
            return Err(StorageError::Closed);
        }
        Ok(self.current.load())
    }

    /// The right to append. Waits for whoever has it.
    fn writable(&self) -> Result<MutexGuard<'_, ()>> {
        let writer = lock(&self.writer);
        self.check_writable()?;
        Ok(writer)
    }

    /// That writing is possible. Waits for nothing.
    pub fn check_writable(&self) -> Result<()> {
        self.check_process()?;
        match self.failed.get() {
            _ if self.options.read_only => Err(StorageError::ReadOnly),
            _ if self.closed.load(Ordering::Acquire) => Err(StorageError::Closed),
            Some(error) => Err(StorageError::PreviousIo(error.clone())),
            None => Ok(()),
        }
    }
}

impl FileStorage {
    /// That this is the process that opened the file. Costs a `getpid`.
    fn check_process(&self) -> Result<()> {
        match self.owner.is_here() {
            true => Ok(()),
            false => {
                Err(StorageError::Forked { path: self.path.display().to_string(), owner: self.owner.pid() })
            }
        }
    }

    /// That the file ends where it was left: somebody who wrote to it (locks are advice) would be overwritten, or a hole
    /// would come before what is appended. Otherwise the storage takes no more writes. Costs an `lseek`.
    fn check_end(&self, snapshot: &Snapshot) -> Result<()> {
        let len = snapshot.file.len().map_err(|e| snapshot.io(e))?;
        let end = snapshot.end();
        if len == end {
            return Ok(());
        }
        let text = format!(
            "{} has {len} bytes and was left with {end}: another process has written to it, check it with `zeo-rs check`",
            self.path.display()
        );
        tracing::error!("no more writes: {text}");
        let _ = self.failed.set(text.clone());
        Err(StorageError::PreviousIo(text))
    }
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        if let Err(e) = self.close_files() {
            tracing::warn!("{e}");
        }
    }
}

/// A panic elsewhere leaves these data whole: every change of them is a single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
