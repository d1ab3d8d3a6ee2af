//! Pack: writes a new data file without the revisions, and objects, that are no longer needed, beside loads and
//! commits, and puts it in the place of the old one. See `docs/pack.md`.
//!
//! | phase | file | what |
//! | --- | --- | --- |
//! | index | `mark` | reads the file up to the pack time: which record of each object is current then |
//! | mark | `mark`, `frontier` | which of them survive |
//! | copy | `copy`, `output` | writes NAME.pack: what survives of the time before, then everything after, again and again until little is left |
//! | switch | `switch` | with the whole storage held: the rest, sync, rename, new index |
//! | blobs | `blobs` | removes the files of dropped revisions |
//!
//! A packer of the application's own does the first three: `foreign`.
//!
//! Until the rename every failure, cancellation or crash leaves the storage as it was. Memory: the index as of the pack
//! time (4 to 8 bytes an object), after marking instead of it the one of the packed file, and 1/344 of the file's size; while
//! marking up to 1 byte an object and another 1/344.

mod blobs;
mod copy;
mod foreign;
mod frontier;
mod mark;
mod output;
mod switch;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, MutexGuard, TryLockError};

use self::blobs::{Removals, remove_listed};
use self::copy::{Copier, Missing};
use self::mark::AtPackTime;
use self::output::Output;
use self::switch::Files;
use super::file::{OsFile, StorageFile};
use super::pace::Pace;
use super::snapshot::Snapshot;
use super::{FileStorage, Packed, lock};
use crate::ids::{Oid, Tid};
use crate::storage::{PackOptions, References, Result, StorageError, WholeStorageLock};

/// Writers are stopped when at most so much is left to be copied: a few milliseconds.
const LITTLE: u64 = 1 << 20;
/// If commits are faster than the copy, writers are stopped after so many rounds with whatever is left.
const ROUNDS: usize = 20;
/// If transactions committed meanwhile bring garbage back to life so often, nothing more is thought garbage.
const GC_ATTEMPTS: usize = 3;

/// How an attempt ended.
enum Outcome {
    Done,
    /// Nothing would change.
    Nothing,
    /// A transaction committed meanwhile needs an object that was thought garbage.
    Missed(Oid),
}

/// What an attempt works with.
struct Job<'a> {
    snapshot: Arc<Snapshot>,
    name: &'a str,
    stop: Tid,
    /// `None`: no garbage collection.
    references: Option<&'a dyn References>,
    /// Reads records, whether or not garbage is collected.
    records: &'a dyn References,
    whole: &'a dyn WholeStorageLock,
    files: Files,
}

impl FileStorage {
    /// See [`crate::storage::Storage::pack`].
    pub(super) fn pack_file(&self, options: PackOptions<'_>, whole: &dyn WholeStorageLock) -> Result<()> {
        self.check_writable()?;
        let stop = options.stop()?;
        if stop == Tid::ZERO {
            return Err(StorageError::Invalid("Invalid pack time".into()));
        }
        let _packing = self.start_packing()?;
        let snapshot = self.snapshot();
        let name = snapshot.name().clone();
        let gc = options.gc.unwrap_or(self.options.pack_gc);
        let files = Files::of(self.operations.clone(), &self.path);
        let mut pace = Pace::new(options.progress, options.throttle);
        let references = gc.then_some(options.references);
        let records = options.references;
        let mut job = Job { snapshot, name: &name, stop, references, records, whole, files };
        for attempt in 1.. {
            if attempt > GC_ATTEMPTS {
                job.references = None;
            }
            let outcome = self.attempt(&job, &mut pace).inspect_err(|e| {
                job.files.discard_packed();
                // The switch may have removed it.
                *lock(&self.saved_index) = None;
                if matches!(e, StorageError::Dangling { .. }) {
                    tracing::error!("{name}: {e}");
                }
            });
            match outcome? {
                Outcome::Nothing => return Ok(()),
                Outcome::Missed(oid) => tracing::info!("{name}: {oid} is needed again: pack starts over"),
                Outcome::Done => break,
            }
        }
        self.tidy_up();
        Ok(())
    }

    /// One pack at a time. Works off what one that was killed has left.
    fn start_packing(&self) -> Result<MutexGuard<'_, ()>> {
        let packing = match self.packing.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(StorageError::Invalid("Already packing".into())),
        };
        if let Some(dir) = &self.blobs {
            remove_listed(dir, &self.snapshot(), &self.path, self.options.pack_keep_old)?;
        }
        Ok(packing)
    }

    /// The packed file is in place; what is left to do can be done later.
    fn tidy_up(&self) {
        let keep_old = self.options.pack_keep_old;
        if let Err(e) = self.save_index() {
            tracing::warn!("{e}; the next start scans the file");
        }
        if !keep_old {
            // Of an earlier pack: no longer the file before the last one.
            let _ = self.operations.remove_file(&Files::of(self.operations.clone(), &self.path).old);
        }
        if let Some(dir) = &self.blobs
            && let Err(e) = remove_listed(dir, &self.snapshot(), &self.path, keep_old)
        {
            tracing::warn!("{e}; the next pack removes what is left");
        }
    }

    fn attempt(&self, job: &Job<'_>, pace: &mut Pace<'_>) -> Result<Outcome> {
        let Job { snapshot, name, .. } = job;
        let source = &snapshot.file;
        let marked_end = snapshot.end();
        let at = mark::index(&**source, name, marked_end, job.stop, pace)?;
        if at.all_packed && at.packed_later {
            tracing::info!("{name} has been packed to this or a later time, or nothing changed since");
            return Ok(Outcome::Nothing);
        }
        let marked = match job.references {
            Some(references) => mark::keep_reachable(&**source, name, marked_end, &at, references, pace)?,
            None => mark::keep_all(&**source, name, marked_end, &at, pace)?,
        };
        let AtPackTime { pack_pos, records, plain, current, .. } = at;
        // Makes room for the index of the packed file.
        drop(current);
        if plain && marked.kept.len() == records {
            tracing::info!("{name}: there is nothing to be dropped");
            return Ok(Outcome::Nothing);
        }
        let out = Output::new(self.create_packed(&job.files)?, job.files.packed.display().to_string());
        let mut removals = match &self.blobs {
            Some(dir) => Some(Removals::new(dir, &job.files.packed)?),
            None => None,
        };
        let mut copier = Copier::new(out, source, name, pack_pos, &marked)?;
        pace.enter("copy", snapshot.end(), 0)?;
        let records = job.records;
        let mut dropped = |oid, tid, data: &[u8]| match &mut removals {
            Some(removals) if records.is_blob(data) => removals.add(oid, tid),
            _ => Ok(()),
        };
        let is_newest = pack_pos == snapshot.end();
        copier.copy_kept(is_newest, self.blobs.is_some().then_some(&mut dropped), pace)?;
        if let Some(removals) = &mut removals {
            removals.finish()?;
        }
        let missing =
            job.references.map(|references| Missing { references, live: &snapshot.index, marked_end });
        self.catch_up_and_switch(job, copier, pack_pos, missing.as_ref(), removals.as_ref(), pace)
    }

    fn catch_up_and_switch(
        &self,
        job: &Job<'_>,
        mut copier: Copier<'_>,
        pack_pos: u64,
        missing: Option<&Missing<'_>>,
        removals: Option<&Removals<'_>>,
        pace: &mut Pace<'_>,
    ) -> Result<Outcome> {
        let mut copied = pack_pos;
        let (mut rounds, mut synced) = (0, 0);
        let _old = self.keep_open(&job.files.old);
        loop {
            let end = job.snapshot.end();
            if end - copied > LITTLE && rounds < ROUNDS {
                if let Some(oid) = copier.copy_rest(copied, end, missing, pace)? {
                    return Ok(Outcome::Missed(oid));
                }
                copied = end;
                rounds += 1;
                pace.enter("catch up", 0, 0)?;
                continue;
            } else if synced < copied {
                // Takes long the first time; what is committed meanwhile is the next round.
                copier.out.sync()?;
                synced = copied;
                continue;
            }
            pace.enter("switch", 0, 0)?;
            pace.set_silent(true);
            let mut result = Err(StorageError::Transaction("the storage was not held for the switch".into()));
            job.whole.with_whole_storage(&mut || {
                // What the lock was waited for may have been a large transaction: it is not copied now.
                let much = job.snapshot.end() - copied > LITTLE && rounds < ROUNDS;
                result = match much {
                    true => Ok(None),
                    false => self.switch_to(job, &mut copier, copied, missing, removals, pace).map(Some),
                };
            });
            pace.set_silent(false);
            if let Some(outcome) = result? {
                return Ok(outcome);
            }
            pace.enter("catch up", 0, 0)?;
        }
    }

    /// With the whole storage held.
    fn switch_to(
        &self,
        job: &Job<'_>,
        copier: &mut Copier<'_>,
        copied: u64,
        missing: Option<&Missing<'_>>,
        removals: Option<&Removals<'_>>,
        pace: &mut Pace<'_>,
    ) -> Result<Outcome> {
        if let Some(oid) = copier.copy_rest(copied, job.snapshot.end(), missing, pace)? {
            return Ok(Outcome::Missed(oid));
        }
        copier.out.sync()?;
        let packed = Packed {
            file: copier.out.file().clone(),
            index: std::mem::take(&mut copier.index),
            samples: std::mem::take(&mut copier.samples),
            end: copier.out.pos(),
        };
        let mut rename = || job.files.put_in_place(self.options.pack_keep_old, &mut |_| {});
        self.switch(packed, &mut rename, &mut || job.files.sync())?;
        if let Some(removals) = removals
            && let Err(e) = removals.confirm()
        {
            tracing::warn!("{e}: blob files that are no longer needed stay");
        }
        Ok(Outcome::Done)
    }

    /// NAME.old as it is before the switch. While somebody has it open, removing its name takes no time, whatever its size:
    /// the blocks of many gigabytes are given back when this is dropped, after the switch.
    fn keep_open(&self, old: &Path) -> Option<File> {
        File::open(old).ok().filter(|_| self.options.pack_keep_old)
    }

    fn create_packed(&self, files: &Files) -> Result<Arc<dyn StorageFile>> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).open(&files.packed);
        let file =
            file.map_err(|e| StorageError::io(format!("cannot create {}", files.packed.display()), e))?;
        if let Err(e) = same_access(&file, &files.data) {
            tracing::warn!("{} does not get the owner and mode of the old file: {e}", files.packed.display());
        }
        Ok(Arc::new(OsFile(file)))
    }
}

/// Who could not read the old file shall not read the packed one.
fn same_access(packed: &File, data: &Path) -> io::Result<()> {
    let old = data.metadata()?;
    if !packed.metadata()?.is_file() {
        return Ok(());
    }
    packed.set_permissions(old.permissions())?;
    match std::os::unix::fs::fchown(packed, Some(old.uid()), Some(old.gid())) {
        // Only the administrator may give files away; that the owner changes is as with any file written anew.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        result => result,
    }
}
