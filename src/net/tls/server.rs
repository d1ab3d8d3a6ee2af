//! The server's side: every client must show a certificate, as with ZEO's `<ssl>` section.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::server::{Acceptor, NoServerSessionStorage};
use rustls::sign::SingleCertAndKey;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_rustls::LazyConfigAcceptor;

use super::explain::Explain;
use super::key::{Identity, Password};
use super::trust::TrustStore;
use super::verify::{PeerVerifier, Said, told};
use super::{Authenticate, PemSource, TlsError, Trust, provider, read_added};

/// An accepted connection.
pub use tokio_rustls::server::TlsStream as ServerStream;

/// What a plaintext client that waited in silence is sent before it is hung up on: the alert `handshake_failure`, by which ours knows that
/// the server speaks TLS.
const SILENCE_ALERT: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 40];

/// How long a client may take to say hello, which it does at once; one without TLS waits for the server, and is told after this.
const HELLO: Duration = Duration::from_secs(5);

/// Who hangs up within this time without a word was looking whether there is a server.
const PROBE: Duration = Duration::from_millis(500);

/// The same failure of the same host is logged once in this time, and so many different ones.
const NEWS: Duration = Duration::from_secs(60);
const MAX_NEWS: usize = 100;

/// ZEO's server `<ssl>` section.
#[derive(Debug, Clone)]
pub struct ServerTlsOptions {
    /// PEM: this server's certificate, then what leads to its CA, if anything; perhaps the key.
    pub certificate: PathBuf,
    /// PEM: the key, if it is not in `certificate`.
    pub key: Option<PathBuf>,
    pub password: Option<Password>,
    /// Which clients may connect.
    pub authenticate: Authenticate,
}

/// A server's certificate, key and trust, as read last.
#[derive(Debug)]
pub struct ServerTls {
    options: ServerTlsOptions,
    identity: RwLock<Arc<Identity>>,
    trust: Trust,
    /// What was made of the two; used again while they are the same. (A connection keeps it for as long as it lives.)
    made: Mutex<Option<Made>>,
    told: Mutex<HashMap<String, Instant>>,
}

#[derive(Debug, Clone)]
struct Made {
    identity: Arc<Identity>,
    trust: Arc<TrustStore>,
    config: Arc<ServerConfig>,
}

impl ServerTls {
    /// Reads and checks everything; errors name the file at fault.
    pub fn new(options: ServerTlsOptions) -> Result<Self, TlsError> {
        let identity = RwLock::new(Arc::new(options.identity()?));
        let trust = Trust::load(options.authenticate.clone())?;
        Ok(Self { options, identity, trust, made: Mutex::default(), told: Mutex::default() })
    }

    /// Reads the files again, for new connections (SIGHUP). On an error everything stays as it was.
    pub fn reload(&self) -> Result<(), TlsError> {
        let identity = Arc::new(self.options.identity()?);
        self.trust.reload()?;
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = identity;
        Ok(())
    }

    /// Accepts these certificates too, from now on and over [`Self::reload`]: how `authenticate DYNAMIC` is filled.
    pub fn trust(&self, pem: PemSource<'_>) -> Result<(), TlsError> {
        self.trust.add(read_added(pem)?)
    }

    /// False if the same was said of this host in the last minute: a client that is refused tries again at once, and for ever.
    pub fn is_news(&self, peer: &str, error: &TlsError) -> bool {
        let host = peer.rsplit_once(':').map_or(peer, |(host, _)| host);
        let text = format!("{host} {}", error.to_string().replace(peer, ""));
        let now = Instant::now();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|_, at| now.duration_since(*at) < NEWS);
        if told.contains_key(&text) {
            return false;
        }
        // Many hosts at once are a scan; then a line each is too much as well.
        told.len() < MAX_NEWS && told.insert(text, now).is_none()
    }

    /// The handshake, on a connection just accepted; `peer` is its name in messages. Costs a stat if `authenticate` is a directory,
    /// a clone of some `Arc`s, and the handshake's cryptography (about a millisecond), which runs on the calling task.
    ///
    /// Whoever says nothing, or nothing of TLS, is told by an alert and by the error's text that this is TLS.
    pub async fn accept<S>(
        &self,
        stream: S,
        peer: &str,
        within: Duration,
    ) -> Result<ServerStream<S>, TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let identity = self.identity.read().unwrap_or_else(PoisonError::into_inner).clone();
        let explain = Explain {
            peer: format!("the client {peer}"),
            is_client: false,
            own: Some(identity.name.clone()),
            said: Said::default(),
        };

        let deadline = tokio::time::Instant::now() + within;
        let hello_within = within.min(HELLO);
        let began = Instant::now();
        let mut hello = std::pin::pin!(LazyConfigAcceptor::new(Acceptor::default(), stream));
        let start = match tokio::time::timeout(hello_within, hello.as_mut()).await {
            Ok(Ok(start)) => start,
            // Probes go at once; a client without TLS waits to be greeted.
            Ok(Err(error)) if is_end(&error) && began.elapsed() < PROBE => return Err(TlsError::HungUp),
            Ok(Err(error)) if is_end(&error) => return Err(explain.silent(began.elapsed())),
            Ok(Err(error)) => return Err(explain.io(&error)),
            Err(_) => {
                if let Some(mut stream) = hello.take_io() {
                    let told = stream.write_all(&SILENCE_ALERT);
                    // It is hung up on anyway.
                    let _ = tokio::time::timeout(Duration::from_secs(1), told).await;
                }
                return Err(explain.silent(hello_within));
            }
        };
        let config = self.config(identity).map_err(|error| explain.rustls(&error))?;
        let handshake = told(&explain.said, start.into_stream(config));
        match tokio::time::timeout_at(deadline, handshake).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(explain.io(&error)),
            Err(_) => Err(explain.closed()),
        }
    }
}

impl ServerTls {
    fn config(&self, identity: Arc<Identity>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let trust = self.trust.current();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = &*made
            && Arc::ptr_eq(&made.identity, &identity)
            && Arc::ptr_eq(&made.trust, &trust)
        {
            return Ok(Arc::clone(&made.config));
        }
        let provider = provider();
        let verifier = PeerVerifier::shared(Arc::clone(&trust), provider.signature_verification_algorithms);
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified.clone())));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let config = Arc::new(config);
        *made = Some(Made { identity, trust, config: Arc::clone(&config) });
        Ok(config)
    }
}

/// The peer went away (and did not answer what it was told).
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::UnexpectedEof | K::ConnectionReset | K::BrokenPipe)
        && error.get_ref().is_none_or(|inner| !inner.is::<rustls::Error>())
}

impl ServerTlsOptions {
    fn identity(&self) -> Result<Identity, TlsError> {
        Identity::load(&self.certificate, self.key.as_deref(), self.password.as_ref(), &provider())
    }
}
