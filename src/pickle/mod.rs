//! Data-only pickle: decode, encode, find references. Never builds or calls anything.

pub mod value;

pub use value::Value;
