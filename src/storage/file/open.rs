//! Opening a [`FileStorage`]: locks, index or scan, damaged tail, blobs.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::ArcSwap;

use super::commit::now;
use super::file::{OsFile, StorageFile};
use super::format::{FIRST_TXN, MAGIC};
use super::index::Index;
use super::lock::LockFile;
use super::oids::{OidSupply, sync_parent};
use super::samples::Samples;
use super::scan::{Range, Scanned, Tail, check_index, check_magic, scan};
use super::snapshot::Snapshot;
use super::space::Space;
use super::{FileStorage, FileStorageOptions, index_file};
use crate::ids::Tid;
use crate::storage::blob::{BlobDir, FileNames, OsFileNames};
use crate::storage::{Owner, Result, StorageError};

/// An opening that read more than this without an index saves one.
const WORTH_SAVING: u64 = 16 << 20;

impl FileStorage {
    /// Opens or creates the data file at `path`.
    ///
    /// Errors: `Locked` (another process has it), `Format` (not a data file), `Corrupted` (a contradiction that is not a
    /// damaged tail), `Invalid` (options that contradict each other or the blob directory), `Io`.
    pub fn open(path: impl AsRef<Path>, options: FileStorageOptions) -> Result<Self> {
        let given = path.as_ref();
        let failed = |what: &str, e| StorageError::io(format!("cannot {what} {}", given.display()), e);
        let absolute = std::path::absolute(given).map_err(|e| failed("find", e))?;
        let path = absolute.as_path();
        if options.read_only && options.create {
            return Err(StorageError::Invalid("a read-only storage cannot be created".into()));
        }
        if options.stop.is_some() && !options.read_only {
            return Err(StorageError::Invalid("time-travel only supported in read-only mode".into()));
        }
        if options.read_only {
            let file = OsFile(File::open(path).map_err(|e| failed("open", e))?);
            return Self::open_file(Arc::new(file), Arc::new(OsFileNames), given, options, None);
        }
        let lock = LockFile::acquire(path)?;
        let existing = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => Some(OsFile(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(failed("open", e)),
        };
        if let Some(file) = &existing {
            lock.lock_data(path, file)?;
        }
        let file = match existing {
            Some(file) if !options.create => file,
            existing => {
                start_empty(path, existing.is_some(), &options)?;
                let created = OpenOptions::new().read(true).write(true).create_new(true).open(path);
                let file = OsFile(created.map_err(|e| failed("create", e))?);
                lock.lock_data(path, &file)?;
                file
            }
        };
        Self::open_file(Arc::new(file), Arc::new(OsFileNames), given, options, Some(lock))
    }

    /// Opens a storage on a file that is open already: what [`Self::open`] does after taking the locks.
    fn open_file(
        file: Arc<dyn StorageFile>,
        operations: Arc<dyn FileNames>,
        given: &Path,
        options: FileStorageOptions,
        lock: Option<LockFile>,
    ) -> Result<Self> {
        let path = std::path::absolute(given).map_err(|e| StorageError::io("cannot find the file", e))?;
        let name: Arc<str> = path.display().to_string().into();
        let writes = !options.read_only;
        let cannot_write = |e| StorageError::io(format!("cannot write {name}"), e);
        if !check_magic(&*file, &name)? && writes {
            file.set_len(0).map_err(cannot_write)?;
            file.write_at(&MAGIC, 0).and_then(|()| file.sync_data()).map_err(cannot_write)?;
            sync_parent(&path).map_err(cannot_write)?;
        }
        // The index shows everything there is: no use for a look at the past.
        let saved = options.stop.is_none().then(|| usable_index(&path, &*file)).flatten();
        let used_index = saved.is_some();
        let (index, start, last_tid) = saved.unwrap_or_else(|| (Index::new(), FIRST_TXN, Tid::ZERO));
        let mut samples = if used_index { Samples::after(start, last_tid) } else { Samples::default() };
        let range = Range { start, last_tid, stop: options.stop };
        let Scanned { end, last_tid, tail } = scan(&*file, &name, range, &index, &mut samples)?;
        match tail {
            Tail::Damaged(what) => {
                tracing::warn!("{name}: {what} at {end}, ignored from there on");
                if writes {
                    save_tail(&path, &*file, end)?;
                }
            }
            Tail::Stray if writes => tracing::warn!("{name}: stray bytes at {end}, cut off"),
            Tail::Stray | Tail::Clean | Tail::Stopped => {}
        }
        if writes && tail != Tail::Clean {
            file.set_len(end).and_then(|()| file.sync_data()).map_err(cannot_write)?;
        }
        warn_of_the_future(&name, last_tid);
        let blobs = match &options.blob_dir {
            Some(dir) => {
                let dir = BlobDir::open_with(operations.clone(), dir, writes)?;
                // Whoever had unfinished blobs here held the lock, and is gone.
                if lock.is_some()
                    && let Err(e) = dir.clean_temp()
                {
                    tracing::warn!("{e}");
                }
                Some(Arc::new(dir))
            }
            None => None,
        };
        let oids = OidSupply::open(&path, index.max_oid());
        let snapshot = Arc::new(Snapshot::new(file, index, end, samples, name));
        let saved_index = used_index.then(|| (Arc::downgrade(&snapshot), start));
        let storage = Self {
            owner: Owner::here(),
            name: given.display().to_string(),
            path,
            options,
            current: ArcSwap::new(snapshot),
            last_tid: AtomicU64::new(last_tid.0),
            closed: AtomicBool::new(false),
            writer: Mutex::new(()),
            last_sync: AtomicU64::new(0),
            failed: OnceLock::new(),
            last_generated: Mutex::new(last_tid),
            space: Space::default(),
            oids,
            blobs,
            operations,
            lock: Mutex::new(lock),
            saved_index: Mutex::new(saved_index),
            used_index,
            packing: Mutex::default(),
            names: Mutex::default(),
        };
        if writes
            && (!used_index || end - start > WORTH_SAVING)
            && let Err(e) = storage.save_index()
        {
            tracing::warn!("{e}");
        }
        Ok(storage)
    }

    /// As [`Self::open`], with a file that the caller has opened: a test's that fails or forgets on demand. No lock is
    /// taken.
    #[doc(hidden)]
    pub fn open_with(
        file: Arc<dyn StorageFile>,
        path: impl AsRef<Path>,
        options: FileStorageOptions,
    ) -> Result<Self> {
        Self::open_with_names(file, Arc::new(OsFileNames), path, options)
    }

    /// As [`Self::open_with`], with operations on names that a test looks at.
    #[doc(hidden)]
    pub fn open_with_names(
        file: Arc<dyn StorageFile>,
        operations: Arc<dyn FileNames>,
        path: impl AsRef<Path>,
        options: FileStorageOptions,
    ) -> Result<Self> {
        Self::open_file(file, operations, path.as_ref(), options, None)
    }
}

/// Makes way for a new data file. Blobs are deleted only where `create` was asked for: a data file that is merely
/// missing (a volume not mounted, a file not restored yet) must not cost them.
fn start_empty(path: &Path, exists: bool, options: &FileStorageOptions) -> Result<()> {
    let failed = |what: &Path, e| StorageError::io(format!("cannot remove {}", what.display()), e);
    if let Some(dir) = &options.blob_dir {
        if options.create {
            match std::fs::remove_dir_all(dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(dir, e)),
                _ => {}
            }
        } else if has_blobs(dir)? {
            return Err(StorageError::Invalid(format!(
                "{} is missing, but {} holds blobs: restore the data file, or open with create=True to start empty and \
                 delete the blobs",
                path.display(),
                dir.display()
            )));
        }
    }
    if exists {
        std::fs::remove_file(path).map_err(|e| failed(path, e))?;
    }
    for suffix in [".index", ".oid"] {
        let file = index_file::beside(path, suffix);
        match std::fs::remove_file(&file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(&file, e)),
            _ => {}
        }
    }
    Ok(())
}

fn has_blobs(dir: &Path) -> Result<bool> {
    if !dir.exists() {
        return Ok(false);
    }
    let mut found = false;
    BlobDir::open(dir, false)?.for_each(&mut |_, _, _| {
        found = true;
        Ok(())
    })?;
    Ok(found)
}

fn usable_index(path: &Path, file: &dyn StorageFile) -> Option<(Index, u64, Tid)> {
    let (index, end) = index_file::load(path)?;
    if end <= FIRST_TXN {
        // Saved while there was nothing.
        return None;
    }
    match check_index(file, &index, end) {
        Ok(Some(tid)) => Some((index, end, tid)),
        Ok(None) => {
            tracing::warn!("the index of {} is not of this file: scanning it", path.display());
            None
        }
        Err(e) => {
            tracing::warn!("cannot check the index of {}: {e}", path.display());
            None
        }
    }
}

/// Copies the bytes from `end` on to the first free NAME.trN, as ZODB does, before they are cut off.
fn save_tail(path: &Path, file: &dyn StorageFile, end: u64) -> Result<()> {
    let failed = |e| StorageError::io(format!("cannot save the damaged tail of {}", path.display()), e);
    let mut number = 0;
    let mut out = loop {
        let name = index_file::beside(path, &format!(".tr{number}"));
        match OpenOptions::new().write(true).create_new(true).open(&name) {
            Ok(out) => break out,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(e) => return Err(failed(e)),
        }
    };
    let mut buf = vec![0; 1 << 20];
    let mut at = end;
    loop {
        let n = file.read_at(&mut buf, at).map_err(failed)?;
        if n == 0 {
            return out.sync_all().map_err(failed);
        }
        out.write_all(buf.get(..n).unwrap_or_default()).map_err(failed)?;
        at += n as u64;
    }
}

/// Tids go on above the last one whatever the clock says; a clock that is far behind deserves a word.
fn warn_of_the_future(name: &str, last_tid: Tid) {
    let ahead = last_tid.to_unix() - now().to_unix();
    if last_tid > now() && ahead > 30.0 * 60.0 {
        tracing::error!("{name}: database records {ahead:.0} seconds in the future");
    } else if last_tid > now() {
        tracing::warn!("{name}: database records {ahead:.0} seconds in the future");
    }
}
