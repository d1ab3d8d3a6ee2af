//! Listening sockets: made for an address or taken over from systemd, and what is accepted from them.

use std::fmt::Display;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket as RawSocket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener};

use super::listener::ServerError;
use super::socket::Socket;
use crate::net::activation::{Inherited, ListeningSocket};
use crate::net::{Address, local};

const BACKLOG: i32 = 1024;
/// `FileDescriptorName` of a socket that is for operators.
const HTTP: &str = "http";

pub(super) enum Listener {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener, SocketFile),
    /// What clients of this machine are offered; there is no file.
    Local(std::os::unix::net::UnixListener),
}

/// Removes the file of a Unix socket with the listener, if it is its own.
pub(super) struct SocketFile {
    path: PathBuf,
    /// Made by this process (and not by systemd).
    own: bool,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.own {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Those of `inherited` that listen at `address`, with it as it really is; `None`: there are none.
pub(super) fn inherited_at(
    inherited: &mut Vec<Inherited>,
    address: &Address,
) -> io::Result<Option<(Vec<Listener>, Address)>> {
    let at_address = |one: &mut Inherited| one.name != HTTP && one.socket.is_at(address);
    let matching: Vec<Inherited> = inherited.extract_if(.., at_address).collect();
    if matching.is_empty() {
        return Ok(None);
    }
    let listeners = matching.into_iter().map(|one| Listener::inherited(one.socket));
    Ok(Some((listeners.collect::<io::Result<_>>()?, address.clone())))
}

/// The socket that systemd calls `http`, for operators.
pub(super) fn inherited_http(
    inherited: &mut Vec<Inherited>,
) -> io::Result<Option<(Vec<std::net::TcpListener>, Address)>> {
    let mut http = Vec::new();
    let mut address = None;
    for one in inherited.extract_if(.., |one| one.name == HTTP) {
        address = Some(one.socket.address()?);
        match one.socket {
            ListeningSocket::Tcp(listener) => http.push(listener),
            ListeningSocket::Unix(_) => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "HTTP needs a TCP socket"));
            }
        }
    }
    Ok(address.map(|address| (http, address)))
}

impl Listener {
    pub(super) fn is_tcp(&self) -> bool {
        matches!(self, Self::Tcp(_))
    }

    pub(super) fn inherited(socket: ListeningSocket) -> io::Result<Self> {
        Ok(match socket {
            ListeningSocket::Tcp(listener) => Self::Tcp(listener),
            ListeningSocket::Unix(listener) => {
                let Ok(Address::Unix(path)) = ListeningSocket::Unix(listener.try_clone()?).address() else {
                    return Err(io::ErrorKind::InvalidInput.into());
                };
                Self::Unix(listener, SocketFile { path, own: false })
            }
        })
    }
}

/// The socket that clients of this machine are offered, with its name.
pub(super) fn listen_locally() -> io::Result<(Listener, String)> {
    let (listener, name) = local::listen()?;
    Ok((Listener::Local(listener), name))
}

pub(super) fn listen(address: &Address) -> io::Result<(Vec<Listener>, Address)> {
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
pub(super) fn listen_http(address: &Address) -> Result<(Vec<std::net::TcpListener>, Address), ServerError> {
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
        Listener::Unix(..) | Listener::Local(_) => None,
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
    Ok(Listener::Unix(listener, SocketFile { path: path.to_owned(), own: true }))
}

pub(super) enum Acceptor {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
    Local(UnixListener),
}

impl Acceptor {
    /// Whether this is the socket that clients of this machine are offered.
    pub(super) fn is_local(&self) -> bool {
        matches!(self, Self::Local(_))
    }

    /// Needs a runtime.
    pub(super) fn new(listener: Listener) -> io::Result<Self> {
        Ok(match listener {
            Listener::Tcp(listener) => Self::Tcp(TcpListener::from_std(listener)?),
            Listener::Unix(listener, file) => Self::Unix(UnixListener::from_std(listener)?, file),
            Listener::Local(listener) => Self::Local(UnixListener::from_std(listener)?),
        })
    }

    pub(super) async fn accept(&self, peer_timeout: Duration) -> io::Result<(Socket, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                if let Err(error) = set_options(&stream, peer_timeout) {
                    // Usually closed again already; reading will tell.
                    tracing::debug!(client = %peer, %error, "socket options cannot be set");
                }
                Ok((Socket::Tcp(stream), Address::from(peer).to_string()))
            }
            Self::Unix(listener, file) => accept_unix(listener, &file.path.display()).await,
            Self::Local(listener) => accept_unix(listener, &"local").await,
        }
    }
}

/// Its peer is shown as a process at `place`.
async fn accept_unix(listener: &UnixListener, place: &(dyn Display + Sync)) -> io::Result<(Socket, String)> {
    let (stream, _) = listener.accept().await?;
    let peer = match stream.peer_cred().ok().and_then(|peer| peer.pid()) {
        Some(pid) => format!("{place} process {pid}"),
        None => place.to_string(),
    };
    Ok((Socket::Unix(stream), peer))
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
