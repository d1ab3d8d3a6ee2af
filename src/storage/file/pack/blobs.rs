//! Files of blob revisions that a pack drops.
//!
//! While copying, their names are collected in BLOBDIR/.removed.new; once the packed file is in place that becomes
//! BLOBDIR/.removed.todo; .removed.doing, once the previous BLOBDIR.old is gone; and then the files are removed (or
//! moved to BLOBDIR.old). A pack that is killed leaves a list that the next one works off if the packed file came into
//! place, which is known by its inode, and forgets otherwise. ZODB's own list, BLOBDIR/.removed, says nothing about that,
//! so it is not used.
//!
//! Every dropped revision is listed by itself. Nothing else in an object's directory is touched, so a commit of a new
//! revision meanwhile is safe. A revision that the data file still has is never removed, whatever a list says.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::super::index_file::beside;
use super::super::snapshot::Snapshot;
use crate::ids::{Oid, Tid};
use crate::storage::blob::BlobDir;
use crate::storage::blob::layout::MARKER;
use crate::storage::{Result, StorageError};

const COLLECTED: &str = ".removed.new";
const TO_DO: &str = ".removed.todo";
const DOING: &str = ".removed.doing";

/// Names of files to be removed. Unless it is confirmed, dropping it forgets them.
pub(super) struct Removals<'a> {
    dir: &'a BlobDir,
    list: BufWriter<File>,
}

impl<'a> Removals<'a> {
    /// Starts an empty list of the packed file `packed`.
    pub(super) fn new(dir: &'a BlobDir, packed: &Path) -> Result<Self> {
        let path = dir.base().join(COLLECTED);
        let start = || {
            let mut list = BufWriter::new(dir.files().create(&path)?);
            writeln!(list, "{}", identity(packed)?)?;
            Ok(list)
        };
        let list = start().map_err(|e| failed("write", &path, e))?;
        Ok(Self { dir, list })
    }

    pub(super) fn add(&mut self, oid: Oid, tid: Tid) -> Result<()> {
        let written = writeln!(self.list, "{:016x}{:016x}", oid.0, tid.0);
        written.map_err(|e| failed("write", &self.dir.base().join(COLLECTED), e))
    }

    /// The list is complete, and durable before the packed file gets its place.
    pub(super) fn finish(&mut self) -> Result<()> {
        let (path, files) = (self.dir.base().join(COLLECTED), self.dir.files());
        let written =
            self.list.flush().and_then(|()| files.sync(&path)).and_then(|()| files.sync(self.dir.base()));
        written.map_err(|e| failed("write", &path, e))
    }

    /// The packed file is in place: the files are to go.
    pub(super) fn confirm(&self) -> Result<()> {
        let path = self.dir.base().join(TO_DO);
        let renamed = self.dir.files().rename(&self.dir.base().join(COLLECTED), &path);
        renamed.map_err(|e| failed("write", &path, e))
    }
}

impl Drop for Removals<'_> {
    fn drop(&mut self) {
        // Under another name once it is confirmed.
        let _ = self.dir.files().remove_file(&self.dir.base().join(COLLECTED));
    }
}

/// First line of a list: which file it belongs to.
fn identity(packed: &Path) -> io::Result<String> {
    let meta = packed.metadata()?;
    Ok(format!("dropped by the pack that made file {} of device {}", meta.ino(), meta.dev()))
}

/// A list that was collected for the data file as it is now: the pack was killed between the switch and
/// [`Removals::confirm`]. Any other is of no use.
fn adopt_collected(dir: &BlobDir, data: &Path) -> Result<()> {
    let path = dir.base().join(COLLECTED);
    let mut first = String::new();
    let read = File::open(&path).and_then(|list| BufReader::new(list).read_line(&mut first));
    match read {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("read", &path, e)),
        Ok(_) => {}
    }
    let switched = identity(data).map_err(|e| failed("look at", data, e))? == first.trim_end();
    let done = match switched {
        true => dir.files().rename(&path, &dir.base().join(TO_DO)),
        false => dir.files().remove_file(&path),
    };
    done.map_err(|e| failed("rename", &path, e))
}

/// Works off the list of a pack whose file is in place, of this one or one that was killed. `keep_old`: BLOBDIR.old
/// becomes a snapshot of the files before the pack, those that stay as hard links.
pub(super) fn remove_listed(dir: &BlobDir, snapshot: &Snapshot, data: &Path, keep_old: bool) -> Result<()> {
    let [to_do, path] = [TO_DO, DOING].map(|name| dir.base().join(name));
    adopt_collected(dir, data)?;
    if to_do.exists() {
        remove_tree(&beside(dir.base(), ".old"))?;
        dir.files().rename(&to_do, &path).map_err(|e| failed("rename", &to_do, e))?;
    }
    let list = match File::open(&path) {
        Ok(list) => BufReader::new(list),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("read", &path, e)),
    };
    let old = match keep_old {
        true => Some(OldBlobs::open(dir)?),
        false => None,
    };
    for line in list.lines() {
        let line = line.map_err(|e| failed("read", &path, e))?;
        let Some((oid, tid)) = parse(&line) else { continue };
        if snapshot.load_serial(oid, tid).is_ok() {
            tracing::warn!("{}: the revision {tid} of {oid} is there: its file stays", path.display());
            continue;
        }
        if let Some(old) = &old {
            old.link(&dir.path(oid, tid))?;
        }
        dir.remove(oid, tid)?;
    }
    if let Some(old) = &old {
        dir.for_each(&mut |_, _, path| old.link(path))?;
    }
    dir.files().remove_file(&path).map_err(|e| failed("remove", &path, e))
}

fn parse(line: &str) -> Option<(Oid, Tid)> {
    let number = |text: Option<&str>| u64::from_str_radix(text?, 16).ok();
    (line.len() == 32).then_some(())?;
    Some((Oid(number(line.get(..16))?), Tid(number(line.get(16..))?)))
}

/// BLOBDIR.old while it is made.
struct OldBlobs<'a> {
    from: &'a Path,
    to: PathBuf,
}

impl<'a> OldBlobs<'a> {
    /// Makes it, or goes on with it after a crash.
    fn open(dir: &'a BlobDir) -> Result<Self> {
        let old = Self { from: dir.base(), to: beside(dir.base(), ".old") };
        old.link(&old.from.join(MARKER))?;
        Ok(old)
    }

    /// Links a file of the blob directory to the same place here. A missing file is fine: somebody removed it.
    fn link(&self, file: &Path) -> Result<()> {
        let target = self.to.join(file.strip_prefix(self.from).unwrap_or(file));
        let parent = target.parent().unwrap_or(&self.to);
        fs::create_dir_all(parent).map_err(|e| failed("make", parent, e))?;
        match fs::hard_link(file, &target) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && !file.exists() => Ok(()),
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(failed("link", &target, e)),
            _ => Ok(()),
        }
    }
}

fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", dir, e)),
        _ => Ok(()),
    }
}

fn failed(verb: &str, path: &Path, source: io::Error) -> StorageError {
    StorageError::io(format!("cannot {verb} {}", path.display()), source)
}
