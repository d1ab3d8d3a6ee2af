//! The client against a scripted server: orderings, broken connections, bad messages.
//!
//! The server is a thread that a test tells what to send and when; nothing sleeps to wait for something.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use zeo_rs::cache::Cache;
use zeo_rs::client::{Access, Client, ClientError, DatabaseCallbacks, Options, Session};
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::net::Address;
use zeo_rs::pickle::Value;
use zeo_rs::wire::{
    Call, ClientHello, Encoding, Fault, FrameReader, MessageId, Notice, Request, decode_request,
    encode_fault, encode_loaded, encode_notice, encode_reply, put_frame,
};

/// Nothing in these tests takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the storage told its database, in order.
#[derive(Debug, PartialEq, Clone)]
enum Told {
    Invalidate(Tid, Vec<Oid>),
    InvalidateCache,
    Connected(u64),
    Disconnected,
    Stale,
}

type Hook = Box<dyn Fn(&Told) + Send + Sync>;

struct Recorder {
    sender: Mutex<Sender<Told>>,
    hook: Hook,
    /// Whether it may be told of invalidations on a caller's thread.
    here: bool,
}

impl Recorder {
    fn tell(&self, told: Told) {
        (self.hook)(&told);
        let _ = self.sender.lock().unwrap().send(told);
    }
}

impl DatabaseCallbacks for Recorder {
    fn invalidate(&self, tid: Tid, oids: &[Oid]) {
        self.tell(Told::Invalidate(tid, oids.to_vec()));
    }
    fn may_be_told_here(&self) -> bool {
        self.here
    }
    fn invalidate_cache(&self) {
        self.tell(Told::InvalidateCache);
    }
    fn connected(&self, session: &Session) {
        self.tell(Told::Connected(session.generation));
    }
    fn disconnected(&self) {
        self.tell(Told::Disconnected);
    }
    fn stale_cache(&self) {
        self.tell(Told::Stale);
    }
}

struct TestClient {
    client: Arc<Client>,
    told: Receiver<Told>,
}

impl TestClient {
    fn open(options: Options) -> Self {
        Self::with_hook(options, Box::new(|_| {}))
    }

    fn with_hook(options: Options, hook: Hook) -> Self {
        Self::told_here(options, true, hook)
    }

    fn told_here(options: Options, here: bool, hook: Hook) -> Self {
        let (sender, told) = channel();
        let callbacks = Arc::new(Recorder { sender: Mutex::new(sender), hook, here });
        let client = Client::new(options, callbacks).unwrap();
        client.connect().unwrap();
        Self { client, told }
    }

    /// Waits until `failure` says what is wrong.
    fn wait_failure(&self, failure: impl Fn(&Client) -> ClientError, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let error = failure(&self.client).to_string();
            if error.contains(wanted) {
                return;
            }
            assert!(Instant::now() < deadline, "{error}");
        }
    }

    fn wait_last_tid(&self, tid: Tid) {
        let deadline = Instant::now() + PATIENCE;
        while self.client.last_tid() != tid {
            assert!(Instant::now() < deadline, "{}", self.client.last_tid());
        }
    }

    /// Skips to what `wanted` accepts.
    fn wait_told(&self, mut wanted: impl FnMut(&Told) -> bool) -> Told {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let told =
                self.told.recv_timeout(deadline - Instant::now()).expect("the storage told its database");
            if wanted(&told) {
                return told;
            }
        }
    }
}

impl Drop for TestClient {
    fn drop(&mut self) {
        let since = Instant::now();
        self.client.close();
        if !std::thread::panicking() {
            // Within a second, on a machine with time to spare.
            assert!(since.elapsed() < Duration::from_secs(10), "close took {:?}", since.elapsed());
        }
    }
}

struct FakeServer {
    listener: TcpListener,
    encoding: Encoding,
}

/// Either kind of socket.
trait Socket: Read + Write + Send {}
impl<S: Read + Write + Send> Socket for S {}

/// The server's end of one connection.
struct Peer {
    socket: Box<dyn Socket>,
    /// The client's address; empty over a Unix socket.
    client: String,
    frames: FrameReader,
    received: BytesMut,
    encoding: Encoding,
}

impl FakeServer {
    fn new(encoding: Encoding) -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").unwrap(), encoding }
    }

    fn options(&self) -> Options {
        let mut options =
            Options::new(vec![Address::tcp("127.0.0.1", self.listener.local_addr().unwrap().port())]);
        options.wait_timeout = PATIENCE;
        options
    }

    /// The next connection, after the handshake.
    fn accept(&self) -> Peer {
        let (socket, client) = self.listener.accept().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_nodelay(true).unwrap();
        Peer::greet(socket, client.to_string(), self.encoding)
    }

    /// The next connection, registered and told about the storage.
    fn serve(&self, last_tid: Tid) -> Peer {
        let mut peer = self.accept();
        peer.register(last_tid);
        peer
    }

    /// A client that is connected and ready, with the server's end of it.
    fn meet(&self, open: impl FnOnce(Options) -> TestClient) -> (TestClient, Peer) {
        std::thread::scope(|scope| {
            let peer = scope.spawn(|| self.serve(Tid(10)));
            let test = open(self.options());
            test.client.wait_connected(PATIENCE).unwrap();
            (test, peer.join().unwrap())
        })
    }
}

impl Peer {
    /// Shakes hands.
    fn greet(socket: impl Socket + 'static, client: String, encoding: Encoding) -> Self {
        let mut peer = Self {
            socket: Box::new(socket),
            client,
            frames: FrameReader::new(128 << 20),
            received: BytesMut::new(),
            encoding,
        };
        let mut out = BytesMut::new();
        put_frame(&mut out, encoding.protocol()).unwrap();
        peer.write(&out);
        let hello = peer.frame().expect("a handshake");
        assert_eq!(ClientHello::parse(&hello).unwrap(), ClientHello::Speak(encoding));
        peer
    }

    fn write(&mut self, bytes: &[u8]) {
        // The client may have given up: that is for the test to notice elsewhere.
        let _ = self.socket.write_all(bytes);
    }

    fn frame(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.frames.next_frame(&mut self.received).unwrap() {
                return Some(frame);
            }
            let mut chunk = [0; 4096];
            match self.socket.read(&mut chunk) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("neither a frame nor the end"),
                Ok(0) | Err(_) => return None,
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
            }
        }
    }

    /// The next call; `None` once the client has closed.
    fn call(&mut self) -> Option<(MessageId, Call)> {
        let frame = self.frame()?;
        let Request { id, call, .. } = decode_request(self.encoding, &frame).unwrap();
        Some((id, call.unwrap()))
    }

    /// The next call that `wanted` takes; one-way calls before it are skipped.
    fn expect(&mut self, wanted: impl Fn(&Call) -> bool) -> MessageId {
        loop {
            let (id, call) = self.call().expect("a call");
            if wanted(&call) {
                return id;
            }
            let is_one_way = id == MessageId::Seq(0) || call == Call::KeepAlive;
            assert!(is_one_way, "unexpected {call:?}");
        }
    }

    /// Answers what a client asks first.
    fn register(&mut self, last_tid: Tid) {
        let id = self.expect(|call| matches!(call, Call::Register { .. }));
        self.reply(&id, &tid_value(last_tid));
        self.get_info();
    }

    /// The same, with the offer of a local socket.
    fn register_and_offer(&mut self, last_tid: Tid, offer: Value) {
        let id = self.expect(|call| matches!(call, Call::Register { .. }));
        self.reply(&id, &tid_value(last_tid));
        self.answer_info(Some(("zeo_rs_local".into(), offer)));
    }

    fn get_info(&mut self) {
        self.answer_info(None);
    }

    fn answer_info(&mut self, more: Option<(Value, Value)>) {
        let id = self.expect(|call| matches!(call, Call::GetInfo));
        let info = std::iter::once(("length".into(), Value::Int(7))).chain(more);
        self.reply(&id, &Value::Dict(info.collect()));
    }

    fn reply(&mut self, id: &MessageId, value: &Value) {
        let mut out = BytesMut::new();
        encode_reply(self.encoding, id, value, &mut out).unwrap();
        self.write(&out);
    }

    fn fault(&mut self, id: &MessageId, class: &str, data: Value) {
        let mut out = BytesMut::new();
        encode_fault(self.encoding, id, &Fault { class: class.into(), data }, &mut out).unwrap();
        self.write(&out);
    }

    fn loaded_bytes(&self, oid: Oid, before: Tid, data: &[u8], tid: Tid, end: Option<Tid>) -> BytesMut {
        let mut out = BytesMut::new();
        encode_loaded(self.encoding, &MessageId::Load { oid, before }, Some((data, tid, end)), &mut out)
            .unwrap();
        out
    }

    fn invalidation_bytes(&self, tid: Tid, oids: &[Oid]) -> BytesMut {
        let mut out = BytesMut::new();
        let notice = Notice::InvalidateTransaction { tid, oids: oids.to_vec() };
        encode_notice(self.encoding, &notice, &mut out).unwrap();
        out
    }

    /// Reads until the client closes the connection.
    fn wait_closed(&mut self) {
        while self.frame().is_some() {}
    }
}

fn tid_value(tid: Tid) -> Value {
    Value::Bytes(Bytes::copy_from_slice(&tid.to_bytes()))
}

fn oid_value(oid: Oid) -> Value {
    Value::Bytes(Bytes::copy_from_slice(&oid.to_bytes()))
}

fn key() -> Value {
    Value::Int(77)
}

fn begin(client: &Client) -> Result<(), ClientError> {
    client.tpc_begin(key(), Bytes::new(), Bytes::new(), Value::Dict(Vec::new()), None, b' ')
}

/// Why there is no connection yet.
fn not_connected(client: &Client) -> ClientError {
    client.wait_connected(Duration::from_millis(20)).unwrap_err()
}

const BOTH: [Encoding; 2] = [Encoding::Pickle, Encoding::Msgpack];

#[test]
fn an_invalidation_before_the_reply_is_applied_first() {
    for encoding in BOTH {
        let server = FakeServer::new(encoding);
        std::thread::scope(|scope| {
            let (test, mut peer) = server.meet(TestClient::open);
            let client = test.client.clone();
            let loading = scope.spawn(move || client.load_before(Oid(1), Tid(11)));
            peer.expect(|call| matches!(call, Call::LoadBefore { .. }));
            let mut both = peer.invalidation_bytes(Tid(12), &[Oid(1)]);
            both.extend_from_slice(&peer.loaded_bytes(Oid(1), Tid(11), b"old", Tid(5), Some(Tid(12))));
            peer.write(&both);
            let loaded = loading.join().unwrap().unwrap().unwrap();
            assert_eq!((&loaded.data[..], loaded.tid), (&b"old"[..], Tid(5)));
            // To the cache, before the reply that follows it.
            assert_eq!(test.client.load_cached(Oid(1), Tid(13)), None);
            test.wait_last_tid(Tid(12));
            assert_eq!(test.client.load_cached(Oid(1), Tid(12)).unwrap().end_tid, Some(Tid(12)));
            assert!(test.client.load_cached(Oid(1), Tid(12)).is_some());
            test.wait_told(|told| *told == Told::Invalidate(Tid(12), vec![Oid(1)]));
        });
    }
}

#[test]
fn an_invalidation_behind_the_reply_ends_what_the_reply_stored() {
    for encoding in BOTH {
        let server = FakeServer::new(encoding);
        std::thread::scope(|scope| {
            let (test, mut peer) = server.meet(TestClient::open);
            let client = test.client.clone();
            let loading = scope.spawn(move || client.load_before(Oid(1), Tid(11)));
            peer.expect(|call| matches!(call, Call::LoadBefore { .. }));
            let mut both = peer.loaded_bytes(Oid(1), Tid(11), b"data", Tid(5), None);
            both.extend_from_slice(&peer.invalidation_bytes(Tid(12), &[Oid(1)]));
            peer.write(&both);
            assert_eq!(loading.join().unwrap().unwrap().unwrap().end_tid, None);
            test.wait_told(|told| matches!(told, Told::Invalidate(Tid(12), _)));
            assert_eq!(test.client.load_cached(Oid(1), Tid(13)), None, "no longer current");
            assert_eq!(test.client.load_cached(Oid(1), Tid(12)).unwrap().end_tid, Some(Tid(12)));
        });
    }
}

/// A database that says when it is told of transaction 12, and takes its time until it is let go.
fn slow_database() -> (Hook, Receiver<()>, Sender<()>) {
    let (entered_tx, entered) = channel();
    let (leave, leave_rx) = channel::<()>();
    let leave_rx = Mutex::new(leave_rx);
    let hook = Box::new(move |told: &Told| {
        if matches!(told, Told::Invalidate(Tid(12), _)) {
            entered_tx.send(()).unwrap();
            leave_rx.lock().unwrap().recv().unwrap();
        }
    });
    (hook, entered, leave)
}

#[test]
fn the_last_tid_waits_for_the_database() {
    let server = FakeServer::new(Encoding::Msgpack);
    let (hook, entered, leave) = slow_database();
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(|options| TestClient::with_hook(options, hook));
        let invalidation = peer.invalidation_bytes(Tid(12), &[Oid(1)]);
        peer.write(&invalidation);
        entered.recv_timeout(PATIENCE).unwrap();
        assert_eq!(test.client.last_tid(), Tid(10), "the database is still being told");
        leave.send(()).unwrap();
        let client = test.client.clone();
        let ping = scope.spawn(move || client.read("ping", &Call::Ping));
        let id = peer.expect(|call| matches!(call, Call::Ping));
        peer.reply(&id, &Value::None);
        ping.join().unwrap().unwrap();
        assert_eq!(test.client.last_tid(), Tid(12));
    });
}

/// With one transaction that the database is just being told of, and one that it is still to be told of. To be let go once.
fn with_a_backlog(encoding: Encoding, then: impl FnOnce(&FakeServer, &TestClient, Peer, &dyn Fn())) {
    let server = FakeServer::new(encoding);
    let (hook, entered, leave) = slow_database();
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(|options| TestClient::with_hook(options, hook));
        let client = test.client.clone();
        let loading = scope.spawn(move || client.load_before(Oid(7), Tid(11)).unwrap().unwrap());
        peer.expect(|call| matches!(call, Call::LoadBefore { .. }));
        let mut bytes = peer.invalidation_bytes(Tid(12), &[Oid(1)]);
        bytes.extend_from_slice(&peer.invalidation_bytes(Tid(13), &[Oid(2)]));
        bytes.extend_from_slice(&peer.loaded_bytes(Oid(7), Tid(11), b"old", Tid(5), None));
        peer.write(&bytes);
        // Who waits for the answer behind the two does not wait for the database.
        let loaded = loading.join().unwrap();
        assert_eq!((&loaded.data[..], loaded.tid), (&b"old"[..], Tid(5)));
        entered.recv_timeout(PATIENCE).unwrap();
        assert_eq!(test.client.last_tid(), Tid(10), "the database is still being told");
        then(&server, &test, peer, &|| leave.send(()).unwrap());
    });
}

/// A database that takes its time holds up no load, but everything from which one could learn what it has not been told.
#[test]
fn a_load_does_not_wait_for_the_database() {
    for encoding in BOTH {
        with_a_backlog(encoding, |_, test, mut peer, leave| {
            std::thread::scope(|scope| {
                let load = |oid, before| {
                    let client = test.client.clone();
                    scope.spawn(move || client.load_before(oid, before).unwrap().unwrap())
                };
                let loads = |call: &Call| matches!(call, Call::LoadBefore { .. });
                // One that shows the end of a revision by a new transaction: as nothing is known of that one, there is no end yet.
                let ended = load(Oid(4), Tid(11));
                peer.expect(loads);
                let bytes = peer.loaded_bytes(Oid(4), Tid(11), b"ended", Tid(5), Some(Tid(13)));
                peer.write(&bytes);
                assert_eq!(ended.join().unwrap().end_tid, None);
                assert_eq!(test.client.load_cached(Oid(4), Tid(11)).unwrap().end_tid, None);
                assert_eq!(test.client.load_cached(Oid(4), Tid(14)), None);

                // One that shows the new transaction itself, and a barrier.
                let newer = load(Oid(2), Tid(14));
                peer.expect(loads);
                let client = test.client.clone();
                let ping = scope.spawn(move || client.read("ping", &Call::Ping));
                let id = peer.expect(|call| matches!(call, Call::Ping));
                let mut bytes = peer.loaded_bytes(Oid(2), Tid(14), b"new", Tid(13), None);
                encode_reply(encoding, &id, &Value::None, &mut bytes).unwrap();
                peer.write(&bytes);
                // Time for a mistake to show: a hit is answered all the while.
                let since = Instant::now();
                while since.elapsed() < Duration::from_millis(50) {
                    assert!(test.client.load_cached(Oid(7), Tid(11)).is_some());
                }
                assert!(!newer.is_finished() && !ping.is_finished());
                assert_eq!(test.client.last_tid(), Tid(10));
                leave();
                ping.join().unwrap().unwrap();
                assert_eq!(test.client.last_tid(), Tid(13));
                assert_eq!(test.client.load_cached(Oid(4), Tid(11)).unwrap().end_tid, Some(Tid(13)));
                assert_eq!(newer.join().unwrap().tid, Tid(13));
                let told: Vec<Told> = test
                    .told
                    .try_iter()
                    .filter(|told| matches!(told, Told::Invalidate(tid, _) if *tid > Tid(10)))
                    .collect();
                assert_eq!(
                    told,
                    [Told::Invalidate(Tid(12), vec![Oid(1)]), Told::Invalidate(Tid(13), vec![Oid(2)])]
                );
            });
        });
    }
}

/// Of what, and on which thread, a database was told, in order.
#[derive(Clone, Default)]
struct Threads(Arc<Mutex<Vec<(Told, ThreadId)>>>);

impl Threads {
    fn note(&self, told: &Told) {
        self.0.lock().unwrap().push((told.clone(), std::thread::current().id()));
    }

    /// The background thread, which tells of connections.
    fn background(&self) -> ThreadId {
        let noted = self.0.lock().unwrap();
        noted.iter().find(|(told, _)| matches!(told, Told::Connected(_))).unwrap().1
    }

    /// The invalidations by transactions after `tid`.
    fn since(&self, tid: Tid) -> Vec<(Tid, ThreadId)> {
        let noted = self.0.lock().unwrap();
        let invalidation = |(told, thread): &(Told, ThreadId)| match told {
            Told::Invalidate(of, _) if *of > tid => Some((*of, *thread)),
            _ => None,
        };
        noted.iter().filter_map(invalidation).collect()
    }
}

/// Who reads is a race, which the caller wins most of the time: this often without is no bad luck.
const ROUNDS: u64 = 200;

/// A caller whose answer stands behind invalidations: rounds of a call that two of them come before. `then`, if it wants no more,
/// gets the thread of the call and the two invalidations.
fn calls_behind_invalidations(
    encoding: Encoding,
    here: bool,
    mut then: impl FnMut(&Threads, ThreadId, &[(Tid, ThreadId)]) -> bool,
) {
    let server = FakeServer::new(encoding);
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| server.serve(Tid(10)));
        let threads = Threads::default();
        let noting = threads.clone();
        let test = TestClient::told_here(server.options(), here, Box::new(move |told| noting.note(told)));
        test.client.wait_connected(PATIENCE).unwrap();
        let mut peer = peer.join().unwrap();
        for round in 0..ROUNDS {
            let before = Tid(10 + 2 * round);
            let (first, second) = (Tid(before.0 + 1), Tid(before.0 + 2));
            let (client, noted) = (test.client.clone(), threads.clone());
            let pinging = scope.spawn(move || {
                client.read("ping", &Call::Ping).unwrap();
                // As of the moment it returned.
                (client.last_tid(), noted.since(before))
            });
            let caller = pinging.thread().id();
            let id = peer.expect(|call| matches!(call, Call::Ping));
            let mut bytes = peer.invalidation_bytes(first, &[Oid(1)]);
            bytes.extend_from_slice(&peer.invalidation_bytes(second, &[Oid(2)]));
            encode_reply(encoding, &id, &Value::None, &mut bytes).unwrap();
            peer.write(&bytes);
            let (last_tid, told) = pinging.join().unwrap();
            assert_eq!(last_tid, second);
            assert_eq!(told.iter().map(|(tid, _)| *tid).collect::<Vec<_>>(), [first, second]);
            if then(&threads, caller, &told) {
                return;
            }
        }
        panic!("it did not happen");
    });
}

/// Who would have to wait until the database has been told does it itself.
#[test]
fn a_caller_tells_the_database_what_its_answer_waits_for() {
    for encoding in BOTH {
        calls_behind_invalidations(encoding, true, |threads, caller, told| {
            let by_whom = told.iter().map(|(_, thread)| *thread).collect::<Vec<_>>();
            assert!(by_whom.iter().all(|thread| [caller, threads.background()].contains(thread)));
            by_whom == [caller, caller]
        });
    }
}

/// Python's main thread, say.
#[test]
fn a_caller_that_may_not_tell_the_database_waits_for_the_background_thread() {
    let mut rounds = 0;
    calls_behind_invalidations(Encoding::Msgpack, false, |threads, _, told| {
        assert!(told.iter().all(|(_, thread)| *thread == threads.background()), "{told:?}");
        rounds += 1;
        rounds == 20
    });
}

/// The database is told of one transaction after the other, whoever does it.
#[test]
fn a_caller_waits_for_who_is_just_telling() {
    let server = FakeServer::new(Encoding::Msgpack);
    let (slow, entered, leave) = slow_database();
    let threads = Threads::default();
    let noting = threads.clone();
    let hook = Box::new(move |told: &Told| {
        noting.note(told);
        slow(told);
    });
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(|options| TestClient::with_hook(options, hook));
        // Nobody calls: the background thread reads it.
        let bytes = peer.invalidation_bytes(Tid(12), &[Oid(1)]);
        peer.write(&bytes);
        entered.recv_timeout(PATIENCE).unwrap();
        let client = test.client.clone();
        let (returned_tx, returned) = channel();
        scope.spawn(move || {
            client.read("ping", &Call::Ping).unwrap();
            returned_tx.send(client.last_tid()).unwrap();
        });
        let id = peer.expect(|call| matches!(call, Call::Ping));
        let mut bytes = peer.invalidation_bytes(Tid(13), &[Oid(2)]);
        encode_reply(Encoding::Msgpack, &id, &Value::None, &mut bytes).unwrap();
        peer.write(&bytes);
        // Time for a mistake to show.
        assert!(returned.recv_timeout(Duration::from_millis(50)).is_err());
        assert_eq!(threads.since(Tid(10)), [(Tid(12), threads.background())]);
        assert_eq!(test.client.last_tid(), Tid(10));
        leave.send(()).unwrap();
        assert_eq!(returned.recv_timeout(PATIENCE).unwrap(), Tid(13));
        let told: Vec<Tid> = threads.since(Tid(10)).iter().map(|(tid, _)| *tid).collect();
        assert_eq!(told, [Tid(12), Tid(13)]);
    });
}

/// A caller has the answer that it reads for, and holds a lock that the database wants; an answer to somebody else, just behind,
/// has to wait for the database. That is not the caller's business.
#[test]
fn who_has_its_answer_does_not_tell_the_database() {
    let server = FakeServer::new(Encoding::Msgpack);
    let threads = Threads::default();
    let noting = threads.clone();
    let lock = Arc::new(Mutex::new(None));
    let wanted = lock.clone();
    let hook = Box::new(move |told: &Told| {
        noting.note(told);
        // Its holder would wait for ever; the test fails instead.
        if matches!(told, Told::Invalidate(..)) && std::thread::current().name() != Some("holder") {
            drop(wanted.lock().unwrap());
        }
    });
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(|options| TestClient::with_hook(options, hook));
        // Who reads is a race, which the first caller wins most of the time.
        for round in 0..20 {
            let (tid, oid) = (Tid(11 + round), Oid(100 + round));
            let (client, held) = (test.client.clone(), lock.clone());
            let holder = std::thread::Builder::new().name("holder".into());
            let loading = holder.spawn_scoped(scope, move || {
                let mut held = held.lock().unwrap();
                *held = client.load_before(oid, Tid(11)).unwrap();
            });
            let loading = loading.unwrap();
            peer.expect(|call| matches!(call, Call::LoadBefore { .. }));
            let client = test.client.clone();
            let pinging = scope.spawn(move || client.read("ping", &Call::Ping).unwrap());
            let id = peer.expect(|call| matches!(call, Call::Ping));
            let mut bytes = peer.loaded_bytes(oid, Tid(11), b"data", Tid(5), None);
            bytes.extend_from_slice(&peer.invalidation_bytes(tid, &[Oid(1)]));
            encode_reply(Encoding::Msgpack, &id, &Value::None, &mut bytes).unwrap();
            peer.write(&bytes);
            let holder = loading.thread().id();
            loading.join().unwrap();
            pinging.join().unwrap();
            assert_eq!(test.client.last_tid(), tid);
            let told = threads.since(Tid(tid.0 - 1));
            assert_eq!(told.len(), 1);
            assert_ne!(told[0], (tid, holder));
        }
    });
}

/// A panic in the database, on a caller's thread: what it may not have heard of is not covered by the last tid, so the next
/// connection begins with everything being forgotten.
#[test]
fn after_a_panic_on_a_callers_thread_nothing_more_is_told() {
    for _ in 0..ROUNDS {
        if panics_on_a_callers_thread() {
            return;
        }
    }
    panic!("it did not happen");
}

/// False: it was the background thread that told the database, which ends the client.
fn panics_on_a_callers_thread() -> bool {
    let server = FakeServer::new(Encoding::Msgpack);
    let hook: Hook = Box::new(|told| assert!(!matches!(told, Told::Invalidate(Tid(12), _)), "as planned"));
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| server.serve(Tid(10)));
        let test = TestClient::with_hook(server.options(), hook);
        test.client.wait_connected(PATIENCE).unwrap();
        test.wait_told(|told| *told == Told::Connected(1));
        let mut peer = peer.join().unwrap();
        let client = test.client.clone();
        let pinging = scope.spawn(move || client.call("pack", &Call::Pack { time: 1.0, wait: true }));
        let id = peer.expect(|call| matches!(call, Call::Pack { .. }));
        let mut bytes = peer.invalidation_bytes(Tid(12), &[Oid(1)]);
        bytes.extend_from_slice(&peer.invalidation_bytes(Tid(13), &[Oid(2)]));
        encode_reply(Encoding::Msgpack, &id, &Value::None, &mut bytes).unwrap();
        peer.write(&bytes);
        if pinging.join().is_ok() {
            return false;
        }
        let _peer = server.serve(Tid(13));
        let mut told = Vec::new();
        test.wait_told(|one| {
            told.push(one.clone());
            *one == Told::Connected(2)
        });
        assert_eq!(told[..2], [Told::Disconnected, Told::InvalidateCache], "{told:?}");
        test.client.wait_connected(PATIENCE).unwrap();
        assert_eq!(test.client.last_tid(), Tid(13));
        true
    })
}

/// What was read before the connection was lost is told before the next one is used.
#[test]
fn the_database_is_told_what_was_read_before_a_disconnect() {
    with_a_backlog(Encoding::Msgpack, |server, test, peer, leave| {
        drop(peer);
        leave();
        let _peer = server.serve(Tid(13));
        test.wait_told(|told| *told == Told::Invalidate(Tid(13), vec![Oid(2)]));
        test.wait_told(|told| *told == Told::Connected(2));
        test.client.wait_connected(PATIENCE).unwrap();
        assert_eq!(test.client.last_tid(), Tid(13));
    });
}

/// A database that is closed is told nothing more.
#[test]
fn a_closed_database_is_told_nothing() {
    with_a_backlog(Encoding::Msgpack, |_, test, _peer, leave| {
        test.client.close();
        leave();
        let mut told = Vec::new();
        test.wait_told(|one| {
            told.push(one.clone());
            *one == Told::Disconnected
        });
        assert!(!told.contains(&Told::Invalidate(Tid(13), vec![Oid(2)])), "{told:?}");
    });
}

#[test]
fn identical_loads_are_sent_once() {
    let server = FakeServer::new(Encoding::Msgpack);
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(TestClient::open);
        let client = test.client.clone();
        // Asked for twice, sent once.
        client.prefetch(&[Oid(1), Oid(2)], Tid(11)).unwrap();
        client.prefetch(&[Oid(2), Oid(1)], Tid(11)).unwrap();
        peer.expect(|call| matches!(call, Call::LoadBefore { oid: Oid(1), .. }));
        let id = peer.expect(|call| matches!(call, Call::LoadBefore { oid: Oid(2), .. }));
        assert_eq!(id, MessageId::Load { oid: Oid(2), before: Tid(11) });
        // These wait for the answer to the prefetch.
        let started = Arc::new(AtomicUsize::new(0));
        let loads: Vec<_> = (0..8)
            .map(|_| {
                let (client, started) = (client.clone(), started.clone());
                scope.spawn(move || {
                    started.fetch_add(1, Ordering::SeqCst);
                    client.load_before(Oid(1), Tid(11)).unwrap().unwrap().data
                })
            })
            .collect();
        while started.load(Ordering::SeqCst) < 8 {
            std::thread::yield_now();
        }
        for (oid, data) in [(Oid(1), &b"once"[..]), (Oid(2), b"two")] {
            let bytes = peer.loaded_bytes(oid, Tid(11), data, Tid(5), None);
            peer.write(&bytes);
        }
        let loader = client.clone();
        let ending = scope.spawn(move || {
            for load in loads {
                assert_eq!(&load.join().unwrap()[..], b"once");
            }
            assert_eq!(&loader.load_before(Oid(2), Tid(11)).unwrap().unwrap().data[..], b"two");
            loader.read("ping", &Call::Ping).unwrap();
        });
        loop {
            match peer.call().unwrap() {
                (id, Call::Ping) => break peer.reply(&id, &Value::None),
                // Looked into the cache just before the answer came, and asked just after.
                (_, Call::LoadBefore { oid: Oid(1), .. }) => {
                    let bytes = peer.loaded_bytes(Oid(1), Tid(11), b"once", Tid(5), None);
                    peer.write(&bytes);
                }
                (_, call) => panic!("{call:?}"),
            }
        }
        ending.join().unwrap();
        assert_eq!(client.cache().len(), 2);
    });
}

#[test]
fn a_load_survives_a_restart_of_the_server() {
    let server = FakeServer::new(Encoding::Pickle);
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(TestClient::open);
        let client = test.client.clone();
        let loading = scope.spawn(move || client.load_before(Oid(1), Tid(11)));
        peer.expect(|call| matches!(call, Call::LoadBefore { .. }));
        drop(peer);
        let mut peer = server.serve(Tid(10));
        peer.expect(|call| matches!(call, Call::LoadBefore { .. }));
        let bytes = peer.loaded_bytes(Oid(1), Tid(11), b"again", Tid(5), None);
        peer.write(&bytes);
        assert_eq!(&loading.join().unwrap().unwrap().unwrap().data[..], b"again");
    });
}

/// Cuts the connection at each step of a commit: the transaction fails, the next one works.
#[test]
fn a_disconnect_poisons_the_transaction() {
    for cut in 0..4 {
        let server = FakeServer::new(Encoding::Msgpack);
        std::thread::scope(|scope| {
            let peer = scope.spawn(|| server.serve(Tid(10)));
            let test = TestClient::open(server.options());
            test.client.wait_connected(PATIENCE).unwrap();
            let mut peer = Some(peer.join().unwrap());
            let client = test.client.clone();
            let mut reached = 0;
            let mut step = |number: usize, peer: &mut Option<Peer>| {
                if number == cut {
                    peer.take();
                    test.wait_told(|told| *told == Told::Disconnected);
                    *peer = Some(server.serve(Tid(10)));
                    test.client.wait_connected(PATIENCE).unwrap();
                }
                reached = number;
            };
            begin(&client).unwrap();
            step(0, &mut peer);
            let stored = client.store(&key(), Oid(1), Tid::ZERO, Bytes::from_static(b"x"));
            if cut == 0 {
                assert!(stored.unwrap_err().is_disconnected());
            } else {
                stored.unwrap();
                step(1, &mut peer);
                let voting = {
                    let client = client.clone();
                    scope.spawn(move || client.tpc_vote(&key()))
                };
                if cut == 1 {
                    assert!(voting.join().unwrap().unwrap_err().is_disconnected());
                } else {
                    let id = peer.as_mut().unwrap().expect(|call| matches!(call, Call::Vote { .. }));
                    if cut == 2 {
                        step(2, &mut peer);
                        assert!(voting.join().unwrap().unwrap_err().is_disconnected());
                    } else {
                        peer.as_mut().unwrap().reply(&id, &Value::List(Vec::new()));
                        voting.join().unwrap().unwrap();
                        let called = Arc::new(AtomicUsize::new(0));
                        let finishing = {
                            let (client, called) = (client.clone(), called.clone());
                            scope.spawn(move || {
                                client.tpc_finish(
                                    &key(),
                                    Box::new(move |_| {
                                        called.fetch_add(1, Ordering::SeqCst);
                                        Ok(())
                                    }),
                                )
                            })
                        };
                        peer.as_mut().unwrap().expect(|call| matches!(call, Call::TpcFinish { .. }));
                        step(3, &mut peer);
                        assert!(finishing.join().unwrap().unwrap_err().is_disconnected());
                        assert_eq!(called.load(Ordering::SeqCst), 0, "an unknown outcome is not announced");
                    }
                }
            }
            client.tpc_abort(&key()).unwrap();
            assert_eq!(client.load_cached(Oid(1), Tid(11)), None);
            // The next one.
            let committing = {
                let client = client.clone();
                scope.spawn(move || {
                    begin(&client)?;
                    client.store(&key(), Oid(1), Tid::ZERO, Bytes::from_static(b"y"))?;
                    client.tpc_vote(&key())?;
                    client.tpc_finish(&key(), Box::new(|_| Ok(())))
                })
            };
            let peer = peer.as_mut().unwrap();
            let id = peer.expect(|call| matches!(call, Call::Vote { .. }));
            peer.reply(&id, &Value::List(Vec::new()));
            let id = peer.expect(|call| matches!(call, Call::TpcFinish { .. }));
            peer.reply(&id, &tid_value(Tid(20)));
            assert_eq!(committing.join().unwrap().unwrap(), Tid(20));
            assert_eq!(client.last_tid(), Tid(20));
            assert_eq!(&client.load_cached(Oid(1), Tid(21)).unwrap().data[..], b"y");
        });
    }
}

#[test]
fn resolved_objects_are_not_cached_as_sent() {
    let server = FakeServer::new(Encoding::Msgpack);
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(TestClient::open);
        let client = test.client.clone();
        let committing = scope.spawn(move || {
            begin(&client)?;
            client.store(&key(), Oid(1), Tid(3), Bytes::from_static(b"mine"))?;
            client.store(&key(), Oid(2), Tid(3), Bytes::from_static(b"first"))?;
            client.store(&key(), Oid(2), Tid(3), Bytes::from_static(b"last"))?;
            client.tpc_vote(&key())?;
            client.tpc_finish(&key(), Box::new(|_| Ok(())))
        });
        let id = peer.expect(|call| matches!(call, Call::Vote { .. }));
        peer.reply(&id, &Value::List(vec![oid_value(Oid(1))]));
        let id = peer.expect(|call| matches!(call, Call::TpcFinish { .. }));
        peer.reply(&id, &tid_value(Tid(20)));
        committing.join().unwrap().unwrap();
        assert_eq!(test.client.load_cached(Oid(1), Tid(21)), None);
        assert_eq!(&test.client.load_cached(Oid(2), Tid(21)).unwrap().data[..], b"last");
    });
}

/// What is no ZEO message ends the connection; whoever waited gets an error, and the client connects again.
#[test]
fn garbage_ends_the_connection() {
    let frame = |body: &[u8]| {
        let mut out = BytesMut::new();
        put_frame(&mut out, body).unwrap();
        out.to_vec()
    };
    let garbage = [
        frame(b""),
        frame(b"nonsense"),
        frame(b"\x80\x03cos\nsystem\n."),
        frame(&[0x94, 0x01, 0xc2]),
        vec![0xff, 0xff, 0xff, 0xff, 1, 2, 3],
        frame(&[0xdd, 0xff, 0xff, 0xff, 0xff]),
    ];
    for (encoding, bytes) in BOTH.into_iter().flat_map(|e| garbage.iter().map(move |bytes| (e, bytes))) {
        let server = FakeServer::new(encoding);
        std::thread::scope(|scope| {
            let (test, mut peer) = server.meet(TestClient::open);
            let client = test.client.clone();
            let packing = scope.spawn(move || client.call("pack", &Call::Pack { time: 1.0, wait: true }));
            peer.expect(|call| matches!(call, Call::Pack { .. }));
            peer.write(bytes);
            assert!(packing.join().unwrap().unwrap_err().is_disconnected());
            peer.wait_closed();
            let _peer = server.serve(Tid(10));
            test.client.wait_connected(PATIENCE).unwrap();
        });
    }
}

#[test]
fn the_cache_is_verified_after_a_reconnect() {
    // What the server answers to getInvalidations, and what is left of oids 1 and 2 in the cache.
    let cases = [
        (Value::Tuple(vec![tid_value(Tid(15)), Value::List(vec![oid_value(Oid(1))])]), [false, true]),
        (Value::None, [false, false]),
    ];
    for (answer, kept) in cases {
        let server = FakeServer::new(Encoding::Pickle);
        std::thread::scope(|scope| {
            let (test, mut peer) = server.meet(TestClient::open);
            for oid in [Oid(1), Oid(2)] {
                let client = test.client.clone();
                let loading = scope.spawn(move || client.load_before(oid, Tid(11)));
                peer.expect(|call| matches!(call, Call::LoadBefore { .. }));
                let bytes = peer.loaded_bytes(oid, Tid(11), b"x", Tid(5), None);
                peer.write(&bytes);
                loading.join().unwrap().unwrap();
            }
            drop(peer);
            test.wait_told(|told| *told == Told::Disconnected);
            let mut peer = server.accept();
            peer.register(Tid(15));
            let id = peer.expect(|call| matches!(call, Call::GetInvalidations { tid: Tid(10) }));
            // While it verifies: one that the answer covers, one that it does not.
            let mut more = peer.invalidation_bytes(Tid(15), &[Oid(1)]);
            more.extend_from_slice(&peer.invalidation_bytes(Tid(16), &[Oid(3)]));
            peer.write(&more);
            peer.reply(&id, &answer);
            test.client.wait_connected(PATIENCE).unwrap();
            assert_eq!(test.client.last_tid(), Tid(16));
            let cached = [Oid(1), Oid(2)].map(|oid| test.client.load_cached(oid, Tid(17)).is_some());
            assert_eq!(cached, kept);
            let told: Vec<Told> = test.told.try_iter().collect();
            assert_eq!(told.contains(&Told::Stale), answer == Value::None);
            assert!(told.contains(&Told::InvalidateCache));
            assert_eq!(told.iter().filter(|told| matches!(told, Told::Invalidate(Tid(15), _))).count(), 1);
            let last = told.iter().rposition(|told| matches!(told, Told::Invalidate(Tid(16), _)));
            assert!(last > told.iter().rposition(|told| *told == Told::InvalidateCache));
        });
    }
}

#[test]
fn a_server_older_than_what_was_seen_is_refused() {
    let server = FakeServer::new(Encoding::Pickle);
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| server.serve(Tid(10)));
        let mut options = server.options();
        options.wait_timeout = Duration::from_millis(300);
        let test = TestClient::open(options);
        test.client.wait_connected(PATIENCE).unwrap();
        drop(peer.join().unwrap());
        test.wait_told(|told| *told == Told::Disconnected);
        let mut peer = server.accept();
        peer.register(Tid(9));
        peer.wait_closed();
        test.wait_failure(|client| client.read("ping", &Call::Ping).unwrap_err(), "older");
        assert_eq!(test.client.last_tid(), Tid(10));
    });
}

#[test]
fn the_reason_of_a_failed_connection_is_told() {
    let server = FakeServer::new(Encoding::Msgpack);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut peer = server.accept();
            let id = peer.expect(|call| matches!(call, Call::Register { .. }));
            let text = Value::Str("unknown storage: 1".into());
            peer.fault(&id, "builtins.ValueError", Value::Tuple(vec![text]));
        });
        let test = TestClient::open(server.options());
        test.wait_failure(not_connected, "unknown storage: 1");
    });
}

#[test]
fn wrong_protocols_are_refused_by_name() {
    for announced in [&b"Z4"[..], b"SSH-2.0-x", b""] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut options =
            Options::new(vec![Address::tcp("127.0.0.1", listener.local_addr().unwrap().port())]);
        options.wait_timeout = PATIENCE;
        let test = TestClient::open(options);
        let (mut socket, _) = listener.accept().unwrap();
        let mut out = BytesMut::new();
        put_frame(&mut out, announced).unwrap();
        socket.write_all(&out).unwrap();
        test.wait_failure(not_connected, "protocol");
    }
}

/// A server that accepts and closes is not stormed.
#[test]
fn an_early_disconnect_is_followed_by_a_delay() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let test = TestClient::open(Options::new(vec![Address::tcp(
        "127.0.0.1",
        listener.local_addr().unwrap().port(),
    )]));
    listener.accept().unwrap();
    let until = Instant::now() + Duration::from_secs(1);
    listener.set_nonblocking(true).unwrap();
    let mut count = 1;
    while Instant::now() < until {
        match listener.accept() {
            Ok(_) => count += 1,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    assert!((1..=15).contains(&count), "{count} connections in a second");
    drop(test);
}

#[test]
fn close_is_quick_in_every_state() {
    // Nobody listens.
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    drop(TestClient::open(Options::new(vec![Address::tcp("127.0.0.1", unused)])));
    // A server that accepts and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let test =
        TestClient::open(Options::new(vec![Address::tcp("127.0.0.1", silent.local_addr().unwrap().port())]));
    let _held = silent.accept().unwrap();
    drop(test);
    // A call that is never answered.
    let server = FakeServer::new(Encoding::Msgpack);
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(TestClient::open);
        let client = test.client.clone();
        let waiting = scope.spawn(move || client.read("ping", &Call::Ping));
        peer.expect(|call| matches!(call, Call::Ping));
        drop(test);
        assert!(waiting.join().unwrap().unwrap_err().is_disconnected());
        peer.wait_closed();
    });
}

#[test]
fn oids_of_a_lost_connection_are_not_used() {
    let server = FakeServer::new(Encoding::Msgpack);
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| server.serve(Tid(10)));
        let test = TestClient::open(server.options());
        test.client.wait_connected(PATIENCE).unwrap();
        let mut peer = Some(peer.join().unwrap());
        for first in [100, 200] {
            let client = test.client.clone();
            let asking = scope.spawn(move || client.new_oid());
            let id = peer.as_mut().unwrap().expect(|call| matches!(call, Call::NewOids { .. }));
            let oids = (first..first + 3).rev().map(|oid| oid_value(Oid(oid))).collect();
            peer.as_mut().unwrap().reply(&id, &Value::List(oids));
            assert_eq!(asking.join().unwrap().unwrap(), Oid(first));
            assert_eq!(test.client.new_oid().unwrap(), Oid(first + 1));
            peer.take();
            test.wait_told(|told| *told == Told::Disconnected);
            peer = Some(server.serve(Tid(10)));
            test.client.wait_connected(PATIENCE).unwrap();
        }
    });
}

/// A callback that asks the server gets an error instead of waiting for itself.
#[test]
fn a_call_from_a_callback_is_refused() {
    let server = FakeServer::new(Encoding::Msgpack);
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(TestClient::open);
        let client = test.client.clone();
        let committing = scope.spawn(move || {
            begin(&client)?;
            client.tpc_vote(&key())?;
            let inside = client.clone();
            let (sender, receiver) = channel();
            let finished = client.tpc_finish(
                &key(),
                Box::new(move |_| {
                    sender.send(inside.read("ping", &Call::Ping)).unwrap();
                    Ok(())
                }),
            );
            assert!(matches!(receiver.recv().unwrap(), Err(ClientError::InCallback(_))));
            finished
        });
        let id = peer.expect(|call| matches!(call, Call::Vote { .. }));
        peer.reply(&id, &Value::List(Vec::new()));
        let id = peer.expect(|call| matches!(call, Call::TpcFinish { .. }));
        peer.reply(&id, &tid_value(Tid(20)));
        assert_eq!(committing.join().unwrap().unwrap(), Tid(20));
    });
}

/// Who waits long tells the database meanwhile, rather than wake another thread for it.
#[test]
fn a_caller_that_waits_for_its_answer_tells_what_comes_before_it() {
    let server = FakeServer::new(Encoding::Msgpack);
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| server.serve(Tid(10)));
        let told_by = Arc::new(Mutex::new(None));
        let hook: Hook = {
            let told_by = told_by.clone();
            Box::new(move |told| {
                if matches!(told, Told::Invalidate(..)) {
                    *told_by.lock().unwrap() = Some(std::thread::current().id());
                }
            })
        };
        let test = TestClient::with_hook(server.options(), hook);
        test.client.wait_connected(PATIENCE).unwrap();
        let mut peer = peer.join().unwrap();
        let client = test.client.clone();
        let waiting = scope.spawn(move || client.call("pack", &Call::Pack { time: 1.0, wait: true }));
        let caller = waiting.thread().id();
        let id = peer.expect(|call| matches!(call, Call::Pack { .. }));
        // Who reads first is a race, so not every time; the background thread naps while the caller reads.
        let deadline = Instant::now() + PATIENCE;
        let mut tid = Tid(11);
        while *told_by.lock().unwrap() != Some(caller) {
            assert!(Instant::now() < deadline, "the caller tells nothing");
            tid = tid.next();
            let bytes = peer.invalidation_bytes(tid, &[Oid(1)]);
            peer.write(&bytes);
            test.wait_last_tid(tid);
        }
        peer.reply(&id, &Value::None);
        waiting.join().unwrap().unwrap();
    });
}

/// A panic in a callback ends the connection, not the waiting.
#[test]
fn a_panic_fails_the_waiters() {
    let server = FakeServer::new(Encoding::Msgpack);
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| server.serve(Tid(10)));
        let hook: Hook =
            Box::new(|told| assert!(!matches!(told, Told::Invalidate(Tid(12), _)), "as planned"));
        let test = TestClient::told_here(server.options(), false, hook);
        test.client.wait_connected(PATIENCE).unwrap();
        let mut peer = peer.join().unwrap();
        let client = test.client.clone();
        let waiting = scope.spawn(move || client.call("pack", &Call::Pack { time: 1.0, wait: true }));
        peer.expect(|call| matches!(call, Call::Pack { .. }));
        let bytes = peer.invalidation_bytes(Tid(12), &[Oid(1)]);
        peer.write(&bytes);
        let error = waiting.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("internal error"), "{error}");
        assert!(test.client.read("ping", &Call::Ping).unwrap_err().to_string().contains("internal error"));
    });
}

#[test]
fn the_writable_server_is_found_while_reading_from_another() {
    let servers = [FakeServer::new(Encoding::Msgpack), FakeServer::new(Encoding::Msgpack)];
    std::thread::scope(|scope| {
        let mut options = servers[0].options();
        options.access = Access::Fallback;
        options.timers.probe = Duration::from_millis(50);
        let test = TestClient::open(options);
        let mut peer = servers[0].accept();
        let id = peer.expect(|call| matches!(call, Call::Register { read_only: false, .. }));
        peer.fault(&id, "ZODB.POSException.ReadOnlyError", Value::Tuple(Vec::new()));
        let id = peer.expect(|call| matches!(call, Call::Register { read_only: true, .. }));
        peer.reply(&id, &tid_value(Tid(10)));
        peer.get_info();
        test.client.wait_connected(PATIENCE).unwrap();
        assert!(test.client.is_read_only());
        let port = servers[1].listener.local_addr().unwrap().port();
        test.client.set_addresses(vec![Address::tcp("127.0.0.1", port)]);
        let second = scope.spawn(|| servers[1].serve(Tid(10)));
        let _second = second.join().unwrap();
        test.wait_told(|told| *told == Told::Connected(2));
        test.client.wait_connected(PATIENCE).unwrap();
        assert!(!test.client.is_read_only());
        peer.wait_closed();
    });
}

/// A prefetched revision is ended by the invalidation behind it like any other.
#[test]
fn an_invalidation_behind_a_prefetched_object_ends_it() {
    for encoding in BOTH {
        let server = FakeServer::new(encoding);
        std::thread::scope(|scope| {
            let (test, mut peer) = server.meet(TestClient::open);
            test.client.prefetch(&[Oid(1), Oid(2)], Tid(11)).unwrap();
            for _ in 0..2 {
                peer.expect(|call| matches!(call, Call::LoadBefore { .. }));
            }
            let mut all = peer.loaded_bytes(Oid(1), Tid(11), b"one", Tid(5), None);
            all.extend_from_slice(&peer.invalidation_bytes(Tid(12), &[Oid(1), Oid(2)]));
            // As of the view before: a server that answers late says when it ended.
            all.extend_from_slice(&peer.loaded_bytes(Oid(2), Tid(11), b"two", Tid(5), Some(Tid(12))));
            peer.write(&all);
            test.wait_told(|told| matches!(told, Told::Invalidate(Tid(12), _)));
            let client = test.client.clone();
            let ping = scope.spawn(move || client.read("ping", &Call::Ping));
            let id = peer.expect(|call| matches!(call, Call::Ping));
            peer.reply(&id, &Value::None);
            ping.join().unwrap().unwrap();
            for oid in [Oid(1), Oid(2)] {
                assert_eq!(test.client.load_cached(oid, Tid(13)), None, "no longer current");
                assert_eq!(test.client.load_cached(oid, Tid(12)).unwrap().end_tid, Some(Tid(12)));
            }
        });
    }
}

/// Who finds another thread writing leaves its call in the buffer: it waits for nothing, and the writer sends it.
#[test]
fn a_call_behind_a_writer_that_waits_is_not_lost() {
    for encoding in BOTH {
        let server = FakeServer::new(encoding);
        std::thread::scope(|scope| {
            let (test, mut peer) = server.meet(TestClient::open);
            assert!(peer.received.is_empty());
            // More than the system takes for a peer that does not read.
            let specification = Value::Bytes(vec![0; 64 << 20].into());
            let client = test.client.clone();
            let asked = scope
                .spawn(move || client.call("undoInfo", &Call::UndoInfo { first: 0, last: 1, specification }));
            let mut length = [0; 4];
            peer.socket.read_exact(&mut length).unwrap();
            test.client.prefetch(&[Oid(1)], Tid(11)).unwrap();
            let mut large = vec![0; u32::from_be_bytes(length) as usize];
            peer.socket.read_exact(&mut large).unwrap();
            let id = decode_request(encoding, &large.into()).unwrap().id;
            peer.expect(|call| matches!(call, Call::LoadBefore { oid: Oid(1), before: Tid(11) }));
            peer.reply(&id, &Value::None);
            assert_eq!(asked.join().unwrap().unwrap(), Value::None);
        });
    }
}

/// What a server tells twice or out of order moves nothing back and harms no newer revision.
#[test]
fn the_last_tid_never_goes_back() {
    let server = FakeServer::new(Encoding::Pickle);
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(TestClient::open);
        let client = test.client.clone();
        let loading = scope.spawn(move || client.load_before(Oid(1), Tid(13)));
        peer.expect(|call| matches!(call, Call::LoadBefore { .. }));
        let mut all = peer.invalidation_bytes(Tid(12), &[Oid(1)]);
        all.extend_from_slice(&peer.loaded_bytes(Oid(1), Tid(13), b"new", Tid(12), None));
        for tid in [Tid(12), Tid(11), Tid(10), Tid(9)] {
            all.extend_from_slice(&peer.invalidation_bytes(tid, &[Oid(1)]));
        }
        peer.write(&all);
        assert_eq!(&loading.join().unwrap().unwrap().unwrap().data[..], b"new");
        let client = test.client.clone();
        let ping = scope.spawn(move || client.read("ping", &Call::Ping));
        let id = peer.expect(|call| matches!(call, Call::Ping));
        peer.reply(&id, &Value::None);
        ping.join().unwrap().unwrap();
        assert_eq!(test.client.last_tid(), Tid(12));
        let cached = test.client.load_cached(Oid(1), Tid(13)).unwrap();
        assert_eq!((&cached.data[..], cached.tid, cached.end_tid), (&b"new"[..], Tid(12), None));
    });
}

/// A verification that was cut off has verified nothing: the next one asks from the same tid.
#[test]
fn a_verification_that_is_cut_off_is_made_again() {
    let server = FakeServer::new(Encoding::Pickle);
    std::thread::scope(|scope| {
        let (test, mut peer) = server.meet(TestClient::open);
        let client = test.client.clone();
        let loading = scope.spawn(move || client.load_before(Oid(1), Tid(11)));
        peer.expect(|call| matches!(call, Call::LoadBefore { .. }));
        let bytes = peer.loaded_bytes(Oid(1), Tid(11), b"old", Tid(5), None);
        peer.write(&bytes);
        loading.join().unwrap().unwrap();
        drop(peer);
        test.wait_told(|told| *told == Told::Disconnected);
        // Told of a commit while it verifies, and cut off before the answer.
        let mut peer = server.accept();
        peer.register(Tid(15));
        peer.expect(|call| matches!(call, Call::GetInvalidations { tid: Tid(10) }));
        let bytes = peer.invalidation_bytes(Tid(16), &[Oid(2)]);
        peer.write(&bytes);
        drop(peer);
        let mut peer = server.accept();
        peer.register(Tid(17));
        assert_eq!(test.client.last_tid(), Tid(10), "nothing is verified yet");
        let id = peer.expect(|call| matches!(call, Call::GetInvalidations { tid: Tid(10) }));
        let changed = Value::List(vec![oid_value(Oid(1)), oid_value(Oid(2))]);
        peer.reply(&id, &Value::Tuple(vec![tid_value(Tid(17)), changed]));
        test.client.wait_connected(PATIENCE).unwrap();
        assert_eq!(test.client.last_tid(), Tid(17));
        assert_eq!(test.client.load_cached(Oid(1), Tid(18)), None);
    });
}

/// Of several servers one is used; what the others say, who answered later, is not applied.
#[test]
fn a_connection_that_came_too_late_is_not_heard() {
    let servers = [FakeServer::new(Encoding::Msgpack), FakeServer::new(Encoding::Msgpack)];
    std::thread::scope(|scope| {
        let mut options = servers[0].options();
        options.addresses.extend(servers[1].options().addresses);
        let test = TestClient::open(options);
        let late = scope.spawn(|| servers[1].accept());
        let mut used = servers[0].accept();
        let mut late = late.join().unwrap();
        used.register(Tid(10));
        test.client.wait_connected(PATIENCE).unwrap();
        let mut both = BytesMut::new();
        let id = late.expect(|call| matches!(call, Call::Register { .. }));
        encode_reply(late.encoding, &id, &tid_value(Tid(20)), &mut both).unwrap();
        both.extend_from_slice(&late.invalidation_bytes(Tid(99), &[Oid(1)]));
        late.write(&both);
        late.get_info();
        late.wait_closed();
        let client = test.client.clone();
        let ping = scope.spawn(move || client.read("ping", &Call::Ping));
        let id = used.expect(|call| matches!(call, Call::Ping));
        used.reply(&id, &Value::None);
        ping.join().unwrap().unwrap();
        assert_eq!(test.client.last_tid(), Tid(10));
        assert!(!test.told.try_iter().any(|told| matches!(told, Told::Invalidate(Tid(99), _))));
    });
}

/// Says when a caller has begun to wait: it asks whether it is to give up.
struct Waiting(Mutex<Sender<()>>);

impl DatabaseCallbacks for Waiting {
    fn invalidate(&self, _: Tid, _: &[Oid]) {}
    fn invalidate_cache(&self) {}
    fn connected(&self, _: &Session) {}
    fn disconnected(&self) {}
    fn stale_cache(&self) {}
    fn interrupted(&self) -> Result<(), zeo_rs::client::CallbackError> {
        let _ = self.0.lock().unwrap().send(());
        Ok(())
    }
}

/// A thread whose `tpc_begin` waits for a connection has the turn, but not the lock: another's calls are answered at once,
/// and its own transaction can be aborted.
#[test]
fn who_waits_to_begin_keeps_nobody_from_an_answer() {
    let server = FakeServer::new(Encoding::Msgpack);
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| server.serve(Tid(10)));
        let (sender, waiting) = channel();
        let client = Client::new(server.options(), Arc::new(Waiting(Mutex::new(sender)))).unwrap();
        client.connect().unwrap();
        client.wait_connected(PATIENCE).unwrap();
        // It connects again, and is not answered yet.
        drop(peer.join().unwrap());
        let other_thread = client.clone();
        let beginner = scope.spawn(move || {
            while other_thread.is_connected() {
                std::thread::yield_now();
            }
            begin(&other_thread)
        });
        waiting.recv_timeout(PATIENCE).unwrap();
        let other = Value::Int(78);
        assert!(!client.is_committing(&other) && !client.is_committing(&key()));
        let stored = client.store(&other, Oid(1), Tid::ZERO, Bytes::from_static(b"x"));
        assert!(matches!(stored, Err(ClientError::Transaction(_))), "{stored:?}");
        client.tpc_abort(&key()).unwrap();
        assert!(!beginner.is_finished(), "the answers above waited for it");
        let _peer = server.serve(Tid(10));
        let begun = beginner.join().unwrap();
        assert!(
            matches!(&begun, Err(ClientError::Transaction(text)) if text.contains("aborted")),
            "{begun:?}"
        );
        begin(&client).unwrap();
        assert!(client.is_committing(&key()));
        client.close();
    });
}

/// A store that the server does not read keeps no other thread from asking about the transaction, or from aborting it.
#[test]
fn a_store_that_is_not_read_can_be_aborted() {
    for encoding in BOTH {
        let server = FakeServer::new(encoding);
        std::thread::scope(|scope| {
            let (test, mut peer) = server.meet(TestClient::open);
            let [client, storer, asker, aborter] = std::array::from_fn(|_| test.client.clone());
            begin(&client).unwrap();
            // More than the system takes for a peer that does not read.
            let data = Bytes::from(vec![0; 64 << 20]);
            let storing = scope.spawn(move || storer.store(&key(), Oid(1), Tid::ZERO, data));
            peer.expect(|call| matches!(call, Call::TpcBegin { .. }));
            let (sender, answer) = channel();
            scope.spawn(move || sender.send(asker.is_committing(&key())));
            assert_eq!(
                answer.recv_timeout(PATIENCE).inspect_err(|_| client.start_close()),
                Ok(true),
                "it waits for the store"
            );
            assert!(!storing.is_finished());
            let aborting = scope.spawn(move || aborter.tpc_abort(&key()));
            peer.expect(|call| matches!(call, Call::Storea { .. }));
            let id = peer.expect(|call| matches!(call, Call::TpcAbort { .. }));
            peer.reply(&id, &Value::None);
            storing.join().unwrap().unwrap();
            aborting.join().unwrap().unwrap();
            assert!(!client.is_committing(&key()));
        });
    }
}

/// A cache file as of `Tid(60)`: object 1 is its newest, 4 has a revision that ended late.
fn cached(directory: &tempfile::TempDir) -> std::path::PathBuf {
    let path = directory.path().join("cache");
    let (cache, _) = Cache::open(&path, 1 << 20).unwrap();
    for (oid, tid, end) in [(1, 50, None), (2, 10, None), (3, 40, None), (4, 5, Some(45)), (4, 45, None)] {
        cache.store(Oid(oid), Tid(tid), end.map(Tid), format!("{oid} {tid}").as_bytes());
    }
    cache.set_last_tid(Tid(60));
    cache.close();
    path
}

/// What the server says of the cache's revisions, newest first, and the oids that it says have changed since.
fn open_cached(
    path: &std::path::Path,
    found: &[(u64, u64, Option<&[u8]>)],
    changed: &[u64],
) -> (Arc<Client>, Peer) {
    let server = FakeServer::new(Encoding::Msgpack);
    let mut options = server.options();
    options.cache_path = Some(path.to_owned());
    let (sender, _) = channel();
    let client = Client::new(options, Arc::new(Waiting(Mutex::new(sender)))).unwrap();
    client.connect().unwrap();
    let mut peer = server.accept();
    peer.register(Tid(70));
    let changed = changed.iter().map(|&oid| oid_value(Oid(oid))).collect();
    let invalidations = Value::Tuple(vec![tid_value(Tid(70)), Value::List(changed)]);
    let mut found = found.iter();
    let mut serve = || {
        loop {
            let (id, call) = peer.call().expect("a call");
            match call {
                Call::LoadSerial { oid, serial } => {
                    let &(of, at, data) = found.next().expect("no more is asked for");
                    assert_eq!((oid, serial), (Oid(of), Tid(at)));
                    match data {
                        Some(data) => peer.reply(&id, &Value::Bytes(Bytes::copy_from_slice(data))),
                        None => peer.fault(&id, "ZODB.POSException.POSKeyError", Value::Tuple(Vec::new())),
                    }
                }
                Call::GetInvalidations { tid: Tid(60) } => peer.reply(&id, &invalidations),
                Call::Ping => return peer.reply(&id, &Value::None),
                other => panic!("unexpected {other:?}"),
            }
        }
    };
    std::thread::scope(|scope| {
        let serving = scope.spawn(&mut serve);
        client.wait_connected(PATIENCE).unwrap();
        // The last call.
        client.read("ping", &Call::Ping).unwrap();
        serving.join().unwrap();
    });
    assert!(found.next().is_none(), "more should have been asked for");
    (client, peer)
}

fn covered(client: &Client) -> Vec<u64> {
    (1..5).filter(|&oid| client.cache().covers(Oid(oid), Tid::MAX)).collect()
}

/// The newest object of the cache was changed and packed while the client was away: the rest is as good as before.
#[test]
fn a_cache_whose_newest_object_was_packed_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = cached(&directory);
    let (client, _peer) = open_cached(&path, &[(1, 50, None), (4, 45, Some(b"4 45"))], &[1]);
    assert_eq!(covered(&client), [2, 3, 4]);
    assert_eq!(client.last_tid(), Tid(70));
    client.close();
    assert!(!path.with_extension("aside").exists());
}

/// An object that nothing refers to any more was packed away without a transaction. What the cache knows to have happened
/// after the newest revision that both have is forgotten, in the file too: it may have been another history.
#[test]
fn of_a_cache_only_what_the_server_has_too_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = cached(&directory);
    let found: [(u64, u64, Option<&[u8]>); 4] =
        [(1, 50, None), (1, 50, None), (4, 45, None), (3, 40, Some(b"3 40"))];
    let (client, _peer) = open_cached(&path, &found, &[]);
    assert_eq!(covered(&client), [2, 3]);
    assert!(
        client.load_cached(Oid(4), Tid(20)).is_none(),
        "it ended in a transaction that may never have been"
    );
    client.close();
    let (cache, _) = Cache::open(&path, 1 << 20).unwrap();
    assert_eq!((cache.len(), cache.covers(Oid(4), Tid(20))), (2, false));
}

/// The server has none of it, or something else under the same tid.
#[test]
fn a_cache_of_another_database_is_moved_aside() {
    let nothing = [(1, 50, None), (4, 45, None), (3, 40, None), (2, 10, None)];
    let other: [(u64, u64, Option<&[u8]>); 2] = [(1, 50, None), (4, 45, Some(b"another"))];
    for (found, changed) in [(&nothing[..], &[1][..]), (&other, &[1]), (&[(1, 50, Some(b"another"))], &[])] {
        let directory = tempfile::tempdir().unwrap();
        let path = cached(&directory);
        let (client, _peer) = open_cached(&path, found, changed);
        assert!(client.cache().is_empty() && client.last_tid() == Tid(70));
        client.close();
        assert!(path.with_extension("aside").exists());
    }
}

/// Servers that offer a client of their machine a Unix socket in their answer to `get_info`.
#[cfg(target_os = "linux")]
mod local {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    use socket2::SockRef;

    use super::*;

    /// A listening socket with an abstract name of its own.
    struct Local {
        listener: UnixListener,
        name: String,
    }

    impl Local {
        fn new() -> Self {
            static COUNT: AtomicUsize = AtomicUsize::new(0);
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("zeo-rs-test-{}-{number}", std::process::id());
            let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
            let listener = UnixListener::bind_addr(&address).unwrap();
            // Of `accept` too.
            SockRef::from(&listener).set_read_timeout(Some(PATIENCE)).unwrap();
            Self { listener, name }
        }

        fn accept(&self) -> UnixStream {
            let (socket, _) = self.listener.accept().expect("the client comes");
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        }

        fn has_been_left_alone(&self) -> bool {
            self.listener.set_nonblocking(true).unwrap();
            self.listener.accept().is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
        }

        fn offer(&self, client: &str) -> Value {
            offer(&self.name, client)
        }
    }

    fn offer(name: &str, client: &str) -> Value {
        Value::Tuple(vec![name.into(), client.into()])
    }

    /// The client's calls come here.
    fn ping(client: &Client, peer: &mut Peer) {
        std::thread::scope(|scope| {
            let ping = scope.spawn(|| client.read("ping", &Call::Ping));
            let id = peer.expect(|call| matches!(call, Call::Ping));
            peer.reply(&id, &Value::None);
            ping.join().unwrap().unwrap();
        });
    }

    #[test]
    fn calls_go_over_the_local_socket() {
        for encoding in BOTH {
            let (server, local, another) = (FakeServer::new(encoding), Local::new(), Local::new());
            std::thread::scope(|scope| {
                let peers = scope.spawn(|| {
                    let mut tcp = server.accept();
                    tcp.register_and_offer(Tid(10), local.offer(&tcp.client));
                    let mut peer = Peer::greet(local.accept(), String::new(), encoding);
                    // Nobody goes on from there, whatever else is offered.
                    peer.register_and_offer(Tid(12), another.offer(&tcp.client));
                    (tcp, peer)
                });
                let test = TestClient::open(server.options());
                test.client.wait_connected(PATIENCE).unwrap();
                let (mut tcp, mut peer) = peers.join().unwrap();
                tcp.wait_closed();
                assert_eq!(test.client.last_tid(), Tid(12), "as the connection has it that is used");
                ping(&test.client, &mut peer);
                test.wait_told(|told| *told == Told::Connected(1));
                // Shown as what was asked for: names of storages and `sortKey` are made of it.
                let session = test.client.session().unwrap();
                let port = server.listener.local_addr().unwrap().port();
                assert_eq!((&session.host[..], session.port), ("127.0.0.1", Some(port)));

                // The next connection begins where every one does.
                drop(peer);
                let mut tcp = server.serve(Tid(12));
                test.wait_told(|told| *told == Told::Connected(2));
                test.client.wait_connected(PATIENCE).unwrap();
                ping(&test.client, &mut tcp);
                assert!(another.has_been_left_alone());
            });
        }
    }

    /// The second connection asks for the same as the first.
    #[test]
    fn access_and_label_are_the_same_over_the_local_socket() {
        fn serve(peer: &mut Peer, offer: Option<Value>) {
            let register = |read_only| Call::Register { storage: "main".into(), read_only };
            let id = peer.expect(|call| *call == register(false));
            peer.fault(&id, "ZODB.POSException.ReadOnlyError", Value::Tuple(Vec::new()));
            let id = peer.expect(|call| *call == register(true));
            peer.reply(&id, &tid_value(Tid(10)));
            let (_, call) = peer.call().unwrap();
            assert_eq!(call, Call::SetClientLabel { label: "web 7".into() });
            peer.answer_info(offer.map(|offer| ("zeo_rs_local".into(), offer)));
        }

        let (server, local) = (FakeServer::new(Encoding::Msgpack), Local::new());
        std::thread::scope(|scope| {
            let mut options = server.options();
            options.access = Access::Fallback;
            options.storage = "main".into();
            options.label = Some("web 7".into());
            let peers = scope.spawn(|| {
                let mut tcp = server.accept();
                let offer = local.offer(&tcp.client);
                serve(&mut tcp, Some(offer));
                let mut peer = Peer::greet(local.accept(), String::new(), server.encoding);
                serve(&mut peer, None);
                (tcp, peer)
            });
            let test = TestClient::open(options);
            test.client.wait_connected(PATIENCE).unwrap();
            let (_tcp, mut peer) = peers.join().unwrap();
            assert!(test.client.is_read_only());
            ping(&test.client, &mut peer);
        });
    }

    /// Nobody there, somebody else's, nonsense: the client stays where it is, and looks nowhere else.
    #[test]
    fn who_is_offered_nothing_useful_stays_with_tcp() {
        let local = Local::new();
        let name = || Value::from(&local.name[..]);
        let offers: [&(dyn Fn(&str) -> Value + Sync); 13] = [
            &|client| offer("zeo-rs-test-nobody", client),
            &|client| offer("", client),
            &|client| offer(&"n".repeat(1000), client),
            // As behind a proxy: the server sees another client.
            &|_| local.offer("127.0.0.1:1"),
            &|_| local.offer(""),
            &|client| local.offer(&format!("{client} ")),
            &|client| local.offer(&client.replace("127.0.0.1", "localhost")),
            &|_| Value::None,
            &|_| name(),
            &|_| Value::Tuple(vec![name()]),
            &|client| Value::Tuple(vec![name(), client.into(), Value::None]),
            &|client| Value::Tuple(vec![name(), Value::Bytes(client.to_owned().into())]),
            &|client| Value::Dict(vec![(name(), client.into())]),
        ];
        for (encoding, offer) in BOTH.into_iter().flat_map(|encoding| offers.map(|offer| (encoding, offer))) {
            let server = FakeServer::new(encoding);
            std::thread::scope(|scope| {
                let peer = scope.spawn(|| {
                    let mut peer = server.accept();
                    let offer = offer(&peer.client);
                    peer.register_and_offer(Tid(10), offer);
                    peer
                });
                let test = TestClient::open(server.options());
                test.client.wait_connected(PATIENCE).unwrap();
                ping(&test.client, &mut peer.join().unwrap());
            });
        }
        assert!(local.has_been_left_alone());
    }

    /// What is no server, or not this one, is left again, at once.
    #[test]
    fn a_local_socket_that_does_not_register_is_left_again() {
        fn greets_with(mut socket: UnixStream, protocol: &[u8]) -> UnixStream {
            let mut out = BytesMut::new();
            put_frame(&mut out, protocol).unwrap();
            let _ = socket.write_all(&out);
            socket
        }
        fn register(socket: UnixStream) -> (Peer, MessageId) {
            let mut peer = Peer::greet(socket, String::new(), Encoding::Msgpack);
            let id = peer.expect(|call| matches!(call, Call::Register { .. }));
            (peer, id)
        }
        let cases: [fn(UnixStream); 5] = [
            drop,
            |socket| drop(greets_with(socket, b"SSH-2.0-x").read(&mut [0; 100])),
            |socket| drop(register(socket)),
            |socket| {
                let (mut peer, id) = register(socket);
                let text = Value::Str("unknown storage: 1".into());
                peer.fault(&id, "builtins.ValueError", Value::Tuple(vec![text]));
                peer.wait_closed();
            },
            |socket| {
                let (mut peer, id) = register(socket);
                peer.reply(&id, &tid_value(Tid(10)));
                let id = peer.expect(|call| matches!(call, Call::GetInfo));
                peer.reply(&id, &Value::Int(5));
                peer.wait_closed();
            },
        ];
        for case in cases {
            let (server, local) = (FakeServer::new(Encoding::Msgpack), Local::new());
            std::thread::scope(|scope| {
                let peer = scope.spawn(|| {
                    let mut peer = server.accept();
                    peer.register_and_offer(Tid(10), local.offer(&peer.client));
                    case(local.accept());
                    peer
                });
                let test = TestClient::open(server.options());
                test.client.wait_connected(PATIENCE).unwrap();
                let mut peer = peer.join().unwrap();
                ping(&test.client, &mut peer);
                assert_eq!(test.client.session().unwrap().generation, 1, "never disconnected");
            });
        }
    }

    /// It is given two seconds, not the time of a handshake; what the server says meanwhile is heard.
    #[test]
    fn a_local_socket_that_says_nothing_holds_nobody_up_for_long() {
        let (server, local) = (FakeServer::new(Encoding::Msgpack), Local::new());
        std::thread::scope(|scope| {
            let mut options = server.options();
            options.timers.handshake = PATIENCE;
            let peers = scope.spawn(|| {
                let mut peer = server.accept();
                peer.register_and_offer(Tid(10), local.offer(&peer.client));
                let silent = local.accept();
                let meanwhile = peer.invalidation_bytes(Tid(11), &[Oid(1)]);
                peer.write(&meanwhile);
                (peer, silent)
            });
            let since = Instant::now();
            let test = TestClient::open(options);
            test.client.wait_connected(PATIENCE).unwrap();
            let took = since.elapsed();
            let (mut peer, mut silent) = peers.join().unwrap();
            // A server that is busy should not lose its clients to TCP.
            assert!((Duration::from_secs(1)..PATIENCE / 2).contains(&took), "{took:?}");
            assert_eq!(silent.read(&mut [0; 100]).unwrap(), 0, "closed, without a word");
            test.wait_told(|told| *told == Told::Invalidate(Tid(11), vec![Oid(1)]));
            ping(&test.client, &mut peer);
            assert_eq!(test.client.last_tid(), Tid(11));
        });
    }
}
