//! What a client is told when it is made.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::net::Address;
use crate::net::tls::ClientTls;

/// What kind of connection is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Writable,
    ReadOnly,
    /// Writable if any server gives it, read-only until then.
    Fallback,
}

#[derive(Clone, Debug)]
pub struct Options {
    /// All of them serve the same data.
    pub addresses: Vec<Address>,
    /// Name of the storage on the server.
    pub storage: String,
    /// For logs and thread names.
    pub name: String,
    pub access: Access,
    /// How long a call waits for a usable connection.
    pub wait_timeout: Duration,
    pub cache_size: usize,
    /// File to keep the cache in.
    pub cache_path: Option<PathBuf>,
    /// File to append every use of the cache to.
    pub cache_trace: Option<PathBuf>,
    /// Shown in the server's log.
    pub label: Option<String>,
    pub tls: Option<Arc<ClientTls>>,
    pub timers: Timers,
}

/// Intervals, changed by tests only.
#[derive(Clone, Copy, Debug)]
pub struct Timers {
    /// First delay after a failed attempt; doubles up to `retry_max`. Each is shortened by a random part of up to half.
    pub retry_min: Duration,
    pub retry_max: Duration,
    /// One attempt to connect, up to the answer to `get_info`.
    pub handshake: Duration,
    pub keep_alive: Duration,
    /// How often a client that fell back to a read-only server looks for a writable one.
    pub probe: Duration,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            retry_min: Duration::from_millis(100),
            retry_max: Duration::from_secs(1),
            handshake: Duration::from_secs(30),
            keep_alive: Duration::from_secs(60),
            probe: Duration::from_secs(5),
        }
    }
}

impl Options {
    pub fn new(addresses: Vec<Address>) -> Self {
        Self {
            addresses,
            storage: "1".into(),
            name: "zeo client".into(),
            access: Access::Writable,
            wait_timeout: Duration::from_secs(30),
            cache_size: 20 << 20,
            cache_path: None,
            cache_trace: None,
            label: None,
            tls: None,
            timers: Timers::default(),
        }
    }
}
