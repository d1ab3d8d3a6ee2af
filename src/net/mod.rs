//! Addresses of servers, as configuration files, command lines and Python give them; TLS for both sides.

pub mod address;
pub mod tls;

pub use address::{Address, AddressError};
