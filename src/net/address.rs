//! [`Address`]: a TCP host and port, or the path of a Unix socket.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

/// Where a server listens or is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// Host `''` is every interface for a server and `127.0.0.1` for a client. Port 0 lets the system choose.
    Tcp {
        host: String,
        port: u16,
    },
    Unix(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error(
        "{0:?} is no address: the port must be a number from 0 to 65535 (use HOST:PORT, PORT, or a path with a /)"
    )]
    Port(String),
    #[error("{0:?} is no address: an IPv6 address with a port is written [ADDRESS]:PORT")]
    Brackets(String),
    #[error("an empty text is no address (use HOST:PORT, PORT, or a path with a /)")]
    Empty,
}

impl Address {
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        Self::Tcp { host: host.into(), port }
    }

    /// The socket addresses that its host name stands for. May ask a name server.
    pub fn resolve(&self, empty_host: &str) -> io::Result<Vec<SocketAddr>> {
        match self {
            Self::Tcp { host, port } => {
                let host = if host.is_empty() { empty_host } else { host };
                let found: Vec<_> = (host, *port).to_socket_addrs()?.collect();
                if found.is_empty() {
                    return Err(io::Error::new(io::ErrorKind::NotFound, format!("{host:?} has no address")));
                }
                Ok(found)
            }
            Self::Unix(_) => Ok(Vec::new()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl From<SocketAddr> for Address {
    /// One of IPv4 that came to a socket of both families is shown as what it is.
    fn from(addr: SocketAddr) -> Self {
        Self::tcp(addr.ip().to_canonical().to_string(), addr.port())
    }
}

impl FromStr for Address {
    type Err = AddressError;

    /// `HOST:PORT`, `:PORT`, `PORT`, `[IPV6]:PORT`, or a path (anything with a `/`), as ZConfig's `socket-address` has it.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.is_empty() {
            return Err(AddressError::Empty);
        }
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        let (host, port) = match text.rsplit_once(':') {
            None => ("", text),
            Some((host, port)) => (host, port),
        };
        let host = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
            Some(Some(inside)) => inside,
            Some(None) => return Err(AddressError::Brackets(text.into())),
            None if host.contains(':') => return Err(AddressError::Brackets(text.into())),
            None => host,
        };
        let port = port.parse().map_err(|_| AddressError::Port(text.into()))?;
        Ok(Self::tcp(host, port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_understood() {
        for (text, address) in [
            ("9100", Address::tcp("", 9100)),
            (":9100", Address::tcp("", 9100)),
            ("localhost:0", Address::tcp("localhost", 0)),
            ("[::1]:9100", Address::tcp("::1", 9100)),
            ("./zeo.sock", Address::Unix("./zeo.sock".into())),
            ("/run/zeo", Address::Unix("/run/zeo".into())),
        ] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
        assert_eq!("".parse::<Address>(), Err(AddressError::Empty));
        assert_eq!("localhost".parse::<Address>(), Err(AddressError::Port("localhost".into())));
        assert_eq!("h:65536".parse::<Address>(), Err(AddressError::Port("h:65536".into())));
        assert_eq!("::1:9100".parse::<Address>(), Err(AddressError::Brackets("::1:9100".into())));
    }

    #[test]
    fn what_is_shown_is_understood() {
        for address in
            [Address::tcp("::1", 1), Address::tcp("h", 2), Address::tcp("", 3), Address::Unix("/a/b".into())]
        {
            assert_eq!(address.to_string().parse(), Ok(address));
        }
    }
}
