//! What is done to names, remembered, and every directory that a power loss may leave of it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use zeo_rs::storage::blob::FileNames;

use super::crash::scratch;
use super::disk::Disk;

type Inode = u64;

/// One operation, of paths below the root.
#[derive(Clone, Debug)]
enum Step {
    Dir(PathBuf),
    RemoveDir(PathBuf),
    /// A name for a file (another one it may have had goes).
    Name(Inode, PathBuf, Option<PathBuf>),
    Remove(PathBuf),
    SyncDir(PathBuf),
    SyncFile(Inode),
}

/// A directory tree: what each name leads to, `None` for directories.
pub(crate) type Tree = BTreeMap<PathBuf, Option<Inode>>;

#[derive(Debug, Default)]
struct State {
    steps: Vec<(usize, Step)>,
    /// Contents by inode; files are written before they get their names here.
    contents: BTreeMap<Inode, Arc<Vec<u8>>>,
}

/// The operating system's, remembered together with how far the data file was at that moment.
pub(crate) struct Names {
    root: PathBuf,
    disk: Option<Arc<Disk>>,
    /// Every file by its inode, under which it stays.
    vault: tempfile::TempDir,
    /// What was there before, durable.
    before: Tree,
    state: Mutex<State>,
}

impl std::fmt::Debug for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Names")
    }
}

/// A state that a crash may leave.
pub(crate) struct Image<'a> {
    pub tree: Tree,
    /// Whether files that were not synced have lost their content.
    pub lost: bool,
    /// Whether it is the work of a file system that keeps the order of operations in different directories.
    pub ordered: bool,
    synced: Vec<Inode>,
    contents: &'a BTreeMap<Inode, Arc<Vec<u8>>>,
    vault: &'a Path,
}

impl Names {
    /// `disk`: the data file, if it is not one of the tree.
    pub(crate) fn new(root: &Path, disk: Option<Arc<Disk>>) -> Arc<Self> {
        let names = Self {
            root: root.to_owned(),
            disk,
            vault: scratch(),
            before: BTreeMap::new(),
            state: Mutex::default(),
        };
        let mut before = Tree::new();
        names.list(root, &mut before);
        for inode in before.values().flatten() {
            names.note(Step::SyncFile(*inode));
        }
        Arc::new(Self { before, ..names })
    }

    fn list(&self, dir: &Path, tree: &mut Tree) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                tree.insert(self.relative(&path), None);
                self.list(&path, tree);
            } else {
                tree.insert(self.relative(&path), Some(self.inode(&path)));
            }
        }
    }

    fn relative(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).unwrap().to_owned()
    }

    /// The file's number; its content is remembered.
    fn inode(&self, path: &Path) -> Inode {
        let inode = path.metadata().unwrap().ino();
        let content = Arc::new(fs::read(path).unwrap());
        let _ = fs::hard_link(path, self.vault.path().join(inode.to_string()));
        self.state.lock().unwrap().contents.insert(inode, content);
        inode
    }

    fn note(&self, step: Step) {
        let events = self.disk.as_ref().map_or(0, |disk| disk.event_count());
        self.state.lock().unwrap().steps.push((events, step));
    }

    /// Number of operations so far.
    pub(crate) fn count(&self) -> usize {
        self.state.lock().unwrap().steps.len()
    }

    /// How many events of the data file came before each operation.
    pub(crate) fn events(&self) -> Vec<usize> {
        self.state.lock().unwrap().steps.iter().map(|(events, _)| *events).collect()
    }

    /// Every state after the first `done` operations: what was made durable, and of the rest nothing, everything, each
    /// beginning, and everything but one. A sync of a directory concerns its own names only, except in `ordered` images.
    pub(crate) fn images(&self, done: usize, mut visit: impl FnMut(&Image<'_>)) {
        let state = self.state.lock().unwrap();
        let mut durable = self.before.clone();
        let mut pending: Vec<&Step> = Vec::new();
        let mut synced = Vec::new();
        for (_, step) in &state.steps[..done] {
            match step {
                Step::SyncFile(inode) => synced.push(*inode),
                Step::SyncDir(dir) => pending.retain(|step| {
                    let is_in = step.parent() == Some(dir);
                    if is_in {
                        step.apply(&mut durable);
                    }
                    !is_in
                }),
                step => pending.push(step),
            }
        }
        let all = pending.len();
        let beginnings = (0..=all).map(|n| (0..n).collect::<Vec<_>>());
        let but_one = (0..all).map(|missing| (0..all).filter(|&i| i != missing).collect());
        for chosen in beginnings.chain(but_one) {
            let mut tree = durable.clone();
            chosen.iter().for_each(|&i| pending[i].apply(&mut tree));
            for lost in [true, false] {
                visit(&state.image(&self.vault, tree.clone(), &synced, lost, false));
            }
        }
        let is_sync = |(_, step): &(usize, Step)| matches!(step, Step::SyncDir(_));
        let from = state.steps[..done].iter().rposition(is_sync).unwrap_or(0);
        for end in from..=done {
            let mut tree = self.before.clone();
            state.steps[..end].iter().for_each(|(_, step)| step.apply(&mut tree));
            visit(&state.image(&self.vault, tree, &synced, false, true));
        }
    }
}

impl State {
    fn image<'a>(
        &'a self,
        vault: &'a tempfile::TempDir,
        tree: Tree,
        synced: &[Inode],
        lost: bool,
        ordered: bool,
    ) -> Image<'a> {
        Image { tree, lost, ordered, synced: synced.to_vec(), contents: &self.contents, vault: vault.path() }
    }
}

impl Step {
    /// The directory whose sync makes it durable.
    fn parent(&self) -> Option<&Path> {
        match self {
            Self::Dir(path) | Self::RemoveDir(path) | Self::Name(_, path, _) | Self::Remove(path) => {
                path.parent()
            }
            Self::SyncDir(_) | Self::SyncFile(_) => None,
        }
    }

    /// Where there is no directory for a name, there is no name.
    fn apply(&self, tree: &mut Tree) {
        let has_place = |tree: &Tree, path: &Path| {
            let parent = path.parent().unwrap();
            parent == Path::new("") || tree.get(parent) == Some(&None)
        };
        match self {
            Self::Dir(path) if has_place(tree, path) => drop(tree.insert(path.clone(), None)),
            Self::Name(inode, path, from) => {
                if let Some(from) = from {
                    tree.remove(from);
                }
                if has_place(tree, path) {
                    tree.insert(path.clone(), Some(*inode));
                }
            }
            Self::RemoveDir(path) => tree.retain(|name, _| !name.starts_with(path)),
            Self::Remove(path) => drop(tree.remove(path)),
            _ => {}
        }
    }
}

impl Image<'_> {
    /// Puts it into an empty directory, the files themselves, which are not to be written to.
    pub(crate) fn put_links(&self, root: &Path) {
        for (name, inode) in &self.tree {
            let path = root.join(name);
            match inode {
                None => fs::create_dir(&path).unwrap(),
                Some(inode) => fs::hard_link(self.vault.join(inode.to_string()), &path).unwrap(),
            }
        }
    }

    /// Puts copies into an empty directory.
    pub(crate) fn put(&self, root: &Path) {
        for (name, inode) in &self.tree {
            let path = root.join(name);
            match inode {
                None => fs::create_dir(&path).unwrap(),
                Some(inode) if self.lost && !self.synced.contains(inode) => fs::write(&path, "").unwrap(),
                Some(inode) => fs::write(&path, &**self.contents.get(inode).unwrap()).unwrap(),
            }
        }
    }
}

impl FileNames for Names {
    fn create(&self, path: &Path) -> io::Result<fs::File> {
        let file = fs::File::create(path)?;
        self.note(Step::Name(self.inode(path), self.relative(path), None));
        Ok(file)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let inode = self.inode(from);
        fs::rename(from, to)?;
        self.note(Step::Name(inode, self.relative(to), Some(self.relative(from))));
        Ok(())
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)?;
        self.note(Step::Name(self.inode(to), self.relative(to), None));
        Ok(())
    }

    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::copy(from, to)?;
        self.note(Step::Name(self.inode(to), self.relative(to), None));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)?;
        self.note(Step::Remove(self.relative(path)));
        Ok(())
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)?;
        self.note(Step::Dir(self.relative(path)));
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)?;
        self.note(Step::RemoveDir(self.relative(path)));
        Ok(())
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        fs::File::open(path)?.sync_all()?;
        let step =
            if path.is_dir() { Step::SyncDir(self.relative(path)) } else { Step::SyncFile(self.inode(path)) };
        self.note(step);
        Ok(())
    }
}
