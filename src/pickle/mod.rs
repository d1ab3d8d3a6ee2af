//! Data-only pickle: decode, encode, find references. Never imports, builds or calls anything.
//!
//! | module | what for |
//! | --- | --- |
//! | [`mod@decode`] | messages of encoding `Z5`, transaction extensions, index files: pickle → [`Value`] |
//! | [`mod@encode`] | the same three, byte for byte as `zodbpickle` writes them |
//! | [`refs`], [`mod@class_of`] | data records: what they refer to, of which class they are |
//!
//! Protocols 0 to 5 are read; protocol 3 is written, the newest that ZODB reads.

pub mod class_of;
pub mod decode;
pub mod encode;
mod opcode;
#[cfg(test)]
pub(crate) mod proptests;
pub mod refs;
mod scanner;
mod tree;
pub mod value;

pub use class_of::{class_of, is_blob_record};
pub use decode::{Globals, decode, decode_extension, decode_first};
pub use encode::{encode, encode_extension, encode_with_memo};
pub use refs::{ReferenceScanner, references};
pub use value::Value;

/// Why bytes are no acceptable pickle, or a value cannot be one. Positions are byte offsets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PickleError {
    #[error("pickle ends early, at byte {at}")]
    Truncated { at: usize },
    #[error("no pickle: unknown opcode 0x{opcode:02x} at byte {at}")]
    Opcode { at: usize, opcode: u8 },
    #[error("no pickle: protocol {version} at byte {at}")]
    Protocol { at: usize, version: u8 },
    #[error("no pickle: opcode 0x{opcode:02x} at byte {at} does not fit the stack")]
    Stack { at: usize, opcode: u8 },
    #[error("no pickle: memo entry {index} is used at byte {at} before it is set")]
    Memo { at: usize, index: u32 },
    #[error("bad number in a pickle at byte {at}")]
    Number { at: usize },
    #[error("bad text in a pickle at byte {at}")]
    Text { at: usize },
    #[error("the pickle uses {module}.{name}, which is not allowed here")]
    Global { module: String, name: String },
    #[error("the persistent id at byte {at} of a {class} is no reference")]
    Reference { at: usize, class: String },
    #[error("values nest deeper than {} or contain themselves", crate::limits::MAX_DEPTH)]
    TooDeep,
    #[error("too many values in one pickle")]
    TooMany,
    #[error("a text, byte string or number of more than 4 GiB cannot be pickled")]
    TooLong,
}
