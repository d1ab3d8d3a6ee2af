//! ZEO protocol 5, sans-io: frames, handshake, messages, in both encodings. Bytes in, typed messages out.
//!
//! Specification: `docs/protocol.md`. A *call* goes from client to server, a *notice* from server to client without an
//! answer, a *reply* or *fault* answers a call.
//!
//! | module | what for |
//! | --- | --- |
//! | [`frame`], [`handshake`] | cutting frames; who speaks what |
//! | [`call`], [`reply`], [`fault`] | the messages as types; errors by condition |
//! | [`codec`] | messages ↔ frames: what servers and clients use |
//! | `call_codec`, `reply_codec` | arguments of every message |
//! | `fast` | straight-line codec of the messages that make up most traffic |
//! | `emit`, `msgpack` | single values in either encoding |

pub mod call;
mod call_codec;
pub mod codec;
mod emit;
mod fast;
pub mod fault;
pub mod frame;
pub mod handshake;
mod local;
mod msgpack;
#[cfg(test)]
mod proptests;
pub mod reply;
mod reply_codec;

pub use call::{BadCall, Call, MessageId, Request, TxnKey};
pub use codec::{
    decode_request, decode_server_message, encode_call, encode_fault, encode_keep_alive, encode_loaded,
    encode_notice, encode_reply, encode_upload,
};
pub use fault::FaultKind;
pub use frame::{FrameReader, put_frame, put_frame_with};
pub use handshake::{ClientHello, choose};
pub use local::{LocalOffer, ShelfOffer};
pub use reply::{Fault, Notice, ServerMessage};

use crate::pickle::PickleError;

/// How messages after the handshake are encoded. The client chooses (`Z5` or `M5`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// `Z5`: pickle protocol 3.
    Pickle,
    /// `M5`.
    Msgpack,
}

/// Why bytes of a peer are not understood, or a message cannot be sent. All but [`WireError::Unencodable`] end the
/// connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    #[error("the peer announces a message of {announced} bytes; the limit is {limit}")]
    TooLarge { announced: usize, limit: usize },
    #[error("the peer speaks TLS, but TLS is not configured here")]
    TlsHello,
    #[error("the peer speaks protocol \"{0}\", not Z5 or M5", received.escape_ascii())]
    Protocol { received: Vec<u8> },
    #[error("undecodable message: {0}")]
    Pickle(#[from] PickleError),
    #[error("undecodable message: {problem} at byte {at}")]
    Msgpack { at: usize, problem: &'static str },
    #[error("not a ZEO message: {0}")]
    Message(String),
    /// Nothing was appended to the output.
    #[error("cannot be sent: {0}")]
    Unencodable(String),
}

impl WireError {
    fn protocol(received: &[u8]) -> Self {
        let shown = received.get(..received.len().min(32)).unwrap_or_default();
        Self::Protocol { received: shown.to_vec() }
    }

    fn frame_too_long() -> Self {
        Self::Unencodable("a message of 4 GiB or more".into())
    }

    fn message(problem: impl Into<String>) -> Self {
        Self::Message(problem.into())
    }
}
