//! One registered connection: who waits for what, who writes, who reads.
//!
//! One file of more than 500 lines, because who may read, who waits and how it ends are one state, under one mutex.
//!
//! # Who reads
//! Messages must be applied one by one in wire order (C1), so there is one reader at a time. A caller that waits for an
//! answer reads the socket itself if nobody else does (it *leads*): it applies every message that comes, its own answer
//! last, and goes on with its work. A miss with one thread so costs one `send`, one or two `recv` and no thread switch. Other
//! callers sleep on their [`Slot`]; a leader that leaves wakes one of them to lead. If nobody waits, the background thread
//! (`keeper.rs`) reads.
//!
//! Invalidations end in a call of Python code. Whoever reads one ends the revisions in the cache and puts the rest into
//! [`News`]: to tell the database, then to move the last tid. Until that is done, reading goes on for load replies of which nobody can tell
//! that it is not (their revision is no younger than the last tid, and an end that is, is not shown), so that a load need not wait
//! for Python code because somebody else has committed. At a younger revision, or an answer to anything else, a
//! leader that still waits for its own answer tells the database itself; it stops if it has it, or may not tell. Nothing behind it
//! is touched before.
//!
//! # Locks
//! `shared` (who waits, who reads; held for a few instructions), `out` (what is to be sent; not held while one thread
//! writes it for all), `inbox` (by the reader, uncontended). None of them is held while Python code runs, except `inbox`, for which nobody waits.

use std::collections::VecDeque;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustc_hash::FxHashMap;

use super::blob::{BlobProgress, Upload};
use super::core::Core;
use super::dial::Registered;
use super::error::{ClientError, Result};
use super::inbox::{CHUNK, Inbox};
use super::news::News;
use super::slot::{Answer, LOOK_AGAIN, Slot};
use super::stream::{Stream, Wake};
use super::transaction::Finish;
use crate::ids::{Oid, Tid};
use crate::pickle::Value;
use crate::shelf::ShelfReader;
use crate::storage::Loaded;
use crate::wire::{self, Call, Encoding, MessageId, Notice, ServerMessage};

/// One-way calls are collected up to here before they are written.
const FLUSH_AT: usize = 64 << 10;
/// So often a thread writes what others have collected, besides its own call.
const MAX_SENDS: usize = 16;
/// A write buffer larger than this is given back after use.
const KEEP_BUFFER: usize = 1 << 20;
/// Waiters that are done are dropped from the queue when it gets this long.
const WAITERS: usize = 64;

pub(super) struct Connection {
    pub(super) stream: Stream,
    pub(super) encoding: Encoding,
    /// Which connection of the client this is; transactions remember it.
    pub(super) generation: u64,
    shelf: Option<ShelfReader>,
    core: Arc<Core>,
    wake: Arc<Wake>,
    next_id: AtomicI64,
    dead: AtomicBool,
    /// How often callers have begun to read.
    leads: AtomicU64,
    shared: Mutex<Shared>,
    out: Mutex<Out>,
    written: Condvar,
    inbox: Mutex<Inbox>,
    /// For the database.
    news: News,
}

/// What is to be sent.
#[derive(Default)]
struct Out {
    collected: BytesMut,
    /// The other buffer: one is filled while one is written.
    spare: BytesMut,
    /// Somebody writes, without the lock, and goes on with what is collected meanwhile.
    writing: bool,
    /// Threads that wait for the end of that.
    waiting: usize,
}

#[derive(Default)]
struct Shared {
    /// Why it is over.
    reason: Option<ClientError>,
    reader: Reader,
    calls: FxHashMap<i64, Pending>,
    /// Identical loads wait for the same answer. A prefetch has no waiter at all.
    loads: FxHashMap<(Oid, Tid), Vec<Arc<Slot>>>,
    /// Callers asleep, to be promoted.
    waiters: VecDeque<Arc<Slot>>,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Reader {
    #[default]
    Nobody,
    Somebody,
    /// Nobody may read: the next message is for the background thread.
    Parked,
}

/// How a caller's reading ended.
#[derive(PartialEq)]
enum Lead {
    Done,
    /// The next message is for the background thread.
    Parked,
    /// By a signal.
    Interrupted,
}

#[derive(PartialEq)]
enum Filled {
    /// All that was there.
    Some,
    /// As much as one call takes; there may be more.
    Full,
    /// Nothing there now, or the connection is over.
    Nothing,
    Interrupted,
}

enum Pending {
    Call(Arc<Slot>),
    Finish(Arc<Slot>, Box<Finish>),
}

impl Connection {
    pub(super) fn new(registered: Registered, generation: u64, core: Arc<Core>, wake: Arc<Wake>) -> Self {
        let Registered { stream, encoding, inbox, shelf, next_id, .. } = registered;
        Self {
            stream,
            encoding,
            generation,
            shelf,
            news: News::new(Arc::clone(&core)),
            core,
            wake,
            next_id: AtomicI64::new(next_id),
            dead: AtomicBool::new(false),
            leads: AtomicU64::new(0),
            shared: Mutex::default(),
            out: Mutex::default(),
            written: Condvar::new(),
            inbox: Mutex::new(inbox),
        }
    }

    // ---- calls

    /// Sends a call and waits for its answer.
    pub(super) fn call(&self, call: &Call) -> Result<Value> {
        let slot = Slot::new();
        let id = self.next_id();
        self.expect(id, Pending::Call(slot.clone()))?;
        self.send(&MessageId::Seq(id), call, true)?;
        match self.wait(&slot, true)? {
            Answer::Value(value) => Ok(value),
            Answer::Loaded(_) => Err(wrong_answer("a call")),
        }
    }

    /// `tpc_finish`: whoever reads the answer applies it before the next message.
    pub(super) fn finish(&self, call: &Call, finish: Finish) -> Result<Value> {
        let slot = Slot::new();
        let id = self.next_id();
        self.expect(id, Pending::Finish(slot.clone(), Box::new(finish)))?;
        self.send(&MessageId::Seq(id), call, false)?;
        match self.wait(&slot, false)? {
            Answer::Value(value) => Ok(value),
            Answer::Loaded(_) => Err(wrong_answer("tpc_finish")),
        }
    }

    /// The server's answer to a `loadBefore`, if it lies on its shelf: without asking, and without waiting for anybody.
    ///
    /// Of a current revision, and as of a tid that the server has published: what comes later has a later tid. Invalidations on
    /// their way may end it; they come to the cache after it, or it does not enter the cache.
    /// Cost: two `pread`, three short locks, one allocation.
    pub(super) fn load_from_shelf(&self, oid: Oid, before: Tid) -> Option<Loaded> {
        let shelf = self.shelf.as_ref()?;
        // As the cache, it knows nothing of what the database has not been told of.
        let before = before.min(self.core.last_tid_now().next());
        let ticket = self.core.cache.ticket(oid);
        let (tid, data) = shelf.load(oid)?;
        if tid >= before {
            return None;
        }
        let data = Bytes::from(data);
        {
            // Of a server that is gone the shelf stays as it was, while others commit to the next one. So it counts only if the
            // connection lasted until now; and what enters the cache is there before it ends, and is verified with the rest.
            let shared = self.shared();
            shared.check().ok()?;
            self.core.cache.store_current(ticket, oid, tid, &data);
        }
        self.core.shelf_hits.fetch_add(1, Ordering::Relaxed);
        Some(Loaded { data, tid, end_tid: None })
    }

    /// `loadBefore`, merged with an identical one that is on its way.
    ///
    /// Cost without company: two short locks, one `send`, one blocking `recv` (the answer is usually one segment).
    pub(super) fn load_before(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>> {
        let slot = Slot::new();
        let first = {
            let mut shared = self.shared();
            shared.check()?;
            match shared.loads.entry((oid, before)) {
                Entry::Vacant(entry) => {
                    entry.insert(vec![slot.clone()]);
                    true
                }
                Entry::Occupied(mut entry) => {
                    entry.get_mut().push(slot.clone());
                    false
                }
            }
        };
        if first {
            self.send(&MessageId::Load { oid, before }, &Call::LoadBefore { oid, before }, true)?;
        }
        match self.wait(&slot, true)? {
            Answer::Loaded(loaded) => Ok(loaded),
            Answer::Value(_) => Err(wrong_answer("loadBefore")),
        }
    }

    /// Sends loads whose answers go to the cache, in as few writes as possible; waits for nothing. What is on the shelf is in the
    /// cache when it returns.
    pub(super) fn prefetch(&self, oids: &[Oid], before: Tid) -> Result<()> {
        let missing: Vec<Oid> =
            oids.iter().copied().filter(|&oid| self.load_from_shelf(oid, before).is_none()).collect();
        for batch in missing.chunks(512) {
            let new: Vec<Oid> = {
                let mut shared = self.shared();
                shared.check()?;
                let mut new = Vec::with_capacity(batch.len());
                for &oid in batch {
                    if let Entry::Vacant(entry) = shared.loads.entry((oid, before)) {
                        entry.insert(Vec::new());
                        new.push(oid);
                    }
                }
                new
            };
            let mut out = self.out();
            for oid in new {
                encode(
                    &mut out.collected,
                    self.encoding,
                    &MessageId::Load { oid, before },
                    false,
                    &Call::LoadBefore { oid, before },
                )?;
            }
            self.flush(out, true)?;
        }
        Ok(())
    }

    /// A one-way call. Collected and written with the next call that waits, or when there is much of it.
    pub(super) fn send_async(&self, call: &Call) -> Result<()> {
        self.shared().check()?;
        let mut out = self.out();
        encode(&mut out.collected, self.encoding, &MessageId::Seq(0), true, call)?;
        if out.collected.len() < FLUSH_AT {
            return Ok(());
        }
        let flushed = self.flush(out, true);
        // A large transaction is nobody's hurry: loads that wait for the processor go first.
        std::thread::yield_now();
        flushed
    }

    /// `storeBlobStart` to `storeBlobEnd`, contiguous on the wire.
    ///
    /// Cost of a chunk: one `pread` into the write buffer, one `send`. (`sendfile` would save the copy between them, but a
    /// receiver on the same machine then takes twice as long for its own: measured.)
    pub(super) fn send_upload(&self, upload: &Upload) -> Result<()> {
        self.shared().check()?;
        let mut out = self.unwritten(self.out(), true)?;
        // What others have collected goes first; what they collect from now on, behind it all.
        let mut mine = std::mem::take(&mut out.collected);
        let mut writer = Writer::begin(self, &mut out);
        drop(out);
        self.core.uploads.set(Some(BlobProgress {
            is_upload: true,
            oid: upload.oid,
            bytes_done: 0,
            bytes_total: Some(upload.size),
        }));
        let sent = self.send_chunks(upload, &mut mine);
        self.core.uploads.set(None);
        if let Err(error) = sent {
            // Half a sequence cannot be taken back.
            self.fail(ClientError::disconnected(format!("an upload broke off: {error}")));
            return Err(error);
        }
        let mut out = self.out();
        if out.collected.is_empty() {
            // Nobody waits for it: written with the next call.
            out.collected = mine;
            writer.end(&mut out);
            return Ok(());
        }
        mine.extend_from_slice(&out.collected);
        out.collected = mine;
        self.write_collected(writer, out, true)
    }

    fn send_chunks(&self, upload: &Upload, buffer: &mut BytesMut) -> Result<()> {
        encode(buffer, self.encoding, &MessageId::Seq(0), true, &Call::StoreBlobStart)?;
        for (offset, length) in upload.chunks() {
            let read = |buffer: &mut BytesMut| upload.read(offset, length, buffer);
            wire::encode_upload(self.encoding, length, buffer, read)?;
            self.write(buffer, true)?;
            buffer.clear();
            self.core.uploads.advance(length);
            std::thread::yield_now();
        }
        encode(buffer, self.encoding, &MessageId::Seq(0), true, &upload.end)
    }

    /// Sent by the background thread. Never waits behind a writer: whoever writes keeps the connection alive anyway.
    pub(super) fn keep_alive(&self) {
        if let Ok(mut out) = self.out.try_lock()
            && !out.writing
            && wire::encode_keep_alive(self.encoding, &mut out.collected).is_ok()
        {
            let _ = self.flush_locked(&mut out);
        }
    }

    /// A call that is answered. `may_give_up`: a signal may end the sending of it.
    fn send(&self, id: &MessageId, call: &Call, may_give_up: bool) -> Result<()> {
        let mut out = self.out();
        if let Err(error) = encode(&mut out.collected, self.encoding, id, false, call) {
            drop(out);
            self.forget(id, &error);
            return Err(error);
        }
        match self.flush(out, may_give_up) {
            // A failed write has failed every waiter, this caller's slot too.
            Err(error) if !error.is_disconnected() => Err(error),
            _ => Ok(()),
        }
    }

    /// Has everything written that is collected: by whoever writes just now, who finds it there, or by this thread. So calls
    /// made at the same time share a `send`, and nobody waits for another's unless there is much to write.
    fn flush<'a>(&'a self, mut out: MutexGuard<'a, Out>, may_give_up: bool) -> Result<()> {
        if out.writing {
            if out.collected.len() < FLUSH_AT {
                return Ok(());
            }
            out = self.unwritten(out, may_give_up)?;
        }
        let writer = Writer::begin(self, &mut out);
        self.write_collected(writer, out, may_give_up)
    }

    /// Dropped in the reverse order, the lock first: the writer takes it when it is dropped.
    fn write_collected<'a>(
        &'a self,
        mut writer: Writer<'a>,
        mut out: MutexGuard<'a, Out>,
        may_give_up: bool,
    ) -> Result<()> {
        for _ in 0..MAX_SENDS {
            let spare = std::mem::take(&mut out.spare);
            let mut data = std::mem::replace(&mut out.collected, spare);
            drop(out);
            let written = self.write(&data, may_give_up);
            data.clear();
            out = self.out();
            if data.capacity() <= KEEP_BUFFER {
                out.spare = data;
            }
            if let Err(error) = written {
                drop(out);
                return Err(error);
            }
            if out.collected.is_empty() {
                break;
            }
        }
        // Where others keep this thread from its own answer: they wait for the lock meanwhile.
        let written = self.flush_locked(&mut out);
        writer.end(&mut out);
        written
    }

    /// Writes, without a lock if the caller `may_give_up`: a signal then runs Python code. Ends the connection if it fails.
    fn write(&self, data: &[u8], may_give_up: bool) -> Result<()> {
        let mut given_up = None;
        let written = self.stream.write_all(data, &mut || {
            // Not asked in vain: what a signal handler raised would be lost.
            if may_give_up && let Err(error) = self.core.check_interrupt() {
                given_up = Some(error);
                return Err(io::ErrorKind::Interrupted.into());
            }
            Ok(())
        });
        match (written, given_up) {
            (Ok(()), _) => Ok(()),
            (Err(_), Some(given_up)) => {
                // The rest of the message cannot be sent by anybody else.
                self.fail(ClientError::disconnected("a signal ended a call in the middle of being sent"));
                Err(given_up)
            }
            (Err(error), None) => Err(self.lost(&error)),
        }
    }

    /// As [`Self::flush`], while nobody else writes or can begin to.
    fn flush_locked(&self, out: &mut Out) -> Result<()> {
        if out.collected.is_empty() {
            return Ok(());
        }
        let written = self.stream.write_all(&out.collected, &mut || Ok(()));
        out.collected.clear();
        if out.collected.capacity() > KEEP_BUFFER {
            out.collected = BytesMut::new();
        }
        written.map_err(|error| self.lost(&error))
    }

    /// Waits until nobody writes, or until the caller is to give up.
    fn unwritten<'a>(
        &'a self,
        mut out: MutexGuard<'a, Out>,
        may_give_up: bool,
    ) -> Result<MutexGuard<'a, Out>> {
        while out.writing {
            out.waiting += 1;
            let waited = self.written.wait_timeout(out, LOOK_AGAIN).unwrap_or_else(PoisonError::into_inner);
            out = waited.0;
            out.waiting -= 1;
            if may_give_up && waited.1.timed_out() {
                drop(out);
                self.core.check_interrupt()?;
                out = self.out();
            }
        }
        Ok(out)
    }

    fn lost(&self, error: &io::Error) -> ClientError {
        let error = ClientError::disconnected(format!("the connection was lost: {error}"));
        self.fail(error.clone());
        error
    }

    /// Takes back an expectation whose call could not be encoded.
    fn forget(&self, id: &MessageId, error: &ClientError) {
        let mut shared = self.shared();
        match id {
            MessageId::Seq(id) => {
                shared.calls.remove(id);
            }
            MessageId::Load { oid, before } => {
                for slot in shared.loads.remove(&(*oid, *before)).unwrap_or_default() {
                    slot.complete(Err(error.clone()));
                }
            }
            MessageId::Other(_) => {}
        }
    }

    fn next_id(&self) -> i64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn expect(&self, id: i64, pending: Pending) -> Result<()> {
        let mut shared = self.shared();
        shared.check()?;
        shared.calls.insert(id, pending);
        Ok(())
    }

    // ---- waiting and reading

    /// Until there is an answer, or the caller is to give up; the answer is then applied without it.
    fn wait(&self, slot: &Arc<Slot>, may_give_up: bool) -> Result<Answer> {
        loop {
            if let Some(answer) = slot.take() {
                return answer;
            }
            let lead = {
                let mut shared = self.shared();
                if slot.is_done() {
                    continue;
                }
                if let (Some(reason), true) = (&shared.reason, shared.reader != Reader::Somebody) {
                    // Its reader took it out and died: nobody else will complete it.
                    return Err(reason.clone());
                }
                if shared.reader == Reader::Nobody {
                    shared.reader = Reader::Somebody;
                    self.leads.fetch_add(1, Ordering::Relaxed);
                    true
                } else {
                    if shared.waiters.len() >= WAITERS {
                        shared.waiters.retain(|waiter| !waiter.is_done());
                    }
                    if !shared.waiters.iter().any(|waiter| Arc::ptr_eq(waiter, slot)) {
                        shared.waiters.push_back(slot.clone());
                    }
                    false
                }
            };
            let interrupted = if lead {
                let mut role = Role { connection: self, parked: false };
                let end = self.read_for(slot);
                role.parked = end == Lead::Parked;
                end == Lead::Interrupted
            } else {
                slot.sleep()
            };
            if interrupted && may_give_up && !slot.is_done() {
                self.core.check_interrupt()?;
            }
        }
    }

    /// Reads until `slot` is done, or somebody else has to go on.
    fn read_for(&self, slot: &Slot) -> Lead {
        let mut inbox = self.inbox();
        loop {
            while self.apply_ready(&mut inbox) {
                // Who has its answer may hold a lock that `db.invalidate` wants, and need not wait for it.
                if slot.is_done() || !self.news.tell_here() {
                    return Lead::Parked;
                }
            }
            if slot.is_done() || self.is_dead() {
                return Lead::Done;
            }
            // It would have to wait for that anyway, and keeps nobody else from an answer.
            if self.news.wants_announcement() && !(self.awaits_one_call() && self.news.tell_here()) {
                self.wake.wake();
            }
            match self.fill(&mut inbox, false) {
                Filled::Some | Filled::Full => {}
                Filled::Interrupted => return Lead::Interrupted,
                Filled::Nothing => return Lead::Done,
            }
        }
    }

    /// Nothing is awaited but the answer to one call, which is no load.
    fn awaits_one_call(&self) -> bool {
        let shared = self.shared();
        shared.calls.len() == 1 && shared.loads.is_empty()
    }

    /// For the background thread: tells the database what it has to hear, and applies what is there. Reads nothing if a caller does.
    pub(super) fn read_in_background(&self) {
        self.tell_database();
        if self.may_read_in_background() {
            let _role = Role { connection: self, parked: false };
            let mut inbox = self.inbox();
            // Not asked once more for what is not there: the caller polls anyway.
            let mut more = Filled::Full;
            loop {
                while self.apply_ready(&mut inbox) {
                    self.tell_database();
                }
                // A stream without a pause does not keep the database waiting.
                if more != Filled::Full || self.is_dead() || !self.news.is_empty() {
                    break;
                }
                more = self.fill(&mut inbox, true);
            }
            // This thread need not be woken for what it is about to tell.
            self.news.wants_announcement();
        }
        // Callers may read meanwhile.
        self.tell_database();
    }

    fn may_read_in_background(&self) -> bool {
        let mut shared = self.shared();
        let may = shared.reader != Reader::Somebody && shared.reason.is_none();
        if may {
            shared.reader = Reader::Somebody;
        }
        may
    }

    /// The second half of invalidations, for the background thread.
    pub(super) fn tell_database(&self) {
        self.news.tell();
    }

    /// From now on the database is told nothing.
    pub(super) fn mute(&self) {
        self.news.mute();
    }

    /// True if something is to be done that the socket does not announce.
    pub(super) fn has_buffered(&self) -> bool {
        !self.news.is_empty() || self.shared().reader == Reader::Parked || self.stream.has_buffered()
    }

    pub(super) fn is_led(&self) -> bool {
        self.shared().reader == Reader::Somebody
    }

    /// How often callers have begun to read, and whether one does now.
    pub(super) fn leads(&self) -> (u64, bool) {
        (self.leads.load(Ordering::Relaxed), self.is_led())
    }

    /// Applies the whole messages of the inbox in order. True: stopped before one that has to wait until the database is told.
    fn apply_ready(&self, inbox: &mut Inbox) -> bool {
        while !self.is_dead() {
            match inbox.next(self.encoding) {
                Ok(Some(message)) if self.news.holds_up(&message) => {
                    inbox.put_back(message);
                    return true;
                }
                Ok(Some(ServerMessage::Notice(Notice::InvalidateTransaction { tid, oids }))) => {
                    self.core.invalidate(tid, &oids);
                    self.news.push(tid, oids);
                }
                Ok(Some(message)) => self.apply(message),
                Ok(None) => return false,
                Err(problem) => {
                    self.fail(ClientError::disconnected(format!(
                        "the server sent what is no ZEO message: {problem}"
                    )));
                }
            }
        }
        false
    }

    /// Reads what the socket has.
    fn fill(&self, inbox: &mut Inbox, now: bool) -> Filled {
        match inbox.fill(&self.stream, now) {
            Ok(CHUNK) => Filled::Full,
            Ok(1..) => Filled::Some,
            Ok(0) => {
                self.fail(ClientError::disconnected("the server closed the connection"));
                Filled::Nothing
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Filled::Nothing,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Filled::Interrupted,
            Err(error) => {
                self.fail(ClientError::disconnected(format!("the connection was lost: {error}")));
                Filled::Nothing
            }
        }
    }

    /// One message, completely: cache first, then waiters (C1).
    fn apply(&self, message: ServerMessage) {
        match message {
            ServerMessage::Loaded { oid, before, loaded } => {
                let loaded = loaded.map(|(data, tid, end_tid)| Loaded { data, tid, end_tid });
                self.apply_loaded(oid, before, loaded);
            }
            ServerMessage::Reply { id: MessageId::Load { oid, before }, value } => {
                self.complete_load(oid, before, &Ok(Answer::Value(value)));
            }
            ServerMessage::Fault { id: MessageId::Load { oid, before }, fault } => {
                self.complete_load(oid, before, &Err(ClientError::Fault(Box::new(fault))));
            }
            ServerMessage::Reply { id: MessageId::Seq(id), value } => self.apply_reply(id, Ok(value)),
            ServerMessage::Fault { id: MessageId::Seq(id), fault } => {
                self.apply_reply(id, Err(ClientError::Fault(Box::new(fault))));
            }
            ServerMessage::Reply { id, .. } | ServerMessage::Fault { id, .. } => {
                tracing::error!(?id, "the server answered a call that nobody made");
            }
            ServerMessage::Notice(notice) => self.core.apply_notice(notice),
            ServerMessage::UnknownNotice { name } => {
                tracing::error!(name, "the server sent an unknown message");
            }
        }
    }

    fn apply_loaded(&self, oid: Oid, before: Tid, loaded: Option<Loaded>) {
        // Taken out first: after `fail` nobody waits, and what nobody waits for does not enter the cache.
        let Some(waiters) = self.shared().loads.remove(&(oid, before)) else {
            tracing::error!(%oid, %before, "the server answered a load that nobody asked for");
            return;
        };
        if let Some(loaded) = &loaded {
            self.core.cache.store(oid, loaded.tid, loaded.end_tid, &loaded.data);
        }
        let loaded = loaded.map(|loaded| self.core.as_shown(loaded));
        complete_all(waiters, &Ok(Answer::Loaded(loaded)));
    }

    fn complete_load(&self, oid: Oid, before: Tid, answer: &Result<Answer>) {
        let waiters = self.shared().loads.remove(&(oid, before)).unwrap_or_default();
        complete_all(waiters, answer);
    }

    fn apply_reply(&self, id: i64, reply: Result<Value>) {
        let pending = self.shared().calls.remove(&id);
        match pending {
            Some(Pending::Call(slot)) => slot.complete(reply.map(Answer::Value)),
            Some(Pending::Finish(slot, finish)) => {
                let applied = reply.and_then(|value| self.core.apply_finish(*finish, value));
                if let Err(error) = &applied {
                    // C6: the cache is suspect, and the server may hold the transaction.
                    self.fail(ClientError::disconnected(format!("tpc_finish failed: {error}")));
                }
                slot.complete(applied.map(Answer::Value));
            }
            None => tracing::error!(id, "the server answered a call that nobody made"),
        }
    }

    // ---- the end

    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Ends the connection: every waiter gets `reason`, blocked readers and writers return. The first reason counts.
    pub(super) fn fail(&self, reason: ClientError) {
        let (calls, loads) = {
            let mut shared = self.shared();
            if shared.reason.is_some() {
                return;
            }
            shared.reason = Some(reason.clone());
            self.dead.store(true, Ordering::Release);
            shared.waiters.clear();
            (std::mem::take(&mut shared.calls), std::mem::take(&mut shared.loads))
        };
        self.stream.shutdown();
        for (_, pending) in calls {
            match pending {
                Pending::Call(slot) | Pending::Finish(slot, _) => slot.complete(Err(reason.clone())),
            }
        }
        for (_, waiters) in loads {
            complete_all(waiters, &Err(reason.clone()));
        }
        self.wake.wake();
    }

    pub(super) fn reason(&self) -> Option<ClientError> {
        self.shared().reason.clone()
    }

    /// Waits until nobody applies messages of this connection any more.
    pub(super) fn wait_for_reader(&self) {
        while self.is_led() {
            self.wake.wait(Duration::from_millis(10));
        }
        drop(self.inbox());
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn check(&self) -> Result<()> {
        match &self.reason {
            Some(reason) => Err(reason.clone()),
            None => Ok(()),
        }
    }
}

/// The reader's role; given up when dropped, also by a panic, which then ends the connection.
struct Role<'a> {
    connection: &'a Connection,
    parked: bool,
}

impl Drop for Role<'_> {
    fn drop(&mut self) {
        let connection = self.connection;
        if std::thread::panicking() {
            connection.fail(ClientError::disconnected("internal error while reading an answer (a bug)"));
        }
        let next = {
            let mut shared = connection.shared();
            shared.reader = if self.parked { Reader::Parked } else { Reader::Nobody };
            let mut next = None;
            while !self.parked
                && next.is_none()
                && let Some(waiter) = shared.waiters.pop_front()
            {
                if !waiter.is_done() {
                    next = Some(waiter);
                }
            }
            next
        };
        if let Some(waiter) = next {
            waiter.promote();
        }
        // Callers come and go, and the background thread looks in by itself: until then the next caller may have told the news.
        if self.parked || connection.news.wants_announcement() && !connection.wake.naps() {
            connection.wake.wake();
        }
    }
}

/// Who writes without holding the lock; given up when dropped, also by a panic.
struct Writer<'a> {
    connection: &'a Connection,
    done: bool,
}

impl<'a> Writer<'a> {
    fn begin(connection: &'a Connection, out: &mut Out) -> Self {
        out.writing = true;
        Self { connection, done: false }
    }

    fn end(&mut self, out: &mut Out) {
        self.done = true;
        out.writing = false;
        if out.waiting > 0 {
            self.connection.written.notify_all();
        }
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if !self.done {
            if std::thread::panicking() {
                // Others count on this thread to write their calls.
                let reason = ClientError::disconnected("internal error while writing (a bug)");
                self.connection.fail(reason);
            }
            let mut out = self.connection.out();
            out.collected.clear();
            self.end(&mut out);
        }
    }
}

fn encode(out: &mut BytesMut, encoding: Encoding, id: &MessageId, is_async: bool, call: &Call) -> Result<()> {
    wire::encode_call(encoding, id, is_async, call, out)
        .map_err(|problem| ClientError::Unsendable(problem.to_string()))
}

fn complete_all(waiters: Vec<Arc<Slot>>, answer: &Result<Answer>) {
    for waiter in waiters {
        waiter.complete(answer.clone());
    }
}

fn wrong_answer(call: &'static str) -> ClientError {
    ClientError::UnexpectedAnswer { call, problem: "an answer of another kind".into() }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
