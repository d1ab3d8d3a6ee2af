//! The server over real sockets, with the memory storage below it and a client that speaks in single frames.

#![allow(clippy::unwrap_used)]

mod bulk;
mod commits;
mod handshake;
mod ordering;
mod others;
mod peer;
mod reads;
mod seats;
