//! Handshake, registration, and peers that speak no ZEO.

use std::io::Read;
use std::net::Shutdown;
use std::time::Duration;

use zeo_rs::ids::Tid;
use zeo_rs::pickle::Value;
use zeo_rs::server::ServerConfig;
use zeo_rs::wire::{Call, Encoding, FaultKind};

use crate::peer::{Peer, memory, raw, read_to_end, say, serve, serve_all};

const ANNOUNCED: &[u8] = b"\0\0\0\x02Z5";

fn framed(body: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(body.len()).unwrap().to_be_bytes().to_vec();
    frame.extend_from_slice(body);
    frame
}

#[test]
fn both_encodings_are_spoken_whatever_was_announced() {
    for msgpack in [false, true] {
        let server = serve(ServerConfig { msgpack, ..ServerConfig::default() }, memory());
        let mut stream = raw(&server);
        let mut announced = [0; 6];
        stream.read_exact(&mut announced).unwrap();
        assert_eq!(&announced, if msgpack { b"\0\0\0\x02M5" } else { b"\0\0\0\x02Z5" });
        if !msgpack {
            Peer::new(&server, Encoding::Pickle).ping();
            Peer::new(&server, Encoding::Msgpack).ping();
        }
    }
}

#[test]
fn ruok_is_answered_with_the_status_of_all_storages() {
    let server = serve_all(ServerConfig::default(), vec![("1".into(), memory()), ("other".into(), memory())]);
    let mut stream = raw(&server);
    say(&mut stream, &framed(b"ruok"));
    let answer = read_to_end(&mut stream);
    let json = answer.strip_prefix(ANNOUNCED).unwrap();
    let length = u32::from_be_bytes(json[..4].try_into().unwrap()) as usize;
    assert_eq!(json.len(), 4 + length);
    let status: serde_json::Value = serde_json::from_slice(&json[4..]).unwrap();
    assert_eq!(status["other"]["last-transaction"], "0000000000000000");
    for key in [
        "connections",
        "loads",
        "stores",
        "commits",
        "aborts",
        "conflicts",
        "conflicts_resolved",
        "active_txns",
        "lock_time",
        "waiting",
        "start",
        "timeout-thread-is-alive",
    ] {
        assert!(status["1"].get(key).is_some(), "{key}");
    }
}

#[test]
fn whoever_speaks_no_zeo_loses_his_connection_and_nobody_else_notices() {
    let server = serve(ServerConfig { max_frame: 1 << 20, ..ServerConfig::default() }, memory());
    let mut client = Peer::new(&server, Encoding::Msgpack);
    let greetings: [&[u8]; 11] = [
        b"\0\0\0\x02Z4",
        b"\0\0\0\x02Z6",
        b"\0\0\0\x02X5",
        b"\0\0\0\x015",
        b"\0\0\0\x03Z5 ",
        b"\0\0\0\0",
        b"GET / HTTP/1.1\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.0\r\n",
        // A TLS hello.
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\xff\xff\xff\xffxxxx",
        b"\0\0\0\x41",
    ];
    for greeting in greetings {
        let mut stream = raw(&server);
        say(&mut stream, greeting);
        assert_eq!(read_to_end(&mut stream), ANNOUNCED, "{}", greeting.escape_ascii());
    }
    // After a good handshake: no message, too large a message, no tuple, a pickle that calls, deep nesting, trailing bytes.
    let deep = [&b"\x80\x03"[..], &b"]".repeat(10_000), &b"a".repeat(9_999), b"."].concat();
    let messages: Vec<(&[u8], Vec<u8>)> = vec![
        (b"Z5", framed(b"")),
        (b"Z5", framed(b"xxxx")),
        (b"Z5", (2u32 << 20).to_be_bytes().to_vec()),
        (b"Z5", framed(b"\x80\x03N.")),
        (b"Z5", framed(b"\x80\x03cos\nsystem\nC\x02ls\x85R.")),
        (b"Z5", framed(&deep)),
        (b"M5", framed(b"\xdd\xff\xff\xff\xff")),
        (b"M5", framed(b"\x94\x01\xc2\xa4ping\x90\xc0")),
        (b"M5", framed(&[0x91; 100_000])),
        // Well-formed, but nothing may be called before register.
        (b"M5", framed(b"\x94\x01\xc2\xa4ping\x90")),
        (b"M5", framed(b"\x94\x00\xc3\xa4nope\x90")),
    ];
    for (protocol, message) in messages {
        let mut stream = raw(&server);
        say(&mut stream, &[framed(protocol), message.clone()].concat());
        assert_eq!(
            read_to_end(&mut stream),
            ANNOUNCED,
            "{}",
            message[..20.min(message.len())].escape_ascii()
        );
    }
    // Cut off in the middle.
    for cut in [1, 5, 7] {
        let mut stream = raw(&server);
        say(&mut stream, &[framed(b"Z5"), framed(b"\x80\x03(K\x01")].concat()[..cut]);
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut stream), ANNOUNCED);
    }
    client.ping();
}

#[test]
fn a_silent_connection_is_closed() {
    let config = ServerConfig { handshake_timeout: Duration::from_millis(50), ..ServerConfig::default() };
    let server = serve(config, memory());
    assert_eq!(read_to_end(&mut raw(&server)), ANNOUNCED);
}

#[test]
fn connections_beyond_the_limit_are_refused() {
    let server = serve(ServerConfig { max_connections: 1, ..ServerConfig::default() }, memory());
    let mut client = Peer::new(&server, Encoding::Pickle);
    assert_eq!(read_to_end(&mut raw(&server)), b"");
    client.ping();
}

#[test]
fn registering() {
    for encoding in [Encoding::Pickle, Encoding::Msgpack] {
        let server = serve(ServerConfig::default(), memory());
        let mut peer = Peer::unregistered(&server, encoding);
        let fault = peer.register("nope", false).unwrap_err();
        assert_eq!(fault.kind(), FaultKind::Value { args: &["unknown storage: nope".into()] });
        // It may try again, and then not once more.
        assert_eq!(peer.register("1", false), Ok(Tid::ZERO));
        peer.send(&Call::Register { storage: "1".into(), read_only: false }, false);
        peer.expect_closed();

        let mut early = Peer::unregistered(&server, encoding);
        early.send(&Call::Ping, false);
        early.expect_closed();
    }
}

#[test]
fn read_only_clients_and_servers() {
    let server = serve(ServerConfig { read_only: true, ..ServerConfig::default() }, memory());
    let mut peer = Peer::unregistered(&server, Encoding::Pickle);
    assert_eq!(peer.register("1", false).unwrap_err().kind(), FaultKind::ReadOnly);
    peer.register("1", true).unwrap();
    assert_eq!(peer.call(Call::NewOids { count: 1 }).unwrap_err().kind(), FaultKind::ReadOnly);
    for call in [
        Call::Vote { txn: Value::Int(1) },
        Call::TpcFinish { txn: Value::Int(1) },
        Call::TpcAbort { txn: Value::Int(1) },
    ] {
        assert_eq!(peer.call(call).unwrap_err().kind(), FaultKind::ReadOnly);
    }
    peer.ping();
    peer.begin(1);
    peer.expect_closed();

    let server = serve(ServerConfig::default(), memory());
    let mut peer = Peer::unregistered(&server, Encoding::Pickle);
    peer.register("1", true).unwrap();
    assert_eq!(peer.call(Call::NewOids { count: 1 }).unwrap_err().kind(), FaultKind::ReadOnly);
}

#[test]
fn unknown_methods_and_wrong_arguments() {
    let server = serve(ServerConfig::default(), memory());
    let send = |body: &[u8]| {
        let mut stream = raw(&server);
        let register = framed(b"\x94\x01\xc2\xa8register\x92\xa11\xc2");
        // The keep-alive is ignored.
        let keep_alive = framed(b"\x94\xff\x00\xa6.reply\xc0");
        say(&mut stream, &[framed(b"M5"), register, framed(body), keep_alive].concat());
        // Fails if the server has closed already.
        let _ = stream.shutdown(Shutdown::Write);
        read_to_end(&mut stream).split_off(ANNOUNCED.len())
    };
    let registered = framed(b"\x94\x01\x00\xa6.reply\xc4\x08\0\0\0\0\0\0\0\0");
    assert_eq!(send(b"\x94\x02\xc2\xa7nothing\x90"), registered);
    assert_eq!(send(b"\x94\x02\xc2\xa6.reply\x90"), registered);
    // Too many arguments of a call that waits: TypeError. Of one that does not: closed.
    let answer = send(b"\x94\x02\xc2\xa4ping\x91\x01");
    let fault = &answer[registered.len() + 4..];
    assert!(
        fault.starts_with(b"\x94\x02\x02\xa6.reply\x92\xb2builtins.TypeError"),
        "{}",
        fault.escape_ascii()
    );
    assert_eq!(send(b"\x94\x00\xc3\xa4ping\x91\x01"), registered);
    // An oid that is none.
    let answer = send(b"\x94\x02\xc2\xa6getTid\x91\xc4\x01x");
    let text = answer.escape_ascii().to_string();
    assert!(text.contains("POSKeyError") && text.ends_with(r"\x91\xc4\x01x"), "{text}");
}
