//! [`Server`]: binds the addresses, accepts connections, stops in good order.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{oneshot, watch};
use tokio_util::task::TaskTracker;

use super::admin;
use super::connection::serve;
use super::hub::{Hub, HubOptions, MAX_SLOW_JOBS};
use super::socket::Socket;
use super::sockets::{self, Acceptor, Listener};
use super::{Place, ServerConfig, Shared, locks::LockHolder};
use crate::ids::Tid;
use crate::net::tls::{ServerStream, ServerTls, TlsError};
use crate::net::{Address, activation};
use crate::storage::{Owner, Storage, StorageError};

/// Worker threads of the storages in Rust (tokio's default).
const MAX_BLOCKING: usize = 512;

/// Why a server could not be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("no address to listen on is given")]
    NoAddress,
    #[error("no storage to serve is given")]
    NoStorage,
    #[error("two storages are named {0:?}; give each its own name")]
    DuplicateStorage(String),
    #[error("cannot listen on {address}: {source}")]
    Bind { address: Address, source: io::Error },
    #[error("a socket that the server was started with (LISTEN_FDS) cannot be used: {0}")]
    Inherited(io::Error),
    #[error("cannot start the threads of the server: {0}")]
    Threads(io::Error),
    #[error("storage {name:?}: {source}")]
    Storage { name: String, source: StorageError },
}

/// A server that listens already (clients can connect, and wait) but serves only when it runs.
pub struct Server {
    shared: Arc<Shared>,
    listeners: Vec<Listener>,
    addresses: Vec<Address>,
    /// For operators.
    http: Vec<std::net::TcpListener>,
    http_address: Option<Address>,
}

impl Server {
    /// Listens on the addresses of `config` and gets the storages ready. The storages are the server's from then on: it
    /// closes them when it stops, or if this fails.
    pub fn bind(
        config: ServerConfig,
        storages: Vec<(String, Arc<dyn Storage>)>,
    ) -> Result<Self, ServerError> {
        let bound = Self::bind_all(config, &storages);
        if bound.is_err() {
            for (name, storage) in &storages {
                if let Err(error) = storage.close() {
                    tracing::error!(storage = %name, %error, "a storage cannot be closed");
                }
            }
        }
        bound
    }

    fn bind_all(config: ServerConfig, storages: &[(String, Arc<dyn Storage>)]) -> Result<Self, ServerError> {
        if storages.is_empty() {
            return Err(ServerError::NoStorage);
        }
        for (at, (name, _)) in storages.iter().enumerate() {
            if storages.iter().skip(at + 1).any(|(other, _)| other == name) {
                return Err(ServerError::DuplicateStorage(name.clone()));
            }
        }
        let mut inherited = if config.inherit {
            activation::inherited().map_err(ServerError::Inherited)?
        } else {
            Vec::new()
        };
        // Those may be of another network namespace, where somebody else can have a name of this one.
        let inherits = !inherited.is_empty();
        let http =
            match (sockets::inherited_http(&mut inherited).map_err(ServerError::Inherited)?, &config.http) {
                (Some(http), _) => Some(http),
                (None, Some(address)) => Some(sockets::listen_http(address)?),
                (None, None) => None,
            };
        let (http, http_address) = http.map_or((Vec::new(), None), |(http, address)| (http, Some(address)));
        let mut listeners = Vec::new();
        let mut addresses = Vec::new();
        for address in &config.addresses {
            let failed = |source| ServerError::Bind { address: address.clone(), source };
            let found = sockets::inherited_at(&mut inherited, address).map_err(failed)?;
            let (more, actual) = found.map_or_else(|| sockets::listen(address).map_err(failed), Ok)?;
            listeners.extend(more);
            addresses.push(actual);
        }
        // What systemd listens at and the configuration does not name is served as well.
        for one in inherited {
            addresses.push(one.socket.address().map_err(ServerError::Inherited)?);
            listeners.push(Listener::inherited(one.socket).map_err(ServerError::Inherited)?);
        }
        if listeners.is_empty() {
            return Err(ServerError::NoAddress);
        }
        // Clients with TLS are not handed a descriptor.
        let shelf = if config.tls.is_none() { config.shared_cache_size } else { 0 };
        let mut hubs = Vec::new();
        for (name, storage) in storages {
            let options = HubOptions {
                invalidation_queue_size: config.invalidation_queue_size,
                invalidation_age: config.invalidation_age,
                transaction_timeout: config.transaction_timeout,
                client_conflict_resolution: config.client_conflict_resolution,
                resolver: Arc::clone(&config.resolver),
                references: Arc::clone(&config.references),
                shelf,
            };
            let hub = Hub::start(name.clone(), Arc::clone(storage), options);
            hubs.push(hub.map_err(|source| ServerError::Storage { name: name.clone(), source })?);
        }
        for hub in &hubs {
            let read_only = config.read_only || hub.is_read_only;
            tracing::info!(storage = %hub.id, name = %hub.name, read_only, "storage opened");
        }
        for address in &addresses {
            tracing::info!(%address, "listening");
        }
        let mut local_socket = None;
        if config.local_socket && config.tls.is_none() && !inherits && listeners.iter().any(Listener::is_tcp)
        {
            match sockets::listen_locally() {
                Ok((listener, name)) => {
                    listeners.push(listener);
                    local_socket = Some(name);
                }
                Err(error) => {
                    tracing::info!(%error, "clients of this machine stay with TCP, there is no local socket")
                }
            }
        }
        let shared = Arc::new(Shared::new(config, hubs, local_socket));
        if let Some(address) = &http_address {
            tracing::info!(%address, "listening for operators (HTTP)");
        }
        Ok(Self { shared, listeners, addresses, http, http_address })
    }

    /// The addresses listened on, with the port that the system chose for port 0.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Where operators are answered.
    pub fn http_address(&self) -> Option<&Address> {
        self.http_address.as_ref()
    }

    /// Serves until `shutdown` is ready; then lets clients that have voted finish, and closes the storages.
    ///
    /// # Errors
    /// The first storage that could not be closed.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServerError> {
        let Self { shared, listeners, http, http_address, .. } = self;
        let (stop, stopped) = watch::channel(false);
        let connections = TaskTracker::new();
        let acceptors = TaskTracker::new();
        for listener in listeners {
            let accepting = accept(Arc::clone(&shared), listener, connections.clone(), stopped.clone());
            acceptors.spawn(async move {
                if let Err(error) = accepting.await {
                    tracing::error!(%error, "a listener ended");
                }
            });
        }
        for listener in http {
            match TcpListener::from_std(listener) {
                // Goes on until the end, to say that the server is stopping.
                Ok(listener) => drop(tokio::spawn(admin::serve(listener, Arc::clone(&shared)))),
                Err(error) => tracing::error!(%error, "the HTTP listener ended"),
            }
        }
        if http_address.is_some() {
            drop(tokio::spawn(admin::watch_rates(Arc::clone(&shared))));
        }
        acceptors.spawn(save_indexes(Arc::clone(&shared), stopped));
        shutdown.await;
        tracing::info!("server stopping");
        shared.stopping.store(true, Ordering::Relaxed);
        let _ = stop.send(true);
        acceptors.close();
        acceptors.wait().await;
        connections.close();
        connections.wait().await;
        let closing = tokio::task::spawn_blocking(move || close_storages(&shared));
        let closed = closing.await.unwrap_or(Ok(()));
        tracing::info!("server stopped");
        closed
    }

    /// Serves in threads of its own.
    pub fn start(self) -> Result<ServerHandle, ServerError> {
        let runtime = self.runtime()?;
        let (addresses, http_address) = (self.addresses.clone(), self.http_address.clone());
        let shared = Arc::clone(&self.shared);
        let (stop, stopped) = oneshot::channel::<()>();
        let run = move || {
            let done = runtime.block_on(self.run(async {
                let _ = stopped.await;
            }));
            // Work that may be stuck in a storage does not keep the process.
            runtime.shutdown_timeout(Duration::from_secs(1));
            done
        };
        let thread =
            std::thread::Builder::new().name("zeo server".into()).spawn(run).map_err(ServerError::Threads)?;
        let owner = Owner::here();
        Ok(ServerHandle { owner, addresses, http_address, shared, stop: Some(stop), thread: Some(thread) })
    }

    fn runtime(&self) -> Result<Runtime, ServerError> {
        let cores = || std::thread::available_parallelism().map_or(2, usize::from).max(2);
        // Storages that hang do not take the threads of the others.
        let slow = self.shared.hubs.iter().filter(|hub| hub.capabilities.slow_calls).count();
        tokio::runtime::Builder::new_multi_thread()
            .max_blocking_threads(MAX_BLOCKING + slow * MAX_SLOW_JOBS)
            .worker_threads(self.shared.config.workers.unwrap_or_else(cores))
            .thread_name("zeo server worker")
            .enable_all()
            .build()
            .map_err(ServerError::Threads)
    }
}

fn close_storages(shared: &Shared) -> Result<(), ServerError> {
    let mut outcome = Ok(());
    for hub in &shared.hubs {
        hub.committer.stop();
        if let Err(source) = hub.storage.close() {
            tracing::error!(storage = %hub.id, error = %source, "a storage cannot be closed");
            outcome = outcome.and(Err(ServerError::Storage { name: hub.id.clone(), source }));
        }
    }
    outcome
}

/// A server that runs in its own threads. Dropping it stops it. In a child of the process that started it there are no
/// such threads, and nothing to stop.
pub struct ServerHandle {
    owner: Owner,
    addresses: Vec<Address>,
    http_address: Option<Address>,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
}

impl ServerHandle {
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    pub fn http_address(&self) -> Option<&Address> {
        self.http_address.as_ref()
    }

    /// Status of all storages, as `ruok` answers it.
    pub fn status_json(&self) -> String {
        super::status::json(&self.shared.hubs)
    }

    /// Who holds or waits for locks, by storage.
    pub fn lock_holders(&self) -> Vec<(String, Vec<LockHolder>)> {
        self.shared.hubs.iter().map(|hub| (hub.id.clone(), hub.locks.holders())).collect()
    }

    /// Connections that have a thread of their own now, because they load without pause.
    pub fn load_threads(&self) -> usize {
        self.shared.config.load_threads - self.shared.seats.free()
    }

    /// Stops in good order and waits for it. Further calls do nothing.
    pub fn stop(&mut self) -> Result<(), ServerError> {
        if !self.owner.is_here() {
            // Nothing is to be woken or joined, not even by a destructor.
            std::mem::forget((self.stop.take(), self.thread.take()));
            return Ok(());
        }
        self.stop.take();
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(ServerError::Threads(io::Error::other("the server's thread panicked"))),
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        // Its error is in the log.
        let _ = self.stop();
    }
}

async fn accept(
    shared: Arc<Shared>,
    listener: Listener,
    connections: TaskTracker,
    mut stopped: watch::Receiver<bool>,
) -> io::Result<()> {
    let acceptor = Acceptor::new(listener)?;
    loop {
        let accepted = tokio::select! {
            accepted = acceptor.accept(shared.config.peer_timeout) => accepted,
            _ = stopped.wait_for(|stop| *stop) => return Ok(()),
        };
        let is_local = acceptor.is_local();
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, or a connection that ended before it was accepted.
                if let Some(not_logged) = shared.refusals.spend(Instant::now()) {
                    tracing::warn!(%error, not_logged, "cannot accept a connection");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some(place) = Place::take(&shared) else {
            let limit = shared.config.max_connections;
            // Who is here already, and stays with TCP, has not been turned away.
            if !is_local && let Some(not_logged) = shared.refusals.spend(Instant::now()) {
                tracing::warn!(client = %peer, limit, not_logged, "too many connections (max-connections), one refused");
            }
            continue;
        };
        tracing::debug!(client = %peer, "connected");
        let (shared, stopped) = (Arc::clone(&shared), stopped.clone());
        connections.spawn(async move {
            match shared.config.tls.clone() {
                // Each in a box of its own: a task has room for the largest of what it waits for, as long as it lives.
                None => Box::pin(serve(shared, socket, peer, is_local, stopped)).await,
                Some(tls) => {
                    let shaken = Box::pin(shake_hands(&shared, &tls, socket, &peer, stopped.clone())).await;
                    if let Some(stream) = shaken {
                        Box::pin(serve(shared, stream, peer, is_local, stopped)).await;
                    }
                }
            }
            drop(place);
        });
    }
}

/// Saves, every now and then, what makes the next start fast, of the storages that have changed.
async fn save_indexes(shared: Arc<Shared>, mut stopped: watch::Receiver<bool>) {
    let mut saved: Vec<Tid> = shared.hubs.iter().map(|hub| hub.registry().last_tid()).collect();
    loop {
        tokio::select! {
            () = tokio::time::sleep(shared.config.checkpoint_interval) => {}
            _ = stopped.wait_for(|stop| *stop) => return,
        }
        for (hub, saved) in shared.hubs.iter().zip(&mut saved) {
            let last_tid = hub.registry().last_tid();
            if std::mem::replace(saved, last_tid) == last_tid {
                continue;
            }
            let storage = Arc::clone(&hub.storage);
            if let Ok(Err(error)) = tokio::task::spawn_blocking(move || storage.checkpoint()).await {
                tracing::warn!(storage = %hub.id, %error, "the index cannot be saved");
            }
        }
    }
}

async fn shake_hands(
    shared: &Shared,
    tls: &ServerTls,
    socket: Socket,
    peer: &str,
    mut stopped: watch::Receiver<bool>,
) -> Option<Box<ServerStream<Socket>>> {
    let shaken = tokio::select! {
        shaken = tls.accept(socket, peer, shared.config.handshake_timeout) => shaken,
        _ = stopped.wait_for(|stop| *stop) => return None,
    };
    match shaken {
        // The state of TLS is some kilobytes, and the task that serves has room for several of what it moves about.
        Ok(stream) => return Some(Box::new(stream)),
        Err(TlsError::HungUp) => tracing::debug!(client = %peer, "connection without a client closed"),
        Err(error) if tls.is_news(peer, &error) => tracing::info!("{error}"),
        Err(error) => tracing::debug!("{error}"),
    }
    None
}
