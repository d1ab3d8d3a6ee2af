//! The contract between a server (or a Python face) and a storage engine.
//!
//! It speaks of oids, tids, records and transactions only: an engine knows nothing of sessions, a session nothing of
//! Data.fs. Another engine (PostgreSQL, a Python storage) may get its tids from outside and finish asynchronously.
//!
//! # Two-phase commit
//! The caller stages a whole transaction ([`StagedTxn`]) without touching the storage, then
//! [`Storage::vote`] checks it and promises that it can be committed, and [`Storage::finish`] commits a *group* of
//! voted transactions: tids in the order given, one sync, then for each in tid order the index is updated, `publish` is
//! called, and `last_tid` moves. (A server's sessions answer loads as of the last tid that they were told of, so a load
//! that comes before `publish` shows nothing too early; a reader that starts from `last_tid` never sees a transaction
//! whose `publish` has not returned.)
//!
//! Between vote and finish the caller must keep every other transaction away from the voted oids (the server's oid
//! locks; the one commit lock of an in-process storage). `undo`, `pack`'s switch and engines whose
//! [`Capabilities::concurrent_votes`] is false need the whole storage.

pub mod blob;
pub mod error;
pub mod file;
pub mod memory;
pub mod owner;
pub mod staged;
pub mod transform;
pub mod write_behind;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::ids::{Oid, Tid};
pub use error::StorageError;
pub use owner::Owner;
pub use staged::{SpillFile, StagedData};
pub use write_behind::WriteBehind;

pub type Result<T, E = StorageError> = std::result::Result<T, E>;

/// One revision of an object, as `loadBefore` answers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    pub data: Bytes,
    pub tid: Tid,
    /// Tid of the next newer revision, whatever its kind; `None` if this one is current.
    pub end_tid: Option<Tid>,
}

/// User, description, extension of a transaction. `extension` is the pickled dict, or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TxnMeta {
    pub user: Bytes,
    pub description: Bytes,
    pub extension: Bytes,
}

/// What one staged operation writes.
#[derive(Clone, Debug)]
pub enum Op {
    /// `store`: conflict-checked write. `blob`: file to move into the blob directory with it.
    Store { oid: Oid, serial: Tid, data: StagedData, blob: Option<PathBuf> },
    /// `checkCurrentSerialInTransaction`.
    CheckCurrent { oid: Oid, serial: Tid },
    /// `deleteObject`.
    Delete { oid: Oid, serial: Tid },
    /// `restore`/`restoreBlob`: unchecked write of the revision `serial`; `data` `None` = undone creation.
    Restore { oid: Oid, serial: Tid, data: Option<StagedData>, prev_txn: Option<Tid>, blob: Option<PathBuf> },
    /// `undo` of the transaction `tid`.
    Undo { tid: Tid },
}

impl Op {
    /// The object it is about; `None` for undo.
    pub fn oid(&self) -> Option<Oid> {
        match self {
            Self::Store { oid, .. }
            | Self::CheckCurrent { oid, .. }
            | Self::Delete { oid, .. }
            | Self::Restore { oid, .. } => Some(*oid),
            Self::Undo { .. } => None,
        }
    }
}

/// A transaction before its vote: everything the client sent, in order.
#[derive(Clone, Debug)]
pub struct StagedTxn {
    pub meta: TxnMeta,
    /// Explicit tid (copying databases); `None`: the engine gives one at finish.
    pub tid: Option<Tid>,
    /// Status byte to be written; `b' '` unless copying.
    pub status: u8,
    pub ops: Vec<Op>,
}

impl Default for StagedTxn {
    fn default() -> Self {
        Self { meta: TxnMeta::default(), tid: None, status: b' ', ops: Vec::new() }
    }
}

/// A store whose serial is not the current one. ZODB's `ConflictError(oid, serials=(committed, read), data)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    pub oid: Oid,
    /// Tid of the committed revision.
    pub committed: Tid,
    /// Serial that the client's state is based on.
    pub read: Tid,
    /// The record that the client tried to store.
    pub data: Bytes,
}

/// What to do with a [`Conflict`].
#[derive(Clone, Debug)]
pub enum Resolution {
    /// Store this record instead; the oid is reported as resolved.
    Resolved(Bytes),
    /// Let the vote fail with [`StorageError::Conflict`].
    Unresolved,
    /// Collect it: the vote ends as [`VoteOutcome::Conflicts`] (client-side resolution).
    AskClient,
}

/// Port: conflict resolution needs the application's classes, so it lives outside the engine.
/// Called without engine locks held; it may call [`Storage::load_serial`] of the same storage.
pub trait ConflictResolver: Send + Sync {
    /// `committed_data` is given for undo, where the committed state may be uncommitted itself.
    fn resolve(
        &self,
        storage: &dyn Storage,
        conflict: &Conflict,
        committed_data: Option<Bytes>,
    ) -> Resolution;

    /// False: it is known that conflicts of this record's class are never resolved. Asks nobody.
    fn may_resolve(&self, _record: &[u8]) -> bool {
        true
    }
}

/// Resolver of storages without classes: every conflict fails.
#[derive(Debug)]
pub struct NoResolution;

impl ConflictResolver for NoResolution {
    fn resolve(&self, _: &dyn Storage, _: &Conflict, _: Option<Bytes>) -> Resolution {
        Resolution::Unresolved
    }

    fn may_resolve(&self, _: &[u8]) -> bool {
        false
    }
}

/// Port: references of a data record (an application may compress or encrypt its records).
pub trait References: Send + Sync {
    /// Appends the oids that `record` refers to (strong, same database).
    fn references(&self, record: &[u8], out: &mut Vec<Oid>) -> Result<()>;

    /// Whether the record is that of a blob. A record that cannot be read is not.
    fn is_blob(&self, record: &[u8]) -> bool {
        transform::untransform(record).is_ok_and(|record| crate::pickle::class_of::is_blob_record(&record))
    }
}

/// Answer of a vote.
pub enum VoteOutcome {
    Ready(VotedTxn),
    /// Only with [`Resolution::AskClient`]: nothing is held; the client resolves and votes again.
    Conflicts(Vec<Conflict>),
}

/// A voted transaction, to be given to `finish` or `abort`. Dropping it aborts it.
pub struct VotedTxn {
    /// Every oid it writes (stores, deletes, restores, undone objects), without duplicates, in order of first write.
    pub oids: Vec<Oid>,
    /// Oids whose stored data is not what the client sent: resolved or undone.
    pub resolved: Vec<Oid>,
    /// The engine's own state.
    pub state: Box<dyn std::any::Any + Send>,
}

/// A committed transaction, as given to `publish`.
#[derive(Clone, Debug)]
pub struct Committed {
    /// Position in the group given to `finish`.
    pub index: usize,
    pub tid: Tid,
    pub oids: Arc<[Oid]>,
}

/// Which optional calls a storage has, and what it declares to clients.
#[derive(Clone, Debug, Default)]
pub struct Capabilities {
    pub undo: bool,
    pub record_iternext: bool,
    pub delete_object: bool,
    pub restore: bool,
    pub blobs: bool,
    pub concurrent_votes: bool,
    /// Any call may take long (a storage written in Python): an event loop makes none itself.
    pub slow_calls: bool,
    /// `(module, name)` pairs of `get_info()['interfaces']`, in resolution order, ending with zope.interface's.
    pub interfaces: Vec<(String, String)>,
}

/// One entry of `history`.
#[derive(Clone, Debug)]
pub struct HistoryEntry {
    pub tid: Tid,
    /// Length of the record's own data; 0 for back-pointers and tombstones.
    pub size: u64,
    pub meta: TxnMeta,
}

/// One entry of `undoLog`/`undoInfo`.
#[derive(Clone, Debug)]
pub struct UndoEntry {
    pub tid: Tid,
    /// Length of the transaction record as Data.fs counts it.
    pub size: u64,
    pub meta: TxnMeta,
}

/// Header of a transaction met while iterating.
#[derive(Clone, Debug)]
pub struct TxnInfo {
    pub tid: Tid,
    pub status: u8,
    pub meta: TxnMeta,
}

/// Data record met while iterating.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordInfo {
    pub oid: Oid,
    pub tid: Tid,
    /// `None`: undone creation or deletion.
    pub data: Option<Bytes>,
    /// Tid of the transaction that holds the data, if the record is a back-pointer.
    pub data_txn: Option<Tid>,
}

/// Transactions in tid order, as of the iterator's creation.
pub trait TxnIterator: Send {
    /// The next transaction and a reader of its records; `None` at the end.
    fn next_txn(&mut self) -> Result<Option<(TxnInfo, Box<dyn RecordIterator>)>>;
}

/// Data records of one transaction, in file order. Independent of the iterator it came from.
pub trait RecordIterator: Send {
    fn next_record(&mut self) -> Result<Option<RecordInfo>>;

    /// A reader of the same records, from the first on. `None`: it has none, ask the storage for the transaction again.
    fn again(&self) -> Option<Box<dyn RecordIterator>> {
        None
    }
}

/// Answer of `record_iternext`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextRecord {
    pub oid: Oid,
    pub tid: Tid,
    pub data: Bytes,
    /// Where to go on; `None` at the end.
    pub next: Option<Oid>,
}

/// A pack in progress, as seen from outside.
#[derive(Clone, Debug, Default)]
pub struct PackProgress {
    /// `"index"`, `"mark"`, `"copy"`, `"catch up"`, `"switch"`, `"blobs"`.
    pub phase: &'static str,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub objects_done: u64,
    pub objects_total: u64,
}

/// How to pack.
pub struct PackOptions<'a> {
    /// Unix time, seconds: revisions current at it are kept.
    pub time: f64,
    /// Collect garbage; `None`: the storage's own default.
    pub gc: Option<bool>,
    pub references: &'a dyn References,
    /// Called every now and then; `false` cancels the pack, leaving everything as it was.
    pub progress: &'a mut (dyn FnMut(&PackProgress) -> bool + Send),
    /// Upper bound of bytes read and written a second.
    pub throttle: Option<u64>,
}

impl PackOptions<'_> {
    /// The pack time as a tid. Errors: `PackTime`; a time that is none must not be taken for one that drops everything.
    pub fn stop(&self) -> Result<Tid> {
        Tid::from_unix(self.time).ok_or(StorageError::PackTime(self.time))
    }
}

/// A storage engine. All methods block; none is called with an engine lock held.
///
/// `load_*` never wait for a commit in progress, in particular not for its sync.
pub trait Storage: Send + Sync {
    /// ZODB's `getName()`.
    fn name(&self) -> String;
    fn is_read_only(&self) -> bool;
    fn capabilities(&self) -> Capabilities;
    /// Number of objects, as ZODB's `len(storage)` (tombstones included).
    fn object_count(&self) -> u64;
    /// Bytes, ZODB's `getSize()`.
    fn size(&self) -> u64;
    /// Newest published tid; `Tid::ZERO` if empty.
    fn last_tid(&self) -> Tid;

    /// The revision with the greatest tid < `before`. `None`: the object exists, but is younger.
    /// Errors: [`StorageError::NotFound`] for an unknown oid or a deletion in effect.
    fn load_before(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>>;
    /// As `load_before`, but only if it needs no disk access (page cache); `Err(WouldBlock)` otherwise.
    fn try_load_before(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>> {
        self.load_before(oid, before)
    }
    fn load_serial(&self, oid: Oid, serial: Tid) -> Result<Bytes>;
    /// ZODB's `getTid`.
    fn current_tid(&self, oid: Oid) -> Result<Tid>;
    /// Newest first, at most `size` entries.
    fn history(&self, oid: Oid, size: usize) -> Result<Vec<HistoryEntry>>;
    /// Record of the smallest living oid >= `next`; `None` at the end.
    fn record_iternext(&self, next: Option<Oid>) -> Result<Option<NextRecord>>;
    /// Transactions with `start <= tid <= stop`.
    fn iterate(&self, start: Option<Tid>, stop: Option<Tid>) -> Result<Box<dyn TxnIterator>>;
    /// The last `count` transactions, oldest first, with the oids they wrote.
    fn last_invalidations(&self, count: usize) -> Result<Vec<(Tid, Vec<Oid>)>>;
    /// Newest first; stops when `accept` was true for `last` entries or at the packed part. Entries `first..last` of
    /// the accepted ones are returned.
    fn undo_log(
        &self,
        first: usize,
        last: usize,
        accept: &mut dyn FnMut(&UndoEntry) -> bool,
    ) -> Result<Vec<UndoEntry>>;

    /// `count` oids never handed out before, ascending, also not before a restart or crash.
    fn new_oids(&self, count: usize) -> Result<Vec<Oid>>;

    /// Checks serials, resolves conflicts, reserves space. See the module documentation.
    fn vote(&self, txn: StagedTxn, resolver: &dyn ConflictResolver) -> Result<VoteOutcome>;
    /// Commits the group. On error nothing of the group was published and the storage refuses writes from then on.
    fn finish(&self, group: Vec<VotedTxn>, publish: &mut dyn FnMut(&Committed)) -> Result<()>;
    fn abort(&self, txn: VotedTxn);
    /// How long the last [`Self::finish`] waited for its sync, for monitors; `None`: it makes none, or cannot tell.
    fn last_sync(&self) -> Option<Duration> {
        None
    }

    /// Packs; the caller guarantees nothing, `switch_lock` gives the engine the whole storage for the final switch.
    fn pack(&self, options: PackOptions<'_>, switch_lock: &dyn WholeStorageLock) -> Result<()>;

    /// Path of a committed blob file. Errors: `NotFound`, `Unsupported`.
    fn blob_path(&self, oid: Oid, serial: Tid) -> Result<PathBuf>;
    /// Where uncommitted blob files go, on the same file system as the committed ones.
    fn temporary_directory(&self) -> Result<PathBuf>;
    /// Where a file may lie for a while that holds what will become part of the storage: on its disk. `None`: it has
    /// no such place.
    fn scratch_directory(&self) -> Option<PathBuf> {
        None
    }
    /// For `storeBlobShared`: the directory of an oid's committed blobs.
    fn blob_oid_directory(&self, oid: Oid) -> Result<PathBuf>;

    /// Why the storage takes no writes any more (an I/O error made it fail-stop); `None`: it does, or never did.
    fn write_failure(&self) -> Option<String> {
        None
    }

    /// Where to report commits that come from below. Engines that own their data have none.
    fn subscribe(&self, _sink: Arc<dyn InvalidationSink>) {}

    /// Saves what makes the next start fast (the index). Called periodically and at close.
    fn checkpoint(&self) -> Result<()>;
    fn close(&self) -> Result<()>;
}

/// Port: commits that happen below a storage (another server of the same database, a storage that is itself a client).
pub trait InvalidationSink: Send + Sync {
    /// A transaction that this storage did not commit itself is visible now. Called in tid order.
    fn invalidate(&self, tid: Tid, oids: Vec<Oid>);
    /// Anything may have changed: clients must verify their caches.
    fn invalidate_all(&self);
}

/// Port: keeps all voted transactions away while the guard lives (server: its oid locks; in-process: the commit lock).
pub trait WholeStorageLock: Send + Sync {
    /// Blocks until every voted transaction has finished or aborted, then runs `body` with no new one voted.
    fn with_whole_storage(&self, body: &mut dyn FnMut());
}
