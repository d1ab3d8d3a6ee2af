//! Listening sockets that the process was started with: systemd's socket activation (`sd_listen_fds(3)`).

use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::Address;

/// One of them, with its `FileDescriptorName`.
#[derive(Debug)]
pub struct Inherited {
    pub name: String,
    pub socket: ListeningSocket,
}

#[derive(Debug)]
pub enum ListeningSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Takes them over, once in the life of the process; nothing if `LISTEN_FDS` is not set, or for another process.
///
/// # Errors
/// One that is no listening TCP or Unix stream socket.
pub fn inherited() -> io::Result<Vec<Inherited>> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut sockets = listenfd::ListenFd::from_env();
    let mut taken = Vec::new();
    for at in 0..sockets.len() {
        let name = names.next().unwrap_or_default().to_owned();
        let socket = match sockets.take_unix_listener(at) {
            Ok(socket) => socket.map(ListeningSocket::Unix),
            Err(_) => sockets.take_tcp_listener(at)?.map(ListeningSocket::Tcp),
        };
        if let Some(socket) = socket {
            socket.set_nonblocking()?;
            taken.push(Inherited { name, socket });
        }
    }
    Ok(taken)
}

impl ListeningSocket {
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.set_nonblocking(true),
            Self::Unix(socket) => socket.set_nonblocking(true),
        }
    }

    /// Where it listens. An abstract Unix socket is shown as `@name`.
    pub fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Self::Tcp(socket) => {
                let local = socket.local_addr()?;
                let host = if local.ip().is_unspecified() { String::new() } else { local.ip().to_string() };
                Address::tcp(host, local.port())
            }
            Self::Unix(socket) => {
                let local = socket.local_addr()?;
                let abstract_name = local.as_abstract_name().map(String::from_utf8_lossy);
                Address::Unix(match (local.as_pathname(), abstract_name) {
                    (Some(path), _) => path.to_owned(),
                    (None, name) => PathBuf::from(format!("@{}", name.unwrap_or_default())),
                })
            }
        })
    }

    /// Whether `wanted` means this socket: the same path, or the same port and one of the host's addresses.
    pub fn is_at(&self, wanted: &Address) -> bool {
        match (self, wanted) {
            (Self::Tcp(socket), Address::Tcp { host, port }) => socket.local_addr().is_ok_and(|local| {
                local.port() == *port
                    && if host.is_empty() {
                        local.ip().is_unspecified()
                    } else {
                        wanted.resolve("").is_ok_and(|found| found.iter().any(|one| one.ip() == local.ip()))
                    }
            }),
            (Self::Unix(_), Address::Unix(_)) => self.address().is_ok_and(|own| own == *wanted),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_recognised() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let tcp = ListeningSocket::Tcp(tcp);
        assert_eq!(tcp.address().unwrap(), Address::tcp("127.0.0.1", port));
        assert!(tcp.is_at(&Address::tcp("127.0.0.1", port)));
        assert!(!tcp.is_at(&Address::tcp("", port)));
        assert!(!tcp.is_at(&Address::tcp("127.0.0.1", port ^ 1)));
        assert!(!tcp.is_at(&Address::Unix("/x".into())));

        let any = ListeningSocket::Tcp(TcpListener::bind("0.0.0.0:0").unwrap());
        let Address::Tcp { host, port } = any.address().unwrap() else { panic!("no TCP") };
        assert_eq!(host, "");
        assert!(any.is_at(&Address::tcp("", port)));

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let unix = ListeningSocket::Unix(UnixListener::bind(&path).unwrap());
        assert_eq!(unix.address().unwrap(), Address::Unix(path.clone()));
        assert!(unix.is_at(&Address::Unix(path)));
        assert!(!unix.is_at(&Address::Unix("/other".into())));
    }
}
