//! Packing by somebody else: ZODB's `IFileStoragePacker`, for packers that run in another process, slower, or by other
//! rules.
//!
//! The packer writes NAME.pack and, with blobs, BLOBDIR/.removed; then this module takes over. What it wrote is not
//! trusted: the file is read like one that is opened, and must end in the newest transaction wherever that is newer
//! than the pack time. If it does not, the storage stays as it is.
//!
//! Cost, while nothing can be committed: one scan and one sync of the packed file.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use super::super::file::{OsFile, StorageFile};
use super::super::format::FIRST_TXN;
use super::super::index::Index;
use super::super::samples::Samples;
use super::super::scan::{Range, Scanned, Tail, check_magic, scan};
use super::super::{FileStorage, Packed, lock};
use super::blobs::Removals;
use super::same_access;
use super::switch::Files;
use crate::ids::{Oid, Tid};
use crate::storage::blob::BlobDir;
use crate::storage::{Result, StorageError};

/// The list of ZODB's packers: a line of hexadecimal digits is an oid, of which all goes, or an oid and a tid.
const REMOVED: &str = ".removed";

impl FileStorage {
    /// Has `packer` write NAME.pack as of `stop`, and puts it in the place of the data file. `packer` answers the size
    /// of the file, `None` if there is nothing to be done; where it answers a size, nothing can be committed any more
    /// until `release` is called, which happens once. Answers whether the file was packed.
    ///
    /// Errors: what `packer` raises, `Invalid` (already packing, or not the file it announced), `Corrupted` (what it wrote
    /// contradicts the format), `Io`.
    pub fn pack_by(
        &self,
        stop: Tid,
        packer: &mut dyn FnMut() -> Result<Option<u64>>,
        release: &mut dyn FnMut(),
    ) -> Result<bool> {
        self.check_writable()?;
        let _packing = self.start_packing()?;
        let files = Files::of(self.operations.clone(), &self.path);
        // Their blocks are given back after the switch, not while writers wait for it.
        let _previous = (self.snapshot(), self.keep_open(&files.old));
        let answer = packer().inspect_err(|_| self.discard(&files));
        let Some(size) = answer? else {
            self.discard(&files);
            return Ok(false);
        };
        let switched = self.switch_to_foreign(&files, stop, size);
        release();
        switched.inspect_err(|_| {
            self.discard(&files);
            // The switch may have removed it.
            *lock(&self.saved_index) = None;
        })?;
        self.tidy_up();
        Ok(true)
    }

    fn switch_to_foreign(&self, files: &Files, stop: Tid, size: u64) -> Result<()> {
        let name = files.packed.display().to_string();
        let failed =
            |e| StorageError::io(format!("cannot read {name}, which the packer should have written"), e);
        let file = OpenOptions::new().read(true).write(true).open(&files.packed).map_err(failed)?;
        if let Err(e) = same_access(&file, &files.data) {
            tracing::warn!("{name} does not get the owner and mode of the old file: {e}");
        }
        let file = OsFile(file);
        let wrong = |what: String| {
            StorageError::Invalid(format!("the packer's {name} {what}; the storage is as it was"))
        };
        let (index, mut samples) = (Index::new(), Samples::default());
        check_magic(&file, &name)?;
        let range = Range { start: FIRST_TXN, last_tid: Tid::ZERO, stop: None };
        let Scanned { end, last_tid, tail } = scan(&file, &name, range, &index, &mut samples)?;
        if tail != Tail::Clean || end != size {
            return Err(wrong(format!("has {end} bytes of whole transactions and should have {size}")));
        }
        let newest = self.last_tid.load(std::sync::atomic::Ordering::Acquire);
        if newest > stop.0 && last_tid.0 != newest {
            return Err(wrong(format!("ends with transaction {last_tid}, and should with {}", Tid(newest))));
        }
        file.sync_data().map_err(|e| StorageError::io(format!("cannot write {name}"), e))?;
        let removals = match &self.blobs {
            Some(dir) => Some(removals(dir, &files.packed, &index)?),
            None => None,
        };
        let packed = Packed { file: std::sync::Arc::new(file), index, samples, end };
        let mut rename = || files.put_in_place(self.options.pack_keep_old, &mut |_| {});
        self.switch(packed, &mut rename, &mut || files.sync())?;
        if let Some(removals) = removals {
            let confirmed = removals.confirm();
            if let Err(e) = confirmed {
                tracing::warn!("{e}: blob files that are no longer needed stay");
            }
        }
        if let Some(dir) = &self.blobs {
            let _ = self.operations.remove_file(&dir.base().join(REMOVED));
        }
        Ok(())
    }

    /// Removes what a packer leaves.
    fn discard(&self, files: &Files) {
        files.discard_packed();
        if let Some(dir) = &self.blobs {
            let _ = self.operations.remove_file(&dir.base().join(REMOVED));
        }
    }
}

/// The packer's list as this storage's own. An object that is still there loses only what is listed revision by revision.
fn removals<'a>(dir: &'a BlobDir, packed: &Path, index: &Index) -> Result<Removals<'a>> {
    let mut removals = Removals::new(dir, packed)?;
    let path = dir.base().join(REMOVED);
    let list = match fs::read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        list => list.map_err(|e| StorageError::io(format!("cannot read {}", path.display()), e))?,
    };
    let number = |digits: &[u8]| u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok();
    for line in list.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty()) {
        let (oid, tid) = line.split_at_checked(16).unwrap_or((line, &[]));
        match (number(oid).map(Oid), number(tid).map(Tid)) {
            (Some(oid), Some(tid)) if line.len() == 32 => removals.add(oid, tid)?,
            (Some(oid), None) if line.len() == 16 => {
                for tid in dir.serials(oid)?.into_iter().filter(|_| index.get(oid).is_none()) {
                    removals.add(oid, tid)?;
                }
            }
            _ => tracing::warn!("{}: a line that is no oid is ignored", path.display()),
        }
    }
    removals.finish()?;
    Ok(removals)
}
