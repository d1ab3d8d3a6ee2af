//! [`Server`]: binds the addresses, accepts connections, stops in good order.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket as RawSocket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::{oneshot, watch};
use tokio_util::task::TaskTracker;

use super::admin;
use super::connection::{Socket, serve};
use super::hub::{Hub, HubOptions};
use super::{ServerConfig, Shared, locks::LockHolder};
use crate::ids::Tid;
use crate::net::Address;
use crate::net::tls::{ServerTls, TlsError};
use crate::storage::{Storage, StorageError};

const BACKLOG: i32 = 1024;

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
    #[error("cannot start the threads of the server: {0}")]
    Threads(io::Error),
    #[error("storage {name:?}: {source}")]
    Storage { name: String, source: StorageError },
}

enum Listener {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener, SocketFile),
}

/// Removes the file of a Unix socket with the listener, if it is still its own.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
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
        if config.addresses.is_empty() {
            return Err(ServerError::NoAddress);
        }
        if storages.is_empty() {
            return Err(ServerError::NoStorage);
        }
        for (at, (name, _)) in storages.iter().enumerate() {
            if storages.iter().skip(at + 1).any(|(other, _)| other == name) {
                return Err(ServerError::DuplicateStorage(name.clone()));
            }
        }
        let mut listeners = Vec::new();
        let mut addresses = Vec::new();
        for address in &config.addresses {
            let failed = |source| ServerError::Bind { address: address.clone(), source };
            let (more, actual) = listen(address).map_err(failed)?;
            listeners.extend(more);
            addresses.push(actual);
        }
        let (http, http_address) = match &config.http {
            Some(address) => listen_http(address).map(|(http, actual)| (http, Some(actual)))?,
            None => (Vec::new(), None),
        };
        let mut hubs = Vec::new();
        for (name, storage) in storages {
            let options = HubOptions {
                invalidation_queue_size: config.invalidation_queue_size,
                invalidation_age: config.invalidation_age,
                transaction_timeout: config.transaction_timeout,
                client_conflict_resolution: config.client_conflict_resolution,
                resolver: Arc::clone(&config.resolver),
                references: Arc::clone(&config.references),
            };
            let hub = Hub::start(name.clone(), Arc::clone(storage), options);
            hubs.push(hub.map_err(|source| ServerError::Storage { name: name.clone(), source })?);
        }
        for address in &addresses {
            tracing::info!(%address, "listening");
        }
        let shared = Arc::new(Shared::new(config, hubs));
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
        Ok(ServerHandle { addresses, http_address, shared, stop: Some(stop), thread: Some(thread) })
    }

    fn runtime(&self) -> Result<Runtime, ServerError> {
        let cores = || std::thread::available_parallelism().map_or(2, usize::from).max(2);
        tokio::runtime::Builder::new_multi_thread()
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

/// A server that runs in its own threads. Dropping it stops it.
pub struct ServerHandle {
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

    /// Stops in good order and waits for it. Further calls do nothing.
    pub fn stop(&mut self) -> Result<(), ServerError> {
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

fn listen(address: &Address) -> io::Result<(Vec<Listener>, Address)> {
    match address {
        Address::Unix(path) => Ok((vec![listen_unix(path)?], address.clone())),
        Address::Tcp { host, port } => {
            let mut candidates = if host.is_empty() {
                // Both families at once; where there is no IPv6, the other one.
                let any = (std::net::Ipv6Addr::UNSPECIFIED, *port).into();
                match listen_tcp(any) {
                    Ok(listener) => return with_actual(address, vec![listener]),
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(error),
                    Err(_) => vec![SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, *port))],
                }
            } else {
                address.resolve("")?
            };
            candidates.dedup();
            let mut listeners: Vec<std::net::TcpListener> = Vec::new();
            let mut failure = None;
            for mut candidate in candidates {
                if let (0, Some(first)) = (*port, listeners.first()) {
                    candidate.set_port(first.local_addr()?.port());
                }
                match listen_tcp(candidate) {
                    Ok(listener) => listeners.push(listener),
                    // A name may stand for an address that this machine does not have (`::1` in a container).
                    Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => failure = Some(error),
                    Err(error) => return Err(error),
                }
            }
            match failure {
                Some(error) if listeners.is_empty() => Err(error),
                _ => with_actual(address, listeners),
            }
        }
    }
}

fn with_actual(
    address: &Address,
    listeners: Vec<std::net::TcpListener>,
) -> io::Result<(Vec<Listener>, Address)> {
    let actual = match (address, listeners.first()) {
        (Address::Tcp { host, port: 0 }, Some(first)) => {
            Address::tcp(host.clone(), first.local_addr()?.port())
        }
        _ => address.clone(),
    };
    Ok((listeners.into_iter().map(Listener::Tcp).collect(), actual))
}

/// HTTP is answered on TCP only.
fn listen_http(address: &Address) -> Result<(Vec<std::net::TcpListener>, Address), ServerError> {
    let failed = |source| ServerError::Bind { address: address.clone(), source };
    if matches!(address, Address::Unix(_)) {
        return Err(failed(io::Error::new(
            io::ErrorKind::InvalidInput,
            "HTTP needs a TCP address, HOST:PORT",
        )));
    }
    let (listeners, actual) = listen(address).map_err(failed)?;
    let tcp = |listener| match listener {
        Listener::Tcp(listener) => Some(listener),
        Listener::Unix(..) => None,
    };
    Ok((listeners.into_iter().filter_map(tcp).collect(), actual))
}

fn listen_tcp(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = RawSocket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // The unspecified address is asked for to serve IPv4 as well.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// A socket file that nobody listens on any more (left by a killed server) is replaced.
fn listen_unix(path: &Path) -> io::Result<Listener> {
    let is_stale = |path: &Path| {
        let is_socket =
            std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        is_socket && std::os::unix::net::UnixStream::connect(path).is_err_and(refused)
    };
    let listener = match std::os::unix::net::UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
            std::fs::remove_file(path)?;
            std::os::unix::net::UnixListener::bind(path)?
        }
        bound => bound?,
    };
    listener.set_nonblocking(true)?;
    Ok(Listener::Unix(listener, SocketFile(path.to_owned())))
}

async fn accept(
    shared: Arc<Shared>,
    listener: Listener,
    connections: TaskTracker,
    mut stopped: watch::Receiver<bool>,
) -> io::Result<()> {
    let acceptor = match listener {
        Listener::Tcp(listener) => Acceptor::Tcp(TcpListener::from_std(listener)?),
        Listener::Unix(listener, file) => Acceptor::Unix(UnixListener::from_std(listener)?, file),
    };
    loop {
        let accepted = tokio::select! {
            accepted = acceptor.accept(shared.config.peer_timeout) => accepted,
            _ = stopped.wait_for(|stop| *stop) => return Ok(()),
        };
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
        let limit = shared.config.max_connections;
        if shared.open.fetch_add(1, Ordering::Relaxed) >= limit {
            shared.open.fetch_sub(1, Ordering::Relaxed);
            if let Some(not_logged) = shared.refusals.spend(Instant::now()) {
                tracing::warn!(client = %peer, limit, not_logged, "too many connections (max-connections), one refused");
            }
            continue;
        }
        tracing::debug!(client = %peer, "connected");
        let (shared, stopped) = (Arc::clone(&shared), stopped.clone());
        connections.spawn(async move {
            match shared.config.tls.clone() {
                None => serve(Arc::clone(&shared), socket, peer, stopped).await,
                Some(tls) => Box::pin(serve_tls(Arc::clone(&shared), &tls, socket, peer, stopped)).await,
            }
            shared.open.fetch_sub(1, Ordering::Relaxed);
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

async fn serve_tls(
    shared: Arc<Shared>,
    tls: &ServerTls,
    socket: Socket,
    peer: String,
    mut stopped: watch::Receiver<bool>,
) {
    let shaken = tokio::select! {
        shaken = tls.accept(socket, &peer, shared.config.handshake_timeout) => shaken,
        _ = stopped.wait_for(|stop| *stop) => return,
    };
    match shaken {
        Ok(stream) => serve(shared, stream, peer, stopped).await,
        Err(TlsError::HungUp) => tracing::debug!(client = %peer, "connection without a client closed"),
        Err(error) if tls.is_news(&peer, &error) => tracing::info!("{error}"),
        Err(error) => tracing::debug!("{error}"),
    }
}

enum Acceptor {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

impl Acceptor {
    async fn accept(&self, peer_timeout: Duration) -> io::Result<(Socket, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                if let Err(error) = set_options(&stream, peer_timeout) {
                    // Usually closed again already; reading will tell.
                    tracing::debug!(client = %peer, %error, "socket options cannot be set");
                }
                Ok((Socket::Tcp(stream), Address::from(peer).to_string()))
            }
            Self::Unix(listener, file) => {
                let (stream, _) = listener.accept().await?;
                let peer = peer_name(&stream, &file.0);
                Ok((Socket::Unix(stream), peer))
            }
        }
    }
}

fn peer_name(stream: &UnixStream, path: &Path) -> String {
    match stream.peer_cred().ok().and_then(|peer| peer.pid()) {
        Some(pid) => format!("{} process {pid}", path.display()),
        None => path.display().to_string(),
    }
}

fn set_options(stream: &TcpStream, peer_timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    // The system counts in whole seconds.
    let seconds = |share: u32| (peer_timeout / share).max(Duration::from_secs(1));
    let keepalive = TcpKeepalive::new().with_time(seconds(4)).with_interval(seconds(12)).with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(peer_timeout))
}
