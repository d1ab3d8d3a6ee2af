//! One task for each connection: owns the socket, one read buffer and one ordered output buffer.
//!
//! ```text
//! wait for one of: bytes, room to write, mailbox, deadline, blob buffer, shutdown
//!   └► write what was posted ─► serve each complete request ─► write what that posted ─► send
//! ```
//! A connection that does nothing but load, and that a lot, runs in a thread of its own meanwhile ([`super::seat`]).
//!
//! Cost of a cached `loadBefore` that comes alone: one `read` (which also clears the readiness, as it is not filled), the
//! engine's `pread`, one `write`; requests that come together share the `read` and the `write`.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{Sleep, sleep, sleep_until, timeout};

use super::Shared;
use super::blobs::BlobStream;
use super::seat::{LOOK, Lost, Pace};
use super::session::{HIGH_WATER, Session};
use super::socket::OverSocket;
use super::status;
use crate::net::Spin;
use crate::net::tls::looks_like_tls;
use crate::wire::{ClientHello, Encoding, FrameReader, decode_request, put_frame};

/// A read buffer is this large, unless a larger frame has begun; that of an idle connection is given back.
const READ: usize = 16 << 10;
/// After so many bytes received without a pause (some 100 us of work) other tasks and threads come first.
const TURN: usize = 64 << 10;
/// An output buffer larger than this is given back once it is sent.
const KEEP: usize = 256 << 10;

/// Serves one connection until it ends. Every end is logged once, with its reason. `is_local`: it came by the socket that clients of
/// this machine are offered.
pub(crate) async fn serve<S>(
    server: Arc<Shared>,
    mut socket: S,
    peer: String,
    is_local: bool,
    mut stop: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + OverSocket + Unpin + Send + 'static,
{
    let mut received = BytesMut::new();
    let mut frames = FrameReader::new(server.config.max_frame);
    let hello = timeout(
        server.config.handshake_timeout,
        shake_hands(&server, &mut socket, &mut frames, &mut received),
    );
    let hello = tokio::select! {
        hello = hello => hello.unwrap_or_else(|_| Err("it said nothing".into())),
        _ = stop.wait_for(|stop| *stop) => return,
    };
    let encoding = match hello {
        Ok(Some(encoding)) => encoding,
        Ok(None) => return tracing::debug!(client = %peer, "connection without a client closed"),
        // Port scans and monitors that know no ZEO come often and say nothing new.
        Err(reason) => {
            return match server.refusals.spend(Instant::now()) {
                Some(not_logged) => {
                    tracing::info!(client = %peer, reason, not_logged, "handshake failed, connection closed");
                }
                None => tracing::debug!(client = %peer, reason, "handshake failed, connection closed"),
            };
        }
    };
    let runtime = tokio::runtime::Handle::current();
    let mut connection = Connection {
        session: Session::new(Arc::clone(&server), runtime, peer, encoding),
        socket,
        frames,
        received,
        turn: 0,
    };
    connection.session.is_local = is_local;
    connection.session.takes_descriptors =
        server.config.tls.is_none() && connection.socket.socket().is_unix();
    connection.session.client_here =
        server.local_socket.as_ref().and_then(|_| connection.socket.socket().client_here());
    let reason = loop {
        match connection.run(&mut stop, Place::Shared).await {
            End::Move => {}
            reason => break reason,
        }
        let Some(seat) = server.seats.take() else { continue };
        connection.socket.socket().leave_runtime();
        let mut stop = stop.clone();
        let arrive = |connection: &mut Connection<S>| connection.socket.socket().enter_runtime();
        let seated = seat.run(connection, arrive, async move |connection| {
            let reason = connection.run(&mut stop, Place::Seat).await;
            connection.socket.socket().leave_runtime();
            reason
        });
        let reason;
        (connection, reason) = match seated.await {
            Ok(back) => back,
            Err(Ok((connection, error))) => {
                tracing::debug!(%error, "no thread for a busy connection");
                (connection, End::Move)
            }
            // Its session went with the panic, which is in the log.
            Err(Err(Lost)) => return,
        };
        connection.socket.socket().enter_runtime();
        if !matches!(reason, End::Move) {
            break reason;
        }
    };
    let Connection { session, .. } = connection;
    let client = session.who();
    match reason {
        End::Peer if session.registration.is_none() => {
            tracing::debug!(client, "connection without a client closed");
        }
        End::Peer if session.has_gone_local() => {
            tracing::debug!(client, "client went on over the local socket")
        }
        End::Peer => tracing::info!(client, "client disconnected"),
        End::Server(reason) => match server.closings.spend(Instant::now()) {
            Some(not_logged) => tracing::warn!(client, reason, not_logged, "connection closed"),
            None => tracing::debug!(client, reason, "connection closed"),
        },
        End::Stop | End::Move => tracing::debug!(client, "connection closed, the server stops"),
    }
    session.end();
}

/// Announces the protocol and understands the client's answer; `None` if there is nothing to serve.
async fn shake_hands<S>(
    server: &Shared,
    socket: &mut S,
    frames: &mut FrameReader,
    received: &mut BytesMut,
) -> Result<Option<Encoding>, String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let announced = if server.config.msgpack { Encoding::Msgpack } else { Encoding::Pickle };
    let mut out = BytesMut::new();
    put_frame(&mut out, announced.protocol()).map_err(|error| error.to_string())?;
    if socket.write_all(&out).await.is_err() || socket.flush().await.is_err() {
        return Ok(None);
    }
    let frame = loop {
        if looks_like_tls(received) {
            return Err("it speaks TLS, and this server does not (it has no <ssl> section)".into());
        }
        if let Some(frame) = frames.next_frame(received).map_err(|error| error.to_string())? {
            break frame;
        }
        received.reserve(256);
        if matches!(socket.read_buf(received).await, Ok(0) | Err(_)) {
            return Ok(None);
        }
    };
    match ClientHello::parse(&frame).map_err(|error| error.to_string())? {
        ClientHello::Speak(encoding) => Ok(Some(encoding)),
        ClientHello::Ruok => {
            // In one piece: monitors read the answer with one `recv`.
            let mut out = BytesMut::new();
            let json = status::json(&server.hubs);
            put_frame(&mut out, json.as_bytes()).map_err(|error| error.to_string())?;
            if socket.write_all(&out).await.is_ok() {
                let _ = socket.shutdown().await;
            }
            Ok(None)
        }
    }
}

enum End {
    /// The peer closed, or the network did.
    Peer,
    Server(String),
    Stop,
    /// Not at all: it is to go on elsewhere.
    Move,
}

/// Where a connection runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the server's runtime.
    Shared,
    /// In a thread of its own.
    Seat,
}

struct Connection<S> {
    session: Session,
    socket: S,
    frames: FrameReader,
    received: BytesMut,
    /// Bytes received since others had their turn; goes along from place to place, or who moves often would have no end of it.
    turn: usize,
}

impl<S: AsyncRead + AsyncWrite + OverSocket + Unpin + Send> Connection<S> {
    async fn run(&mut self, stop: &mut watch::Receiver<bool>, place: Place) -> End {
        let mailbox = Arc::clone(&self.session.mailbox);
        let mut stop_at = None;
        let mut alarm = Alarm::default();
        let mut pace = Pace::new(self.session.requests);
        self.session.owns_thread = place == Place::Seat;
        let spin = Spin::default();
        let mut moves = false;
        let mut look = pin!(sleep(LOOK));
        loop {
            self.session.listen();
            let served_all = self.serve_received();
            self.session.listen();
            if !served_all && self.session.may_serve() {
                // What held up the rest was done in the meantime; no byte may come that would wake this task.
                continue;
            }
            if let Some(reason) = self.session.closing() {
                let reason = reason.to_owned();
                // What was answered before should still arrive, if the peer reads.
                let _ = timeout(Duration::from_millis(100), self.socket.write_all(&self.session.out)).await;
                return End::Server(reason);
            }
            moves |= match place {
                Place::Shared => pace.is_busy(self.session.requests),
                Place::Seat => pace.has_changed(self.session.requests),
            };
            if moves && self.session.out.is_empty() && self.session.may_serve() {
                return End::Move;
            }
            if stop_at.is_none() && *stop.borrow() {
                stop_at = Some(Instant::now() + self.session.server.config.shutdown_grace);
            }
            if stop_at.is_some() && !self.session.is_committing() && self.session.out.is_empty() {
                return End::Stop;
            }
            if let Some(shelf) = self.session.handed_over.take() {
                // Who cannot take it now does without.
                let sent = self.socket.socket().send_with(shelf.reader(), &self.session.out);
                let sent = sent.unwrap_or(0);
                self.session.out.advance(sent);
                self.session.count_traffic(0, sent);
            }
            let rested = self.turn >= TURN;
            if rested {
                self.turn = 0;
                std::thread::yield_now();
                tokio::task::yield_now().await;
            }
            alarm.set(self.session.deadline());
            let may_serve = self.session.may_serve();
            if may_serve {
                self.received.reserve(self.frames.room_wanted(&self.received).max(READ));
            }
            let Self { session, socket, received, turn, .. } = self;
            // First without the rest of what is waited for: to ask it costs more than most requests. Once a turn the rest
            // is asked all the same, or a peer that never pauses would outrun its deadline and a stop.
            let at_once = if rested {
                None
            } else {
                now(transfer(socket, &mut session.out, received, &mut session.stream, may_serve)).await
            };
            if at_once.is_none() && place == Place::Seat && may_serve && session.out.is_empty() {
                // What has come then is taken below; its wake-up is on its way.
                spin.ask(|| socket.socket().is_readable().then_some(()));
            }
            let done = match at_once {
                Some(done) => done,
                None => tokio::select! {
                    biased;
                    () = mailbox.filled(), if session.may_listen() => continue,
                    () = mailbox.until_condemned(), if !session.may_listen() => continue,
                    () = alarm.rings(), if alarm.is_set() => {
                        session.look_at_deadline();
                        continue;
                    }
                    () = look.as_mut(), if place == Place::Seat => {
                        moves |= pace.is_quiet(session.requests);
                        look.as_mut().reset(tokio::time::Instant::now() + LOOK);
                        continue;
                    }
                    () = sleep_until(stop_at.unwrap_or_else(Instant::now).into()), if stop_at.is_some() => return End::Stop,
                    _ = stop.changed(), if stop_at.is_none() => continue,
                    done = transfer(socket, &mut session.out, received, &mut session.stream, may_serve) => done,
                },
            };
            match done {
                Transfer::Sent(count) => session.count_traffic(0, count),
                Transfer::Received(count) => {
                    session.count_traffic(count, 0);
                    *turn += count;
                }
                Transfer::Ended => return End::Peer,
                Transfer::Read(buffer) => session.stream_on(buffer),
            }
        }
    }

    /// Serves what has been received whole, as far as the session allows; true if nothing of it is left.
    fn serve_received(&mut self) -> bool {
        while self.session.may_serve() {
            let request = match self.frames.next_frame(&mut self.received) {
                Ok(None) => return true,
                Ok(Some(frame)) => decode_request(self.session.encoding, &frame),
                Err(error) => Err(error),
            };
            match request {
                Ok(request) => self.session.serve(request),
                Err(error) => self.session.close(error.to_string()),
            }
        }
        false
    }
}

/// Rings when a transaction may have held its locks for too long, or when an earlier one would have.
///
/// A transaction that ends in time leaves it set: a timer that is set and taken back with every commit costs two
/// wake-ups of the runtime's driver, this one costs one early ring for each timeout.
#[derive(Default)]
struct Alarm(Option<Pin<Box<Sleep>>>);

impl Alarm {
    fn is_set(&self) -> bool {
        self.0.is_some()
    }

    /// Deadlines of one connection only move on, so one that is set already is not too late.
    fn set(&mut self, deadline: Option<Instant>) {
        if let (None, Some(deadline)) = (&self.0, deadline) {
            self.0 = Some(Box::pin(sleep_until(deadline.into())));
        }
    }

    async fn rings(&mut self) {
        if let Some(sleep) = &mut self.0 {
            sleep.await;
            self.0 = None;
        }
    }
}

/// The result of `future` if it is ready now. Nobody is kept from their turn: the runtime's budget ends it every so often.
async fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

enum Transfer {
    /// So many bytes.
    Sent(usize),
    Received(usize),
    /// The peer is gone.
    Ended,
    /// The next piece of a blob is in memory.
    Read(std::io::Result<(std::fs::File, Vec<u8>)>),
}

/// Sends some of `out`, or receives, or waits for the next piece of a blob, whichever can be done first.
async fn transfer<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut S,
    out: &mut BytesMut,
    received: &mut BytesMut,
    stream: &mut Option<BlobStream>,
    may_receive: bool,
) -> Transfer {
    poll_fn(|cx| {
        if !out.is_empty()
            && let Poll::Ready(sent) = Pin::new(&mut *socket).poll_write(cx, out)
        {
            return Poll::Ready(match sent {
                Ok(0) | Err(_) => Transfer::Ended,
                Ok(sent) => {
                    out.advance(sent);
                    if out.is_empty() && out.capacity() > KEEP {
                        *out = BytesMut::new();
                    }
                    Transfer::Sent(sent)
                }
            });
        }
        // TLS may hold what the socket did not take; plain sockets have nothing to flush.
        if out.is_empty() && matches!(Pin::new(&mut *socket).poll_flush(cx), Poll::Ready(Err(_))) {
            return Poll::Ready(Transfer::Ended);
        }
        if out.len() < HIGH_WATER
            && let Some(stream) = stream
            && let Poll::Ready(read) = Pin::new(&mut stream.read).poll(cx)
        {
            return Poll::Ready(Transfer::Read(read.unwrap_or_else(|error| Err(error.into()))));
        }
        if may_receive && let Poll::Ready(read) = pin!(socket.read_buf(received)).poll(cx) {
            return Poll::Ready(match read {
                Ok(0) | Err(_) => Transfer::Ended,
                Ok(count) => Transfer::Received(count),
            });
        }
        Poll::Pending
    })
    .await
}
