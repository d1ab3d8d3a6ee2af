//! The server: sessions, commit, invalidation.

mod locks;

pub use locks::LockHolder;
