//! What can go wrong in a storage, by condition. `python/errors.rs` and `server/fault.rs` map it to ZODB's exceptions.

use std::io;
use std::sync::Arc;

use super::Conflict;
use crate::ids::{Oid, Tid};

#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// `POSKeyError(oid)`: unknown oid, or a deletion / undone creation is in effect.
    #[error("no object {0}")]
    NotFound(Oid),
    /// `POSKeyError(text, oid, serial)`.
    #[error("no blob file of {oid} at {serial}")]
    NoBlob { oid: Oid, serial: Tid },
    #[error("conflict on {}: committed {}, read {}", .0.oid, .0.committed, .0.read)]
    Conflict(Box<Conflict>),
    /// `ReadConflictError`, from `checkCurrentSerialInTransaction`.
    #[error("read conflict on {oid}: committed {committed}, read {read}")]
    ReadConflict { oid: Oid, committed: Tid, read: Tid },
    #[error("the storage is read-only")]
    ReadOnly,
    /// `UndoError(reason, oid)`.
    #[error("cannot undo: {reason}")]
    Undo { reason: String, oid: Option<Oid> },
    /// `MultipleUndoErrors([(oid, UndoError)])`.
    #[error("cannot undo {} objects", .0.len())]
    MultipleUndo(Vec<(Oid, String)>),
    /// `StorageTransactionError`.
    #[error("{0}")]
    Transaction(String),
    /// `FileStorageError` and its like: a request that cannot be carried out, with what to do instead.
    #[error("{0}")]
    Invalid(String),
    /// `FileStorageFormatError`: not a Data.fs.
    #[error("{0}")]
    Format(String),
    /// `FileStorageQuotaError`.
    #[error("the storage quota of {0} bytes is exceeded")]
    Quota(u64),
    /// The file contradicts its format (`CorruptedFileStorageError`, `CorruptedTransactionError`, `CorruptedDataError`).
    #[error("{path}: {what} at {pos}")]
    Corrupted { path: String, pos: u64, what: String },
    /// Another process holds the file.
    #[error("{0}")]
    Locked(String),
    #[error("{0} is not supported by this storage")]
    Unsupported(&'static str),
    /// [`super::Storage::try_load_before`] would have to wait for the disk.
    #[error("would block")]
    WouldBlock,
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: Arc<io::Error>,
    },
    /// An earlier I/O error made the storage read-only until it is opened again.
    #[error("the storage takes no writes since an I/O error ({0}); reopen it")]
    PreviousIo(String),
    #[error("the storage is closed")]
    Closed,
    /// A child of the process that opened the file wants to write.
    #[error(
        "{path} was opened by process {owner}, which this process was forked from: open it anew here, or after the fork"
    )]
    Forked { path: String, owner: u32 },
    /// `ValueError`: a pack time that is none.
    #[error("Invalid pack time {0:?}: a Unix time in seconds, of the year 1900 or later")]
    PackTime(f64),
    /// Garbage collection met a reference to nothing (ZODB: `KeyError(oid)`).
    #[error(
        "{referrer} refers to {oid}, which does not exist: pack without garbage collection, or repair it first"
    )]
    Dangling { oid: Oid, referrer: Oid },
    /// The pack was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// An exception of a Python storage or resolver: class name and arguments as text.
    #[error("{class}: {text}")]
    Foreign { class: String, text: String },
}

impl StorageError {
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source: Arc::new(source) }
    }
}
