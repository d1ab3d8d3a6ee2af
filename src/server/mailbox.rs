//! [`Mailbox`]: what the rest of the server has to say to one connection, in order.
//!
//! Everything that reaches a connection's output from outside its own task comes through here, so the order in which
//! things are posted is the order in which the client reads them (invalidations, replies of worker threads, lock grants).
//! A client that does not read makes its mailbox grow: invalidations are counted, and beyond a limit the connection is
//! dropped (the client verifies its cache when it comes back) and nothing more is kept for it.
//!
//! Cost of a post: one uncontended mutex, one push, and a wake-up of the connection's task if it sleeps. What a group of
//! commits publishes is put in first and rung for once, so that a client wakes once for all of it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;

use super::hub::ClientInfo;
use super::session::Session;
use crate::ids::{Oid, Tid};
use crate::wire::{Encoding, Notice, encode_notice};

/// One committed transaction, as every registered connection is told of it. Encoded once per encoding, on first use.
#[derive(Debug)]
pub(crate) struct Publication {
    pub(crate) tid: Tid,
    pub(crate) oids: Arc<[Oid]>,
    pickled: OnceLock<Bytes>,
    packed: OnceLock<Bytes>,
}

impl Publication {
    pub(crate) fn new(tid: Tid, oids: Arc<[Oid]>) -> Self {
        Self { tid, oids, pickled: OnceLock::new(), packed: OnceLock::new() }
    }

    /// The whole `invalidateTransaction` frame.
    pub(crate) fn frame(&self, encoding: Encoding) -> &Bytes {
        let cell = match encoding {
            Encoding::Pickle => &self.pickled,
            Encoding::Msgpack => &self.packed,
        };
        cell.get_or_init(|| {
            let mut frame = BytesMut::new();
            let notice = Notice::InvalidateTransaction { tid: self.tid, oids: self.oids.to_vec() };
            if let Err(error) = encode_notice(encoding, &notice, &mut frame) {
                tracing::error!(tid = %self.tid, %error, "an invalidation cannot be sent");
            }
            frame.freeze()
        })
    }

    /// About how much of a mailbox it takes.
    fn weight(&self) -> usize {
        64 + 11 * self.oids.len()
    }
}

/// `length` and `size` of a storage, as `info` notices carry them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StorageInfo {
    pub(crate) length: u64,
    pub(crate) size: u64,
}

/// Something to be done by a connection's own task.
type Continuation = Box<dyn FnOnce(&mut Session) + Send>;

pub(crate) enum Event {
    /// Another connection, or the storage itself, committed this.
    Published(Arc<Publication>),
    /// This connection's own commit: `info`, then what the continuation writes, then its view includes it.
    Committed { publication: Arc<Publication>, info: StorageInfo, reply: Continuation },
    /// After a pack.
    Info(StorageInfo),
    /// The result of a worker thread, or a lock that was granted.
    Continue(Continuation),
}

struct State {
    events: VecDeque<Event>,
    /// Weight of the invalidations among them.
    unread: usize,
    /// Weight of the largest. It does not count towards the limit: a transaction of millions of objects is no reason to
    /// drop everybody.
    largest: usize,
    /// Nothing more is kept.
    closed: bool,
    /// Why the connection is to be closed, now, whatever it is doing.
    condemned: Option<String>,
    /// Whose it is, for people.
    label: String,
    read_only: bool,
}

/// See the module documentation.
pub(crate) struct Mailbox {
    state: Mutex<State>,
    /// Lets the connection's task skip the mutex when there is nothing.
    filled: AtomicBool,
    condemned: AtomicBool,
    wake: Notify,
    limit: usize,
    peer: String,
    since: Instant,
}

impl Mailbox {
    pub(crate) fn new(limit: usize, peer: String) -> Self {
        Self {
            state: Mutex::new(State {
                events: VecDeque::new(),
                unread: 0,
                largest: 0,
                closed: false,
                condemned: None,
                label: String::new(),
                read_only: false,
            }),
            filled: AtomicBool::new(false),
            condemned: AtomicBool::new(false),
            wake: Notify::new(),
            limit,
            peer,
            since: Instant::now(),
        }
    }

    /// What the client has told about itself.
    pub(crate) fn introduce(&self, label: &str, read_only: bool) {
        let mut state = self.lock();
        state.label = label.to_owned();
        state.read_only = read_only;
    }

    pub(crate) fn client(&self) -> ClientInfo {
        let state = self.lock();
        ClientInfo {
            peer: self.peer.clone(),
            label: state.label.clone(),
            read_only: state.read_only,
            connected: self.since.elapsed(),
            unread: state.unread,
        }
    }

    /// Bytes of invalidations that wait for its client.
    pub(crate) fn unread(&self) -> usize {
        self.lock().unread
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends `event`, or drops it (releasing what it holds) if the connection has ended; wakes the connection.
    pub(crate) fn post(&self, event: Event) {
        self.put(event);
        self.ring();
    }

    /// Wakes the connection if there is something for it.
    pub(crate) fn ring(&self) {
        if self.filled.load(Ordering::Acquire) {
            self.wake.notify_one();
        }
    }

    /// As [`Self::post`], but the connection is woken by [`Self::ring`]: of several events in a row it is to hear at once.
    pub(crate) fn put(&self, event: Event) {
        let weight = match &event {
            Event::Published(publication) => publication.weight(),
            _ => 0,
        };
        let mut state = self.lock();
        if state.closed {
            // What it holds may have locks to release, which takes other mutexes.
            drop(state);
            return drop(event);
        }
        state.unread += weight;
        state.largest = state.largest.max(weight);
        if state.unread - state.largest > self.limit {
            let reason = format!("it does not read its invalidations ({} bytes wait for it)", state.unread);
            drop(state);
            return self.condemn(reason);
        }
        state.events.push_back(event);
        drop(state);
        self.filled.store(true, Ordering::Release);
    }

    /// The connection is to be closed for this reason, even if it is busy or its client does not read.
    ///
    /// What waits for it stays here until its task has ended it. It is not dropped now: the caller may be announcing a
    /// transaction, and with a verdict that nobody reads any more goes the abort of a voted transaction, which in a
    /// storage that is a client itself waits for an answer that only the caller's thread can receive.
    pub(crate) fn condemn(&self, reason: String) {
        let mut state = self.lock();
        state.closed = true;
        state.condemned.get_or_insert(reason);
        drop(state);
        self.condemned.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    /// Whether [`Self::condemn`] was called, and why.
    pub(crate) fn sentence(&self) -> Option<String> {
        if self.condemned.load(Ordering::Acquire) { self.lock().condemned.clone() } else { None }
    }

    /// Waits for [`Self::condemn`] only, while the connection cannot take events.
    pub(crate) async fn until_condemned(&self) {
        while !self.condemned.load(Ordering::Acquire) {
            self.wake.notified().await;
        }
    }

    /// Takes everything posted so far.
    pub(crate) fn take(&self, into: &mut VecDeque<Event>) {
        if !self.filled.swap(false, Ordering::Acquire) {
            return;
        }
        let mut state = self.lock();
        (state.unread, state.largest) = (0, 0);
        if into.is_empty() {
            std::mem::swap(into, &mut state.events);
        } else {
            into.append(&mut state.events);
        }
    }

    /// Waits until there is something to take, or the connection is condemned.
    pub(crate) async fn filled(&self) {
        while !self.filled.load(Ordering::Acquire) && !self.condemned.load(Ordering::Acquire) {
            self.wake.notified().await;
        }
    }

    /// No event is kept from now on. Returns those that were not taken, to be dropped outside any lock.
    pub(crate) fn close(&self) -> VecDeque<Event> {
        let mut state = self.lock();
        state.closed = true;
        std::mem::take(&mut state.events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dropped(Arc<AtomicBool>);

    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// Whoever announces a transaction may hold what the abort of a voted one needs.
    #[test]
    fn what_a_condemned_connection_holds_is_not_released_by_its_judge() {
        let mailbox = Mailbox::new(100, "peer".into());
        let released = Arc::new(AtomicBool::new(false));
        let verdict = Dropped(Arc::clone(&released));
        mailbox.post(Event::Continue(Box::new(move |_| drop(verdict))));
        let publication = || Event::Published(Arc::new(Publication::new(Tid(1), Arc::new([Oid(1)]))));
        // 75 each; the largest is not counted
        mailbox.post(publication());
        mailbox.post(publication());
        assert!(mailbox.sentence().is_none());
        mailbox.post(publication());
        assert!(mailbox.sentence().is_some_and(|reason| reason.contains("does not read")));
        assert!(!released.load(Ordering::Relaxed));
        drop(mailbox.close());
        assert!(released.load(Ordering::Relaxed));
    }
}
