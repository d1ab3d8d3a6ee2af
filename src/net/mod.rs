//! Addresses of servers, as configuration files, command lines and Python give them.

pub mod address;

pub use address::{Address, AddressError};
