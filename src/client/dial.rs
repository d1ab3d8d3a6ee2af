//! One attempt to get a registered connection from one address; runs on a thread of its own.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;

use super::inbox::Inbox;
use super::options::{Access, Options};
use super::stream::Stream;
use crate::ids::Tid;
use crate::net::Address;
use crate::net::local;
use crate::pickle::Value;
use crate::shelf::ShelfReader;
use crate::wire::{self, Call, Encoding, Fault, LocalOffer, MessageId, Notice, ServerMessage, ShelfOffer};

/// A connection that only its maker uses: calls go one at a time, notices are kept (C4).
pub(super) struct Registered {
    pub(super) stream: Stream,
    pub(super) encoding: Encoding,
    pub(super) inbox: Inbox,
    pub(super) notices: Vec<Notice>,
    /// What `get_info` answered.
    pub(super) info: Vec<(Value, Value)>,
    offer: Option<LocalOffer>,
    /// What the server has put within reach.
    pub(super) shelf: Option<ShelfReader>,
    pub(super) server_tid: Tid,
    pub(super) read_only: bool,
    pub(super) next_id: i64,
}

/// Why an attempt failed, as text for the log and for `ClientDisconnected`.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Wire(#[from] wire::WireError),
    #[error("the server answered {call} with {}", describe(fault))]
    Fault { call: &'static str, fault: Box<Fault> },
    #[error("the server gives read-only access only")]
    ReadOnly,
    #[error("the server closed the connection {0}")]
    Closed(&'static str),
    #[error("the server speaks TLS: give ssl (an <ssl> section), with the certificates it wants")]
    SpeaksTls,
    #[error("unexpected answer to {0}")]
    Unexpected(&'static str),
    #[error("{0}")]
    Cache(String),
}

/// A server greets at once. One that has not after this long may be waiting for a TLS hello, which is worth saying.
const GREETING: Duration = Duration::from_secs(1);

/// A server that is on this machine, and says so, is there at once over its local socket too; or else TCP has to do.
const NEXT_DOOR: Duration = Duration::from_secs(2);

/// Connects, shakes hands, registers, asks what the storage is. `note` is told what takes long.
pub(super) fn dial(
    address: &Address,
    options: &Options,
    access: Access,
    cancelled: &AtomicBool,
    note: &dyn Fn(String),
) -> Result<Registered, DialError> {
    let deadline = Instant::now() + options.timers.handshake;
    let stream = Stream::connect(address, options.tls.as_deref(), deadline, cancelled)?;
    let attempt = Attempt { address, options, access, deadline, cancelled, note };
    let registered = attempt.open(stream)?;
    Ok(attempt.next_door(&registered).unwrap_or(registered))
}

/// What one attempt is about.
struct Attempt<'a> {
    address: &'a Address,
    options: &'a Options,
    access: Access,
    deadline: Instant,
    cancelled: &'a AtomicBool,
    note: &'a dyn Fn(String),
}

impl Attempt<'_> {
    /// Shakes hands, registers, asks.
    fn open(&self, stream: Stream) -> Result<Registered, DialError> {
        let Self { address, options, access, deadline, cancelled, note } = *self;
        let mut inbox = Inbox::default();
        let mut patience = deadline.min(Instant::now() + GREETING);
        let announced = loop {
            if inbox.is_tls() {
                return Err(DialError::SpeaksTls);
            }
            if let Some(frame) = inbox.next_frame()? {
                break frame;
            }
            match stream.wait_readable(patience, cancelled) {
                Err(error) if error.kind() == ErrorKind::TimedOut && patience < deadline => {
                    let hint = if options.tls.is_none() { "; it may want TLS (ssl)" } else { "" };
                    note(format!("{address}: connected, but the server says nothing{hint}"));
                    patience = deadline;
                    continue;
                }
                ready => ready?,
            }
            if inbox.fill(&stream, false)? == 0 {
                return Err(stream
                    .tls_closed()
                    .map_or(DialError::Closed("without a word (does it want TLS?)"), |error| {
                        DialError::Io(std::io::Error::other(error))
                    }));
            }
        };
        let encoding = wire::choose(&announced)?;
        let mut out = BytesMut::new();
        wire::put_frame(&mut out, encoding.protocol())?;
        stream.write_all(&out, &mut || Ok(()))?;
        let mut registered = Registered {
            stream,
            encoding,
            inbox,
            notices: Vec::new(),
            info: Vec::new(),
            offer: None,
            shelf: None,
            server_tid: Tid::ZERO,
            read_only: access == Access::ReadOnly,
            next_id: 1,
        };
        registered.register(options, access, deadline, cancelled)?;
        Ok(registered)
    }

    /// The same server over its local socket, if it offers one and can be reached there ([`local`]).
    fn next_door(&self, registered: &Registered) -> Option<Registered> {
        let offer = registered.offer.as_ref()?;
        if registered.stream.client_here()? != offer.client {
            return None;
        }
        let deadline = self.deadline.min(Instant::now() + NEXT_DOOR);
        let opened = local::connect(&offer.name).map_err(DialError::from).and_then(|socket| {
            Attempt { deadline, note: &|_| {}, ..*self }.open(registered.stream.beside(socket))
        });
        opened.inspect_err(|error| tracing::debug!(%error, "the server's local socket cannot be used")).ok()
    }
}

impl Registered {
    fn register(
        &mut self,
        options: &Options,
        access: Access,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), DialError> {
        let storage = &options.storage;
        let register = |read_only| Call::Register { storage: storage.clone(), read_only };
        let answer = match self.call("register", &register(access == Access::ReadOnly), deadline, cancelled) {
            Err(DialError::Fault { fault, .. }) if fault.class == "ZODB.POSException.ReadOnlyError" => {
                if access != Access::Fallback {
                    return Err(DialError::ReadOnly);
                }
                self.read_only = true;
                self.call("register", &register(true), deadline, cancelled)?
            }
            other => other?,
        };
        let answer = match answer {
            // ZEO 4.
            Value::None => self.call("lastTransaction", &Call::LastTransaction, deadline, cancelled)?,
            answer => answer,
        };
        self.server_tid = tid_of(&answer).ok_or(DialError::Unexpected("register"))?;
        if let Some(label) = &options.label {
            let mut out = BytesMut::new();
            let call = Call::SetClientLabel { label: label.clone() };
            wire::encode_call(self.encoding, &MessageId::Seq(0), true, &call, &mut out)?;
            self.stream.write_all(&out, &mut || Ok(()))?;
        }
        let Value::Dict(mut info) = self.call("get_info", &Call::GetInfo, deadline, cancelled)? else {
            return Err(DialError::Unexpected("get_info"));
        };
        self.offer = LocalOffer::take(&mut info);
        let shelf = ShelfOffer::take(&mut info).zip(self.stream.take_descriptor());
        self.shelf = shelf.and_then(|(offer, file)| ShelfReader::open(file, offer.format, offer.capacity));
        self.info = info;
        Ok(())
    }

    /// One call and its answer. Notices that come before it are kept in order.
    pub(super) fn call(
        &mut self,
        name: &'static str,
        call: &Call,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<Value, DialError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut out = BytesMut::new();
        wire::encode_call(self.encoding, &MessageId::Seq(id), false, call, &mut out)?;
        self.stream.write_all(&out, &mut || Ok(()))?;
        loop {
            while let Some(message) = self.inbox.next(self.encoding)? {
                match message {
                    ServerMessage::Reply { id: MessageId::Seq(of), value } if of == id => return Ok(value),
                    ServerMessage::Fault { id: MessageId::Seq(of), fault } if of == id => {
                        return Err(DialError::Fault { call: name, fault: Box::new(fault) });
                    }
                    ServerMessage::Notice(notice) => self.notices.push(notice),
                    other => tracing::error!(?other, "unexpected message while connecting"),
                }
            }
            self.stream.wait_readable(deadline, cancelled)?;
            if self.inbox.fill(&self.stream, false)? == 0 {
                return Err(DialError::Closed("while the client registered"));
            }
        }
    }
}

pub(super) fn tid_of(value: &Value) -> Option<Tid> {
    match value {
        Value::Bytes(bytes) => Tid::from_slice(bytes),
        _ => None,
    }
}

/// `builtins.ValueError: unknown storage: 2`.
fn describe(fault: &Fault) -> String {
    let text = match &fault.data {
        Value::Tuple(items) | Value::List(items) => items
            .iter()
            .map(|item| match item {
                Value::Str(text) => text.clone(),
                other => format!("{other:?}"),
            })
            .collect::<Vec<_>>()
            .join(", "),
        other => format!("{other:?}"),
    };
    format!("{}: {text}", fault.class)
}

/// When to try an address again: doubling delays with jitter, so that the clients of a restarted server do not come
/// all at once.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    pub(super) fn next(&mut self, min: Duration, max: Duration) -> Duration {
        let whole = min.saturating_mul(1 << self.failures.min(16)).min(max);
        self.failures = self.failures.saturating_add(1);
        whole.mul_f64(0.5 + random_fraction() / 2.0)
    }
}

/// 0..1, different in every process and thread; not for secrets.
fn random_fraction() -> f64 {
    use std::hash::{BuildHasher, Hasher};
    static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u64(COUNT.fetch_add(1, Ordering::Relaxed));
    (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
}
