//! What a connection reads, in which order: S1 to S7 of `docs/ordering.md`.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use zeo_rs::ids::{Oid, Tid};
use zeo_rs::pickle::Value;
use zeo_rs::server::{ServerConfig, ServerHandle};
use zeo_rs::storage::Storage;
use zeo_rs::wire::{Call, Encoding, Notice, ServerMessage};

use crate::peer::{Gated, PATIENCE, Peer, memory, serve};

#[test]
fn others_hear_of_a_commit_before_its_committer_can_tell_them() {
    let server = serve(ServerConfig::default(), memory());
    let mut a = Peer::new(&server, Encoding::Pickle);
    let mut b = Peer::new(&server, Encoding::Msgpack);
    let mut last = Tid::ZERO;
    for round in 0..200u32 {
        let tid = a.commit(1, last, &round.to_be_bytes()).unwrap();
        assert!(tid > last);
        // S4: `info`, then the reply; no invalidation of its own.
        assert!(matches!(&a.notices[..], [Notice::Info(_)]), "{:?}", a.notices);
        a.notices.clear();
        // S5: a round trip is a barrier.
        b.ping();
        assert_eq!(b.invalidations(), [(tid, vec![Oid(1)])]);
        b.notices.clear();
        assert_eq!(b.call(Call::LastTransaction).unwrap(), tid.into());
        last = tid;
    }
    assert_eq!(b.load(1, Tid::MAX).unwrap().unwrap().1, last);
}

#[test]
fn an_empty_transaction_is_announced_too() {
    let server = serve(ServerConfig::default(), memory());
    let mut a = Peer::new(&server, Encoding::Pickle);
    let mut b = Peer::new(&server, Encoding::Pickle);
    a.begin(1);
    a.vote(1).unwrap();
    let tid = a.finish(1).unwrap();
    assert_eq!(b.notice(), Notice::InvalidateTransaction { tid, oids: vec![] });
}

#[test]
fn a_load_that_was_overtaken_by_an_invalidation_is_not_current() {
    let storage = Gated::new(false);
    let server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let mut a = Peer::new(&server, Encoding::Pickle);
    let mut b = Peer::new(&server, Encoding::Pickle);
    let first = a.commit(1, Tid::ZERO, b"old").unwrap();
    let other = a.commit(2, Tid::ZERO, b"other").unwrap();
    b.ping();
    // B's loads have read the old state, and wait; meanwhile A commits.
    storage.loads.shut();
    for oid in [1, 2] {
        b.send(&Call::LoadBefore { oid: Oid(oid), before: Tid::MAX }, false);
    }
    storage.loads.wait_for(2);
    let second = a.commit(1, first, b"new").unwrap();
    // The loads of B hold up nothing else of B.
    b.notices.clear();
    b.ping();
    assert_eq!(b.invalidations(), [(second, vec![Oid(1)])]);
    storage.loads.open();
    let mut answers = HashMap::new();
    for _ in 0..2 {
        match b.message().unwrap() {
            ServerMessage::Loaded { oid, loaded, .. } => answers.insert(oid.0, loaded.unwrap()),
            other => panic!("{other:?}"),
        };
    }
    assert_eq!(answers[&1], ("old".into(), first, Some(second)));
    assert_eq!(answers[&2], ("other".into(), other, None));
    assert_eq!(b.load(1, Tid::MAX).unwrap(), Some(("new".into(), second, None)));
}

#[test]
fn nothing_is_shown_or_ended_before_its_invalidation() {
    let storage = Gated::new(true);
    let server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let mut a = Peer::new(&server, Encoding::Pickle);
    let first = a.commit(1, Tid::ZERO, b"old").unwrap();
    // Appears in the engine without having been published, as between the engine's index and `publish`.
    let mut writer = Vec::new();
    let staged = zeo_rs::storage::StagedTxn {
        ops: vec![zeo_rs::storage::Op::Store { oid: Oid(1), serial: first, data: "new".into(), blob: None }],
        ..Default::default()
    };
    let voted = storage.inner.vote(staged, &zeo_rs::storage::NoResolution).unwrap();
    let zeo_rs::storage::VoteOutcome::Ready(voted) = voted else { panic!() };
    storage.inner.finish(vec![voted], &mut |committed| writer.push(committed.tid)).unwrap();
    assert!(storage.inner.last_tid() > first);
    assert_eq!(a.load(1, Tid::MAX).unwrap(), Some(("old".into(), first, None)));
    assert_eq!(a.call(Call::GetTid { oid: Oid(1) }).unwrap(), first.into());
    assert_eq!(a.call(Call::LastTransaction).unwrap(), first.into());
    assert_eq!(a.registered, Tid::ZERO);
}

/// Objects 1..=OBJECTS all get the same value in every transaction of a group.
const GROUPS: u64 = 3;
const MEMBERS: u64 = 4;

fn member(group: u64, number: u64) -> u64 {
    group * 100 + number
}

/// Several writers, each with a group of objects of its own that it changes together, and readers that load at random:
/// what each of them reads must fit one history.
#[test]
fn every_connection_reads_one_history() {
    let storage = memory();
    let server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let until = Instant::now() + Duration::from_millis(1500);
    std::thread::scope(|scope| {
        for group in 1..=GROUPS {
            let server = &server;
            scope.spawn(move || write_group(server, group, until));
        }
        for seed in 0..4 {
            let server = &server;
            scope.spawn(move || read_and_check(server, seed, until));
        }
        // Connections that come and go: each must get all that came after the tid it was told.
        let server = &server;
        let storage = Arc::clone(&storage);
        scope.spawn(move || {
            while Instant::now() < until {
                let mut peer = Peer::new(server, Encoding::Msgpack);
                for _ in 0..5 {
                    peer.ping();
                }
                check_complete(&peer, &*storage);
            }
        });
    });
}

fn write_group(server: &ServerHandle, group: u64, until: Instant) {
    let mut peer =
        Peer::new(server, if group.is_multiple_of(2) { Encoding::Pickle } else { Encoding::Msgpack });
    let mut serial = Tid::ZERO;
    let mut count = 0u64;
    while count < 20 || Instant::now() < until {
        count += 1;
        peer.begin(7);
        for number in 0..MEMBERS {
            peer.store(7, member(group, number), serial, &count.to_be_bytes());
        }
        assert_eq!(peer.vote(7), Ok(Value::List(vec![])).map(|list| same_in(peer.encoding, list)));
        let before: Vec<_> = peer.invalidations();
        serial = peer.finish(7).unwrap();
        // S4: smaller tids only before the reply.
        assert!(before.iter().all(|(tid, _)| *tid < serial));
        assert!(peer.invalidations().iter().all(|(tid, _)| *tid < serial));
        assert!(peer.invalidations().windows(2).all(|pair| pair[0].0 < pair[1].0));
        let own = |oids: &[Oid]| oids.iter().any(|oid| oid.0 / 100 == group);
        assert!(peer.invalidations().iter().all(|(_, oids)| !own(oids)), "its own invalidation");
    }
}

fn same_in(encoding: Encoding, list: Value) -> Value {
    match (encoding, list) {
        (Encoding::Msgpack, Value::List(items)) => Value::Tuple(items),
        (_, list) => list,
    }
}

fn read_and_check(server: &ServerHandle, seed: u64, until: Instant) {
    let mut peer =
        Peer::new(server, if seed.is_multiple_of(2) { Encoding::Pickle } else { Encoding::Msgpack });
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut view = peer.registered;
    // Last invalidation of each object, as far as this connection has been told.
    let mut invalidated: HashMap<u64, Tid> = HashMap::new();
    // What was current when it was read.
    let mut values: HashMap<(u64, Tid), Vec<u8>> = HashMap::new();
    while Instant::now() < until {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let oid = member(random % GROUPS + 1, random >> 32 & (MEMBERS - 1));
        peer.send(&Call::LoadBefore { oid: Oid(oid), before: Tid::MAX }, false);
        let message = peer.message().unwrap();
        for notice in std::mem::take(&mut peer.notices) {
            let Notice::InvalidateTransaction { tid, oids } = notice else { panic!("{notice:?}") };
            assert!(tid > view, "S2, S3: {tid} after {view}");
            view = tid;
            for oid in oids {
                invalidated.insert(oid.0, tid);
            }
        }
        match message {
            ServerMessage::Fault { .. } => assert!(!invalidated.contains_key(&oid), "created, and announced"),
            ServerMessage::Loaded { loaded: None, .. } => {
                assert!(!invalidated.contains_key(&oid), "created, and announced");
            }
            ServerMessage::Loaded { loaded: Some((data, tid, end)), .. } => {
                assert!(tid <= view, "S7: {tid} is shown before its invalidation, at {view}");
                assert!(end.is_none(), "asked for the current one, got one that ended at {end:?}");
                if let Some(last) = invalidated.get(&oid) {
                    assert_eq!(tid, *last, "S1: a revision older than the last invalidation");
                }
                let group = oid / 100;
                let known = values.entry((group, tid)).or_insert_with(|| data.to_vec());
                assert_eq!(known[..], data[..], "one transaction, two values");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Between `registered` and the last invalidation received, none is missing.
fn check_complete(peer: &Peer, storage: &dyn Storage) {
    let got = peer.invalidations();
    let Some((last, _)) = got.last() else { return };
    let mut transactions = storage.iterate(Some(peer.registered.next()), Some(*last)).unwrap();
    let mut written = Vec::new();
    while let Some((info, _)) = transactions.next_txn().unwrap() {
        written.push(info.tid);
    }
    assert_eq!(got.iter().map(|(tid, _)| *tid).collect::<Vec<_>>(), written);
}

/// S3, at the tightest: a commit between every two registrations.
#[test]
fn registration_leaves_no_gap() {
    let storage = memory();
    let server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let done = AtomicBool::new(false);
    let commits = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut peer = Peer::new(&server, Encoding::Pickle);
            let mut serial = Tid::ZERO;
            while !done.load(Ordering::Relaxed) {
                serial = peer.commit(1, serial, b"data").unwrap();
                commits.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..100 {
            let mut peer = Peer::new(&server, Encoding::Pickle);
            let from = commits.load(Ordering::Relaxed);
            let start = Instant::now();
            while commits.load(Ordering::Relaxed) < from + 2 {
                assert!(start.elapsed() < PATIENCE);
                std::thread::yield_now();
            }
            peer.ping();
            assert!(!peer.invalidations().is_empty());
            check_complete(&peer, &*storage);
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// A storage that is itself a client of another server: what others commit there reaches the clients here in tid order,
/// also when it is heard of while a commit from here is under way.
#[test]
fn commits_below_the_storage_are_announced_in_order() {
    let storage = Gated::new(true);
    let server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let below = storage.below.lock().unwrap().clone().unwrap();
    let mut a = Peer::new(&server, Encoding::Pickle);
    let mut b = Peer::new(&server, Encoding::Pickle);
    below.invalidate(Tid(5), vec![Oid(5)]);
    b.ping();
    assert_eq!(b.invalidations(), [(Tid(5), vec![Oid(5)])]);
    b.notices.clear();
    storage.finishes.shut();
    a.begin(1);
    a.store(1, 1, Tid::ZERO, b"x");
    a.vote(1).unwrap();
    let id = a.send(&Call::TpcFinish { txn: Value::Int(1) }, false);
    storage.finishes.wait_for(1);
    let future = Tid::from_unix(4e9).unwrap();
    for tid in [Tid(6), future] {
        below.invalidate(tid, vec![Oid(6)]);
    }
    b.ping();
    assert!(b.notices.is_empty());
    storage.finishes.open();
    let own = a.answer(&id).unwrap().as_tid().unwrap();
    b.ping();
    assert_eq!(b.invalidations().iter().map(|(tid, _)| *tid).collect::<Vec<_>>(), [Tid(6), own, future]);
    a.ping();
    assert_eq!(a.invalidations().iter().map(|(tid, _)| *tid).collect::<Vec<_>>(), [Tid(5), Tid(6), future]);
    // Its own commit, reported back, is not news.
    below.invalidate(own, vec![Oid(1)]);
    b.ping();
    assert_eq!(b.invalidations().len(), 3);
    // Anything may have changed: everybody has to verify.
    below.invalidate_all();
    a.expect_closed();
    b.expect_closed();
}

#[test]
fn missed_invalidations_are_answered_from_the_queue() {
    let storage = memory();
    let config = ServerConfig { invalidation_queue_size: 3, ..ServerConfig::default() };
    let server = serve(config, Arc::clone(&storage) as Arc<dyn Storage>);
    let mut peer = Peer::new(&server, Encoding::Pickle);
    let get = |peer: &mut Peer, tid: Tid| peer.call(Call::GetInvalidations { tid }).unwrap();
    assert_eq!(get(&mut peer, Tid::ZERO), Value::Tuple(vec![Tid::ZERO.into(), Value::List(vec![])]));
    let mut tids = Vec::new();
    for oid in 1..=4 {
        tids.push(peer.commit(oid, Tid::ZERO, b"x").unwrap());
    }
    let answer = |oids: &[Oid]| Value::Tuple(vec![tids[3].into(), Value::oids(oids)]);
    assert_eq!(get(&mut peer, tids[3]), answer(&[]));
    assert_eq!(get(&mut peer, tids[2]), answer(&[Oid(4)]));
    assert_eq!(get(&mut peer, tids[1]), answer(&[Oid(4), Oid(3)]));
    // The queue's oldest is newer, and there is no invalidation-age.
    assert_eq!(get(&mut peer, tids[0]), Value::None);
    drop(server);

    // A new server fills its queue from the storage; an age reaches beyond the queue.
    let reopened = Gated::new(true);
    let mut tids = Vec::new();
    {
        let server = serve(ServerConfig::default(), Arc::clone(&reopened) as Arc<dyn Storage>);
        let mut peer = Peer::new(&server, Encoding::Pickle);
        for oid in 1..=4 {
            tids.push(peer.commit(oid, Tid::ZERO, b"x").unwrap());
        }
    }
    let config = ServerConfig {
        invalidation_queue_size: 2,
        invalidation_age: Some(Duration::from_secs(3600)),
        ..ServerConfig::default()
    };
    let server = serve(config, reopened);
    let mut peer = Peer::new(&server, Encoding::Pickle);
    assert_eq!(get(&mut peer, tids[2]), Value::Tuple(vec![tids[3].into(), Value::oids(&[Oid(4)])]));
    let old = get(&mut peer, tids[0]);
    assert_eq!(old, Value::Tuple(vec![tids[3].into(), Value::oids(&[Oid(2), Oid(3), Oid(4)])]));
    assert_eq!(get(&mut peer, Tid::from_unix(1.0).unwrap()), Value::None);
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_others_are_not_held_up() {
    let config = ServerConfig { max_unread: 20_000, ..ServerConfig::default() };
    let server = serve(config, memory());
    let mut writer = Peer::new(&server, Encoding::Msgpack);
    let mut reader = Peer::new(&server, Encoding::Msgpack);
    let mut sleeper = Peer::new(&server, Encoding::Msgpack);
    // Makes the sleeper's output stop: it asks for more than its socket buffers hold.
    let big = writer.commit(1, Tid::ZERO, &vec![7; 1 << 20]).unwrap();
    sleeper.ping();
    for _ in 0..30 {
        sleeper.send(&Call::LoadBefore { oid: Oid(1), before: big.next() }, false);
    }
    let mut serial = Tid::ZERO;
    let start = Instant::now();
    for round in 0u32.. {
        serial = writer.commit(2, serial, b"x").unwrap();
        writer.notices.clear();
        reader.ping();
        reader.notices.clear();
        if round % 50 == 0 {
            let status = reader.call(Call::ServerStatus).unwrap();
            if status.get("connections").unwrap().as_int() == Some(2) {
                break;
            }
        }
        assert!(start.elapsed() < PATIENCE, "the sleeper is still there");
    }
    sleeper.expect_closed();
    reader.ping();
}
