//! zeo-rs: ZEO, the client-server storage of ZODB, in Rust for Python.
//!
//! # Layout
//! One direction: a module may use those below it, never above (checked by `tests/rust/layering.rs`).
//!
//! | module | what it is | may do |
//! | --- | --- | --- |
//! | `python` | the extension module `zeo_rs._zeo`: converts, releases the GIL, maps errors | feature `python` |
//! | [`server`] | sessions, commit, invalidation | tokio, feature `net` |
//! | [`client`] | connection, transaction, blobs of one `ClientStorage` | sockets, feature `net` |
//! | [`net`] | addresses, TLS configuration | feature `net` |
//! | [`storage`] | the [`storage::Storage`] trait; `file` (Data.fs), `memory`, `blob` directories | blocking file I/O |
//! | [`cache`] | the client's object cache | blocking file I/O |
//! | `shelf` | current revisions that clients of the server's machine read themselves | a file in memory, feature `net` |
//! | [`wire`] | sans-io: frames, handshake, messages, the two encodings | nothing: bytes in, messages out |
//! | [`pickle`] | data-only pickle: decode, encode, find references | nothing |
//! | [`ids`], [`limits`] | [`ids::Oid`], [`ids::Tid`]; every bound in one place | nothing |

pub mod cache;
#[cfg(feature = "net")]
pub mod client;
pub mod ids;
pub mod limits;
#[cfg(feature = "net")]
pub mod net;
pub mod pickle;
#[cfg(feature = "net")]
pub mod server;
#[cfg(feature = "net")]
mod shelf;
pub mod storage;
pub mod wire;

#[cfg(feature = "python")]
mod python;
