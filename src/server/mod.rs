//! The server: sessions, commit, invalidation.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`listener`], `sockets` | addresses bound, connections accepted and counted |
//! | `connection`, `socket` | one task a connection: socket, buffers, when to do what |
//! | `seat` | threads for connections that load without pause |
//! | `session` | one client: its view, its calls (`reads`, `transaction`, `undo`, `cursors`, `blobs`) |
//! | `mailbox` | what the rest of the server has to say to one connection, in order |
//! | `hub`, `pack_watch` | one storage: who listens, what was published; its pack |
//! | `staging` | what a transaction has sent before its vote, in memory or on disk |
//! | `locks`, `verdict` | which transaction holds which objects; how a vote ends |
//! | `commit`, `gather` | the thread that finishes; what it finishes together |
//! | `admin` | the operators' HTTP listener: metrics, health, status page |
//! | `status`, `fault`, `slow` | numbers for monitors; errors for clients; what took too long, for the log |
//!
//! The rules of ordering and what they exclude: `docs/ordering.md`.

mod admin;
mod blobs;
mod commit;
mod connection;
mod cursors;
mod fault;
mod gather;
mod hub;
pub mod listener;
mod locks;
mod mailbox;
mod pack_watch;
mod reads;
mod seat;
mod session;
mod slow;
mod socket;
mod sockets;
mod staging;
mod status;
mod transaction;
mod undo;
mod verdict;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::limits;
use crate::net::Address;
use crate::net::tls::ServerTls;
use crate::storage::transform::RecordReferences;
use crate::storage::{ConflictResolver, NoResolution, References};
use hub::Hub;
pub use listener::{Server, ServerError, ServerHandle};
pub use locks::LockHolder;
use seat::Seats;
use slow::{Budget, SlowLog};

/// How to serve. The defaults are ZEO's, except for limits that ZEO does not have.
pub struct ServerConfig {
    pub addresses: Vec<Address>,
    /// Also serve the sockets that the process was started with (systemd's `LISTEN_FDS`). One at an address above takes
    /// its place; one that is called `http` is for operators.
    pub inherit: bool,
    /// Announce `M5` rather than `Z5`; the client decides in either case.
    pub msgpack: bool,
    /// No client may write (packing is allowed).
    pub read_only: bool,
    /// Transactions kept for clients that were away: `n` of them bridge `n - 1` missed ones.
    pub invalidation_queue_size: usize,
    /// Beyond the queue, invalidations are collected from the storage for clients that were away no longer than this.
    pub invalidation_age: Option<Duration>,
    /// How long a transaction may hold its locks. (ZEO has no limit unless one is set.)
    pub transaction_timeout: Option<Duration>,
    /// Send conflicts to the client to be resolved there.
    pub client_conflict_resolution: bool,
    /// Resolves conflicts here, if clients do not.
    pub resolver: Arc<dyn ConflictResolver>,
    /// Finds the references in a record, for pack.
    pub references: Arc<dyn References>,
    /// Largest message accepted.
    pub max_frame: usize,
    /// Connections beyond this number are closed at once.
    pub max_connections: usize,
    /// Bytes of invalidations that a client may leave unread before it is dropped.
    pub max_unread: usize,
    /// Bytes of one transaction before its vote.
    pub max_staged: usize,
    /// Iterators that a client may keep open.
    pub max_cursors: usize,
    /// Bytes of records that one transaction keeps in memory before its vote; further ones go to a temporary file.
    pub staging_memory: usize,
    /// Where that file is; `None`: beside the storage's own, or where the system keeps temporary files.
    pub staging_directory: Option<PathBuf>,
    /// How long an accepted connection may say nothing.
    pub handshake_timeout: Duration,
    /// A peer that acknowledges nothing, or takes in nothing of what waits for it, for this long is gone (half-open
    /// connections, pulled cables, stopped processes). TCP only.
    pub peer_timeout: Duration,
    /// Operations that take this long are logged; `None`: none are.
    pub slow_operation: Option<Duration>,
    /// Where operators are answered over HTTP (metrics, health, a status page); `None`: nowhere.
    pub http: Option<Address>,
    /// How long a stopping server waits for clients that have voted to finish.
    pub shutdown_grace: Duration,
    /// Speak TLS, with clients that show a certificate it trusts.
    pub tls: Option<Arc<ServerTls>>,
    /// How often storages that have changed save their index.
    pub checkpoint_interval: Duration,
    /// Threads of the event loop; `None`: one a core, at least two.
    pub workers: Option<usize>,
    /// Connections that load without pause and may have a thread each.
    pub load_threads: usize,
    /// Offer clients of this machine a Unix socket when they come over TCP without TLS.
    pub local_socket: bool,
    /// Bytes of memory, for each storage, where clients that come over a Unix socket find current objects without asking; zero: none.
    pub shared_cache_size: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            inherit: false,
            msgpack: false,
            read_only: false,
            invalidation_queue_size: 100,
            invalidation_age: None,
            transaction_timeout: Some(Duration::from_secs(30)),
            client_conflict_resolution: false,
            resolver: Arc::new(NoResolution),
            references: Arc::new(RecordReferences),
            max_frame: limits::MAX_FRAME,
            max_connections: 10_000,
            max_unread: 16 << 20,
            max_staged: 4 << 30,
            max_cursors: 1000,
            staging_memory: 64 << 20,
            staging_directory: None,
            handshake_timeout: Duration::from_secs(60),
            peer_timeout: Duration::from_secs(20),
            slow_operation: Some(Duration::from_secs(1)),
            http: None,
            shutdown_grace: Duration::from_secs(5),
            tls: None,
            checkpoint_interval: Duration::from_secs(300),
            workers: None,
            load_threads: 64,
            local_socket: true,
            shared_cache_size: 64 << 20,
        }
    }
}

impl fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerConfig").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

/// A connection counts as open until this is dropped, however its task ends.
pub(crate) struct Place(Arc<Shared>);

impl Place {
    /// `None`: there are too many.
    pub(crate) fn take(shared: &Arc<Shared>) -> Option<Self> {
        let place = Self(Arc::clone(shared));
        (shared.open.fetch_add(1, Ordering::Relaxed) < shared.config.max_connections).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What all connections of a server share.
pub(crate) struct Shared {
    pub(crate) config: ServerConfig,
    pub(crate) hubs: Vec<Arc<Hub>>,
    pub(crate) slow: SlowLog,
    /// Connections of all listeners.
    open: AtomicUsize,
    /// Lines about connections that were refused or never became a client's.
    refusals: Budget,
    /// Lines about connections that were closed because of what their peer did.
    closings: Budget,
    /// Lines about votes that wait in a crowd.
    pub(crate) crowds: Budget,
    /// Lines about packs that failed.
    pub(crate) refused_packs: Budget,
    stopping: AtomicBool,
    pub(crate) seats: Seats,
    /// Name of the socket that clients of this machine are offered.
    pub(crate) local_socket: Option<String>,
    /// Who has registered there and not yet left its first connection.
    pub(crate) gone_local: AtomicUsize,
    /// Bytes of staged records in memory, of all transactions.
    pub(crate) staged_memory: Arc<AtomicUsize>,
}

impl Shared {
    pub(crate) fn new(config: ServerConfig, hubs: Vec<Arc<Hub>>, local_socket: Option<String>) -> Self {
        Self {
            slow: SlowLog::new(config.slow_operation),
            seats: Seats::new(config.load_threads),
            config,
            hubs,
            local_socket,
            gone_local: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            refusals: Budget::default(),
            closings: Budget::default(),
            crowds: Budget::default(),
            refused_packs: Budget::default(),
            stopping: AtomicBool::new(false),
            staged_memory: Arc::default(),
        }
    }

    /// Long work should give up.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_however_its_connection_ends() {
        let config = ServerConfig { max_connections: 1, ..ServerConfig::default() };
        let shared = Arc::new(Shared::new(config, Vec::new(), None));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _place = Place::take(&shared).expect("the first");
            assert!(Place::take(&shared).is_none());
            panic!("in a connection's task");
        }));
        assert!(panicked.is_err());
        assert!(Place::take(&shared).is_some());
        assert_eq!(shared.open.load(Ordering::Relaxed), 0);
    }
}
