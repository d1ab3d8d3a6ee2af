//! [`Pending`]: a transaction that is being put together, in memory (or its caller's spill file). Nothing of it is in the file before it is finished.
//!
//! [`FileStorage::apply`] checks one operation against the committed state and adds what it writes; so an in-process
//! user gets conflicts and undo's oids at once, and `vote` is a loop over it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rustc_hash::FxHashMap;

use super::format::{DATA_HEADER_LEN, MAX_POS, TXN_HEADER_LEN, status};
use super::snapshot::Snapshot;
use super::{FileStorage, transactions};
use crate::ids::{Oid, Tid};
use crate::limits::MAX_TXN_METADATA;
use crate::storage::blob::BlobDir;
use crate::storage::{
    Conflict, ConflictResolver, Op, Resolution, Result, SpillFile, StagedData, StorageError, TxnMeta,
    VotedTxn,
};

/// A transaction between `begin` and `vote`. Dropping it forgets it; blob files given to it stay where they are.
pub struct Pending {
    pub(super) meta: TxnMeta,
    /// `None`: the storage gives one at finish.
    pub(super) tid: Option<Tid>,
    pub(super) status: u8,
    pub(super) records: Vec<NewRecord>,
    /// Oid → its last record in `records`.
    pub(super) newest: FxHashMap<Oid, usize>,
    /// Oids in order of first write.
    pub(super) oids: Vec<Oid>,
    pub(super) resolved: Vec<Oid>,
    pub(super) blobs: Vec<NewBlob>,
    /// Length in the file.
    pub(super) len: u64,
    spill: Option<Box<Spill>>,
}

/// Data of a transaction that do not stay in memory.
struct Spill {
    file: Arc<SpillFile>,
    /// How far they have been moved: records, and their length.
    records: usize,
    len: u64,
}

/// An in-process transaction keeps so much in memory; beyond it goes to a file without a name, [`SPILL_BATCH`] at a time.
const SPILL_AT: u64 = 16 << 20;
const SPILL_BATCH: u64 = 4 << 20;

pub(super) struct NewRecord {
    pub(super) oid: Oid,
    /// `None`: the transaction's tid; otherwise of a restored revision.
    pub(super) tid: Option<Tid>,
    pub(super) body: Body,
}

#[derive(Clone)]
pub(super) enum Body {
    Data(StagedData),
    /// The same data as the committed record at this position.
    Back(u64),
    Tombstone,
}

impl Body {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Back(_) | Self::Tombstone => 8,
        }
    }
}

pub(super) struct NewBlob {
    pub(super) oid: Oid,
    /// As of [`NewRecord`].
    pub(super) tid: Option<Tid>,
    pub(super) source: BlobSource,
}

pub(super) enum BlobSource {
    /// A file to take over.
    File(PathBuf),
    /// The committed file of an older revision (undo).
    Revision(Tid),
}

/// What [`FileStorage::apply`] did.
#[derive(Debug, Default)]
pub struct Applied {
    /// The stored data are not those given: a conflict was resolved.
    pub resolved: bool,
    /// Oids that an undo wrote.
    pub undone: Vec<Oid>,
    /// The resolver wants the client to resolve it; nothing was added.
    pub conflict: Option<Conflict>,
}

/// State of a [`VotedTxn`]: everything checked, space reserved, blob files made ready. Dropping it gives them up.
pub(super) struct Voted {
    pub(super) meta: TxnMeta,
    pub(super) tid: Option<Tid>,
    pub(super) status: u8,
    pub(super) records: Vec<NewRecord>,
    pub(super) blobs: ReadyBlobs,
    pub(super) space: Reservation,
}

/// Blob files that only lack their names.
#[derive(Default)]
pub(super) struct ReadyBlobs {
    pub(super) dir: Option<Arc<BlobDir>>,
    pub(super) files: Vec<(Oid, Option<Tid>, PathBuf)>,
}

impl Drop for ReadyBlobs {
    fn drop(&mut self) {
        if let Some(dir) = &self.dir {
            self.files.iter().for_each(|(.., file)| dir.discard(file));
        }
    }
}

/// Disk space promised to a voted transaction.
pub(super) struct Reservation {
    pub(super) len: u64,
    outstanding: Arc<AtomicU64>,
}

impl Reservation {
    pub(super) fn new(len: u64, outstanding: &Arc<AtomicU64>) -> Self {
        outstanding.fetch_add(len, Ordering::SeqCst);
        Self { len, outstanding: outstanding.clone() }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.outstanding.fetch_sub(self.len, Ordering::SeqCst);
    }
}

/// What an object's state is for the next operation of a transaction.
pub(super) enum Newest<'a> {
    /// Written by this transaction.
    Pending(&'a NewRecord),
    Committed(u64),
    None,
}

impl Pending {
    pub(super) fn newest(&self, snapshot: &Snapshot, oid: Oid) -> Newest<'_> {
        match self.newest.get(&oid).and_then(|&i| self.records.get(i)) {
            Some(record) => Newest::Pending(record),
            None => snapshot.index.get(oid).map_or(Newest::None, Newest::Committed),
        }
    }

    pub(super) fn push(&mut self, record: NewRecord) {
        self.len += DATA_HEADER_LEN as u64 + record.body.len();
        if self.newest.insert(record.oid, self.records.len()).is_none() {
            self.oids.push(record.oid);
        }
        self.records.push(record);
    }

    /// The blob files given to it.
    pub fn blob_files(&self) -> Vec<PathBuf> {
        let files = self.blobs.iter().filter_map(|blob| match &blob.source {
            BlobSource::File(path) => Some(path.clone()),
            BlobSource::Revision(_) => None,
        });
        files.collect()
    }

    /// Oids it writes, in order of first write.
    pub fn oids(&self) -> &[Oid] {
        &self.oids
    }
}

impl FileStorage {
    /// Begins a transaction. Errors: `ReadOnly`, `Invalid` for metadata that do not fit the format.
    pub fn begin(&self, meta: TxnMeta, tid: Option<Tid>, status: u8) -> Result<Pending> {
        self.check_writable()?;
        let parts = [
            (&meta.user, "user name too long"),
            (&meta.description, "description too long"),
            (&meta.extension, "too much extension data"),
        ];
        for (part, text) in parts {
            if part.len() > MAX_TXN_METADATA {
                return Err(StorageError::Invalid(text.into()));
            }
        }
        if status == status::CHECKPOINT {
            return Err(StorageError::Invalid("status c means unfinished: recovery would drop it".into()));
        }
        let len = TXN_HEADER_LEN + meta.user.len() + meta.description.len() + meta.extension.len() + 8;
        Ok(Pending {
            meta,
            tid,
            status,
            records: Vec::new(),
            newest: FxHashMap::default(),
            oids: Vec::new(),
            resolved: Vec::new(),
            blobs: Vec::new(),
            len: len as u64,
            spill: None,
        })
    }

    /// Whether a transaction has more in memory than it should. Costs nothing.
    pub fn is_large(&self, txn: &Pending) -> bool {
        match &txn.spill {
            None => txn.len > SPILL_AT,
            Some(spill) => txn.len - spill.len > SPILL_BATCH,
        }
    }

    /// Moves the data of its records to a temporary file beside the data file. (A server has done so before, with limits of
    /// its own.)
    ///
    /// Errors: `Io`, most likely a full disk: the transaction can only be given up.
    pub fn spill(&self, txn: &mut Pending) -> Result<()> {
        // A child would write into its parent's file.
        self.check_process()?;
        let spill = match &mut txn.spill {
            Some(spill) => spill,
            none => {
                let directory = self.path.parent().unwrap_or(Path::new("/"));
                let file = Arc::new(SpillFile::create(directory)?);
                none.insert(Box::new(Spill { file, records: 0, len: 0 }))
            }
        };
        let mut records: Vec<&mut StagedData> = Vec::new();
        for record in txn.records.iter_mut().skip(spill.records) {
            if let Body::Data(data @ StagedData::Memory(_)) = &mut record.body {
                records.push(data);
            }
        }
        let data: Vec<Bytes> = records.iter().map(|data| data.to_bytes()).collect::<Result<_>>()?;
        for (record, place) in records.into_iter().zip(spill.file.append(&data)?) {
            *record = place;
        }
        (spill.records, spill.len) = (txn.records.len(), txn.len);
        Ok(())
    }

    /// Checks one operation and adds what it writes. After an error the transaction can only be given up.
    ///
    /// Cost of a store: an index lookup and, for an object that exists, one `pread` of its header.
    pub fn apply(&self, txn: &mut Pending, op: Op, resolver: &dyn ConflictResolver) -> Result<Applied> {
        let snapshot = self.reading()?;
        let mut applied = Applied::default();
        match op {
            Op::Store { oid, serial, data, blob } => {
                self.note_oid(oid);
                let committed = match snapshot.index.get(oid) {
                    Some(pos) => Some(snapshot.head_of(oid, pos)?.header.tid),
                    None => None,
                };
                let data = match committed.filter(|&committed| committed != serial) {
                    None => data,
                    Some(committed) => {
                        let conflict = Conflict { oid, committed, read: serial, data: data.to_bytes()? };
                        match resolver.resolve(self, &conflict, None) {
                            Resolution::Resolved(data) => {
                                applied.resolved = true;
                                txn.resolved.push(oid);
                                data.into()
                            }
                            Resolution::Unresolved => return Err(StorageError::Conflict(Box::new(conflict))),
                            Resolution::AskClient => {
                                applied.conflict = Some(conflict);
                                return Ok(applied);
                            }
                        }
                    }
                };
                not_empty(oid, data.is_empty())?;
                self.check_quota(&snapshot, txn)?;
                txn.push(NewRecord { oid, tid: None, body: Body::Data(data) });
                self.add_blob(txn, oid, None, blob.map(BlobSource::File))?;
            }
            Op::CheckCurrent { oid, serial } => {
                let committed = self.tid_of(&snapshot, oid)?;
                if committed != serial {
                    return Err(StorageError::ReadConflict { oid, committed, read: serial });
                }
            }
            Op::Delete { oid, serial } => {
                let pos = snapshot.index.get(oid).ok_or(StorageError::NotFound(oid))?;
                let committed = snapshot.head_of(oid, pos)?.header.tid;
                if committed != serial {
                    let conflict = Conflict { oid, committed, read: serial, data: Bytes::new() };
                    return Err(StorageError::Conflict(Box::new(conflict)));
                }
                txn.push(NewRecord { oid, tid: None, body: Body::Tombstone });
            }
            Op::Restore { oid, serial, data, prev_txn, blob } => {
                self.note_oid(oid);
                if let Some(data) = &data {
                    not_empty(oid, data.is_empty())?;
                }
                // A hint that does not hold (packed away here, or never known) is no hint: the data are written.
                let repeated = match prev_txn {
                    Some(tid) => {
                        let data = data.as_ref().map(StagedData::to_bytes).transpose()?;
                        snapshot.find_repeated(oid, data.as_deref(), tid)?
                    }
                    None => None,
                };
                let body = match (repeated, data) {
                    (Some(pos), _) => Body::Back(pos),
                    (None, Some(data)) => Body::Data(data),
                    (None, None) => Body::Tombstone,
                };
                txn.push(NewRecord { oid, tid: Some(serial), body });
                self.add_blob(txn, oid, Some(serial), blob.map(BlobSource::File))?;
            }
            Op::Undo { tid } => {
                let found = snapshot.find_txn(tid)?;
                let (pos, header) = found.ok_or_else(transactions::no_such_transaction)?;
                applied.undone = self.undo(&snapshot, txn, pos, &header, resolver)?;
            }
        }
        Ok(applied)
    }

    pub(super) fn add_blob(
        &self,
        txn: &mut Pending,
        oid: Oid,
        tid: Option<Tid>,
        source: Option<BlobSource>,
    ) -> Result<()> {
        let Some(source) = source else { return Ok(()) };
        if self.blobs.is_none() {
            return Err(StorageError::Unsupported("blobs"));
        }
        txn.blobs.push(NewBlob { oid, tid, source });
        Ok(())
    }

    /// ZODB's rule: a record may not begin beyond the quota. Counts what others have voted, too.
    fn check_quota(&self, snapshot: &Snapshot, txn: &Pending) -> Result<()> {
        let Some(quota) = self.options.quota else { return Ok(()) };
        let start = snapshot.end() + self.space.outstanding() + txn.len - 8;
        if start > quota { Err(StorageError::Quota(quota)) } else { Ok(()) }
    }

    /// Whether `vote_pending` would make no system call: nothing but memory is needed, and space is promised already. It is
    /// a guess when others vote at the same time.
    pub fn votes_at_once(&self, txn: &Pending) -> bool {
        txn.blobs.is_empty() && self.space.has_room(self.current.load().end(), txn.len)
    }

    /// Promises that the transaction can be finished: reserves its disk space and makes its blob files ready (synced and
    /// on the right file system). From here on the blob files belong to the storage; if it fails they are where they were.
    pub fn vote_pending(&self, txn: Pending) -> Result<VotedTxn> {
        self.check_writable()?;
        let snapshot = self.reading()?;
        let space = self.space.reserve(&snapshot, txn.len)?;
        if snapshot.end() + self.space.outstanding() >= MAX_POS {
            return Err(StorageError::Invalid("the file would exceed 256 TiB, the format's limit".into()));
        }
        let mut blobs = ReadyBlobs { dir: self.blobs.clone(), files: Vec::new() };
        if let Some(dir) = &self.blobs {
            for NewBlob { oid, tid, source } in txn.blobs {
                let file = match source {
                    BlobSource::File(path) => dir.prepare(&path, oid)?,
                    BlobSource::Revision(from) => dir.prepare_copy(oid, from)?,
                };
                blobs.files.push((oid, tid, file));
            }
        }
        let Pending { meta, tid, status, records, oids, resolved, .. } = txn;
        let state = Voted { meta, tid, status, records, blobs, space };
        Ok(VotedTxn { oids, resolved, state: Box::new(state) })
    }

    /// Gives a transaction up, removing the blob files given to it.
    pub fn abort_pending(&self, txn: Pending) {
        self.discard_blob_files(&txn.blob_files());
    }

    /// Removes blob files that were given to a transaction and not taken over: after a vote that failed they are where
    /// they were. Those that are not there are fine.
    pub fn discard_blob_files(&self, files: &[PathBuf]) {
        if !self.owner.is_here() {
            // Of a transaction that the parent may still commit.
            return;
        }
        files.iter().for_each(|path| remove_quietly(path));
    }
}

/// An empty payload cannot be told from a back-pointer: ZODB writes it all the same and cannot read the file again.
pub(super) fn not_empty(oid: Oid, is_empty: bool) -> Result<()> {
    if is_empty {
        return Err(StorageError::Invalid(format!(
            "the data of {oid} are empty: a data file cannot hold that"
        )));
    }
    Ok(())
}

fn remove_quietly(path: &Path) {
    if let Err(e) = std::fs::remove_file(path)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("cannot remove {}: {e}", path.display());
    }
}
