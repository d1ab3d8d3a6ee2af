//! What can go wrong between a client and its server, by condition. `python/client_errors.rs` maps it to exceptions.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::ids::Oid;
use crate::wire::{Fault, FaultKind, WireError};

/// Cloned to every waiter that it concerns.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No connection, or it was lost; transient. Says why as far as that is known.
    #[error("{0}")]
    Disconnected(String),
    /// The server answered with an error.
    #[error("{}: {:?}", .0.class, .0.data)]
    Fault(Box<Fault>),
    /// The server answered something that the protocol does not allow.
    #[error("unexpected answer to {call}: {problem}")]
    UnexpectedAnswer { call: &'static str, problem: String },
    #[error("no object {0}")]
    NotFound(Oid),
    #[error("the storage is read-only")]
    ReadOnly,
    /// `StorageTransactionError`.
    #[error("{0}")]
    Transaction(String),
    /// A call that waits for the server, from inside a callback that the answer has to wait for.
    #[error("{0} must not be called from a callback of the storage: the answer would wait for that callback")]
    InCallback(&'static str),
    /// What a callback raised: that of `tpc_finish`, or an interrupt of the waiting caller.
    #[error("{0}")]
    Callback(Arc<CallbackError>),
    #[error(
        "this storage was opened by process {0}, before a fork; open a ClientStorage of its own in every process"
    )]
    Forked(u32),
    /// Blobs need a `blob_dir`.
    #[error("blobs are not configured: give ClientStorage a blob_dir")]
    NoBlobDir,
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: Arc<io::Error>,
    },
    /// What was to be sent does not fit the protocol.
    #[error("cannot be sent: {0}")]
    Unsendable(String),
}

pub type Result<T, E = ClientError> = std::result::Result<T, E>;

impl ClientError {
    /// The server has no such object (or has deleted it).
    pub fn is_missing_object(&self) -> bool {
        match self {
            Self::NotFound(_) => true,
            Self::Fault(fault) => matches!(fault.kind(), FaultKind::NotFound { .. }),
            _ => false,
        }
    }
}

impl From<WireError> for ClientError {
    fn from(problem: WireError) -> Self {
        Self::Unsendable(problem.to_string())
    }
}

/// An error of the layer above, carried through unseen.
pub struct CallbackError(pub Box<dyn std::any::Any + Send + Sync>, pub String);

impl fmt::Debug for CallbackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.1)
    }
}

impl fmt::Display for CallbackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.1)
    }
}

impl ClientError {
    pub fn disconnected(reason: impl Into<String>) -> Self {
        Self::Disconnected(reason.into())
    }

    pub(super) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source: Arc::new(source) }
    }

    pub fn is_disconnected(&self) -> bool {
        matches!(self, Self::Disconnected(_))
    }
}
