//! [`Session`]: one client, from its handshake on: what it may call, what it is told, and its view of the storage.
//!
//! A session does no I/O. Its connection ([`super::connection`]) gives it decoded requests and the events of its mailbox,
//! one after the other, and sends what it appends to `out`; so the order of that one buffer is the order on the wire.
//!
//! # The view
//! `view` is the last tid whose invalidation (or whose own `tpc_finish` reply) is in `out`. Every load is answered as of
//! the view, so it can neither show a transaction before its invalidation nor, after it, call current what it ended. No
//! lock is needed for that: the engine has several revisions of an object.
//!
//! # Slow work
//! What may wait for the disk or for Python runs on a worker thread, and its reply comes back through the mailbox, so it
//! is behind everything published before it was ready. `hold` counts the work that later requests of this client must
//! not overtake.
//!
//! One file of more than 500 lines: view, `out` and `hold` are one state. Commits are in `transaction.rs`, slow reads in `reads.rs`.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Shared;
use super::blobs::{BlobStream, SharedBlob, Upload};
use super::cursors::{CursorCall, Cursors};
use super::fault;
use super::hub::{Hub, Registration, count};
use super::mailbox::{Event, Mailbox, Publication, StorageInfo};
use super::slow::{Budget, Operation};
use super::transaction::Transaction;
use crate::ids::{Oid, Tid};
use crate::pickle::Value;
use crate::shelf::{self, Shelf};
use crate::storage::StorageError;
use crate::wire::{
    BadCall, Call, Encoding, Fault, LocalOffer, MessageId, Notice, Request, ShelfOffer, encode_fault,
    encode_notice, encode_reply,
};

/// Worker threads that one client may keep busy; its further requests wait.
const MAX_JOBS: usize = 16;
/// With this much unsent output no further request of a client is served.
pub(crate) const HIGH_WATER: usize = 1 << 20;

/// Characters of a label.
const MAX_LABEL: usize = 200;
/// Characters of a reason why a connection was closed.
const MAX_REASON: usize = 1000;

/// Where the answer of a call goes.
#[derive(Debug)]
pub(crate) struct ReplyTo {
    pub(crate) id: MessageId,
    /// The client waits for no answer; an error closes the connection.
    pub(crate) is_async: bool,
    pub(crate) method: &'static str,
    pub(crate) began: Instant,
    /// What it is about, for the log.
    pub(crate) oid: Option<Oid>,
    pub(crate) tid: Option<Tid>,
}

/// What a call has come to.
pub(crate) enum Outcome {
    Reply(Value),
    /// The answer has been written, or will come through the mailbox.
    Later,
}

pub(crate) type Served = Result<Outcome, Fault>;

/// See the module documentation. The fields are for the modules that implement its calls.
pub(crate) struct Session {
    pub(crate) server: Arc<Shared>,
    pub(crate) runtime: Handle,
    pub(crate) peer: String,
    pub(crate) label: String,
    pub(crate) encoding: Encoding,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) registration: Option<Registration>,
    pub(crate) read_only: bool,
    pub(crate) view: Tid,
    /// Frames to be sent.
    pub(crate) out: BytesMut,
    /// It may block without holding up others.
    pub(crate) owns_thread: bool,
    /// How many loads, and how many other calls, there were.
    pub(crate) requests: (u64, u64),
    /// It came by the local socket.
    pub(crate) is_local: bool,
    /// Its socket is a Unix one, without TLS, and it has been handed nothing yet.
    pub(crate) takes_descriptors: bool,
    /// A descriptor of this goes with the next bytes.
    pub(crate) handed_over: Option<Arc<Shelf>>,
    /// Its client's address, if that is on this machine and may go on over the local socket.
    pub(crate) client_here: Option<String>,
    /// How many requests there had been when it was told so.
    offered: Option<(u64, u64)>,
    pub(crate) txn: Option<Transaction>,
    pub(crate) votes: u64,
    /// Finishes on their way; they are not stopped any more.
    pub(crate) committer_busy: usize,
    pub(crate) upload: Option<Upload>,
    pub(crate) uploads: u64,
    pub(crate) stream: Option<BlobStream>,
    /// `None` while a worker thread has them.
    pub(crate) cursors: Option<Cursors>,
    pub(crate) cursor_calls: VecDeque<(ReplyTo, CursorCall)>,
    /// The views of loads on worker threads, and what was published since the oldest of them.
    pub(crate) slow_loads: Vec<Tid>,
    pub(crate) published_meanwhile: VecDeque<Arc<Publication>>,
    /// Lines that its calls can write without an end.
    pub(crate) chatter: Budget,
    hold: usize,
    jobs: usize,
    events: VecDeque<Event>,
    closing: Option<String>,
}

impl Session {
    pub(crate) fn new(server: Arc<Shared>, runtime: Handle, peer: String, encoding: Encoding) -> Self {
        let mailbox = Arc::new(Mailbox::new(server.config.max_unread, peer.clone()));
        let cursors = Cursors::new(server.config.max_cursors);
        Self {
            server,
            runtime,
            peer,
            label: String::new(),
            encoding,
            mailbox,
            registration: None,
            read_only: false,
            view: Tid::ZERO,
            out: BytesMut::new(),
            owns_thread: false,
            requests: (0, 0),
            is_local: false,
            takes_descriptors: false,
            handed_over: None,
            client_here: None,
            offered: None,
            txn: None,
            votes: 0,
            committer_busy: 0,
            upload: None,
            uploads: 0,
            stream: None,
            cursors: Some(cursors),
            cursor_calls: VecDeque::new(),
            slow_loads: Vec::new(),
            published_meanwhile: VecDeque::new(),
            chatter: Budget::default(),
            hold: 0,
            jobs: 0,
            events: VecDeque::new(),
            closing: None,
        }
    }

    /// Name in log lines.
    pub(crate) fn who(&self) -> String {
        if self.label.is_empty() { self.peer.clone() } else { format!("{} ({})", self.peer, self.label) }
    }

    /// What `get_info` says of the local socket, to those for whom it is.
    pub(crate) fn offer_local_socket(&mut self) -> Option<(Value, Value)> {
        let (client, name) = (self.client_here.clone()?, self.server.local_socket.clone()?);
        self.offered = Some(self.requests);
        Some(LocalOffer { name, client }.into_pair())
    }

    /// What `get_info` says of the shelf, to a client that gets it with the answer. Once: descriptors that nobody takes are a burden on
    /// the whole server.
    pub(crate) fn offer_shelf(&mut self, hub: &Hub) -> Option<(Value, Value)> {
        let shelf = hub.shelf.as_ref().filter(|_| std::mem::take(&mut self.takes_descriptors))?;
        self.handed_over = Some(Arc::clone(shelf));
        if !shelf.is_ready() {
            let shelf = Arc::clone(shelf);
            self.runtime.spawn_blocking(move || shelf.prepare());
        }
        Some(ShelfOffer { format: shelf::FORMAT, capacity: shelf.capacity() }.into_pair())
    }

    /// At the end: whether its client has gone on over the local socket. One that has asked for nothing since that was offered, while
    /// somebody registered there, counts as having; of several it does not matter which.
    pub(crate) fn has_gone_local(&self) -> bool {
        let one_less = |count: usize| count.checked_sub(1);
        self.offered == Some(self.requests)
            && self.server.gone_local.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok()
    }

    /// Nothing more is served or told; the connection ends. The first reason counts.
    pub(crate) fn close(&mut self, reason: impl Into<String>) {
        // It goes to the log, and may quote what the peer sent.
        self.closing.get_or_insert_with(|| reason.into().chars().take(MAX_REASON).collect());
    }

    pub(crate) fn closing(&self) -> Option<&str> {
        self.closing.as_deref()
    }

    /// Whether the next request may be served now.
    pub(crate) fn may_serve(&self) -> bool {
        self.hold == 0
            && self.jobs < MAX_JOBS
            && self.stream.is_none()
            && self.upload.as_ref().is_none_or(|upload| !upload.is_full())
            && self.out.len() < HIGH_WATER
            && self.closing.is_none()
    }

    /// Whether events may be written now: not into the middle of a blob, nor for a client that does not read.
    pub(crate) fn may_listen(&self) -> bool {
        self.stream.is_none() && self.out.len() < HIGH_WATER && self.closing.is_none()
    }

    /// Writes everything that was posted before this moment.
    ///
    /// Called after reading from the socket and before serving what was read, which makes every request a barrier.
    pub(crate) fn listen(&mut self) {
        if let Some(reason) = self.mailbox.sentence() {
            self.close(reason);
        }
        loop {
            while self.stream.is_none() && self.closing.is_none() {
                let Some(event) = self.events.pop_front() else { break };
                self.heed(event);
            }
            if !self.may_listen() || !self.events.is_empty() {
                return;
            }
            let mut events = std::mem::take(&mut self.events);
            self.mailbox.take(&mut events);
            self.events = events;
            if self.events.is_empty() {
                return;
            }
        }
    }

    fn heed(&mut self, event: Event) {
        match event {
            Event::Published(publication) => {
                self.out.extend_from_slice(publication.frame(self.encoding));
                self.advance(publication);
            }
            Event::Committed { publication, info, reply } => {
                self.tell_info(info);
                reply(self);
                self.advance(publication);
            }
            Event::Info(info) => self.tell_info(info),
            Event::Continue(continuation) => continuation(self),
        }
    }

    fn advance(&mut self, publication: Arc<Publication>) {
        self.view = self.view.max(publication.tid);
        if !self.slow_loads.is_empty() {
            self.published_meanwhile.push_back(publication);
        }
    }

    /// A load as of `view` has come back: what only it had to know is forgotten.
    pub(crate) fn slow_load_done(&mut self, view: Tid) {
        if let Some(at) = self.slow_loads.iter().position(|other| *other == view) {
            self.slow_loads.swap_remove(at);
        }
        let oldest = self.slow_loads.iter().min();
        while self
            .published_meanwhile
            .front()
            .is_some_and(|first| oldest.is_none_or(|oldest| first.tid <= *oldest))
        {
            self.published_meanwhile.pop_front();
        }
    }

    fn tell_info(&mut self, info: StorageInfo) {
        self.notify(&Notice::Info(Value::dict([("length", info.length.into()), ("size", info.size.into())])));
    }

    pub(crate) fn notify(&mut self, notice: &Notice) {
        if let Err(error) = encode_notice(self.encoding, notice, &mut self.out) {
            self.close(error.to_string());
        }
    }

    /// Serves one request. Its reply is appended to `out`, now or later.
    pub(crate) fn serve(&mut self, request: Request) {
        let Request { id, is_async, call } = request;
        let call = match call {
            Ok(Call::KeepAlive) => return,
            Ok(call) => call,
            Err(bad) => return self.serve_bad(id, is_async, &bad),
        };
        match call {
            Call::LoadBefore { .. } => self.requests.0 += 1,
            _ => self.requests.1 += 1,
        }
        let (oid, tid) = subject(&call);
        let mut to = ReplyTo { id, is_async, method: method(&call), began: Instant::now(), oid, tid };
        let served = match (&self.registration, call) {
            (None, Call::Register { storage, read_only }) => self.register(&storage, read_only),
            (None, _) => return self.close(format!("it called {} before register", to.method)),
            (Some(_), Call::Register { .. }) => return self.close("it called register twice"),
            (Some(registration), call) => {
                let hub = Arc::clone(&registration.hub);
                self.dispatch(&hub, call, &mut to)
            }
        };
        self.answer(to, served);
    }

    fn serve_bad(&mut self, id: MessageId, is_async: bool, bad: &BadCall) {
        let fault = match bad {
            _ if self.registration.is_none() => return self.close(format!("before register: {bad}")),
            // ZEO permits this name and then has no such method.
            BadCall::UnknownMethod(name) if name != "new_oid" => return self.close(bad.to_string()),
            _ => Fault::from(bad),
        };
        let began = Instant::now();
        self.answer(ReplyTo { id, is_async, method: "call", began, oid: None, tid: None }, Err(fault));
    }

    fn dispatch(&mut self, hub: &Arc<Hub>, call: Call, to: &mut ReplyTo) -> Served {
        match call {
            Call::LoadBefore { oid, before } => self.load_before(hub, to, oid, before),
            Call::Ping => Ok(Outcome::Reply(Value::None)),
            Call::LastTransaction => Ok(Outcome::Reply(self.view.into())),
            Call::GetInfo => self.get_info(hub, to),
            Call::GetInvalidations { tid } => self.get_invalidations(hub, to, tid),
            Call::LoadSerial { oid, serial } => self.load_serial(hub, to, oid, serial),
            Call::GetTid { oid } => self.get_tid(hub, to, oid),
            Call::History { oid, size } => self.history(hub, to, oid, size),
            Call::RecordIternext { next } => self.record_iternext(hub, to, next),
            Call::NewOids { count } => self.new_oids(hub, to, count),
            Call::TpcBegin { txn, user, description, extension, tid, status } => {
                self.tpc_begin(hub, txn, user, description, &extension, tid, status)
            }
            Call::Storea { oid, serial, data, txn } => self.storea(hub, oid, serial, data, &txn),
            Call::CheckCurrentSerial { oid, serial, txn } => self.check_current(oid, serial, &txn),
            Call::DeleteObject { oid, serial, txn } => self.delete_object(hub, oid, serial, &txn),
            Call::Restorea { oid, serial, data, prev_txn, txn } => {
                self.restorea(hub, oid, serial, data, prev_txn, &txn)
            }
            Call::Undoa { trans_id, txn } => self.undoa(hub, &trans_id, &txn),
            Call::StoreBlobStart => self.store_blob_start(hub),
            Call::StoreBlobChunk { chunk } => self.store_blob_chunk(hub, &chunk),
            Call::StoreBlobEnd { oid, serial, data, txn } => {
                self.store_blob_end(hub, to, oid, serial, data, txn)
            }
            Call::StoreBlobShared { oid, serial, data, filename, txn } => {
                self.store_blob_shared(hub, to, SharedBlob { oid, serial, data, filename, key: txn })
            }
            Call::Vote { txn } => self.vote(hub, to, &txn),
            Call::TpcFinish { txn } => self.tpc_finish(hub, to, &txn),
            Call::TpcAbort { txn } => self.tpc_abort(hub, &txn),
            Call::SendBlob { oid, serial } => self.send_blob(hub, to, oid, serial),
            Call::Pack { time, wait } => self.pack(hub, to, time, wait),
            Call::UndoInfo { first, last, specification } => {
                self.undo_info(hub, to, first, last, specification)
            }
            Call::UndoLog { first, last } => self.undo_info(hub, to, first, last, Value::None),
            Call::IteratorStart { start, stop } => {
                self.cursor_call(hub, to, CursorCall::Start { start, stop })
            }
            Call::IteratorNext { iid } => self.cursor_call(hub, to, CursorCall::Next { iid }),
            Call::IteratorRecordStart { txn_iid, tid } => {
                self.cursor_call(hub, to, CursorCall::RecordStart { txn_iid, tid })
            }
            Call::IteratorRecordNext { iid } => self.cursor_call(hub, to, CursorCall::RecordNext { iid }),
            Call::IteratorGc { iids } => self.cursor_call(hub, to, CursorCall::Forget { iids }),
            Call::ServerStatus => Ok(Outcome::Reply(super::status::value(hub))),
            Call::SetClientLabel { label } => {
                self.name(&label);
                Ok(Outcome::Reply(Value::None))
            }
            Call::Register { .. } | Call::KeepAlive => Ok(Outcome::Reply(Value::None)),
        }
    }

    /// Takes a label: shown to people, and in every line about this client, so it is short and one line.
    fn name(&mut self, label: &str) {
        let label = printable(label, MAX_LABEL);
        if label == self.label {
            return;
        }
        self.label = label;
        self.mailbox.introduce(&self.label, self.read_only);
        if let Some(not_logged) = self.chatter.spend(Instant::now()) {
            tracing::info!(client = %self.peer, label = %self.label, not_logged, "client label");
        }
    }

    fn register(&mut self, storage: &str, read_only: bool) -> Served {
        let Some(hub) = self.server.hubs.iter().find(|hub| hub.id == storage) else {
            return Err(Fault::value_error(format!("unknown storage: {storage}")));
        };
        let only_reads = self.server.config.read_only || hub.is_read_only;
        if only_reads && !read_only {
            return Err(fault::of(&StorageError::ReadOnly));
        }
        self.read_only = read_only || only_reads;
        let (registration, view) = hub.register(&self.mailbox);
        self.registration = Some(registration);
        self.view = view;
        self.mailbox.introduce(&self.label, self.read_only);
        if self.is_local {
            self.server.gone_local.fetch_add(1, Ordering::Relaxed);
        }
        tracing::info!(client = %self.peer, storage, read_only = self.read_only, "client registered");
        Ok(Outcome::Reply(view.into()))
    }

    /// Writes what a call has come to.
    pub(crate) fn answer(&mut self, to: ReplyTo, served: Served) {
        if matches!(served, Ok(Outcome::Later)) {
            return;
        }
        // A pack takes its time, and a blob that of its client.
        if !matches!(to.method, "pack" | "sendBlob") {
            self.took(&to, to.began.elapsed());
        }
        match served {
            Ok(Outcome::Later) => {}
            Ok(Outcome::Reply(_)) if to.is_async => {}
            Ok(Outcome::Reply(value)) => {
                if let Err(error) = encode_reply(self.encoding, &to.id, &value, &mut self.out) {
                    self.answer_fault(&to, &Fault::value_error(error.to_string()));
                }
            }
            Err(fault) => self.answer_fault(&to, &fault),
        }
    }

    /// For the log of slow operations.
    pub(crate) fn took(&self, to: &ReplyTo, took: Duration) {
        let Some(Registration { hub, .. }) = &self.registration else { return };
        let operation = Operation {
            client: &self.peer,
            label: &self.label,
            storage: &hub.id,
            call: to.method,
            oid: to.oid,
            tid: to.tid,
        };
        self.server.slow.note(took, &hub.stats.slow, &operation);
    }

    /// Bytes that its socket has moved.
    pub(crate) fn count_traffic(&self, received: usize, sent: usize) {
        if let Some(Registration { hub, .. }) = &self.registration {
            let (counter, count) = match sent {
                0 => (&hub.stats.bytes_received, received),
                sent => (&hub.stats.bytes_sent, sent),
            };
            counter.fetch_add(count as u64, Ordering::Relaxed);
        }
    }

    fn answer_fault(&mut self, to: &ReplyTo, fault: &Fault) {
        if to.is_async {
            return self.close(format!("{} failed: {} {}", to.method, fault.class, fault.data));
        }
        if let Err(error) = encode_fault(self.encoding, &to.id, fault, &mut self.out) {
            self.close(format!("{} failed, and its error {error}", to.method));
        }
    }

    /// Runs `work` on a worker thread, then `then` in this session.
    pub(crate) fn background<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> T + Send + 'static,
        then: impl FnOnce(&mut Self, T) + Send + 'static,
    ) {
        self.jobs += 1;
        let mailbox = Arc::clone(&self.mailbox);
        self.on_worker(move || match catch_unwind(AssertUnwindSafe(work)) {
            Ok(done) => mailbox.post(Event::Continue(Box::new(move |session: &mut Self| {
                session.jobs -= 1;
                then(session, done);
            }))),
            Err(_) => mailbox.condemn("internal error: a worker thread panicked".into()),
        });
    }

    /// Runs `work` on a worker thread; of a storage with slow calls, when there is one left for it.
    fn on_worker(&self, work: impl FnOnce() + Send + 'static) {
        let places = self.registration.as_ref().and_then(|registration| registration.hub.slow_jobs.clone());
        on_worker(&self.runtime, places, work);
    }

    /// As [`Self::background`]; no further request is served until it is done.
    pub(crate) fn background_in_order<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> T + Send + 'static,
        then: impl FnOnce(&mut Self, T) + Send + 'static,
    ) {
        self.hold += 1;
        self.background(work, move |session, done| {
            session.hold -= 1;
            then(session, done);
        });
    }

    /// Answers a call by what `work` finds out on a worker thread.
    pub(crate) fn in_background(
        &mut self,
        to: &mut ReplyTo,
        work: impl FnOnce() -> Result<Value, StorageError> + Send + 'static,
    ) -> Served {
        let to = to.take();
        self.background(work, move |session, done| {
            session.answer(to, done.map(Outcome::Reply).map_err(|error| fault::of(&error)));
        });
        Ok(Outcome::Later)
    }

    /// As [`Self::in_background`], unless the storage's calls are quick enough to be made here and now.
    pub(crate) fn here_or_in_background(
        &mut self,
        hub: &Arc<Hub>,
        to: &mut ReplyTo,
        work: impl FnOnce() -> Result<Value, StorageError> + Send + 'static,
    ) -> Served {
        if hub.capabilities.slow_calls {
            return self.in_background(to, work);
        }
        work().map(Outcome::Reply).map_err(|error| fault::of(&error))
    }

    /// When the transaction has held its locks too long.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.txn.as_ref().and_then(Transaction::deadline)
    }

    /// Whether a client is between its vote and the end of its transaction.
    pub(crate) fn is_committing(&self) -> bool {
        self.committer_busy > 0 || self.txn.as_ref().is_some_and(Transaction::holds_locks)
    }

    /// Ends it: aborts, releases, removes from the lists. What may block is done on a worker thread.
    pub(crate) fn end(mut self) {
        if let Some(registration) = self.registration.take() {
            if self.txn.is_some() {
                count(&registration.hub.stats.aborts);
                registration.hub.stats.active_txns.fetch_sub(1, Ordering::Relaxed);
            }
            drop(registration);
        }
        let unread = self.mailbox.close();
        let runtime = self.runtime.clone();
        if self.txn.is_some() || self.upload.is_some() || !unread.is_empty() || !self.events.is_empty() {
            // Not one of the places of a storage with slow calls: an abort, of which there is one at a time, ends the waiting of others.
            runtime.spawn_blocking(move || drop((unread, self)));
        }
    }
}

/// Runs `work` on a thread that may block, when it gets one of `places`, if there is a choice of those.
fn on_worker(runtime: &Handle, places: Option<Arc<Semaphore>>, work: impl FnOnce() + Send + 'static) {
    let Some(places) = places else {
        runtime.spawn_blocking(work);
        return;
    };
    let holding = |place: OwnedSemaphorePermit| {
        move || {
            work();
            drop(place);
        }
    };
    match Arc::clone(&places).try_acquire_owned() {
        Ok(place) => drop(runtime.spawn_blocking(holding(place))),
        Err(_) => drop(runtime.spawn(async move {
            // It is never closed.
            if let Ok(place) = places.acquire_owned().await {
                tokio::task::spawn_blocking(holding(place));
            }
        })),
    }
}

impl ReplyTo {
    /// Moves it out, for an answer that comes later.
    pub(crate) fn take(&mut self) -> Self {
        let id = std::mem::replace(&mut self.id, MessageId::Seq(0));
        Self { id, ..*self }
    }
}

/// At most `most` characters of `text`, without what moves a cursor or begins a line.
fn printable(text: &str, most: usize) -> String {
    let mut printable = String::new();
    for character in text.chars().take(most) {
        if character.is_control() || matches!(character, '\u{2028}' | '\u{2029}') {
            printable.extend(character.escape_default());
        } else {
            printable.push(character);
        }
    }
    printable
}

/// Keeps `data` without keeping the much larger buffer that it was received in.
pub(crate) fn own(data: Bytes) -> Bytes {
    if data.len() < 16 << 10 { Bytes::copy_from_slice(&data) } else { data }
}

/// The object and the transaction that a call names.
fn subject(call: &Call) -> (Option<Oid>, Option<Tid>) {
    match call {
        Call::LoadBefore { oid, before } => (Some(*oid), Some(*before)),
        Call::LoadSerial { oid, serial } | Call::SendBlob { oid, serial } => (Some(*oid), Some(*serial)),
        Call::GetTid { oid } | Call::History { oid, .. } => (Some(*oid), None),
        Call::StoreBlobEnd { oid, serial, .. } | Call::StoreBlobShared { oid, serial, .. } => {
            (Some(*oid), Some(*serial))
        }
        Call::RecordIternext { next } => (*next, None),
        Call::GetInvalidations { tid } | Call::IteratorRecordStart { tid, .. } => (None, Some(*tid)),
        Call::IteratorStart { start, .. } => (None, *start),
        _ => (None, None),
    }
}

fn method(call: &Call) -> &'static str {
    match call {
        Call::Register { .. } => "register",
        Call::GetInfo => "get_info",
        Call::LastTransaction => "lastTransaction",
        Call::GetInvalidations { .. } => "getInvalidations",
        Call::LoadBefore { .. } => "loadBefore",
        Call::LoadSerial { .. } => "loadSerial",
        Call::GetTid { .. } => "getTid",
        Call::History { .. } => "history",
        Call::RecordIternext { .. } => "record_iternext",
        Call::NewOids { .. } => "new_oids",
        Call::TpcBegin { .. } => "tpc_begin",
        Call::Storea { .. } => "storea",
        Call::CheckCurrentSerial { .. } => "checkCurrentSerialInTransaction",
        Call::DeleteObject { .. } => "deleteObject",
        Call::Restorea { .. } => "restorea",
        Call::Undoa { .. } => "undoa",
        Call::StoreBlobStart => "storeBlobStart",
        Call::StoreBlobChunk { .. } => "storeBlobChunk",
        Call::StoreBlobEnd { .. } => "storeBlobEnd",
        Call::StoreBlobShared { .. } => "storeBlobShared",
        Call::Vote { .. } => "vote",
        Call::TpcFinish { .. } => "tpc_finish",
        Call::TpcAbort { .. } => "tpc_abort",
        Call::SendBlob { .. } => "sendBlob",
        Call::Pack { .. } => "pack",
        Call::UndoInfo { .. } => "undoInfo",
        Call::UndoLog { .. } => "undoLog",
        Call::IteratorStart { .. } => "iterator_start",
        Call::IteratorNext { .. } => "iterator_next",
        Call::IteratorRecordStart { .. } => "iterator_record_start",
        Call::IteratorRecordNext { .. } => "iterator_record_next",
        Call::IteratorGc { .. } => "iterator_gc",
        Call::ServerStatus => "server_status",
        Call::SetClientLabel { .. } => "set_client_label",
        Call::Ping => "ping",
        Call::KeepAlive => "keep-alive",
    }
}
