//! Addresses of servers, as configuration files, command lines and Python give them; sockets from systemd; TLS for both sides.

pub mod activation;
pub mod address;
pub mod tls;

pub use address::{Address, AddressError};
