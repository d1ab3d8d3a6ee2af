//! Replies, faults and notices: what a server says.

use bytes::Bytes;

use super::MessageId;
use crate::ids::{Oid, Tid};
use crate::pickle::Value;

/// One-way message from the server.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    InvalidateTransaction {
        tid: Tid,
        oids: Vec<Oid>,
    },
    /// Some keys of `get_info`.
    Info(Value),
    ReceiveBlobStart {
        oid: Oid,
        serial: Tid,
    },
    ReceiveBlobChunk {
        oid: Oid,
        serial: Tid,
        chunk: Bytes,
    },
    ReceiveBlobStop {
        oid: Oid,
        serial: Tid,
    },
}

/// An error reply: exception class by name, and its arguments (tuple) or attributes (dict).
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// `module.Class`.
    pub class: String,
    pub data: Value,
}

/// One message from a server, as its client reads it.
#[derive(Clone, Debug, PartialEq)]
pub enum ServerMessage {
    /// Answer to a `loadBefore` that was sent with the id `(oid, before)`: `(data, tid, end_tid)`, or `None`.
    Loaded {
        oid: Oid,
        before: Tid,
        loaded: Option<(Bytes, Tid, Option<Tid>)>,
    },
    Reply {
        id: MessageId,
        value: Value,
    },
    Fault {
        id: MessageId,
        fault: Fault,
    },
    Notice(Notice),
    /// A one-way message of an unknown name: to be logged and ignored.
    UnknownNotice {
        name: String,
    },
}
