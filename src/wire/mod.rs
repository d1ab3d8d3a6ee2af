//! ZEO protocol 5, sans-io: frames, handshake, messages, in both encodings. Bytes in, typed messages out.
//!
//! Specification: `docs/protocol.md`. A *call* goes from client to server, a *notice* from server to client without an
//! answer, a *reply* or *fault* answers a call.

pub mod call;
pub mod reply;

pub use call::{BadCall, Call, MessageId, Request, TxnKey};
pub use reply::{Fault, Notice, ServerMessage};

/// How messages after the handshake are encoded. The client chooses (`Z5` or `M5`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// `Z5`: pickle protocol 3.
    Pickle,
    /// `M5`.
    Msgpack,
}
