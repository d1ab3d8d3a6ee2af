//! Local sockets: a client and a server of one machine go on over a Unix socket when they have met over TCP.
//!
//! TCP over loopback costs either side of a load some microseconds more than a Unix socket does, which is a third of all CPU
//! time of a load (docs/performance.md). Configurations of sites say `localhost:8100`, so the server offers its local socket,
//! under a name that nobody can take before, to those clients of a plain TCP address that are on its machine ([`crate::wire::LocalOffer`]:
//! a key of the answer to `get_info`, which other clients ignore). Its name is abstract: it is no file, and exists only in the
//! network namespace of the server, like the loopback interface itself. A client that does not reach it stays with TCP.
//!
//! A client behind a forwarded port or a proxy is not on the server's machine although its TCP peer is, or wants the proxy in
//! between. So the offer says whom the server sees, and who is somebody else does not take it.

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};

use super::Address;

/// Begins every name.
#[cfg(target_os = "linux")]
const PREFIX: &str = "zeo-rs-";

/// Of a TCP socket: the end of a client that is on its server's machine, as both sides name it.
pub(crate) fn client_here(client: io::Result<SocketAddr>, server: io::Result<SocketAddr>) -> Option<String> {
    let (client, server) = (client.ok()?, server.ok()?);
    let (here, there) = (client.ip().to_canonical(), server.ip().to_canonical());
    // From 127.0.0.1 one gets to 127.0.1.1, which some systems call the machine.
    let same = here == there || here.is_loopback() && there.is_loopback();
    same.then(|| Address::from(client).to_string())
}

/// A listening socket with a new name.
///
/// # Errors
/// The system's; `Unsupported` where there are no abstract names.
#[cfg(target_os = "linux")]
pub(crate) fn listen() -> io::Result<(UnixListener, String)> {
    use std::hash::{BuildHasher, RandomState};
    use std::os::linux::net::SocketAddrExt;

    // A keyed hash, with a key that the system made at random.
    let random = || RandomState::new().hash_one(std::process::id());
    let name = format!("{PREFIX}{:016x}{:016x}", random(), random());
    let listener =
        UnixListener::bind_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name.as_bytes())?)?;
    listener.set_nonblocking(true)?;
    Ok((listener, name))
}

/// Connects without waiting. The name is the peer's: only one that a server of this project would give is tried.
///
/// # Errors
/// `InvalidInput` for another name; the system's, `WouldBlock` if too many wait to be accepted; `Unsupported` where there are no abstract names.
#[cfg(target_os = "linux")]
pub(crate) fn connect(name: &str) -> io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

    if !name.starts_with(PREFIX) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn listen() -> io::Result<(UnixListener, String)> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn connect(_name: &str) -> io::Result<UnixStream> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn both_ends_name_the_client_alike() {
        for at in ["127.0.0.1:0", "[::]:0"] {
            // Without IPv6 there is nothing to try.
            let Ok(listener) = TcpListener::bind(at) else { continue };
            let port = listener.local_addr().unwrap().port();
            let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let (server, peer) = listener.accept().unwrap();
            let seen_by_server = client_here(Ok(peer), server.local_addr());
            assert!(seen_by_server.is_some());
            assert_eq!(seen_by_server, client_here(client.local_addr(), client.peer_addr()));
        }
        let (loopback, other_loopback) = ("127.0.0.1:1".parse().unwrap(), "127.0.1.1:2".parse().unwrap());
        assert_eq!(client_here(Ok(loopback), Ok(other_loopback)).as_deref(), Some("127.0.0.1:1"));
        let (here, there) = ("10.0.0.1:1".parse().unwrap(), "10.0.0.2:1".parse().unwrap());
        assert_eq!(client_here(Ok(here), Ok(there)), None);
        assert_eq!(client_here(Err(io::ErrorKind::NotConnected.into()), Ok(there)), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn who_has_the_name_connects_and_a_full_queue_is_not_waited_for() {
        let (listener, name) = listen().unwrap();
        let (other, other_name) = listen().unwrap();
        assert_ne!(name, other_name);
        drop(other);
        assert_eq!(connect(&other_name).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert!(connect(&format!("{PREFIX}{}", "n".repeat(1000))).is_err());
        assert_eq!(connect("somebody else").unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let first = connect(&name).unwrap();
        let _accepted = listener.accept().unwrap();
        assert!(first.peer_addr().is_ok());
        let waiting: Vec<_> =
            std::iter::repeat_with(|| connect(&name)).take(100_000).take_while(Result::is_ok).collect();
        assert!(waiting.len() < 10_000, "{}", waiting.len());
    }
}
