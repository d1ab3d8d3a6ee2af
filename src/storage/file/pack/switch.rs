//! Putting the packed file in the place of the old one, so that at every moment NAME is one whole file or the other.
//!
//! | step | a crash after it leaves |
//! | --- | --- |
//! | NAME.pack synced | NAME old, a leftover NAME.pack |
//! | NAME.index removed, synced | NAME old without index: opening scans it |
//! | NAME.old replaced by a link to NAME | NAME old, NAME.old the same file |
//! | NAME.pack renamed to NAME | NAME new without index: opening scans it |
//! | directory synced; only now are commits taken again | NAME new |
//! | NAME.index saved | NAME new with its index |
//!
//! The index goes first because one that belongs to another file may, by chance, pass the check on opening.
//! ZODB renames NAME away before it renames NAME.pack; a crash between the two leaves no NAME, and an empty database
//! at the next start.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::index_file::beside;
use crate::storage::blob::FileNames;
use crate::storage::{Result, StorageError};

pub(super) struct Files {
    names: Arc<dyn FileNames>,
    pub data: PathBuf,
    pub packed: PathBuf,
    pub old: PathBuf,
    pub index: PathBuf,
}

impl Files {
    pub(super) fn of(names: Arc<dyn FileNames>, data: &Path) -> Self {
        Self {
            names,
            data: data.to_owned(),
            packed: beside(data, ".pack"),
            old: beside(data, ".old"),
            index: beside(data, ".index"),
        }
    }

    /// Everything up to the rename, which is the last step: if this fails, NAME is what it was. `step` is called after
    /// each step.
    pub(super) fn put_in_place(&self, keep_old: bool, step: &mut dyn FnMut(&'static str)) -> Result<()> {
        self.remove(&self.index)?;
        self.sync()?;
        step("index removed");
        if keep_old {
            self.remove(&self.old)?;
            step("old removed");
            self.names.hard_link(&self.data, &self.old).map_err(|e| {
                let text = "keep the previous file (pack_keep_old needs hard links)";
                failed(text, &self.old, e)
            })?;
            step("old linked");
        }
        let renamed = self.names.rename(&self.packed, &self.data);
        renamed.map_err(|e| failed("put the packed file in place of", &self.data, e))?;
        step("renamed");
        Ok(())
    }

    /// Makes the names durable.
    pub(super) fn sync(&self) -> Result<()> {
        let parent = self.data.parent().unwrap_or(Path::new("."));
        self.names.sync(parent).map_err(|e| failed("sync the directory of", &self.data, e))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        match self.names.remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, e)),
            _ => Ok(()),
        }
    }

    /// Removes what a failed pack leaves.
    pub(super) fn discard_packed(&self) {
        let _ = self.names.remove_file(&self.packed);
    }
}

fn failed(verb: &str, path: &Path, source: io::Error) -> StorageError {
    StorageError::io(format!("cannot {verb} {}", path.display()), source)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::ids::{Oid, Tid};
    use crate::storage::Storage;
    use crate::storage::blob::OsFileNames;
    use crate::storage::file::{FileStorage, FileStorageOptions};

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/filestorage").join(name)
    }

    fn copy_files(from: &Path, to: &Path) {
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
            }
        }
    }

    /// What loads answer, and the last tid.
    fn answers(data: &Path) -> (Vec<Option<Tid>>, Tid, u64) {
        let storage = FileStorage::open(data, FileStorageOptions::default()).unwrap();
        let load = |oid| storage.load_before(Oid(oid), Tid::MAX).ok().flatten().map(|loaded| loaded.tid);
        ((0..8).map(load).collect(), storage.last_tid(), storage.size())
    }

    /// The directory as a crash after each step would leave it, opened: one whole file or the other.
    #[test]
    fn every_crash_image_opens_as_one_file_or_the_other() {
        for keep_old in [true, false] {
            let root = tempfile::tempdir().unwrap();
            let live = root.path().join("live");
            fs::create_dir(&live).unwrap();
            let files = Files::of(Arc::new(OsFileNames), &live.join("Data.fs"));
            fs::copy(fixture("pack_source/Data.fs"), &files.data).unwrap();
            let old = answers(&files.data);
            assert!(files.index.exists());
            fs::copy(fixture("pack_out/pack_out_gc_09.fs"), &files.packed).unwrap();
            fs::copy(fixture("simple/Data.fs"), &files.old).unwrap();
            let mut images = vec![root.path().join("0 synced")];
            fs::create_dir(&images[0]).unwrap();
            copy_files(&live, &images[0]);
            files
                .put_in_place(keep_old, &mut |step| {
                    let image = root.path().join(format!("{} {step}", images.len()));
                    fs::create_dir(&image).unwrap();
                    copy_files(&live, &image);
                    images.push(image);
                })
                .unwrap();
            files.sync().unwrap();
            let new = answers(&files.data);
            assert_ne!(old.2, new.2);
            assert_eq!(images.len(), if keep_old { 5 } else { 3 });
            for image in &images {
                let data = image.join("Data.fs");
                let renamed = image.ends_with(images.last().unwrap());
                assert_eq!(answers(&data), if renamed { new.clone() } else { old.clone() }, "{image:?}");
                // And again, with the index that the first opening has saved.
                assert_eq!(answers(&data), if renamed { new.clone() } else { old.clone() }, "{image:?}");
            }
        }
    }
}
