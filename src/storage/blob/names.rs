//! [`FileNames`]: everything that is done to blob files and their directories, and to the names of the data file in a pack,
//! goes through this trait, so that a test can crash it (as `StorageFile` for the data file's content).

use std::fmt::Debug;
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Operations on names. Each is durable once the directory that the new name is in (or the removed one was in) has been
/// synced, contents once the file has been.
pub trait FileNames: Send + Sync + Debug {
    /// An empty file, to be written.
    fn create(&self, path: &Path) -> io::Result<File> {
        File::create(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::copy(from, to).map(drop)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    /// Only if it is empty.
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    /// Syncs a file, or the names in a directory.
    fn sync(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
}

/// Those of the operating system.
#[derive(Debug, Default)]
pub struct OsFileNames;

impl FileNames for OsFileNames {}
