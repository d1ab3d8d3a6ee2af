//! Connections that load without pause get a thread each, and lose it when they do anything else or nothing.

use std::time::{Duration, Instant};

use zeo_rs::ids::{Oid, Tid};
use zeo_rs::server::{ServerConfig, ServerHandle};
use zeo_rs::wire::{Call, Encoding};

use crate::peer::{PATIENCE, Peer, memory, serve};

/// Loads until the connection has a thread of its own.
fn sit_down(server: &ServerHandle, peer: &mut Peer, oid: u64) {
    let before = server.load_threads();
    let deadline = Instant::now() + PATIENCE;
    while server.load_threads() == before {
        assert!(Instant::now() < deadline, "no thread for a client that loads without pause");
        peer.load(oid, Tid::MAX).unwrap().unwrap();
    }
}

fn wait_for(server: &ServerHandle, threads: usize) {
    let deadline = Instant::now() + PATIENCE;
    while server.load_threads() != threads {
        assert!(Instant::now() < deadline, "{} instead of {threads}", server.load_threads());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn it_is_the_same_connection_on_a_thread_of_its_own() {
    for encoding in [Encoding::Pickle, Encoding::Msgpack] {
        let server = serve(ServerConfig::default(), memory());
        let mut writer = Peer::new(&server, encoding);
        let first = writer.commit(1, Tid::ZERO, b"one").unwrap();
        let mut reader = Peer::new(&server, encoding);
        sit_down(&server, &mut reader, 1);

        // It hears of commits, in order with its loads.
        let second = writer.commit(1, first, b"two").unwrap();
        reader.ping();
        assert_eq!(reader.invalidations(), [(second, vec![Oid(1)])]);
        assert_eq!(reader.load(1, Tid::MAX).unwrap(), Some(("two".into(), second, None)));
        assert_eq!(reader.load(1, second).unwrap(), Some(("one".into(), first, Some(second))));

        // The ping was something else than a load: back to the others, and on to a thread again.
        wait_for(&server, 0);
        sit_down(&server, &mut reader, 1);
        // A whole transaction, begun on the thread.
        let third = reader.commit(1, second, b"three").unwrap();
        writer.ping();
        assert_eq!(writer.invalidations().last(), Some(&(third, vec![Oid(1)])));
        wait_for(&server, 0);
    }
}

#[test]
fn a_quiet_connection_hears_of_commits_and_gives_its_thread_back() {
    let server = serve(ServerConfig::default(), memory());
    let mut writer = Peer::new(&server, Encoding::Msgpack);
    let mut tid = writer.commit(1, Tid::ZERO, b"x").unwrap();
    let mut reader = Peer::new(&server, Encoding::Msgpack);
    sit_down(&server, &mut reader, 1);
    // Over some looks of its thread it says nothing.
    while server.load_threads() > 0 {
        tid = writer.commit(1, tid, b"x").unwrap();
        reader.notice();
        assert_eq!(reader.notices.len(), 0);
    }
    assert_eq!(reader.load(1, Tid::MAX).unwrap(), Some(("x".into(), tid, None)));
}

#[test]
fn calls_behind_loads_in_one_piece_are_all_answered() {
    let server = serve(ServerConfig::default(), memory());
    let mut peer = Peer::new(&server, Encoding::Msgpack);
    let first = peer.commit(1, Tid::ZERO, b"one").unwrap();
    sit_down(&server, &mut peer, 1);
    for _ in 0..100 {
        peer.send(&Call::LoadBefore { oid: Oid(1), before: Tid::MAX }, false);
    }
    let ping = peer.send(&Call::Ping, false);
    for _ in 0..100 {
        assert_eq!(peer.loaded().unwrap(), Some(("one".into(), first, None)));
    }
    peer.answer(&ping).unwrap();
    wait_for(&server, 0);
}

#[test]
fn there_are_no_more_threads_than_were_allowed() {
    let server = serve(ServerConfig { load_threads: 1, ..ServerConfig::default() }, memory());
    let mut peers: Vec<_> = (0..3).map(|_| Peer::new(&server, Encoding::Msgpack)).collect();
    peers[0].commit(1, Tid::ZERO, b"x").unwrap();
    sit_down(&server, &mut peers[0], 1);
    for _ in 0..500 {
        for peer in &mut peers {
            peer.load(1, Tid::MAX).unwrap().unwrap();
        }
        assert!(server.load_threads() <= 1);
    }
    // Whoever leaves makes room.
    drop(peers.remove(0));
    wait_for(&server, 0);
    sit_down(&server, &mut peers[1], 1);
}

#[test]
fn a_server_that_stops_does_not_wait_for_clients_that_load() {
    let mut server = serve(ServerConfig::default(), memory());
    let mut writer = Peer::new(&server, Encoding::Msgpack);
    writer.commit(1, Tid::ZERO, b"x").unwrap();
    let mut reader = Peer::new(&server, Encoding::Msgpack);
    sit_down(&server, &mut reader, 1);
    let loading = std::thread::spawn(move || while reader.try_load(1).is_some() {});
    server.stop().unwrap();
    loading.join().unwrap();
}
