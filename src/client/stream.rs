//! The socket: TCP or unix, plain or TLS, read and written by different threads at once.
//!
//! The socket stays in blocking mode. A reader that has nothing else to do blocks in `recv` itself: one system call
//! for a reply, not a poll and a read. [`Stream::shutdown`] ends every blocked call.

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg};
use socket2::{SockRef, TcpKeepalive};

use super::race::connect_first;
use crate::net::local::client_here;
use crate::net::tls::{ClientSession, ClientTls, TlsError};
use crate::net::{Address, Spin};

/// A dead peer is noticed after about this long without an answer to the kernel's probes.
const DEAD_AFTER: Duration = Duration::from_secs(20);
const PROBE_IDLE: Duration = Duration::from_secs(10);
const PROBE_INTERVAL: Duration = Duration::from_secs(3);
/// What an empty host means to a client.
const LOCAL: &str = "127.0.0.1";
/// Each address that a name resolves to gets this long.
const CONNECT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Stream {
    socket: Socket,
    tls: Option<Mutex<ClientSession>>,
    /// As `str((host, port))` or the path: what `sortKey` is made of.
    pub(super) peer: Peer,
    spin: Spin,
    /// A descriptor that came with the bytes of a Unix socket, while one may come.
    handed: Option<Mutex<Option<OwnedFd>>>,
}

#[derive(Clone, Debug)]
pub(super) enum Peer {
    Tcp { host: String, port: u16 },
    Unix(String),
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Stream {
    /// Connects, TLS handshake included. Blocks up to `deadline`, or until `cancelled`.
    pub(super) fn connect(
        address: &Address,
        tls: Option<&ClientTls>,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> io::Result<Self> {
        let (mut stream, host) = match address {
            Address::Unix(path) => {
                let socket = Socket::Unix(UnixStream::connect(path)?);
                (Self::new(socket, Peer::Unix(path.display().to_string())), None)
            }
            Address::Tcp { host, .. } => {
                let host = if host.is_empty() { LOCAL } else { host.as_str() };
                let socket = connect_tcp(address, deadline)?;
                let remote = socket.peer_addr()?;
                let peer = Peer::Tcp { host: remote.ip().to_string(), port: remote.port() };
                (Self::new(Socket::Tcp(socket), peer), Some(host))
            }
        };
        if let Some(tls) = tls {
            let session = tls.session(host, &address.to_string()).map_err(io::Error::other)?;
            stream.start_tls(session, deadline, cancelled)?;
        }
        Ok(stream)
    }

    /// The own address, if this is TCP without TLS to a server of this machine.
    pub(super) fn client_here(&self) -> Option<String> {
        match &self.socket {
            Socket::Tcp(socket) if self.tls.is_none() => client_here(socket.local_addr(), socket.peer_addr()),
            _ => None,
        }
    }

    /// Another one to the same server, shown as this one.
    pub(super) fn beside(&self, socket: UnixStream) -> Self {
        Self::new(Socket::Unix(socket), self.peer.clone())
    }

    fn new(socket: Socket, peer: Peer) -> Self {
        let handed = matches!(socket, Socket::Unix(_)).then(Mutex::default);
        Self { socket, tls: None, peer, spin: Spin::default(), handed }
    }

    /// The descriptor that the server has handed over, if any. None is taken from now on.
    pub(super) fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.handed.take()?.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_tls(
        &mut self,
        mut session: ClientSession,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> io::Result<()> {
        let mut buffer = [0; 16384];
        loop {
            while session.wants_write() {
                session.write_tls(&mut RawWriter(self))?;
            }
            if !session.is_handshaking() {
                break;
            }
            self.wait_readable(deadline, cancelled)?;
            let count =
                self.receive(&mut buffer, false).map_err(|error| io::Error::other(session.failed(&error)))?;
            if count == 0 {
                return Err(io::Error::other(session.closed()));
            }
            if let Err(error) = session.receive(buffer.get(..count).unwrap_or_default()) {
                while session.wants_write() && session.write_tls(&mut RawWriter(self)).is_ok() {}
                return Err(io::Error::other(error));
            }
        }
        self.tls = Some(Mutex::new(session));
        Ok(())
    }

    /// Blocks until there is something, unless `now`, which then is `WouldBlock`. 0: the peer closed.
    pub(super) fn read(&self, buffer: &mut [u8], now: bool) -> io::Result<usize> {
        let Some(tls) = &self.tls else { return self.receive(buffer, now) };
        let mut raw = [0; 16384];
        loop {
            match lock(tls).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            let count = self.receive(&mut raw, now)?;
            if count == 0 {
                return Ok(0);
            }
            lock(tls).receive(raw.get(..count).unwrap_or_default()).map_err(io::Error::other)?;
        }
    }

    /// Writes all of it; one writer at a time. Blocks while the peer does not read. A signal that comes meanwhile is told to
    /// `interrupted`, whose error ends the writing in the middle of the data.
    pub(super) fn write_all(
        &self,
        data: &[u8],
        interrupted: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(tls) = &self.tls else { return self.send_all(data, interrupted) };
        for chunk in data.chunks(32 << 10) {
            // The ciphertext is taken out under the lock and written without it: the reader must go on meanwhile.
            let mut ciphertext = Vec::with_capacity(chunk.len() + 256);
            {
                let mut session = lock(tls);
                let mut rest = chunk;
                while !rest.is_empty() {
                    let count = session.write(rest)?;
                    rest = rest.get(count..).unwrap_or_default();
                    while session.wants_write() {
                        session.write_tls(&mut ciphertext)?;
                    }
                }
            }
            self.send_all(&ciphertext, interrupted)?;
        }
        Ok(())
    }

    fn send_all(&self, mut data: &[u8], interrupted: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        while !data.is_empty() {
            match RawWriter(self).write(data) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    data = data.get(count..).unwrap_or_default();
                    // A blocking `send` that a signal ends in the middle says how far it was, and not why.
                    if !data.is_empty() {
                        interrupted()?;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => interrupted()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What it may mean that a TLS server closed the connection before it greeted.
    pub(super) fn tls_closed(&self) -> Option<TlsError> {
        self.tls.as_ref().map(|tls| lock(tls).closed())
    }

    /// True if [`Self::read`] has something without asking the socket.
    pub(super) fn has_buffered(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| lock(tls).has_plaintext())
    }

    /// Waits until `deadline`; `TimedOut` or `Interrupted` otherwise.
    pub(super) fn wait_readable(&self, deadline: Instant, cancelled: &AtomicBool) -> io::Result<()> {
        const SLICE: Duration = Duration::from_millis(100);
        loop {
            if cancelled.load(Ordering::Relaxed) {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "closed"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the server does not answer"));
            }
            if self.has_buffered() || self.poll(None, left.min(SLICE))?.socket {
                return Ok(());
            }
        }
    }

    /// Waits for bytes or for `wake`, at most `timeout`.
    pub(super) fn poll(&self, wake: Option<&Wake>, timeout: Duration) -> io::Result<Ready> {
        let socket = PollFd::new(&self.socket, PollFlags::IN);
        let (mut one, mut two);
        let fds: &mut [PollFd<'_>] = match wake {
            None => {
                one = [socket];
                &mut one
            }
            Some(wake) => {
                two = [socket, PollFd::new(&wake.receiver, PollFlags::IN)];
                &mut two
            }
        };
        poll_for(fds, timeout)?;
        let ready = Ready {
            socket: !fds[0].revents().is_empty(),
            wake: fds.get(1).is_some_and(|fd| !fd.revents().is_empty()),
        };
        if let (true, Some(wake)) = (ready.wake, wake) {
            wake.drain();
        }
        Ok(ready)
    }

    /// Ends the connection for both directions; blocked readers and writers return.
    pub(super) fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    fn receive(&self, buffer: &mut [u8], now: bool) -> io::Result<usize> {
        let mut receive =
            |flags| rustix::net::recv(&self.socket, &mut *buffer, flags).map(|(count, _)| count);
        if let (Socket::Unix(socket), Some(handed)) = (&self.socket, self.handed.as_ref()) {
            return receive_with_descriptor(socket, buffer, now, handed);
        }
        if now {
            return Ok(receive(RecvFlags::DONTWAIT)?);
        }
        let soon = self.spin.ask(|| match receive(RecvFlags::DONTWAIT) {
            Err(rustix::io::Errno::AGAIN) => None,
            received => Some(received),
        });
        Ok(soon.unwrap_or_else(|| receive(RecvFlags::empty()))?)
    }
}

/// As [`Stream::receive`], with a descriptor that comes along; the first one is kept.
fn receive_with_descriptor(
    socket: &UnixStream,
    buffer: &mut [u8],
    now: bool,
    handed: &Mutex<Option<OwnedFd>>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = if now { RecvFlags::DONTWAIT } else { RecvFlags::empty() } | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            let mut place = handed.lock().unwrap_or_else(PoisonError::into_inner);
            *place = place.take().or_else(|| descriptors.next());
        }
    }
    Ok(received.bytes)
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub(super) socket: bool,
    pub(super) wake: bool,
}

struct RawWriter<'a>(&'a Stream);

impl Write for RawWriter<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(&self.0.socket, data, SendFlags::NOSIGNAL)?)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn connect_tcp(address: &Address, deadline: Instant) -> io::Result<TcpStream> {
    let socket = connect_first(&address.resolve(LOCAL)?, deadline, CONNECT)?;
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(PROBE_IDLE).with_interval(PROBE_INTERVAL).with_retries(3);
    let reference = SockRef::from(&socket);
    reference.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    reference.set_tcp_user_timeout(Some(DEAD_AFTER))?;
    Ok(socket)
}

/// A panic while it was held has ended the connection; there is nothing to protect.
fn lock(tls: &Mutex<ClientSession>) -> MutexGuard<'_, ClientSession> {
    tls.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes a thread that sleeps in [`Stream::poll`] or [`Wake::wait`].
#[derive(Debug)]
pub(super) struct Wake {
    receiver: UnixStream,
    sender: UnixStream,
    pending: AtomicBool,
    naps: AtomicBool,
}

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        let (receiver, sender) = UnixStream::pair()?;
        receiver.set_nonblocking(true)?;
        sender.set_nonblocking(true)?;
        Ok(Self { receiver, sender, pending: AtomicBool::new(false), naps: AtomicBool::new(false) })
    }

    /// One system call, or none if a wake-up is on its way already.
    pub(super) fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            let _ = (&self.sender).write(&[0]);
        }
    }

    /// Who sleeps here looks at everything afterwards.
    pub(super) fn wait(&self, timeout: Duration) {
        self.naps.store(true, Ordering::SeqCst);
        if poll_for(&mut [PollFd::new(&self.receiver, PollFlags::IN)], timeout).is_ok() {
            self.drain();
        }
        self.naps.store(false, Ordering::SeqCst);
    }

    /// Whether somebody is in [`Self::wait`], and will look by itself at what was done before this call.
    pub(super) fn naps(&self) -> bool {
        self.naps.load(Ordering::SeqCst)
    }

    fn drain(&self) {
        // Emptied before the flag falls: a wake-up in between is seen by the caller, who looks at everything now. If the
        // flag is up and its byte is still on its way, it stays up until the byte is taken out: a byte without a flag would
        // never be, and every poll return at once.
        if self.pending.load(Ordering::Acquire) {
            let mut buffer = [0; 8];
            if (&self.receiver).read(&mut buffer).is_ok() {
                // Not a mere store: what the wakers did before they found it up is to be seen from here on.
                self.pending.swap(false, Ordering::AcqRel);
            }
        }
    }
}

fn poll_for(fds: &mut [PollFd<'_>], timeout: Duration) -> io::Result<()> {
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    match poll(fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_up_between_its_flag_and_its_byte_leaves_nothing_behind() {
        let wake = Wake::new().unwrap();
        // Another thread is in the middle of `wake` when this one looks.
        wake.pending.store(true, Ordering::Release);
        wake.wait(Duration::ZERO);
        (&wake.sender).write_all(&[0]).unwrap();
        wake.wait(Duration::ZERO);
        let left = (&wake.receiver).read(&mut [0; 8]).map_err(|error| error.kind());
        assert_eq!(left, Err(io::ErrorKind::WouldBlock));
        assert!(!wake.pending.load(Ordering::Acquire));
    }
}
