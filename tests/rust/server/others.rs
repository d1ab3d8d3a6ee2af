//! What one client or the server itself is doing, and what the others notice of it: nothing, or all of it in order.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::pickle::Value;
use zeo_rs::server::ServerConfig;
use zeo_rs::storage::{Conflict, ConflictResolver, Resolution, Storage};
use zeo_rs::wire::{Call, Encoding};

use crate::peer::{Gate, Gated, PATIENCE, Peer, memory, serve, serve_all};

/// Merges everything, when the test lets it.
#[derive(Default)]
struct Gatekeeper(Gate);

impl ConflictResolver for Gatekeeper {
    fn resolve(&self, _: &dyn Storage, _: &Conflict, _: Option<Bytes>) -> Resolution {
        self.0.pass();
        Resolution::Resolved(Bytes::from_static(b"merged"))
    }
}

#[test]
fn conflict_resolution_holds_up_nobody() {
    let resolver = Arc::new(Gatekeeper::default());
    let config = ServerConfig { resolver: Arc::clone(&resolver) as _, ..ServerConfig::default() };
    let server = serve(config, memory());
    let mut a = Peer::new(&server, Encoding::Pickle);
    let first = a.commit(1, Tid::ZERO, b"one").unwrap();
    let second = a.commit(1, first, b"two").unwrap();
    resolver.0.shut();
    // more of them than the event loop has threads
    let mut conflicting = Vec::new();
    for oid in 0..8 {
        let mut peer = Peer::new(&server, Encoding::Msgpack);
        if oid > 0 {
            let first = peer.commit(100 + oid, Tid::ZERO, b"one").unwrap();
            peer.commit(100 + oid, first, b"two").unwrap();
        }
        peer.begin(1);
        peer.store(1, if oid == 0 { 1 } else { 100 + oid }, first, b"three");
        let vote = peer.send(&Call::Vote { txn: Value::Int(1) }, false);
        resolver.0.wait_for(oid as usize + 1);
        conflicting.push((peer, vote));
    }
    let mut b = Peer::new(&server, Encoding::Msgpack);
    assert_eq!(b.load(1, Tid::MAX).unwrap(), Some(("two".into(), second, None)));
    let other = b.commit(2, Tid::ZERO, b"other").unwrap();
    a.ping();
    assert_eq!(a.invalidations().last(), Some(&(other, vec![Oid(2)])));
    for (peer, vote) in &mut conflicting {
        peer.ping_before(vote);
    }
    resolver.0.open();
    for (mut peer, vote) in conflicting {
        assert_eq!(peer.answer(&vote).unwrap().as_items().map(<[Value]>::len), Some(1));
        peer.finish(1).unwrap();
    }
    b.ping();
    assert_eq!(b.load(1, Tid::MAX).unwrap().unwrap().0, "merged");
}

#[test]
fn a_long_history_holds_up_nobody() {
    let storage = Gated::new(true);
    let server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let mut a = Peer::new(&server, Encoding::Pickle);
    let first = a.commit(1, Tid::ZERO, b"one").unwrap();
    storage.histories.shut();
    let history = a.send(&Call::History { oid: Oid(1), size: 1_000_000 }, false);
    storage.histories.wait_for(1);
    a.ping_before(&history);
    assert_eq!(a.load(1, Tid::MAX).unwrap(), Some(("one".into(), first, None)));
    let mut b = Peer::new(&server, Encoding::Msgpack);
    let second = b.commit(1, first, b"two").unwrap();
    storage.histories.open();
    // as of when it was asked
    let entries = a.answer(&history).unwrap();
    let tids: Vec<_> =
        entries.as_items().unwrap().iter().map(|entry| entry.get("tid").unwrap().as_tid()).collect();
    assert_eq!(tids, [Some(first)]);
    assert_eq!(a.invalidations(), [(second, vec![Oid(1)])]);
}

/// The engine shows a transaction a moment before it is published; no call of another client does.
#[test]
fn nothing_is_read_before_its_invalidation() {
    let storage = Gated::new(true);
    let server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let mut a = Peer::new(&server, Encoding::Pickle);
    let first = a.commit(1, Tid::ZERO, b"one").unwrap();
    let mut b = Peer::new(&server, Encoding::Msgpack);
    a.begin(2);
    a.store(2, 1, first, b"two");
    a.store(2, 7, Tid::ZERO, b"new");
    a.vote(2).unwrap();
    storage.publishes.shut();
    let finish = a.send(&Call::TpcFinish { txn: Value::Int(2) }, false);
    storage.publishes.wait_for(2);
    let second = storage.last_tid();
    assert!(second > first);
    let read = |b: &mut Peer| {
        let tids = |entries: Value| -> Vec<Tid> {
            let tid = |entry: &Value| entry.get("tid").unwrap().as_tid().unwrap();
            entries.as_items().unwrap().iter().map(tid).collect()
        };
        let history = tids(b.call(Call::History { oid: Oid(1), size: 1 }).unwrap());
        let all = tids(b.call(Call::History { oid: Oid(1), size: 10 }).unwrap());
        let created = b.call(Call::History { oid: Oid(7), size: 1 }).is_ok();
        let serial = b.call(Call::LoadSerial { oid: Oid(1), serial: second }).is_ok();
        let current = b.call(Call::GetTid { oid: Oid(1) }).unwrap().as_tid().unwrap();
        let undo = b.call(Call::UndoLog { first: 0, last: -20 }).unwrap().as_items().unwrap().len();
        let record = b.call(Call::RecordIternext { next: None }).unwrap();
        let record = record.as_items().unwrap()[1].as_tid().unwrap();
        let next = b.call(Call::RecordIternext { next: Some(Oid(2)) }).is_ok();
        let iid = b.call(Call::IteratorStart { start: None, stop: None }).unwrap().as_int().unwrap();
        let mut transactions = 0;
        while b.call(Call::IteratorNext { iid }).unwrap() != Value::None {
            transactions += 1;
        }
        let last = b.call(Call::LastTransaction).unwrap().as_tid().unwrap();
        ((history, all, created, serial, current), (undo, record, next, transactions, last))
    };
    let before = ((vec![first], vec![first], false, false, first), (1, first, false, 1, first));
    assert_eq!(read(&mut b), before);
    assert_eq!(b.invalidations(), []);
    storage.publishes.open();
    assert_eq!(a.answer(&finish).unwrap().as_tid(), Some(second));
    let after = ((vec![second], vec![second, first], true, true, second), (2, second, true, 2, second));
    assert_eq!(read(&mut b), after);
    assert_eq!(b.invalidations(), [(second, vec![Oid(1), Oid(7)])]);
}

/// The storage takes longer over a vote than the transaction may hold its locks: it ends all the same, and whoever waits goes on.
#[test]
fn a_vote_that_outlasts_its_time_lets_the_next_one_in() {
    let storage = Gated::new(true);
    let timeout = Duration::from_millis(50);
    let config = ServerConfig { transaction_timeout: Some(timeout), ..ServerConfig::default() };
    let server = serve(config, Arc::clone(&storage) as Arc<dyn Storage>);
    let mut a = Peer::new(&server, Encoding::Pickle);
    a.begin(1);
    a.store(1, 1, Tid::ZERO, b"x");
    storage.votes.shut();
    let began = Instant::now();
    a.send(&Call::Vote { txn: Value::Int(1) }, false);
    storage.votes.wait_for(1);
    std::thread::sleep(timeout.saturating_sub(began.elapsed()) + timeout);
    storage.votes.open();
    a.expect_closed();
    // whose own vote may be too slow on a busy machine; then it is dropped, too, but never waits for ever
    let committed = (0..20).any(|_| {
        let mut b = Peer::new(&server, Encoding::Msgpack);
        matches!(b.try_commit(1, &[(1, Tid::ZERO, b"y")]), Some(Ok(_)))
    });
    assert!(committed);
    assert_eq!(storage.inner.load_before(Oid(1), Tid::MAX).unwrap().unwrap().data, "y");
}

/// Clients commit as fast as they can while the server stops: what was acknowledged is there, what was not is whole or not there.
#[test]
fn a_stop_in_the_midst_of_commits_loses_nothing_acknowledged() {
    const CLIENTS: u64 = 6;
    let storage = memory();
    let mut server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let acknowledged = Mutex::new(BTreeSet::new());
    let peers: Vec<Peer> = (0..CLIENTS).map(|_| Peer::new(&server, Encoding::Msgpack)).collect();
    std::thread::scope(|scope| {
        for (number, mut peer) in (0..).zip(peers) {
            let acknowledged = &acknowledged;
            scope.spawn(move || {
                // pairs of objects, one of them shared with the next client: votes wait for each other
                let (own, shared) = (1 + number, 1 + (number + 1) % CLIENTS);
                loop {
                    let serial = |peer: &mut Peer, oid| match peer.try_load(oid) {
                        Some(Ok(Some((_, tid, _)))) => Some(tid),
                        Some(_) => Some(Tid::ZERO),
                        None => None,
                    };
                    let (Some(one), Some(two)) = (serial(&mut peer, own), serial(&mut peer, shared)) else {
                        return;
                    };
                    let stores = [(own, one, &b"x"[..]), (shared, two, &b"y"[..])];
                    match peer.try_commit(1, &stores) {
                        Some(Ok(tid)) => assert!(acknowledged.lock().unwrap().insert(tid)),
                        Some(Err(_)) => {}
                        None => return,
                    }
                }
            });
        }
        let start = Instant::now();
        while acknowledged.lock().unwrap().len() < 50 {
            assert!(start.elapsed() < PATIENCE);
            std::thread::yield_now();
        }
        server.stop().unwrap();
    });
    let mut there = BTreeSet::new();
    let mut transactions = storage.iterate(None, None).unwrap();
    while let Some((info, mut records)) = transactions.next_txn().unwrap() {
        there.insert(info.tid);
        let mut count = 0;
        while records.next_record().unwrap().is_some() {
            count += 1;
        }
        assert_eq!(count, 2);
    }
    let acknowledged = acknowledged.into_inner().unwrap();
    assert!(acknowledged.is_subset(&there));
    assert!(there.len() - acknowledged.len() <= CLIENTS as usize);
}

#[test]
fn a_storage_that_hangs_leaves_the_others_their_threads() {
    let hanging = Gated::slow();
    let storages = vec![("1".into(), memory() as _), ("hangs".into(), Arc::clone(&hanging) as _)];
    let server = serve_all(ServerConfig::default(), storages);
    hanging.loads.shut();
    // more calls than the runtime has threads that may block
    let mut stuck: Vec<Peer> = (0..40).map(|_| Peer::unregistered(&server, Encoding::Msgpack)).collect();
    for peer in &mut stuck {
        peer.register("hangs", false).unwrap();
        for oid in 0..16 {
            peer.send(&Call::LoadBefore { oid: Oid(oid), before: Tid::MAX }, false);
        }
    }
    hanging.loads.wait_for(64);
    let mut other = Peer::new(&server, Encoding::Msgpack);
    other.call(Call::NewOids { count: 1 }).unwrap();
    other.commit(1, Tid::ZERO, b"one").unwrap();
    other.call(Call::History { oid: Oid(1), size: 1 }).unwrap();
    // each of them gets its turn
    hanging.loads.open();
    hanging.loads.wait_for(40 * 16);
    for peer in &mut stuck {
        for _ in 0..16 {
            assert!(peer.loaded().is_err());
        }
    }
}

/// Nor a pack or an undo that waits behind one.
#[test]
fn a_hung_client_stops_only_who_wants_its_objects() {
    let config =
        ServerConfig { transaction_timeout: Some(Duration::from_secs(600)), ..ServerConfig::default() };
    let server = serve(config, memory());
    let mut hung = Peer::new(&server, Encoding::Pickle);
    hung.begin(1);
    hung.store(1, 1, Tid::ZERO, b"one");
    hung.vote(1).unwrap();
    let mut packing = Peer::new(&server, Encoding::Msgpack);
    let pack = packing.send(&Call::Pack { time: 1e9, wait: true }, false);
    // with a tid of its own, as a copy has it: that takes the whole storage
    let mut whole = Peer::new(&server, Encoding::Msgpack);
    let mut begin = Call::TpcBegin {
        txn: Value::Int(1),
        user: Bytes::new(),
        description: Bytes::new(),
        extension: Value::Dict(Vec::new()),
        tid: Some(Tid::from_unix(4e9).unwrap()),
        status: b' ',
    };
    whole.cast(begin.clone());
    whole.store(1, 2, Tid::ZERO, b"two");
    let vote = whole.send(&Call::Vote { txn: Value::Int(1) }, false);
    whole.ping_before(&vote);
    let mut other = Peer::new(&server, Encoding::Pickle);
    let third = other.commit(3, Tid::ZERO, b"three").unwrap();
    whole.ping_before(&vote);
    other.commit(3, third, b"again").unwrap();
    hung.abort(1);
    assert_eq!(whole.answer(&vote).unwrap(), Value::Tuple(Vec::new()));
    whole.abort(1);
    packing.answer(&pack).unwrap();
    // what no storage could have is refused, with its reason
    if let Call::TpcBegin { tid, .. } = &mut begin {
        *tid = Some(Tid::MAX);
    }
    whole.cast(begin);
    let refused = whole.vote(1).unwrap_err();
    assert!(format!("{refused:?}").contains("larger than any"), "{refused:?}");
    whole.begin(1);
    whole.store(1, u64::MAX, Tid::ZERO, b"x");
    let refused = whole.vote(1).unwrap_err();
    assert!(format!("{refused:?}").contains("0xffffffffffffffff"), "{refused:?}");
    assert!(other.commit(4, Tid::ZERO, b"four").unwrap() < Tid::from_unix(4e9).unwrap());
}

#[test]
fn times_of_packs_that_mean_nothing_are_refused() {
    let server = serve(ServerConfig::default(), memory());
    let mut peer = Peer::new(&server, Encoding::Msgpack);
    peer.commit(1, Tid::ZERO, b"one").unwrap();
    for time in [1e300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e300, 1e15] {
        let fault = peer.call(Call::Pack { time, wait: true }).unwrap_err();
        assert!(format!("{fault:?}").contains("Unix time"), "{fault:?}");
        peer.cast(Call::SetClientLabel { label: "still here".into() });
    }
    for time in [-5.0, 0.0, 4e9] {
        peer.call(Call::Pack { time, wait: true }).unwrap();
    }
    assert_eq!(peer.call(Call::ServerStatus).unwrap().get("pack"), Some(&Value::None));
}

#[test]
fn transactions_that_end_with_their_connection_are_counted() {
    let config =
        ServerConfig { transaction_timeout: Some(Duration::from_millis(100)), ..ServerConfig::default() };
    let server = serve(config, memory());
    let mut watcher = Peer::new(&server, Encoding::Pickle);
    let mut gone = Peer::new(&server, Encoding::Pickle);
    gone.begin(1);
    gone.ping();
    drop(gone);
    let mut hung = Peer::new(&server, Encoding::Msgpack);
    hung.begin(1);
    hung.vote(1).unwrap();
    hung.expect_closed();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = watcher.call(Call::ServerStatus).unwrap();
        let number = |name| status.get(name).and_then(Value::as_int);
        if (number("aborts"), number("transaction_timeouts"), number("active_txns"))
            == (Some(2), Some(1), Some(0))
        {
            break;
        }
        assert!(Instant::now() < deadline, "{status:?}");
    }
}
