//! The order of `docs/ordering.md` under random schedules, without sockets, threads or a clock: a seed is a schedule.
//!
//! Clients register, load, listen and vanish at every point of a commit: before a transaction is published (when the
//! engine already shows it), between the transactions of a group, and while commits from below wait for their turn. Each
//! client's output is read as a client reads it, and every answer must be exactly the engine's as of what this client
//! had been told just before it. What lies on the shelf must be what is current as of what was published last.

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tokio::runtime::{Builder, Runtime};

use super::{Below, Hub, HubOptions};
use crate::ids::{Oid, Tid};
use crate::server::mailbox::Event;
use crate::server::session::{Outcome, ReplyTo, Session};
use crate::server::{ServerConfig, Shared};
use crate::shelf::{self, ShelfReader};
use crate::storage::memory::MemoryStorage;
use crate::storage::transform::RecordReferences;
use crate::storage::{
    InvalidationSink, NoResolution, Op, StagedTxn, Storage, TxnMeta, VoteOutcome, VotedTxn,
};
use crate::wire::{
    Call, Encoding, FrameReader, MessageId, Notice, Request, ServerMessage, decode_server_message,
};

const OBJECTS: u64 = 6;
const CLIENTS: usize = 5;

/// xorshift: the same schedule for the same seed, everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

struct Client {
    session: Session,
    encoding: Encoding,
    frames: FrameReader,
    received: BytesMut,
    next_id: i64,
    /// What it has been told, as it reads: the register's tid, invalidations, its own commits.
    registered: Tid,
    view: Tid,
    told: Vec<Tid>,
    own: Vec<Tid>,
}

struct Sim {
    random: Random,
    /// Nothing runs on it: what vanishes may hold something to be dropped there.
    runtime: Runtime,
    storage: Arc<MemoryStorage>,
    shared: Arc<Shared>,
    hub: Arc<Hub>,
    clients: Vec<Client>,
    /// Of a client on this machine.
    shelf: ShelfReader,
    /// Published, in order.
    published: Vec<Tid>,
    checked: usize,
    on_shelf: usize,
}

impl Sim {
    fn new(seed: u64) -> Self {
        let storage = Arc::new(MemoryStorage::new("memory"));
        let options = HubOptions {
            invalidation_queue_size: 3,
            invalidation_age: None,
            transaction_timeout: None,
            client_conflict_resolution: false,
            resolver: Arc::new(NoResolution),
            references: Arc::new(RecordReferences),
            shelf: 1 << 20,
        };
        let hub = Hub::start("1".into(), Arc::clone(&storage) as Arc<dyn Storage>, options).unwrap();
        let shared = Arc::new(Shared::new(ServerConfig::default(), vec![Arc::clone(&hub)], None));
        let runtime = Builder::new_current_thread().build().unwrap();
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        hub.shelf.as_ref().unwrap().prepare();
        let descriptor = hub.shelf.as_ref().unwrap().reader().try_clone_to_owned().unwrap();
        let shelf = ShelfReader::open(descriptor, shelf::FORMAT, 1 << 20).unwrap();
        let (clients, published) = (Vec::new(), Vec::new());
        Self { random, runtime, storage, shared, hub, clients, shelf, published, checked: 0, on_shelf: 0 }
    }

    fn connect(&mut self) {
        let encoding = if self.random.below(2) == 0 { Encoding::Pickle } else { Encoding::Msgpack };
        let session =
            Session::new(Arc::clone(&self.shared), self.runtime.handle().clone(), "peer".into(), encoding);
        let mut client = Client {
            session,
            encoding,
            frames: FrameReader::new(1 << 20),
            received: BytesMut::new(),
            next_id: 0,
            registered: Tid::ZERO,
            view: Tid::ZERO,
            told: Vec::new(),
            own: Vec::new(),
        };
        client.call(Call::Register { storage: "1".into(), read_only: false });
        let Some(ServerMessage::Reply { value, .. }) = client.read().pop() else { panic!("no answer") };
        client.registered = value.as_tid().unwrap();
        client.view = client.registered;
        // what was published before is known, what comes after will be told
        assert_eq!(client.registered, self.published.last().copied().unwrap_or(Tid::ZERO));
        self.clients.push(client);
    }

    /// Something that clients do; `in_commit`: in the middle of a commit.
    fn step(&mut self, in_commit: bool) {
        self.check_shelf();
        let choice = self.random.below(if in_commit { 8 } else { 10 });
        let client = self.random.below(self.clients.len().max(1) as u64) as usize;
        match choice {
            _ if self.clients.is_empty() => self.connect(),
            0 if self.clients.len() < CLIENTS => self.connect(),
            1 if self.random.below(4) == 0 => {
                self.check(client);
                self.check_complete(client, false);
                self.clients.swap_remove(client).session.end();
            }
            0..=2 => self.clients[client].session.listen(),
            3..=5 => self.load(client),
            // a round trip is a barrier
            6 => {
                self.clients[client].session.listen();
                self.clients[client].call(Call::Ping);
                self.check(client);
                self.check_complete(client, true);
            }
            7 => self.commit_below(),
            _ => self.commit(),
        }
    }

    /// Whatever lies there is what is current as of the last published tid, or it could be shown with a view that it does not belong to.
    fn check_shelf(&mut self) {
        let before = self.hub.registry().last_tid().next();
        for oid in (0..OBJECTS).map(Oid) {
            let Some((tid, data)) = self.shelf.load(oid) else { continue };
            let expected = self.storage.load_before(oid, before).unwrap().unwrap();
            assert_eq!((tid, &data[..]), (expected.tid, &expected.data[..]), "{oid} before {before}");
            self.on_shelf += 1;
        }
    }

    fn load(&mut self, client: usize) {
        let oid = Oid(self.random.below(OBJECTS));
        let before = match self.random.below(3) {
            0 if !self.published.is_empty() => {
                self.published[self.random.below(self.published.len() as u64) as usize]
            }
            _ => Tid::MAX,
        };
        let id = MessageId::Load { oid, before };
        let call = Ok(Call::LoadBefore { oid, before });
        self.clients[client].session.serve(Request { id, is_async: false, call });
    }

    fn voted(&mut self) -> VotedTxn {
        let count = 1 + self.random.below(2);
        let mut oids: Vec<Oid> = (0..count).map(|_| Oid(self.random.below(OBJECTS))).collect();
        oids.sort();
        oids.dedup();
        let store = |oid: Oid| {
            let serial = self.storage.current_tid(oid).unwrap_or(Tid::ZERO);
            Op::Store { oid, serial, data: Bytes::from_static(b"data").into(), blob: None }
        };
        let ops = oids.into_iter().map(store).collect();
        let staged = StagedTxn { meta: TxnMeta::default(), tid: None, status: b' ', ops };
        match self.storage.vote(staged, &NoResolution) {
            Ok(VoteOutcome::Ready(voted)) => voted,
            _ => panic!("no vote"),
        }
    }

    /// What the committer does with a group, with the clients at work in between.
    fn commit(&mut self) {
        let size = 1 + self.random.below(3);
        // Blind writes: the storage is asked for each vote of its own, so their objects may be the same.
        let group: Vec<VotedTxn> = (0..size).map(|_| self.voted()).collect();
        let storage = Arc::clone(&self.storage);
        let hub = Arc::clone(&self.hub);
        hub.finishing();
        let done = storage.finish(group, &mut |committed| {
            self.steps();
            let tid = committed.tid;
            let committer = self.random.below(self.clients.len() as u64 + 1) as usize;
            match self.clients.get_mut(committer) {
                Some(client) => {
                    client.own.push(tid);
                    let listener = client.session.registration.as_ref().unwrap().id;
                    let mailbox = Arc::clone(&client.session.mailbox);
                    let info = hub.info();
                    let reply = move |session: &mut Session| {
                        let to = ReplyTo {
                            id: MessageId::Seq(-1),
                            is_async: false,
                            method: "tpc_finish",
                            began: Instant::now(),
                            oid: None,
                            tid: None,
                        };
                        session.answer(to, Ok(Outcome::Reply(tid.into())));
                    };
                    hub.publish(tid, Arc::clone(&committed.oids), listener, |publication| {
                        mailbox.post(Event::Committed { publication, info, reply: Box::new(reply) });
                    });
                }
                // its connection has ended
                None => hub.publish(tid, Arc::clone(&committed.oids), u64::MAX, |_| {}),
            }
            self.note_published(tid);
            self.steps();
        });
        done.unwrap();
        hub.finished();
        self.note_published(self.storage.last_tid());
    }

    /// Everything up to `tid` that a committed transaction of the storage has is published by now.
    fn note_published(&mut self, tid: Tid) {
        let known = self.published.last().map_or(Tid::ZERO, |last| last.next());
        let mut transactions = self.storage.iterate(Some(known), Some(tid)).unwrap();
        while let Some((info, _)) = transactions.next_txn().unwrap() {
            self.published.push(info.tid);
        }
    }

    fn steps(&mut self) {
        for _ in 0..self.random.below(4) {
            self.step(true);
        }
    }

    /// Another server of the same database commits.
    fn commit_below(&mut self) {
        let voted = self.voted();
        let mut news = None;
        self.storage
            .finish(vec![voted], &mut |committed| news = Some((committed.tid, committed.oids.to_vec())))
            .unwrap();
        let (tid, oids) = news.unwrap();
        Below(Arc::downgrade(&self.hub)).invalidate(tid, oids);
        if self.hub.registry().held_back.is_none() {
            self.note_published(tid);
        }
    }

    /// Reads what a client has been sent.
    fn check(&mut self, client: usize) {
        let storage = Arc::clone(&self.storage);
        let client = &mut self.clients[client];
        for message in client.read() {
            match message {
                ServerMessage::Notice(Notice::InvalidateTransaction { tid, .. }) => client.hear(tid),
                ServerMessage::Reply { id: MessageId::Seq(-1), value } => {
                    let tid = value.as_tid().unwrap();
                    assert!(client.own.contains(&tid));
                    client.hear(tid);
                }
                ServerMessage::Notice(_) | ServerMessage::Reply { .. } => {}
                ServerMessage::UnknownNotice { .. } => panic!("{message:?}"),
                ServerMessage::Loaded { oid, before, loaded } => {
                    let expected = storage.load_before(oid, before.min(client.view.next())).unwrap();
                    let expected = expected.map(|found| {
                        (found.data, found.tid, found.end_tid.filter(|end| *end <= client.view))
                    });
                    assert_eq!(loaded, expected, "load of {oid} before {before} as of {}", client.view);
                    self.checked += 1;
                }
                ServerMessage::Fault { id, .. } => {
                    let MessageId::Load { oid, before } = id else { panic!("{id:?}") };
                    // unknown then, perhaps created since
                    let now = storage.load_before(oid, before.min(client.view.next()));
                    assert!(!matches!(now, Ok(Some(_))), "load of {oid} before {before}: {now:?}");
                }
            }
        }
    }

    /// It was told every transaction once, in order, from `register` on; `all`: up to the last one.
    fn check_complete(&self, client: usize, all: bool) {
        let client = &self.clients[client];
        let mut expected = self.published.iter().copied().filter(|tid| *tid > client.registered);
        for told in &client.told {
            assert_eq!(expected.next(), Some(*told));
        }
        if all {
            assert_eq!(expected.next(), None);
        }
    }
}

impl Client {
    fn call(&mut self, call: Call) {
        self.next_id += 1;
        self.session.serve(Request { id: MessageId::Seq(self.next_id), is_async: false, call: Ok(call) });
    }

    fn hear(&mut self, tid: Tid) {
        assert!(tid > self.view, "{tid} after {}", self.view);
        self.view = tid;
        self.told.push(tid);
    }

    fn read(&mut self) -> Vec<ServerMessage> {
        self.received.extend_from_slice(&self.session.out.split());
        let mut messages = Vec::new();
        while let Some(frame) = self.frames.next_frame(&mut self.received).unwrap() {
            messages.push(decode_server_message(self.encoding, &frame).unwrap());
        }
        messages
    }
}

#[test]
fn every_schedule_shows_every_client_one_history() {
    let (mut checked, mut on_shelf) = (0, 0);
    for seed in 0..200 {
        let mut sim = Sim::new(seed);
        for _ in 0..120 {
            sim.step(false);
        }
        for client in 0..sim.clients.len() {
            sim.clients[client].session.listen();
            sim.check(client);
            sim.check_complete(client, true);
        }
        checked += sim.checked;
        on_shelf += sim.on_shelf;
        sim.hub.committer.stop();
    }
    assert!(checked > 1000, "{checked} loads were checked");
    assert!(on_shelf > 1000, "{on_shelf} entries of the shelf were checked");
}

/// A client that always has a load on its way to the disk and back remembers what its oldest load has to know, no more.
#[test]
fn loads_that_never_pause_keep_nothing_for_ever() {
    let mut sim = Sim::new(1);
    sim.connect();
    let mut previous = None;
    for _ in 0..100 {
        let view = sim.clients[0].session.view;
        sim.clients[0].session.slow_loads.push(view);
        sim.commit_below();
        sim.clients[0].session.listen();
        if let Some(previous) = previous.replace(view) {
            sim.clients[0].session.slow_load_done(previous);
        }
        // the one that is on its way still has to hear of what came after it
        let kept: Vec<Tid> =
            sim.clients[0].session.published_meanwhile.iter().map(|publication| publication.tid).collect();
        assert_eq!(kept, [sim.clients[0].session.view]);
    }
    sim.hub.committer.stop();
}

/// What a pack has dropped is not to be had any more.
#[test]
fn a_pack_leaves_nothing_on_the_shelf() {
    let mut sim = Sim::new(1);
    sim.connect();
    sim.commit_below();
    sim.clients[0].session.listen();
    let on_shelf = |sim: &Sim| (0..OBJECTS).filter(|oid| sim.shelf.load(Oid(*oid)).is_some()).count();
    for _ in 0..100 {
        sim.load(0);
    }
    assert!(on_shelf(&sim) > 0);
    sim.hub.broadcast_info();
    assert_eq!(on_shelf(&sim), 0);
    sim.hub.committer.stop();
}
