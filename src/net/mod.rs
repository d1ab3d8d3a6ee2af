//! Addresses of servers, as configuration files, command lines and Python give them; sockets from systemd; TLS for both sides; what two
//! processes of one machine can do better: local sockets, and how long to ask a socket before sleeping on it.

pub mod activation;
pub mod address;
pub(crate) mod local;
mod spin;
pub mod tls;

pub use address::{Address, AddressError};
pub(crate) use spin::Spin;
