//! [`BlobDir`]: the committed blob files of one storage.
//!
//! A file is made ready before the vote is answered ([`BlobDir::prepare`]: on this file system, read-only, synced,
//! its directory made) and gets its final name when the tid is known ([`BlobDir::publish`]: one rename and one sync
//! of the directory). So what can fail for lack of space or rights fails before the vote.
//!
//! Cost of a blob commit: 1 fsync of the file, 1 fsync of its directory, plus 1 fsync for each directory made.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use super::layout::{Layout, MARKER, TEMP};
use super::names::{FileNames, OsFileNames};
use crate::ids::{Oid, Tid};
use crate::storage::{Owner, Result, StorageError};

/// How the names of voted blob files end, and those of files that `zeo_rs.FileStorage` was given before the vote.
const PREPARED: &str = ".prepared";
const STAGED: &str = ".staged";
/// Ends the names of files that a server is receiving.
pub const RECEIVED: &str = ".received";

/// A blob directory. Shared by all threads of a storage.
#[derive(Debug)]
pub struct BlobDir {
    owner: Owner,
    base: PathBuf,
    layout: Layout,
    /// Names of files made here are unique in this process by this, among processes by the pid.
    next_temp: AtomicU64,
    files: Arc<dyn FileNames>,
    /// Held while a name appears in an object's directory and while empty directories are removed, so that neither
    /// pulls the ground from under the other. Never held during a sync.
    names: Mutex<()>,
}

impl BlobDir {
    /// Opens the directory with the layout that its marker names; without a marker `bushy` if it is empty, else
    /// `lawn` (as ZODB's `automatic`). `create`: make it, its temporary directory and marker where missing.
    ///
    /// Errors: `Invalid` for an unknown marker, `Io`.
    pub fn open(path: &Path, create: bool) -> Result<Self> {
        Self::open_with(Arc::new(OsFileNames), path, create)
    }

    /// As [`Self::open`], with operations that a test looks at, or fails.
    #[doc(hidden)]
    pub fn open_with(files: Arc<dyn FileNames>, path: &Path, create: bool) -> Result<Self> {
        let layout = match read_marker(path)? {
            Some(layout) => layout,
            None if is_used(path)? => Layout::Lawn,
            None => Layout::Bushy,
        };
        Self::make(files, path, layout, create)
    }

    /// Opens the directory with a given layout. Errors: `Invalid` if its marker names another one, `Io`.
    pub fn open_as(path: &Path, layout: Layout, create: bool) -> Result<Self> {
        Self::make(Arc::new(OsFileNames), path, layout, create)
    }

    fn make(files: Arc<dyn FileNames>, path: &Path, layout: Layout, create: bool) -> Result<Self> {
        let base = std::path::absolute(path).map_err(|e| failed("find", path, e))?;
        match read_marker(&base)? {
            Some(found) if found != layout => {
                let text =
                    format!("{} has layout {found}, not {layout}: use another directory", base.display());
                return Err(StorageError::Invalid(text));
            }
            Some(_) if !create => {}
            found if create => {
                make_dirs(&*files, &base)?;
                if found.is_none() {
                    write_marker(&*files, &base, layout)?;
                }
                make_dirs(&*files, &base.join(TEMP))?;
            }
            _ => {}
        }
        Ok(Self {
            owner: Owner::here(),
            base,
            layout,
            next_temp: AtomicU64::new(0),
            files,
            names: Mutex::new(()),
        })
    }

    pub fn base(&self) -> &Path {
        &self.base
    }

    pub(crate) fn files(&self) -> &dyn FileNames {
        &*self.files
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Where uncommitted files go, on the same file system as the committed ones.
    pub fn temp_dir(&self) -> PathBuf {
        self.base.join(TEMP)
    }

    /// Directory of an object's committed files; it need not exist.
    pub fn oid_dir(&self, oid: Oid) -> PathBuf {
        self.base.join(self.layout.oid_dir(oid))
    }

    /// File of a revision; it need not exist.
    pub fn path(&self, oid: Oid, tid: Tid) -> PathBuf {
        self.base.join(self.layout.file(oid, tid))
    }

    /// File of a revision. Errors: `NoBlob` if there is none (ZODB's `loadBlob`).
    pub fn existing_path(&self, oid: Oid, tid: Tid) -> Result<PathBuf> {
        let path = self.path(oid, tid);
        match path.try_exists() {
            Ok(true) => Ok(path),
            Ok(false) => Err(StorageError::NoBlob { oid, serial: tid }),
            Err(e) => Err(failed("look for", &path, e)),
        }
    }

    /// Makes an object's directory, durably. An existing one is fine.
    pub fn make_oid_dir(&self, oid: Oid) -> Result<PathBuf> {
        let dir = self.oid_dir(oid);
        make_dirs(&*self.files, &dir)?;
        Ok(dir)
    }

    /// Takes over the file `source`: afterwards it is at the returned path, synced and read-only, and can be given to
    /// [`Self::publish`] or removed with [`Self::discard`]. On error `source` is where it was.
    pub fn prepare(&self, source: &Path, oid: Oid) -> Result<PathBuf> {
        let dir = self.make_oid_dir(oid)?;
        let staged = self.temp_path();
        match self.files.rename(source, &staged) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(failed("take over", source, e)),
            // Most likely another file system.
            Err(_) => {
                if let Err(e) = self.files.copy(source, &staged) {
                    let _ = self.files.remove_file(&staged);
                    return Err(failed("copy", source, e));
                }
                self.files.remove_file(source).map_err(|e| failed("remove", source, e))?;
            }
        }
        if let Err(e) = make_read_only(&staged, &dir).and_then(|()| sync(&*self.files, &staged)) {
            let _ = self.files.rename(&staged, source);
            return Err(e);
        }
        Ok(staged)
    }

    /// As [`Self::prepare`], with the content of a committed revision (for undo): a hard link where the file system has
    /// them, else a copy. Errors: `NoBlob` if the revision has no file.
    pub fn prepare_copy(&self, oid: Oid, from: Tid) -> Result<PathBuf> {
        let dir = self.make_oid_dir(oid)?;
        let source = self.existing_path(oid, from)?;
        let staged = self.temp_path();
        if self.files.hard_link(&source, &staged).is_err() {
            if let Err(e) = self.files.copy(&source, &staged) {
                let _ = self.files.remove_file(&staged);
                return Err(failed("copy", &source, e));
            }
            make_read_only(&staged, &dir)?;
        }
        sync(&*self.files, &staged)?;
        Ok(staged)
    }

    /// Gives a prepared file its final name, durably. Repeating it after it succeeded is an error, after it failed not.
    pub fn publish(&self, prepared: &Path, oid: Oid, tid: Tid) -> Result<()> {
        let target = self.path(oid, tid);
        {
            let _names = self.names.lock().unwrap_or_else(|e| e.into_inner());
            let mut moved = self.files.rename(prepared, &target);
            if matches!(&moved, Err(e) if e.kind() == io::ErrorKind::NotFound) && prepared.exists() {
                // A pack found the new directory empty and removed it.
                self.make_oid_dir(oid)?;
                moved = self.files.rename(prepared, &target);
            }
            moved.map_err(|e| failed("name", &target, e))?;
            // Renaming one hard link over another of the same file leaves both.
            let _ = self.files.remove_file(prepared);
        }
        sync(&*self.files, &self.oid_dir(oid))
    }

    /// Removes a prepared file that will not be published; one of the parent's is left to it by a child.
    pub fn discard(&self, prepared: &Path) {
        if !self.owner.is_here() {
            return;
        }
        let _ = self.files.remove_file(prepared);
    }

    /// [`Self::prepare`] and [`Self::publish`] in one.
    pub fn commit(&self, source: &Path, oid: Oid, tid: Tid) -> Result<()> {
        let prepared = self.prepare(source, oid)?;
        self.publish(&prepared, oid, tid).inspect_err(|_| self.discard(&prepared))
    }

    /// [`Self::prepare_copy`] and [`Self::publish`] in one.
    pub fn copy(&self, oid: Oid, from: Tid, to: Tid) -> Result<()> {
        let prepared = self.prepare_copy(oid, from)?;
        self.publish(&prepared, oid, to).inspect_err(|_| self.discard(&prepared))
    }

    /// Removes the file of a revision and the directories it leaves empty. A missing file is fine.
    pub fn remove(&self, oid: Oid, tid: Tid) -> Result<()> {
        let path = self.path(oid, tid);
        match self.files.remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &path, e)),
            _ => {}
        }
        self.prune(oid);
        Ok(())
    }

    /// Removes all files of an object and the directories it leaves empty.
    pub fn remove_all(&self, oid: Oid) -> Result<()> {
        for tid in self.serials(oid)? {
            self.remove(oid, tid)?;
        }
        self.prune(oid);
        Ok(())
    }

    /// Removes an object's directory and those above it, as far as they are empty.
    pub(crate) fn prune(&self, oid: Oid) {
        let _names = self.names.lock().unwrap_or_else(|e| e.into_inner());
        let mut dir = self.oid_dir(oid);
        while dir != self.base && self.files.remove_dir(&dir).is_ok() && dir.pop() {}
    }

    /// Tids of the files of an object, ascending.
    pub fn serials(&self, oid: Oid) -> Result<Vec<Tid>> {
        let mut tids = Vec::new();
        for_each_entry(&self.oid_dir(oid), &mut |entry, _| {
            let relative = self.layout.oid_dir(oid).join(entry.file_name());
            tids.extend(self.layout.parse(&relative).filter(|(found, _)| *found == oid).map(|(_, tid)| tid));
            Ok(())
        })?;
        tids.sort_unstable();
        Ok(tids)
    }

    /// Calls `visit` with every committed file, in no particular order.
    pub fn for_each(&self, visit: &mut dyn FnMut(Oid, Tid, &Path) -> Result<()>) -> Result<()> {
        self.walk(&self.base, self.layout.depth(), visit)
    }

    fn walk(
        &self,
        dir: &Path,
        levels: usize,
        visit: &mut dyn FnMut(Oid, Tid, &Path) -> Result<()>,
    ) -> Result<()> {
        for_each_entry(dir, &mut |entry, is_dir| {
            let path = entry.path();
            if is_dir && levels > 0 {
                let temp = path == self.temp_dir();
                return if temp { Ok(()) } else { self.walk(&path, levels - 1, visit) };
            }
            let relative = path.strip_prefix(&self.base).unwrap_or(&path);
            match self.layout.parse(relative) {
                Some((oid, tid)) => visit(oid, tid, &path),
                None => Ok(()),
            }
        })
    }

    /// Removes what transactions of processes that are gone have left in the temporary directory: files made here, by
    /// `zeo_rs.FileStorage` and by a server, told by their names. Only for who holds the lock of the data file, so that nobody else can
    /// have such transactions. Files of others (clients that share the directory) stay. Answers how many.
    pub fn clean_temp(&self) -> Result<usize> {
        let mut removed = 0;
        for_each_entry(&self.temp_dir(), &mut |entry, is_dir| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let ours = [PREPARED, STAGED, RECEIVED].iter().any(|end| name.ends_with(end));
            if !is_dir && ours && self.files.remove_file(&entry.path()).is_ok() {
                removed += 1;
            }
            Ok(())
        })?;
        Ok(removed)
    }

    /// A new name in the temporary directory.
    fn temp_path(&self) -> PathBuf {
        let number = self.next_temp.fetch_add(1, Ordering::Relaxed);
        let started =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        self.temp_dir().join(format!("{}-{started:x}-{number}{PREPARED}", std::process::id()))
    }
}

fn failed(verb: &str, path: &Path, source: io::Error) -> StorageError {
    StorageError::io(format!("cannot {verb} {}", path.display()), source)
}

fn read_marker(base: &Path) -> Result<Option<Layout>> {
    let marker = base.join(MARKER);
    match fs::read(&marker) {
        Ok(content) => match Layout::from_marker(&String::from_utf8_lossy(&content)) {
            Some(layout) => Ok(Some(layout)),
            None => {
                let text = format!("{} names an unknown layout of blob directories", marker.display());
                Err(StorageError::Invalid(text))
            }
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("read", &marker, e)),
    }
}

/// Before anything else is in the directory, and whole at once: without the marker it would be taken for one of the old
/// layout, with half of it for one of an unknown layout.
fn write_marker(files: &dyn FileNames, base: &Path, layout: Layout) -> Result<()> {
    let [temp, marker] = [".new", ""].map(|suffix| base.join(format!("{MARKER}{suffix}")));
    let made = files.create(&temp).and_then(|mut file| file.write_all(layout.name().as_bytes()));
    made.map_err(|e| failed("write", &temp, e))?;
    sync(files, &temp)?;
    files.rename(&temp, &marker).map_err(|e| failed("write", &marker, e))?;
    sync(files, base)
}

/// Whether a directory without marker already has content (hidden files do not count).
fn is_used(base: &Path) -> Result<bool> {
    let mut used = false;
    for_each_entry(base, &mut |entry, _| {
        used |= !entry.file_name().to_string_lossy().starts_with('.');
        Ok(())
    })?;
    Ok(used)
}

/// Calls `visit` with each entry and whether it is a directory; a missing directory has none.
fn for_each_entry(dir: &Path, visit: &mut dyn FnMut(&fs::DirEntry, bool) -> Result<()>) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("list", dir, e)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| failed("list", dir, e))?;
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        visit(&entry, is_dir)?;
    }
    Ok(())
}

/// `mkdir -p`, durably: each directory made is synced into its parent. A concurrent maker is fine.
fn make_dirs(files: &dyn FileNames, dir: &Path) -> Result<()> {
    let mut missing = Vec::new();
    let mut at = Some(dir);
    while let Some(path) = at.filter(|path| !path.as_os_str().is_empty() && !path.exists()) {
        missing.push(path);
        at = path.parent();
    }
    for path in missing.into_iter().rev() {
        match files.create_dir(path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed("make", path, e)),
            _ => {}
        }
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync(files, parent)?;
        }
    }
    Ok(())
}

/// Committed files are written once: no write bits, and readable by whoever may read their directory.
fn make_read_only(file: &Path, dir: &Path) -> Result<()> {
    let mode = |path: &Path| fs::metadata(path).map(|meta| meta.permissions().mode());
    let result = mode(file).and_then(|file_mode| {
        let dir_mode = mode(dir)?;
        let wanted = (file_mode & 0o7777 & !0o222) | (dir_mode & 0o444);
        fs::set_permissions(file, fs::Permissions::from_mode(wanted))
    });
    result.map_err(|e| failed("set the mode of", file, e))
}

/// A file's content, or the names in a directory.
fn sync(files: &dyn FileNames, path: &Path) -> Result<()> {
    files.sync(path).map_err(|e| failed("sync", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OID: Oid = Oid(0x0e);

    fn file(dir: &Path, content: &str) -> PathBuf {
        let path = dir.join("upload");
        fs::write(&path, content).unwrap();
        path
    }

    fn files(dir: &BlobDir) -> Vec<(Oid, Tid)> {
        let mut found = Vec::new();
        dir.for_each(&mut |oid, tid, path| {
            assert_eq!(path, dir.path(oid, tid));
            found.push((oid, tid));
            Ok(())
        })
        .unwrap();
        found.sort();
        found
    }

    #[test]
    fn layout_is_chosen_as_zodb_does() {
        let temp = tempfile::tempdir().unwrap();
        let base = temp.path().join("blobs");
        assert_eq!(BlobDir::open(&base, true).unwrap().layout(), Layout::Bushy);
        assert_eq!(fs::read_to_string(base.join(".layout")).unwrap(), "bushy");
        assert!(base.join("tmp").is_dir());
        fs::write(base.join(".layout"), "lawn\n").unwrap();
        assert_eq!(BlobDir::open(&base, true).unwrap().layout(), Layout::Lawn);
        fs::remove_file(base.join(".layout")).unwrap();
        assert_eq!(BlobDir::open(&base, false).unwrap().layout(), Layout::Lawn);
        assert!(!base.join(".layout").exists());
        fs::write(base.join(".layout"), "forest").unwrap();
        assert!(matches!(BlobDir::open(&base, true), Err(StorageError::Invalid(_))));
        fs::write(base.join(".layout"), "bushy").unwrap();
        assert!(matches!(BlobDir::open_as(&base, Layout::ZeoCache, true), Err(StorageError::Invalid(_))));
    }

    #[test]
    fn missing_directory_opens_read_only_without_a_trace() {
        let temp = tempfile::tempdir().unwrap();
        let base = temp.path().join("none");
        let dir = BlobDir::open(&base, false).unwrap();
        assert!(matches!(dir.existing_path(OID, Tid(1)), Err(StorageError::NoBlob { .. })));
        assert!(files(&dir).is_empty() && !base.exists());
    }

    #[test]
    fn commit_copy_remove() {
        let temp = tempfile::tempdir().unwrap();
        for layout in [Layout::Bushy, Layout::Lawn, Layout::ZeoCache] {
            let dir = BlobDir::open_as(&temp.path().join(layout.name()), layout, true).unwrap();
            let upload = file(temp.path(), "first");
            dir.commit(&upload, OID, Tid(0x10)).unwrap();
            assert!(!upload.exists());
            let path = dir.existing_path(OID, Tid(0x10)).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "first");
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o222, 0);
            dir.copy(OID, Tid(0x10), Tid(0x20)).unwrap();
            assert_eq!(fs::read_to_string(dir.path(OID, Tid(0x20))).unwrap(), "first");
            // Again over itself (repeated after a crash): the same inode under both names.
            dir.copy(OID, Tid(0x10), Tid(0x20)).unwrap();
            assert!(matches!(dir.copy(OID, Tid(9), Tid(0x21)), Err(StorageError::NoBlob { .. })));
            assert_eq!(fs::read_dir(dir.temp_dir()).unwrap().count(), 0);
            assert_eq!(dir.serials(OID).unwrap(), [Tid(0x10), Tid(0x20)]);
            assert_eq!(files(&dir), [(OID, Tid(0x10)), (OID, Tid(0x20))]);
            dir.remove(OID, Tid(0x10)).unwrap();
            dir.remove(OID, Tid(0x10)).unwrap();
            assert!(dir.oid_dir(OID).exists());
            dir.remove_all(OID).unwrap();
            let mut left: Vec<_> =
                fs::read_dir(dir.base()).unwrap().map(|e| e.unwrap().file_name()).collect();
            left.sort();
            assert_eq!(left, [".layout", "tmp"]);
        }
    }

    #[test]
    fn publish_survives_a_prune_of_its_directory() {
        let temp = tempfile::tempdir().unwrap();
        let dir = BlobDir::open(&temp.path().join("blobs"), true).unwrap();
        let prepared = dir.prepare(&file(temp.path(), "x"), OID).unwrap();
        dir.prune(OID);
        assert!(!dir.oid_dir(OID).exists());
        dir.publish(&prepared, OID, Tid(1)).unwrap();
        assert_eq!(files(&dir), [(OID, Tid(1))]);
    }

    #[test]
    fn what_dead_transactions_left_is_cleaned_and_nothing_else() {
        let temp = tempfile::tempdir().unwrap();
        let dir = BlobDir::open(&temp.path().join("blobs"), true).unwrap();
        let prepared = dir.prepare(&file(temp.path(), "x"), OID).unwrap();
        let [staged, received, upload] =
            ["0a1b.staged", "zeo-1-0.received", "BUCabcde"].map(|name| dir.temp_dir().join(name));
        for path in [&staged, &received, &upload] {
            fs::write(path, "").unwrap();
        }
        assert_eq!(dir.clean_temp().unwrap(), 3);
        assert!(upload.exists() && !staged.exists() && !received.exists() && !prepared.exists());
    }

    #[test]
    fn fixture_directories_are_read() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/filestorage");
        for (name, layout) in [("blobs", Layout::Bushy), ("blobs_lawn", Layout::Lawn)] {
            let dir = BlobDir::open(&fixtures.join(name).join("blobs"), false).unwrap();
            assert_eq!(dir.layout(), layout);
            assert!(!files(&dir).is_empty(), "{name}");
        }
    }
}
