//! [`Socket`]: an accepted connection of either kind, that can go from one runtime to another.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::net::local::client_here;
use crate::net::tls::ServerStream;

/// Either kind of socket.
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    /// On its way from one runtime to another.
    Moving(Moving),
}

pub(crate) enum Moving {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
    /// It has got lost: reads and writes fail.
    Lost,
}

impl Socket {
    /// The current runtime, the one that it was used in, forgets it.
    pub(crate) fn leave_runtime(&mut self) {
        let moving = match std::mem::replace(self, Self::Moving(Moving::Lost)) {
            Self::Tcp(stream) => stream.into_std().map(Moving::Tcp),
            Self::Unix(stream) => stream.into_std().map(Moving::Unix),
            Self::Moving(moving) => Ok(moving),
        };
        *self = Self::Moving(moving.unwrap_or(Moving::Lost));
    }

    pub(crate) fn is_unix(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// Sends some of `data`, and with its first byte a descriptor, without waiting: how much.
    ///
    /// # Errors
    /// The system's; `Unsupported`: not a Unix socket.
    pub(crate) fn send_with(&self, descriptor: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
        let Self::Unix(stream) = self else { return Err(io::ErrorKind::Unsupported.into()) };
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(stream, &[IoSlice::new(data)], &mut ancillary, flags)?)
    }

    /// The client's address, if it is a TCP one of this machine. Two system calls.
    pub(crate) fn client_here(&self) -> Option<String> {
        let Self::Tcp(stream) = self else { return None };
        client_here(stream.peer_addr(), stream.local_addr())
    }

    /// Whether something has come, asking the system.
    pub(crate) fn is_readable(&self) -> bool {
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let peeked = match self {
            Self::Tcp(stream) => recv(stream, &mut byte, flags),
            Self::Unix(stream) => recv(stream, &mut byte, flags),
            Self::Moving(_) => return true,
        };
        !matches!(peeked, Err(Errno::AGAIN))
    }

    /// The current runtime is told of it.
    pub(crate) fn enter_runtime(&mut self) {
        let arrived = match std::mem::replace(self, Self::Moving(Moving::Lost)) {
            Self::Moving(Moving::Tcp(stream)) => TcpStream::from_std(stream).map(Self::Tcp),
            Self::Moving(Moving::Unix(stream)) => UnixStream::from_std(stream).map(Self::Unix),
            here => Ok(here),
        };
        *self = arrived.unwrap_or(Self::Moving(Moving::Lost));
    }
}

/// A stream over a socket that can go to another runtime.
pub(crate) trait OverSocket {
    fn socket(&mut self) -> &mut Socket;
}

impl OverSocket for Socket {
    fn socket(&mut self) -> &mut Socket {
        self
    }
}

impl OverSocket for ServerStream<Socket> {
    fn socket(&mut self) -> &mut Socket {
        self.get_mut().0
    }
}

impl<S: OverSocket> OverSocket for Box<S> {
    fn socket(&mut self) -> &mut Socket {
        (**self).socket()
    }
}

fn lost<T>() -> Poll<io::Result<T>> {
    Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Moving(_) => lost(),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Moving(_) => lost(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Moving(_) => lost(),
        }
    }
}
