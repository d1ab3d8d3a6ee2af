//! Addresses of servers, as configuration files, command lines and Python give them; sockets from systemd; TLS for both sides; how long to
//! ask a socket before sleeping on it.

pub mod activation;
pub mod address;
mod spin;
pub mod tls;

pub use address::{Address, AddressError};
pub(crate) use spin::Spin;
