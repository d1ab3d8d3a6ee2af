//! Calls: what a client asks.

use bytes::Bytes;

use crate::ids::{Oid, Tid};
use crate::pickle::Value;

/// Id of a call, echoed by its reply exactly as received.
#[derive(Clone, Debug, PartialEq)]
pub enum MessageId {
    /// Synchronous calls count 1, 2, 3...; asynchronous ones use 0; -1 is the keep-alive.
    Seq(i64),
    /// `loadBefore` uses its own arguments as id.
    Load { oid: Oid, before: Tid },
    /// Anything else a client chose.
    Other(Value),
}

/// A client's handle of its transaction (Python sends `id(transaction)`); only compared.
pub type TxnKey = Value;

/// One message from a client.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub id: MessageId,
    /// True: the client waits for no answer; an error closes the connection.
    pub is_async: bool,
    /// `Err`: to be answered with a fault (or, if asynchronous or unknown, by closing).
    pub call: Result<Call, BadCall>,
}

/// A call that could not be understood although its message could.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BadCall {
    #[error("no method {0:?}")]
    UnknownMethod(String),
    #[error("{method}: {problem}")]
    Arguments { method: &'static str, problem: String },
    /// An oid or tid argument of a wrong length: ZODB answers `POSKeyError`.
    #[error("{method}: {argument} is not 8 bytes")]
    NotEightBytes { method: &'static str, argument: &'static str, given: Bytes },
}

/// The calls of the protocol (wire names in `call_codec.rs`; semantics in `docs/protocol.md`).
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// The first call. `read_only` is 0/1 or a bool on the wire.
    Register {
        storage: String,
        read_only: bool,
    },
    GetInfo,
    LastTransaction,
    GetInvalidations {
        tid: Tid,
    },
    LoadBefore {
        oid: Oid,
        before: Tid,
    },
    LoadSerial {
        oid: Oid,
        serial: Tid,
    },
    GetTid {
        oid: Oid,
    },
    History {
        oid: Oid,
        size: i64,
    },
    RecordIternext {
        next: Option<Oid>,
    },
    NewOids {
        count: i64,
    },
    TpcBegin {
        txn: TxnKey,
        user: Bytes,
        description: Bytes,
        extension: Value,
        tid: Option<Tid>,
        status: u8,
    },
    Storea {
        oid: Oid,
        serial: Tid,
        data: Bytes,
        txn: TxnKey,
    },
    CheckCurrentSerial {
        oid: Oid,
        serial: Tid,
        txn: TxnKey,
    },
    DeleteObject {
        oid: Oid,
        serial: Tid,
        txn: TxnKey,
    },
    Restorea {
        oid: Oid,
        serial: Tid,
        data: Option<Bytes>,
        prev_txn: Option<Tid>,
        txn: TxnKey,
    },
    /// `trans_id` is base64 text of a tid, as `undoLog` gave it.
    Undoa {
        trans_id: Bytes,
        txn: TxnKey,
    },
    StoreBlobStart,
    StoreBlobChunk {
        chunk: Bytes,
    },
    StoreBlobEnd {
        oid: Oid,
        serial: Tid,
        data: Bytes,
        txn: TxnKey,
    },
    StoreBlobShared {
        oid: Oid,
        serial: Tid,
        data: Bytes,
        filename: String,
        txn: TxnKey,
    },
    Vote {
        txn: TxnKey,
    },
    TpcFinish {
        txn: TxnKey,
    },
    TpcAbort {
        txn: TxnKey,
    },
    SendBlob {
        oid: Oid,
        serial: Tid,
    },
    /// `time`: Unix seconds.
    Pack {
        time: f64,
        wait: bool,
    },
    UndoInfo {
        first: i64,
        last: i64,
        specification: Value,
    },
    UndoLog {
        first: i64,
        last: i64,
    },
    IteratorStart {
        start: Option<Tid>,
        stop: Option<Tid>,
    },
    IteratorNext {
        iid: i64,
    },
    IteratorRecordStart {
        txn_iid: i64,
        tid: Tid,
    },
    IteratorRecordNext {
        iid: i64,
    },
    IteratorGc {
        iids: Vec<i64>,
    },
    ServerStatus,
    SetClientLabel {
        label: String,
    },
    Ping,
    /// Any message with id -1: to be ignored.
    KeepAlive,
}
