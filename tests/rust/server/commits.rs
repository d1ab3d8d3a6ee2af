//! Two-phase commit: locks, conflicts, and clients that vanish in the middle of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::pickle::Value;
use zeo_rs::server::{ServerConfig, ServerHandle};
use zeo_rs::storage::{Conflict, ConflictResolver, Resolution, Storage, StorageError};
use zeo_rs::wire::{Call, Encoding, FaultKind, MessageId};

use crate::peer::{Gated, PATIENCE, Peer, memory, serve};

fn status(peer: &mut Peer, key: &str) -> Value {
    peer.call(Call::ServerStatus).unwrap().get(key).unwrap().clone()
}

/// Asks until the status says so.
fn until(peer: &mut Peer, key: &str, wanted: i64) {
    let start = Instant::now();
    while status(peer, key).as_int() != Some(wanted) {
        assert!(start.elapsed() < PATIENCE, "{key} never was {wanted}: {:?}", status(peer, key));
    }
}

fn two(server: &ServerHandle) -> (Peer, Peer) {
    (Peer::new(server, Encoding::Pickle), Peer::new(server, Encoding::Msgpack))
}

fn send_vote(peer: &mut Peer, key: i64) -> MessageId {
    peer.send(&Call::Vote { txn: Value::Int(key) }, false)
}

#[test]
fn transactions_on_different_objects_vote_side_by_side() {
    let server = serve(ServerConfig::default(), memory());
    let (mut a, mut b) = two(&server);
    for (peer, oid) in [(&mut a, 1), (&mut b, 2)] {
        peer.begin(1);
        peer.store(1, oid, Tid::ZERO, b"x");
    }
    a.vote(1).unwrap();
    b.vote(1).unwrap();
    // The later vote finishes first.
    let second = b.finish(1).unwrap();
    let first = a.finish(1).unwrap();
    assert!(first > second);
    assert_eq!(a.invalidations(), [(second, vec![Oid(2)])]);
}

#[test]
fn a_vote_on_the_same_object_waits_and_reads_the_invalidation_first() {
    let server = serve(ServerConfig::default(), memory());
    let (mut a, mut b) = two(&server);
    let mut c = Peer::new(&server, Encoding::Pickle);
    let first = a.commit(1, Tid::ZERO, b"x").unwrap();
    c.ping();
    for peer in [&mut a, &mut b, &mut c] {
        peer.notices.clear();
        peer.begin(1);
        peer.store(1, 1, first, b"y");
    }
    a.vote(1).unwrap();
    let waiting = send_vote(&mut b, 1);
    until(&mut a, "waiting", 1);
    // A waiting client is served, but may not vote again.
    assert_eq!(b.vote(1).unwrap_err().data, Value::Tuple(vec!["Already voting (waiting)".into()]));
    assert_eq!(b.load(1, Tid::MAX).unwrap().unwrap().1, first);
    let next = send_vote(&mut c, 1);
    until(&mut a, "waiting", 2);
    assert_eq!(a.vote(1).unwrap_err().data, Value::Tuple(vec!["Already voting (locked)".into()]));
    a.abort(1);
    // First come, first served.
    assert_eq!(b.answer(&waiting).unwrap().as_items(), Some(&[][..]));
    until(&mut a, "waiting", 1);
    let second = b.finish(1).unwrap();
    let fault = c.answer(&next).unwrap_err();
    assert_eq!(c.invalidations(), [(second, vec![Oid(1)])]);
    let FaultKind::Conflict { oid, serials, is_read, .. } = fault.kind() else { panic!("{fault:?}") };
    assert_eq!((oid, serials, is_read), (Some(Oid(1)), Some((second, first)), false));
    // The failed vote has ended the transaction.
    assert_eq!(c.vote(1).unwrap_err().data, Value::Tuple(vec![Value::None, Value::Int(1)]));
    c.abort(1);
    assert_eq!(status(&mut a, "conflicts").as_int(), Some(1));
    assert_eq!(status(&mut a, "active_txns").as_int(), Some(0));
}

/// Merges what begins with `m`.
struct Merges;

impl ConflictResolver for Merges {
    fn resolve(&self, _: &dyn Storage, _: &Conflict, _: Option<Bytes>) -> Resolution {
        Resolution::Resolved("merged".into())
    }

    fn may_resolve(&self, record: &[u8]) -> bool {
        record.starts_with(b"m")
    }
}

#[test]
fn who_has_lost_does_not_wait_for_the_rest_of_its_locks() {
    let config = ServerConfig { resolver: Arc::new(Merges), ..ServerConfig::default() };
    let server = serve(config, memory());
    let (mut a, mut holder) = two(&server);
    let first = a.commit(1, Tid::ZERO, b"x").unwrap();
    holder.begin(1);
    holder.store(1, 2, Tid::ZERO, b"held to the end");
    holder.vote(1).unwrap();
    a.begin(1);
    a.store(1, 1, first, b"y");
    a.vote(1).unwrap();
    // All of them want the object of `holder` too, so none is granted its locks before the end.
    let mut waiting = Vec::new();
    for data in [&b"lost"[..], b"may be merged", b"checks"] {
        let mut peer = Peer::new(&server, Encoding::Msgpack);
        peer.begin(1);
        if data == b"checks" {
            peer.cast(Call::CheckCurrentSerial { oid: Oid(1), serial: first, txn: Value::Int(1) });
        } else {
            peer.store(1, 1, first, data);
        }
        peer.store(1, 2, Tid::ZERO, b"m");
        let id = send_vote(&mut peer, 1);
        until(&mut a, "waiting", waiting.len() as i64 + 1);
        waiting.push((peer, id));
    }
    let second = a.finish(1).unwrap();
    let (mut merged, merged_id) = waiting.remove(1);
    for ((mut peer, id), read) in waiting.into_iter().zip([false, true]) {
        let fault = peer.answer(&id).unwrap_err();
        assert_eq!(peer.invalidations(), [(second, vec![Oid(1)])], "before the answer");
        let FaultKind::Conflict { oid, serials, is_read, .. } = fault.kind() else { panic!("{fault:?}") };
        assert_eq!((serials, is_read), (Some((second, first)), read));
        assert!(read || oid == Some(Oid(1)));
        // The transaction has ended: the next can begin.
        peer.begin(2);
        peer.ping();
    }
    // One that comes too late need not wait either.
    let mut late = Peer::new(&server, Encoding::Pickle);
    late.begin(1);
    late.store(1, 1, first, b"lost");
    late.store(1, 2, Tid::ZERO, b"x");
    late.vote(1).unwrap_err();
    until(&mut a, "waiting", 1);
    assert_eq!(status(&mut a, "conflicts").as_int(), Some(3));
    let third = holder.finish(1).unwrap();
    // What may be resolved has waited, and is, also against the later commit.
    assert_eq!(merged.answer(&merged_id).unwrap().as_items().unwrap(), [Oid(1).into(), Oid(2).into()]);
    assert_eq!(merged.invalidations(), [(second, vec![Oid(1)]), (third, vec![Oid(2)])]);
    merged.finish(1).unwrap();
    assert_eq!(a.load(1, Tid::MAX).unwrap().unwrap().0, "merged");
}

#[test]
fn whoever_only_reads_an_object_shares_it() {
    let server = serve(ServerConfig::default(), memory());
    let (mut a, mut b) = two(&server);
    let first = a.commit(1, Tid::ZERO, b"x").unwrap();
    for (peer, oid) in [(&mut a, 2), (&mut b, 3)] {
        peer.begin(1);
        peer.cast(Call::CheckCurrentSerial { oid: Oid(1), serial: first, txn: Value::Int(1) });
        peer.store(1, oid, Tid::ZERO, b"x");
        peer.vote(1).unwrap();
    }
    let mut c = Peer::new(&server, Encoding::Pickle);
    c.begin(1);
    c.store(1, 1, first, b"y");
    let waiting = send_vote(&mut c, 1);
    until(&mut a, "waiting", 1);
    a.finish(1).unwrap();
    b.finish(1).unwrap();
    c.answer(&waiting).unwrap();
    let second = c.finish(1).unwrap();
    b.begin(2);
    b.cast(Call::CheckCurrentSerial { oid: Oid(1), serial: first, txn: Value::Int(2) });
    let fault = b.vote(2).unwrap_err();
    let FaultKind::Conflict { serials, is_read, .. } = fault.kind() else { panic!("{fault:?}") };
    assert_eq!((serials, is_read), (Some((second, first)), true));
}

#[test]
fn finishes_that_come_together_are_committed_together() {
    let storage = Gated::new(true);
    let server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let mut peers: Vec<Peer> = (0..6).map(|_| Peer::new(&server, Encoding::Msgpack)).collect();
    storage.finishes.shut();
    let mut ids = Vec::new();
    for (oid, peer) in peers.iter_mut().enumerate() {
        peer.begin(1);
        peer.store(1, oid as u64 + 1, Tid::ZERO, b"x");
        peer.vote(1).unwrap();
        ids.push(peer.send(&Call::TpcFinish { txn: Value::Int(1) }, false));
        if oid == 0 {
            storage.finishes.wait_for(1);
        } else {
            // Has been received.
            peer.ping_before(&ids[oid]);
        }
    }
    storage.finishes.open();
    let mut tids: Vec<Tid> =
        peers.iter_mut().zip(&ids).map(|(peer, id)| peer.answer(id).unwrap().as_tid().unwrap()).collect();
    let last = *tids.iter().max().unwrap();
    for peer in &mut peers {
        peer.ping();
        let told: Vec<Tid> = peer.invalidations().iter().map(|(tid, _)| *tid).collect();
        assert!(told.is_sorted() && told.len() == 5);
    }
    tids.sort();
    tids.dedup();
    assert_eq!(tids.len(), 6);
    assert_eq!(storage.last_tid(), last);
    assert_eq!(status(&mut peers[0], "commits").as_int(), Some(6));
    assert_eq!(status(&mut peers[0], "commit_groups").as_int(), Some(2));
}

/// The states of a transaction in which its client can vanish.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Begun,
    Stored,
    Waiting,
    Voted,
    Finishing,
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind() {
    for stage in [Stage::Begun, Stage::Stored, Stage::Waiting, Stage::Voted, Stage::Finishing] {
        for by_server in [false, true] {
            let storage = Gated::new(true);
            let server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
            let (mut a, mut gone) = two(&server);
            let first = a.commit(1, Tid::ZERO, b"x").unwrap();
            gone.ping();
            gone.begin(1);
            if !matches!(stage, Stage::Begun) {
                gone.store(1, 1, first, b"theirs");
            }
            let mut holder = Peer::new(&server, Encoding::Pickle);
            match stage {
                Stage::Begun | Stage::Stored => gone.ping(),
                Stage::Waiting => {
                    holder.begin(1);
                    holder.store(1, 1, first, b"held");
                    holder.vote(1).unwrap();
                    send_vote(&mut gone, 1);
                    until(&mut a, "waiting", 1);
                }
                Stage::Voted => drop(gone.vote(1).unwrap()),
                Stage::Finishing => {
                    gone.vote(1).unwrap();
                    // Not alone, or its connection would wait for the storage itself.
                    holder.begin(1);
                    holder.store(1, 2, Tid::ZERO, b"held");
                    holder.vote(1).unwrap();
                    storage.finishes.shut();
                    gone.send(&Call::TpcFinish { txn: Value::Int(1) }, false);
                    storage.finishes.wait_for(2);
                }
            }
            if by_server {
                // An error in a call that nobody waits for: the server closes.
                gone.begin(2);
                gone.cast(Call::StoreBlobChunk { chunk: "no upload".into() });
                gone.expect_closed();
            }
            drop(gone);
            until(&mut a, "connections", 2);
            storage.finishes.open();
            if matches!(stage, Stage::Waiting | Stage::Finishing) {
                until(&mut a, "waiting", 0);
                holder.abort(1);
            }
            // What was being finished is committed, and everybody hears of it; all else never happened.
            let serial = match stage {
                Stage::Finishing => {
                    until(&mut a, "commits", 2);
                    // The status is as of now, what has been told is as of the round trip.
                    a.ping();
                    a.invalidations().last().unwrap().0
                }
                _ => first,
            };
            assert_eq!(
                a.commit(1, serial, b"next").map(|tid| tid > serial),
                Ok(true),
                "{stage:?} {by_server}"
            );
            until(&mut a, "active_txns", 0);
        }
    }
}

#[test]
fn a_transaction_that_holds_its_locks_too_long_is_aborted() {
    let timeout = |timeout| ServerConfig { transaction_timeout: Some(timeout), ..ServerConfig::default() };
    // Long enough for a busy machine to finish in what was just voted.
    let limit = Duration::from_secs(3);
    let server = serve(timeout(limit), memory());
    let (mut hung, mut next) = two(&server);
    hung.begin(1);
    hung.store(1, 1, Tid::ZERO, b"x");
    let start = Instant::now();
    hung.vote(1).unwrap();
    // Waiting does not count: it gets its own time when it gets the locks.
    next.begin(1);
    next.store(1, 1, Tid::ZERO, b"y");
    next.vote(1).unwrap();
    assert!(start.elapsed() >= limit);
    next.finish(1).unwrap();
    hung.expect_closed();
    // One that holds nothing may take its time.
    let limit = Duration::from_millis(20);
    let server = serve(timeout(limit), memory());
    let mut slow = Peer::new(&server, Encoding::Pickle);
    slow.begin(1);
    slow.store(1, 1, Tid::ZERO, b"y");
    slow.ping();
    std::thread::sleep(limit * 5);
    slow.ping();
    slow.abort(1);
}

#[test]
fn a_client_that_never_pauses_does_not_outlive_its_transaction() {
    // Loads make it move from thread to thread, or try to.
    let loads = Call::LoadBefore { oid: Oid(1), before: Tid::MAX };
    for (load_threads, calls) in
        [(64, [Call::Ping, Call::Ping]), (0, [loads.clone(), loads.clone()]), (64, [loads, Call::Ping])]
    {
        outlive(load_threads, &calls);
    }
}

fn outlive(load_threads: usize, calls: &[Call; 2]) {
    let config = ServerConfig {
        transaction_timeout: Some(Duration::from_millis(200)),
        load_threads,
        ..ServerConfig::default()
    };
    let server = serve(config, memory());
    let (mut noisy, mut next) = two(&server);
    noisy.begin(1);
    noisy.store(1, 1, Tid::ZERO, b"x");
    noisy.vote(1).unwrap();
    let flood = [noisy.casts(&calls[0], 100), noisy.casts(&calls[1], 1)].concat().repeat(200);
    let start = Instant::now();
    // ends with an error once the server has closed the connection
    let noise = std::thread::spawn(move || while start.elapsed() < PATIENCE && noisy.write(&flood) {});
    next.begin(1);
    next.store(1, 1, Tid::ZERO, b"y");
    next.vote(1).unwrap();
    assert!(start.elapsed() < PATIENCE);
    noise.join().unwrap();
}

#[test]
fn a_storage_that_fails_in_finish_says_so_and_goes_on_answering() {
    let storage = Gated::new(true);
    let server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let (mut a, mut b) = two(&server);
    *storage.fails.lock().unwrap() = Some(StorageError::PreviousIo("disk full".into()));
    let fault = a.commit(1, Tid::ZERO, b"x").unwrap_err();
    assert!(fault.data.to_string().contains("disk full"), "{fault:?}");
    b.ping();
    assert!(b.invalidations().is_empty() && b.notices.is_empty(), "S6");
    assert_eq!(b.call(Call::LastTransaction).unwrap(), Tid::ZERO.into());
    // The locks are free.
    b.commit(1, Tid::ZERO, b"y").unwrap();
}

#[test]
fn transactions_out_of_order() {
    let server = serve(ServerConfig::default(), memory());
    let (mut a, _) = two(&server);
    let none = |given: i64| Value::Tuple(vec![Value::None, Value::Int(given)]);
    assert_eq!(a.vote(1).unwrap_err().data, none(1));
    assert_eq!(a.call(Call::TpcFinish { txn: Value::Int(1) }).unwrap(), Value::None);
    a.abort(1);
    a.begin(1);
    // The same again is ignored.
    a.begin(1);
    assert_eq!(a.vote(2).unwrap_err().data, Value::Tuple(vec![Value::Int(1), Value::Int(2)]));
    let fault = a.call(Call::TpcFinish { txn: Value::Int(1) }).unwrap_err();
    assert_eq!(fault.class, "builtins.AssertionError");
    a.abort(2);
    a.vote(1).unwrap();
    a.store(1, 1, Tid::ZERO, b"too late, ignored");
    let tid = a.finish(1).unwrap();
    assert!(a.load(1, Tid::MAX).is_err());
    // Another one beside the open one: closed, as nobody waits for the answer.
    a.begin(3);
    a.begin(4);
    a.expect_closed();
    let mut b = Peer::new(&server, Encoding::Pickle);
    assert_eq!(b.registered, tid);
    b.store(9, 1, Tid::ZERO, b"no transaction");
    b.expect_closed();
}

#[test]
fn deletes_restores_and_undo() {
    let server = serve(ServerConfig::default(), memory());
    let (mut a, mut b) = two(&server);
    let first = a.commit(1, Tid::ZERO, b"one").unwrap();
    a.begin(2);
    a.cast(Call::DeleteObject { oid: Oid(1), serial: first, txn: Value::Int(2) });
    a.vote(2).unwrap();
    let deleted = a.finish(2).unwrap();
    b.ping();
    // Unlike ZEO's, deleted and restored objects are announced.
    assert_eq!(b.invalidations(), [(first, vec![Oid(1)]), (deleted, vec![Oid(1)])]);
    assert!(matches!(b.load(1, Tid::MAX).unwrap_err().kind(), FaultKind::NotFound { .. }));
    assert_eq!(b.load(1, deleted).unwrap(), Some(("one".into(), first, Some(deleted))));

    b.notices.clear();
    let own_tid = Tid(deleted.0 + 1_000_000);
    a.cast(Call::TpcBegin {
        txn: Value::Int(3),
        user: "u".into(),
        description: "d".into(),
        extension: Value::Dict(vec![]),
        tid: Some(own_tid),
        status: b' ',
    });
    a.cast(Call::Restorea {
        oid: Oid(5),
        serial: own_tid,
        data: Some("restored".into()),
        prev_txn: None,
        txn: Value::Int(3),
    });
    a.vote(3).unwrap();
    assert_eq!(a.finish(3), Ok(own_tid));
    b.ping();
    assert_eq!(b.invalidations(), [(own_tid, vec![Oid(5)])]);

    let log = b.call(Call::UndoLog { first: 0, last: -20 }).unwrap();
    let entries = log.as_items().unwrap();
    assert_eq!(entries.len(), 3);
    let undo_delete = entries[1].get("id").unwrap().as_bytes().unwrap().clone();
    assert_eq!(entries[1].get("user_name").unwrap().as_bytes().unwrap(), "user");
    b.begin(4);
    b.cast(Call::Undoa { trans_id: undo_delete, txn: Value::Int(4) });
    assert_eq!(b.vote(4).unwrap().as_items().unwrap(), [Oid(1).into()]);
    let undone = b.finish(4).unwrap();
    assert_eq!(a.notice(), zeo_rs::wire::Notice::InvalidateTransaction { tid: undone, oids: vec![Oid(1)] });
    assert_eq!(a.load(1, Tid::MAX).unwrap().unwrap().0, "one");
    // What does not exist cannot be undone; the error comes from the vote.
    a.begin(5);
    a.cast(Call::Undoa { trans_id: "nonsense".into(), txn: Value::Int(5) });
    let fault = a.vote(5).unwrap_err();
    assert_eq!(fault.class, "ZODB.POSException.UndoError");
    a.ping();
}

#[test]
fn clients_resolve_conflicts_if_told_to() {
    let config = ServerConfig { client_conflict_resolution: true, ..ServerConfig::default() };
    let server = serve(config, memory());
    let (mut a, mut b) = two(&server);
    let first = a.commit(1, Tid::ZERO, b"one").unwrap();
    let second = a.commit(1, first, b"two").unwrap();
    b.begin(1);
    b.store(1, 1, first, b"mine");
    b.store(1, 2, Tid::ZERO, b"new");
    let conflicts = b.vote(1).unwrap();
    let [conflict] = conflicts.as_items().unwrap() else { panic!("{conflicts:?}") };
    assert_eq!(conflict.get("oid").unwrap().as_oid(), Some(Oid(1)));
    assert_eq!(conflict.get("data").unwrap().as_bytes().unwrap(), "mine");
    assert_eq!(conflict.get("serials").unwrap().as_items().unwrap(), [second.into(), first.into()]);
    // Nothing is held meanwhile.
    let third = a.commit(2, Tid::ZERO, b"taken").unwrap();
    b.store(1, 1, second, b"merged");
    let conflicts = b.vote(1).unwrap();
    let [conflict] = conflicts.as_items().unwrap() else { panic!("{conflicts:?}") };
    assert_eq!(conflict.get("oid").unwrap().as_oid(), Some(Oid(2)));
    b.store(1, 2, third, b"merged too");
    assert_eq!(b.vote(1).unwrap().as_items(), Some(&[][..]));
    b.finish(1).unwrap();
    assert_eq!(b.load(1, Tid::MAX).unwrap().unwrap().0, "merged");
    assert_eq!(b.load(2, Tid::MAX).unwrap().unwrap().0, "merged too");
}

#[test]
fn a_transaction_may_not_grow_without_bound() {
    let server = serve(ServerConfig { max_staged: 10_000, ..ServerConfig::default() }, memory());
    let (mut a, mut b) = two(&server);
    a.begin(1);
    for oid in 0..20 {
        a.store(1, oid, Tid::ZERO, &[0; 1000]);
    }
    a.expect_closed();
    b.ping();
}

#[test]
fn a_stopping_server_lets_the_voted_finish() {
    let storage = memory();
    let mut server = serve(ServerConfig::default(), Arc::clone(&storage) as Arc<dyn Storage>);
    let (mut voted, mut idle) = two(&server);
    voted.begin(1);
    voted.store(1, 1, Tid::ZERO, b"x");
    voted.vote(1).unwrap();
    let stopping = std::thread::spawn(move || {
        let stopped = server.stop();
        (server, stopped)
    });
    idle.expect_closed();
    let tid = voted.finish(1).unwrap();
    voted.expect_closed();
    let (_server, stopped) = stopping.join().unwrap();
    stopped.unwrap();
    assert_eq!(storage.last_tid(), tid);
}
