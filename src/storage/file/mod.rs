//! The FileStorage engine: ZODB's Data.fs, byte for byte, both ways. See `docs/filestorage.md`.
//!
//! | file | what |
//! | --- | --- |
//! | `format`, `file`, `index` | headers, the file as the engine sees it, oid → position |
//! | `pack`, `check` | pack and verification |

pub mod file;
pub mod format;
pub mod index;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use self::file::StorageFile;
use self::index::Index;
use crate::ids::Tid;
use crate::storage::{Result, StorageError};

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

/// What readers need: a file and the index into it. A pack replaces both at once; whoever holds the old pair goes on
/// reading the old file.
pub struct Snapshot {
    pub file: Arc<dyn StorageFile>,
    pub index: Index,
}

/// A packed file that is ready to replace the current one.
pub struct Packed {
    pub file: Arc<dyn StorageFile>,
    pub index: Index,
    /// End of its last transaction.
    pub end: u64,
}

/// A ZODB FileStorage.
pub struct FileStorage {
    /// Absolute, whatever the current directory becomes.
    path: PathBuf,
    options: FileStorageOptions,
    snapshot: RwLock<Arc<Snapshot>>,
    /// End of the last published transaction in the snapshot's file.
    end: AtomicU64,
    last_tid: AtomicU64,
    writer: Mutex<Writer>,
}

/// State of whoever appends; its mutex is the only lock of a commit and no reader takes it.
struct Writer {
    /// An I/O error after which nothing is written any more.
    failed: Option<String>,
}

impl FileStorage {
    /// Absolute path of the data file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn options(&self) -> &FileStorageOptions {
        &self.options
    }

    /// The file and index of this moment. Costs a read lock and a reference count.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// End of the last published transaction: everything below belongs to the file for good (until a pack).
    pub(crate) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    pub fn last_tid(&self) -> Tid {
        Tid(self.last_tid.load(Ordering::Acquire))
    }

    /// Replaces file and index after a pack. `rename` puts the packed file in the old one's place; if it fails, nothing
    /// has changed. The caller holds the whole storage: nothing is voted.
    pub(crate) fn switch(&self, packed: Packed, rename: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let writer = self.writable()?;
        if !packed.file.try_lock().map_err(|e| StorageError::io("cannot lock the packed file", e))? {
            return Err(StorageError::Locked(format!(
                "the packed file of {} is locked",
                self.path.display()
            )));
        }
        rename()?;
        let Packed { file, index, end } = packed;
        let mut current = self.snapshot.write().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(Snapshot { file, index });
        self.end.store(end, Ordering::Release);
        drop(current);
        drop(writer);
        Ok(())
    }

    fn writable(&self) -> Result<MutexGuard<'_, Writer>> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        match &writer.failed {
            Some(error) => Err(StorageError::PreviousIo(error.clone())),
            None => Ok(writer),
        }
    }
}
