//! TLS handshakes in memory, our client with our server, over the certificates of `tests/fixtures/tls/` (`make.sh` there says how they
//! were made): what is accepted, what is refused, and what each side says about it.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use zeo_rs::net::tls::{
    Authenticate, ClientSession, ClientTls, ClientTlsOptions, Password, PemSource, ServerTls,
    ServerTlsOptions, TlsError, TlsVersion, looks_like_tls,
};

const HOST: &str = "zeo.example.com";
const WITHIN: Duration = Duration::from_secs(10);

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name)
}

fn pem(name: &str) -> PathBuf {
    fixture(&format!("{name}.pem"))
}

fn key(name: &str) -> Option<PathBuf> {
    Some(fixture(&format!("{name}.key")))
}

fn server_options(certificate: &str, trusts: &str) -> ServerTlsOptions {
    // Dated certificates were made with the key of another.
    let key_of = if matches!(certificate, "expired" | "future") { "server" } else { certificate };
    ServerTlsOptions {
        certificate: pem(certificate),
        key: key(key_of),
        password: None,
        authenticate: Authenticate::File(pem(trusts)),
    }
}

fn client_options(certificate: &str, trusts: &str) -> ClientTlsOptions {
    ClientTlsOptions {
        certificate: Some(pem(certificate)),
        key: key(certificate),
        password: None,
        authenticate: Authenticate::File(pem(trusts)),
        check_hostname: true,
        server_hostname: None,
        versions: vec![],
    }
}

/// Both ends after a handshake and one message each way: `Ok`, or what each said.
#[derive(Debug)]
struct Outcome {
    server: Result<(), String>,
    client: Result<(), String>,
}

impl Outcome {
    fn is_accepted(&self) -> bool {
        self.server.is_ok() && self.client.is_ok()
    }
}

async fn pump(
    session: &mut ClientSession,
    socket: &mut DuplexStream,
    until: impl Fn(&mut ClientSession) -> bool,
) -> Result<(), String> {
    loop {
        while session.wants_write() {
            let mut out = Vec::new();
            session.write_tls(&mut out).map_err(|error| error.to_string())?;
            // The server may be gone with its alert in the pipe, which is to be read.
            let _ = socket.write_all(&out).await;
        }
        if until(session) {
            return Ok(());
        }
        let mut buffer = [0; 4096];
        let count = socket.read(&mut buffer).await.map_err(|error| error.to_string())?;
        if count == 0 {
            return Err(session.closed().to_string());
        }
        if let Err(error) = session.receive(&buffer[..count]) {
            let mut alert = Vec::new();
            while session.wants_write() {
                session.write_tls(&mut alert).map_err(|error| error.to_string())?;
            }
            let _ = socket.write_all(&alert).await;
            return Err(error.to_string());
        }
    }
}

async fn handshake(server: Arc<ServerTls>, client: &ClientTls, host: Option<&str>) -> Outcome {
    let (near, mut far) = duplex(1 << 16);
    let serving = tokio::spawn(async move {
        let mut stream =
            server.accept(near, "10.0.0.1:4711", WITHIN).await.map_err(|error| error.to_string())?;
        let mut question = [0; 4];
        stream.read_exact(&mut question).await.map_err(|error| error.to_string())?;
        assert_eq!(&question, b"ping");
        stream.write_all(b"pong").await.map_err(|error| error.to_string())?;
        stream.flush().await.map_err(|error| error.to_string())
    });
    let client = async {
        let mut session = client.session(host, "zeo.example.com:8100").map_err(|error| error.to_string())?;
        pump(&mut session, &mut far, |session| !session.is_handshaking()).await?;
        session.write(b"ping").map_err(|error| error.to_string())?;
        let mut answer = Vec::new();
        // TLS 1.3 tells a refused client only here.
        let answered = std::cell::RefCell::new(&mut answer);
        pump(&mut session, &mut far, |session| {
            let mut buffer = [0; 16];
            if let Ok(count) = session.read(&mut buffer) {
                answered.borrow_mut().extend_from_slice(&buffer[..count]);
            }
            answered.borrow().len() >= 4
        })
        .await?;
        assert_eq!(answer, b"pong");
        Ok(())
    };
    let client = client.await;
    drop(far);
    Outcome { server: serving.await.unwrap(), client }
}

fn run(server: ServerTlsOptions, client: ClientTlsOptions) -> Outcome {
    run_to(server, client, HOST)
}

fn run_to(server: ServerTlsOptions, client: ClientTlsOptions, host: &str) -> Outcome {
    let (server, client) = (ServerTls::new(server).unwrap(), ClientTls::new(client).unwrap());
    block_on(handshake(Arc::new(server), &client, Some(host)))
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), future).await.expect("hangs") })
}

/// A server showing `certificate` to a client that has `trusted` as its authenticate file.
fn served(certificate: &str, trusted: &str) -> Outcome {
    run(server_options(certificate, "client"), client_options("client", trusted))
}

#[track_caller]
fn assert_accepted(outcome: Outcome) {
    assert!(outcome.is_accepted(), "{outcome:?}");
}

/// One side refuses with its text, the other is told in its own words.
#[track_caller]
fn assert_says(said: &Result<(), String>, parts: &[&str]) {
    let said = said.as_ref().expect_err("accepted");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
}

// ---- what is accepted

#[test]
fn zeo_documentation_certificates_work_in_both_versions() {
    for versions in [vec![TlsVersion::Tls12], vec![TlsVersion::Tls13], vec![]] {
        let client = ClientTlsOptions { versions, ..client_options("client", "server") };
        assert_accepted(run(server_options("server", "client"), client));
    }
}

#[test]
fn a_pinned_certificate_is_accepted_whatever_it_looks_like() {
    // Self-signed as CA, not as CA, by SHA-1, for clients only; X.509 v1 or by an unknown CA; other key types.
    for name in ["server", "not-ca", "sha1", "eku-client", "leaf", "leaf-v1", "leaf-sha1", "ed25519", "p384"]
    {
        for versions in [TlsVersion::Tls12, TlsVersion::Tls13] {
            let client = ClientTlsOptions { versions: vec![versions], ..client_options("client", name) };
            let outcome = run(server_options(name, "client"), client);
            assert!(outcome.is_accepted(), "{name}: {outcome:?}");
        }
    }
    for name in ["server", "sha1", "leaf-v1", "ed25519", "p384"] {
        let outcome = run(server_options("server", name), client_options(name, "server"));
        assert!(outcome.is_accepted(), "{name}: {outcome:?}");
    }
}

#[test]
fn a_chain_to_a_configured_ca_is_accepted() {
    for name in ["leaf", "leaf-v1", "leaf-deep"] {
        assert_accepted(served(name, "ca"));
        assert_accepted(served(name, "several"));
        assert_accepted(run(server_options("server", "ca"), client_options(name, "server")));
    }
}

// ---- what is refused, and what is said

#[test]
fn an_unknown_server_is_refused_and_told_so() {
    let outcome = served("server", "stranger");
    assert_says(
        &outcome.client,
        &["the server zeo.example.com:8100", "CN=zeo.example.com", "self-signed", "stranger.pem"],
    );
    assert_says(
        &outcome.server,
        &["the client 10.0.0.1:4711", "does not know our certificate", "server.pem"],
    );
    assert_says(&served("leaf", "other-ca").client, &["issued by 'CN=My CA'", "other-ca.pem"]);
    assert_says(&served("leaf-v1", "other-ca").client, &["issued by 'CN=My CA'", "other-ca.pem"]);
}

#[test]
fn an_unknown_client_is_refused_and_told_so() {
    for versions in [TlsVersion::Tls12, TlsVersion::Tls13] {
        let client = ClientTlsOptions { versions: vec![versions], ..client_options("stranger", "server") };
        let outcome = run(server_options("server", "client"), client);
        assert_says(
            &outcome.server,
            &["the client 10.0.0.1:4711", "CN=stranger", "self-signed", "client.pem"],
        );
        assert_says(
            &outcome.client,
            &["the server zeo.example.com:8100", "does not know our certificate", "stranger.pem"],
        );
    }
}

#[test]
fn a_client_without_certificate_is_refused_and_told_so() {
    for versions in [TlsVersion::Tls12, TlsVersion::Tls13] {
        let client = ClientTlsOptions {
            certificate: None,
            key: None,
            versions: vec![versions],
            ..client_options("client", "server")
        };
        let outcome = run(server_options("server", "client"), client);
        assert_says(&outcome.server, &["the client 10.0.0.1:4711", "shows no certificate"]);
        assert_says(&outcome.client, &["requires a client certificate"]);
    }
}

#[test]
fn dates_count_for_pinned_certificates_too() {
    assert_says(&served("expired", "expired").client, &["expired on 2021-01-01 00:00 UTC"]);
    assert_says(&served("expired", "expired").server, &["expired or not yet valid", "expired.pem"]);
    assert_says(&served("future", "future").client, &["not valid before 2100-01-01"]);
    let outcome = served("leaf", "ca-expired");
    assert_says(&outcome.client, &["issued by 'CN=My CA'", "ca-expired.pem expired on 2021-01-01"]);
    assert_says(&served("leaf-v1", "ca-expired").client, &["ca-expired.pem expired on"]);
}

#[test]
fn a_pinned_certificate_does_not_vouch_for_others() {
    let outcome = served("signed-by-not-ca", "not-ca");
    assert_says(&outcome.client, &["not-ca.pem is not a CA"]);
}

#[test]
fn the_old_certificate_of_a_renewed_one_is_named() {
    // The same subject, another certificate.
    assert_says(&served("sha1", "not-ca").client, &["not the one of the same subject", "not-ca.pem"]);
}

#[test]
fn purpose_and_signatures_of_chains_are_checked() {
    assert_says(&served("leaf-eku-client", "ca").client, &["extendedKeyUsage"]);
    assert_says(&served("leaf-sha1", "ca").client, &["SHA-1"]);
    assert_accepted(run(server_options("server", "ca"), client_options("leaf-eku-client", "server")));
}

#[test]
fn only_the_holder_of_the_key_may_show_a_certificate() {
    // Another's certificate and one's own key: refused when configured, so nobody gets as far as the handshake.
    let mut options = client_options("client", "server");
    options.key = key("stranger");
    let error = ClientTls::new(options).unwrap_err();
    assert!(matches!(error, TlsError::KeyMismatch { .. }), "{error}");
    for part in ["stranger.key", "CN=client", "client.pem"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn revocation_lists_are_honoured() {
    assert_accepted(served("leaf", "ca-and-crl"));
    assert_accepted(served("leaf-v1", "ca-and-crl"));
    for name in ["revoked", "revoked-v1"] {
        let outcome = served(name, "ca-and-crl");
        assert_says(&outcome.client, &["was revoked by its issuer 'CN=My CA'"]);
        assert_says(&outcome.server, &["to be revoked"]);
        let outcome = run(server_options("server", "ca-and-crl"), client_options(name, "server"));
        assert_says(&outcome.server, &["was revoked"]);
        // Without the list nobody can know.
        assert_accepted(served(name, "ca"));
    }
    assert_says(
        &served("leaf", "ca-and-old-crl").client,
        &["revocation list of its issuer", "expired on 2020-02-01"],
    );
    // Pinned or not.
    let both = tempfile::NamedTempFile::new().unwrap();
    let text =
        [pem("ca-and-crl"), pem("revoked")].map(|path| std::fs::read_to_string(path).unwrap()).concat();
    std::fs::write(both.path(), text).unwrap();
    let client = ClientTlsOptions {
        authenticate: Authenticate::File(both.path().into()),
        ..client_options("client", "ca")
    };
    assert_says(&run(server_options("revoked", "client"), client).client, &["was revoked"]);
}

#[test]
fn an_issuer_without_revocation_list_is_refused_where_there_are_some() {
    let both = tempfile::NamedTempFile::new().unwrap();
    let text =
        [pem("other-ca"), pem("ca"), fixture("ca.crl")].map(|path| std::fs::read_to_string(path).unwrap());
    std::fs::write(both.path(), text.concat()).unwrap();
    let trusts = Authenticate::File(both.path().into());
    let client = ClientTlsOptions { authenticate: trusts, ..client_options("client", "ca") };
    assert_accepted(run(server_options("leaf", "client"), client.clone()));
    let deep = run(server_options("leaf-deep", "client"), client);
    assert_says(&deep.client, &["has revocation lists, but none of its issuer 'CN=Intermediate'"]);
}

// ---- host names

#[test]
fn host_names_are_checked_as_openssl_does() {
    let cases = [
        // certificate, host, accepted
        ("server", "zeo.example.com", true),
        ("server", "ZEO.Example.com", true),
        ("server", "other.example.com", false),
        ("server", "127.0.0.1", false),
        ("san", "zeo.example.com", true),
        ("san", "127.0.0.1", true),
        ("san", "foo.example.com", false),
        ("wild", "zeo.example.com", true),
        ("wild", "a.b.example.com", false),
        ("wild", "example.com", false),
        ("ip-cn", "127.0.0.1", false),
    ];
    for (name, host, accepted) in cases {
        let outcome = run_to(server_options(name, "client"), client_options("client", name), host);
        assert_eq!(outcome.is_accepted(), accepted, "{name} as {host}: {outcome:?}");
        if !accepted {
            assert_says(&outcome.client, &[host, "server-hostname", "check-hostname"]);
            assert_says(&outcome.server, &["perhaps it is not for the host name"]);
        }
    }
}

#[test]
fn server_hostname_and_check_hostname() {
    let client =
        ClientTlsOptions { server_hostname: Some(HOST.into()), ..client_options("client", "server") };
    assert_accepted(run_to(server_options("server", "client"), client, "127.0.0.1"));
    let client = ClientTlsOptions { check_hostname: false, ..client_options("client", "server") };
    assert_accepted(run_to(server_options("server", "client"), client.clone(), "127.0.0.1"));
    // Not even a name.
    assert_accepted(run_to(server_options("server", "client"), client.clone(), "zeo server"));
    // Unix sockets have no host.
    let server = Arc::new(ServerTls::new(server_options("server", "client")).unwrap());
    assert_accepted(block_on(handshake(server, &ClientTls::new(client).unwrap(), None)));
    let error =
        ClientTls::new(client_options("client", "server")).unwrap().session(None, "/socket").unwrap_err();
    assert!(matches!(error, TlsError::NoHostName), "{error}");
    let bad = ClientTlsOptions { server_hostname: Some("a b".into()), ..client_options("client", "server") };
    assert!(matches!(ClientTls::new(bad).unwrap_err(), TlsError::HostName(_)));
}

// ---- files

#[test]
fn keys_in_every_coat() {
    let plain = ["server.key", "key-pkcs1.pem"];
    let encrypted = [
        "key-legacy-aes128.pem",
        "key-legacy-aes192.pem",
        "key-legacy-aes256.pem",
        "key-legacy-des3.pem",
        "key-pkcs8.pem",
        "key-pkcs8-des3.pem",
        "key-pkcs8-scrypt.pem",
    ];
    let with = |key: &str, password: Option<Password>| ServerTlsOptions {
        key: Some(fixture(key)),
        password,
        ..server_options("server", "client")
    };
    for key in plain {
        ServerTls::new(with(key, None)).unwrap();
    }
    for key in encrypted {
        ServerTls::new(with(key, Some("secret".into()))).unwrap();
        let error = ServerTls::new(with(key, Some("wrong".into()))).unwrap_err();
        assert!(matches!(error, TlsError::WrongPassword { .. }), "{key}: {error}");
        let error = ServerTls::new(with(key, None)).unwrap_err();
        assert!(matches!(error, TlsError::KeyNeedsPassword { .. }), "{key}: {error}");
        assert!(error.to_string().contains("password-function"), "{error}");
        let asked = Password::new(|| Err("the vault is sealed".into()));
        let error = ServerTls::new(with(key, Some(asked))).unwrap_err();
        assert!(error.to_string().contains("the vault is sealed"), "{error}");
    }
    for key in ["key-sec1.pem", "key-sec1-legacy.pem"] {
        let leaf = ServerTlsOptions { certificate: pem("leaf"), ..with(key, Some("secret".into())) };
        ServerTls::new(leaf).unwrap();
    }
    let combined = ServerTlsOptions {
        certificate: pem("server-and-key"),
        key: None,
        ..server_options("server", "client")
    };
    ServerTls::new(combined).unwrap();
}

#[test]
fn the_password_is_asked_only_for_an_encrypted_key() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let password = Password::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
        Ok(b"secret".to_vec())
    });
    let options = ServerTlsOptions { password: Some(password), ..server_options("server", "client") };
    ServerTls::new(options.clone()).unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 0);
    ServerTls::new(ServerTlsOptions { key: Some(fixture("key-pkcs8.pem")), ..options }).unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let empty = tempfile::NamedTempFile::new().unwrap();
    let cut = tempfile::NamedTempFile::new().unwrap();
    let whole = std::fs::read_to_string(pem("several")).unwrap();
    std::fs::write(cut.path(), &whole[..whole.len() - 100]).unwrap();
    let garbled = tempfile::NamedTempFile::new().unwrap();
    let text = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
    std::fs::write(garbled.path(), text).unwrap();
    let name = |path: &Path| path.display().to_string();
    let ok = || server_options("server", "client");
    let trusting = |path: PathBuf| ServerTlsOptions { authenticate: Authenticate::File(path), ..ok() };
    let showing = |path: PathBuf| ServerTlsOptions { certificate: path, ..ok() };
    let keyed = |path: PathBuf| ServerTlsOptions { key: Some(path), ..ok() };
    let cases: Vec<(ServerTlsOptions, Vec<String>)> = vec![
        (
            showing(fixture("missing.pem")),
            vec!["certificate".into(), "missing.pem".into(), "No such file".into()],
        ),
        (showing(fixture("server.der")), vec!["server.der".into(), "DER".into(), "openssl x509".into()]),
        (showing(fixture("server.key")), vec!["no certificate".into(), "server.key".into()]),
        (ServerTlsOptions { key: None, ..ok() }, vec!["no private key".into(), "server.pem".into()]),
        (
            keyed(fixture("client.key")),
            vec!["client.key".into(), "server.pem".into(), "is not that of".into()],
        ),
        (keyed(fixture("key-pkcs8-pbes1.pem")), vec!["key-pkcs8-pbes1.pem".into()]),
        (trusting(fixture("missing.pem")), vec!["authenticate file".into(), "missing.pem".into()]),
        (trusting(empty.path().into()), vec![name(empty.path()), "empty".into()]),
        (trusting(fixture("server.key")), vec!["no certificate".into(), "server.key".into()]),
        (trusting(cut.path().into()), vec![name(cut.path()), "only 2 of its 3 blocks".into()]),
        (trusting(garbled.path().into()), vec![name(garbled.path()), "cannot be read".into()]),
    ];
    for (mut options, parts) in cases {
        if options.key.as_ref().is_some_and(|key| key.ends_with("key-pkcs8-pbes1.pem")) {
            options.password = Some("secret".into());
        }
        let error = ServerTls::new(options).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(&part), "{part:?} is not in {error:?}");
        }
    }
    for name in ["rsa1024", "p521"] {
        let error = ServerTls::new(server_options(name, "client")).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("2048 bits"), "{error}");
    }
}

#[test]
fn authenticate_words() {
    assert!(matches!(Authenticate::for_server("DYNAMIC"), Ok(Authenticate::Dynamic)));
    assert!(matches!(Authenticate::for_client(Some("DYNAMIC")), Ok(Authenticate::System)));
    assert!(matches!(Authenticate::for_client(None), Ok(Authenticate::System)));
    for word in ["-", "SIGNED"] {
        let error = Authenticate::for_server(word).unwrap_err().to_string();
        assert!(error.contains(&format!("authenticate {word} does not work")), "{error}");
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    assert!(matches!(Authenticate::for_server(path), Ok(Authenticate::Directory(_))));
}

// ---- changes while running

#[test]
fn a_directory_is_read_by_hashed_names_and_followed() {
    let directory = tempfile::tempdir().unwrap();
    let authenticate = Authenticate::Directory(directory.path().to_owned());
    let options = ServerTlsOptions { authenticate, ..server_options("server", "client") };
    std::fs::copy(pem("client"), directory.path().join("client.pem")).unwrap();
    let error = ServerTls::new(options.clone()).unwrap_err();
    assert!(matches!(error, TlsError::NoHashedCertificates { .. }), "{error}");
    assert!(error.to_string().contains("openssl rehash"), "{error}");

    std::os::unix::fs::symlink("client.pem", directory.path().join("0123abcd.0")).unwrap();
    let server = Arc::new(ServerTls::new(options).unwrap());
    let client = ClientTls::new(client_options("client", "server")).unwrap();
    let stranger = ClientTls::new(client_options("stranger", "server")).unwrap();
    let connect = |client: &ClientTls| block_on(handshake(server.clone(), client, Some(HOST)));
    assert_accepted(connect(&client));
    assert!(!connect(&stranger).is_accepted());

    std::fs::copy(pem("stranger"), directory.path().join("4567cdef.0")).unwrap();
    std::fs::remove_file(directory.path().join("0123abcd.0")).unwrap();
    assert_accepted(connect(&stranger));
    assert!(!connect(&client).is_accepted());
}

#[test]
fn reload_takes_new_files_and_keeps_the_old_ones_on_errors() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str, fixture_name: &str| {
        std::fs::copy(fixture(fixture_name), directory.path().join(name)).unwrap();
    };
    place("own.pem", "server.pem");
    place("own.key", "server.key");
    place("clients.pem", "client.pem");
    let server = Arc::new(
        ServerTls::new(ServerTlsOptions {
            certificate: directory.path().join("own.pem"),
            key: Some(directory.path().join("own.key")),
            password: None,
            authenticate: Authenticate::File(directory.path().join("clients.pem")),
        })
        .unwrap(),
    );
    let connect = |client: ClientTlsOptions| {
        block_on(handshake(server.clone(), &ClientTls::new(client).unwrap(), Some(HOST)))
    };
    assert_accepted(connect(client_options("client", "server")));

    place("own.pem", "san.pem");
    let error = server.reload().unwrap_err();
    assert!(matches!(error, TlsError::KeyMismatch { .. }), "{error}");
    assert_accepted(connect(client_options("client", "server")));

    place("own.key", "san.key");
    place("clients.pem", "stranger.pem");
    assert_accepted(connect(client_options("client", "server")));
    server.reload().unwrap();
    assert_accepted(connect(client_options("stranger", "san")));
    assert_says(&connect(client_options("client", "san")).server, &["CN=client", "clients.pem"]);

    place("clients.pem", "ca.key");
    assert!(matches!(server.reload().unwrap_err(), TlsError::NoCertificate { .. }));
    assert_accepted(connect(client_options("stranger", "san")));
}

#[test]
fn dynamic_trusts_nobody_until_told() {
    let options =
        ServerTlsOptions { authenticate: Authenticate::Dynamic, ..server_options("server", "client") };
    let server = Arc::new(ServerTls::new(options).unwrap());
    let client = ClientTls::new(client_options("client", "server")).unwrap();
    let connect = || block_on(handshake(server.clone(), &client, Some(HOST)));
    assert_says(&connect().server, &["CN=client", "the certificates added by the program (0 certificates)"]);
    assert!(matches!(server.trust(PemSource::Text(b"")), Err(TlsError::NotPem { .. })));
    assert!(matches!(
        server.trust(PemSource::File(&fixture("client.key"))),
        Err(TlsError::NoCertificate { .. })
    ));
    server.trust(PemSource::File(&pem("client"))).unwrap();
    assert_accepted(connect());
    server.reload().unwrap();
    assert_accepted(connect());
}

// ---- plaintext

#[test]
fn plaintext_clients_are_recognised() {
    block_on(async {
        let server = ServerTls::new(server_options("server", "client")).unwrap();
        for hello in [&b"\0\0\0\x04ruok"[..], b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x02M5"] {
            let (near, mut far) = duplex(1 << 12);
            far.write_all(hello).await.unwrap();
            let error = server.accept(near, "10.0.0.1:4711", WITHIN).await.unwrap_err().to_string();
            assert!(error.contains("10.0.0.1:4711") && error.contains("does not speak TLS"), "{error}");
            let mut told = Vec::new();
            far.read_to_end(&mut told).await.unwrap();
            assert!(looks_like_tls(&told), "{told:?}");
        }
    });
}

#[test]
fn silent_clients_are_told_and_dropped() {
    block_on(async {
        let server = ServerTls::new(server_options("server", "client")).unwrap();
        let (near, mut far) = duplex(1 << 12);
        let error =
            server.accept(near, "10.0.0.1:4711", Duration::from_millis(20)).await.unwrap_err().to_string();
        assert!(error.contains("no TLS hello") && error.contains("with ssl"), "{error}");
        let mut told = Vec::new();
        far.read_to_end(&mut told).await.unwrap();
        assert!(looks_like_tls(&told), "{told:?}");
        // One that begins and stops is dropped as well.
        let (near, mut far) = duplex(1 << 12);
        far.write_all(&[0x16, 3, 1, 2, 0]).await.unwrap();
        server.accept(near, "10.0.0.1:4711", Duration::from_millis(20)).await.unwrap_err();
    });
}

#[test]
fn the_same_failure_of_the_same_host_is_no_news() {
    let server = ServerTls::new(server_options("server", "client")).unwrap();
    let error = |text: &str| TlsError::Failed(format!("TLS with the client {text}"));
    assert!(server.is_news("10.0.0.1:1", &error("10.0.0.1:1 failed")));
    assert!(!server.is_news("10.0.0.1:2", &error("10.0.0.1:2 failed")));
    assert!(server.is_news("10.0.0.1:3", &error("10.0.0.1:3 failed otherwise")));
    assert!(server.is_news("10.0.0.2:1", &error("10.0.0.2:1 failed")));
    let news = (0..1000).filter(|n| server.is_news(&format!("10.1.0.{n}:1"), &error("failed"))).count();
    assert!(news < 100, "{news}");
}

#[test]
fn a_plaintext_server_is_recognised() {
    let client = ClientTls::new(client_options("client", "server")).unwrap();
    let mut session = client.session(Some(HOST), "zeo.example.com:8100").unwrap();
    let mut hello = Vec::new();
    session.write_tls(&mut hello).unwrap();
    assert!(looks_like_tls(&hello));
    // What a ZEO server says first.
    let error = session.receive(b"\0\0\0\x02M5").unwrap_err().to_string();
    assert!(error.contains("zeo.example.com:8100") && error.contains("<ssl> section"), "{error}");
    assert!(!looks_like_tls(b"\0\0\0\x02M5"));
}

#[test]
fn large_data_passes_in_both_directions() {
    let server = Arc::new(ServerTls::new(server_options("server", "client")).unwrap());
    let client = ClientTls::new(client_options("client", "server")).unwrap();
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n * 7 % 251) as u8).collect();
    let expected = data.clone();
    let echoed = block_on(async {
        let (near, mut far) = duplex(1 << 16);
        let size = data.len();
        let serving = tokio::spawn(async move {
            let mut stream = server.accept(near, "client", WITHIN).await.unwrap();
            let mut got = vec![0; size];
            stream.read_exact(&mut got).await.unwrap();
            stream.write_all(&got).await.unwrap();
            stream.flush().await.unwrap();
        });
        let mut session = client.session(Some(HOST), "server").unwrap();
        pump(&mut session, &mut far, |session| !session.is_handshaking()).await.unwrap();
        let mut rest = &data[..];
        while !rest.is_empty() {
            let count = session.write(rest).unwrap();
            rest = &rest[count..];
            pump(&mut session, &mut far, |_| true).await.unwrap();
        }
        let mut got = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        while got.len() < size {
            match session.read(&mut buffer) {
                Ok(count) => got.extend_from_slice(&buffer[..count]),
                Err(_) => {
                    let count = far.read(&mut buffer).await.unwrap();
                    session.receive(&buffer[..count]).unwrap();
                }
            }
        }
        serving.await.unwrap();
        got
    });
    assert!(echoed == expected);
}
