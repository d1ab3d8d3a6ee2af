//! [`Value`]: the plain values of ZEO messages, transaction extensions and index files, in either encoding.

use bytes::Bytes;

/// A decoded value. Classes and calls are kept as data.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// Beyond `i64`: two's complement, little-endian, minimal.
    BigInt(Bytes),
    Float(f64),
    Bytes(Bytes),
    Str(String),
    Tuple(Vec<Self>),
    List(Vec<Self>),
    /// Pairs in order of appearance.
    Dict(Vec<(Self, Self)>),
    /// `set`, `frozenset` and the like stay calls.
    Global {
        module: String,
        name: String,
    },
    /// `callable(*args)`, then `state` applied (REDUCE, NEWOBJ, BUILD).
    Call {
        callable: Box<Self>,
        args: Box<Self>,
        state: Option<Box<Self>>,
    },
}
