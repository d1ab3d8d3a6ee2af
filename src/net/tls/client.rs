//! The client's side: a session to be driven over any socket, because the client's threads read and write their own.

use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use bytes::{Buf, BytesMut};
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, ClientConnection, SupportedProtocolVersion};

use super::explain::Explain;
use super::key::{Identity, Password};
use super::verify::PeerVerifier;
use super::{Authenticate, PemSource, TlsError, Trust, provider, read_added};

/// ZEO's client `<ssl>` section, and what an `ssl.SSLContext` can say.
#[derive(Debug, Clone)]
pub struct ClientTlsOptions {
    /// PEM: this client's certificate. ZEO's servers require one.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub password: Option<Password>,
    /// Which servers are trusted.
    pub authenticate: Authenticate,
    /// Whether the server's certificate must be for the host connected to.
    pub check_hostname: bool,
    /// The name to check (and to send as SNI) instead of the address's host.
    pub server_hostname: Option<String>,
    /// Among 1.2 and 1.3; both if empty.
    pub versions: Vec<TlsVersion>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsVersion {
    Tls12,
    Tls13,
}

/// A client's certificate, key and trust, as read last.
#[derive(Debug)]
pub struct ClientTls {
    options: ClientTlsOptions,
    identity: RwLock<Option<Arc<Identity>>>,
    trust: Trust,
}

impl ClientTls {
    /// Reads and checks everything; errors name the file at fault.
    pub fn new(options: ClientTlsOptions) -> Result<Self, TlsError> {
        if let Some(host) = &options.server_hostname {
            parse_host(host)?;
        }
        let identity = RwLock::new(options.identity()?.map(Arc::new));
        let trust = Trust::load(options.authenticate.clone())?;
        Ok(Self { options, identity, trust })
    }

    /// Reads the files again, for new connections. On an error everything stays as it was.
    pub fn reload(&self) -> Result<(), TlsError> {
        let identity = self.options.identity()?.map(Arc::new);
        self.trust.reload()?;
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = identity;
        Ok(())
    }

    /// Trusts these certificates too, from now on and over [`Self::reload`].
    pub fn trust(&self, pem: PemSource<'_>) -> Result<(), TlsError> {
        self.trust.add(read_added(pem)?)
    }

    /// A session for a new connection to `host` (none for Unix sockets); `peer` is the server's name in messages.
    pub fn session(&self, host: Option<&str>, peer: &str) -> Result<ClientSession, TlsError> {
        let options = &self.options;
        let name = match options.server_hostname.as_deref().or(host) {
            Some(host) if options.check_hostname => Some(parse_host(host)?),
            None if options.check_hostname => return Err(TlsError::NoHostName),
            // Only for SNI.
            other => other.and_then(|host| parse_host(host).ok()),
        };
        let identity = self.identity.read().unwrap_or_else(PoisonError::into_inner).clone();
        let provider = provider();
        let algorithms = provider.signature_verification_algorithms;
        let (verifier, said) = PeerVerifier::new(self.trust.current(), options.check_hostname, algorithms);
        let own = identity.as_ref().map(|identity| identity.name.clone());
        let explain = Explain { peer: format!("the server {peer}"), is_client: true, own, said };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&options.protocol_versions())
            .map_err(|error| explain.rustls(&error))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match identity {
            Some(identity) => builder
                .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified.clone()))),
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        config.enable_sni = name.is_some();
        // Without a name nothing is sent or checked; rustls wants one all the same.
        let name = name.unwrap_or(ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()));
        let connection =
            ClientConnection::new(Arc::new(config), name).map_err(|error| explain.rustls(&error))?;
        Ok(ClientSession { connection, explain, incoming: BytesMut::new(), is_closed: false })
    }
}

impl ClientTlsOptions {
    fn identity(&self) -> Result<Option<Identity>, TlsError> {
        let Some(certificate) = &self.certificate else { return Ok(None) };
        Identity::load(certificate, self.key.as_deref(), self.password.as_ref(), &provider()).map(Some)
    }

    fn protocol_versions(&self) -> Vec<&'static SupportedProtocolVersion> {
        let wanted = |version| self.versions.is_empty() || self.versions.contains(&version);
        let mut versions = Vec::new();
        if wanted(TlsVersion::Tls13) {
            versions.push(&rustls::version::TLS13);
        }
        if wanted(TlsVersion::Tls12) {
            versions.push(&rustls::version::TLS12);
        }
        versions
    }
}

fn parse_host(host: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(host.to_owned()).map_err(|_| TlsError::HostName(host.to_owned()))
}

/// One connection's TLS, without its socket: ciphertext in and out, plaintext in and out. Errors tell the whole story.
///
/// The peer's refusal of our certificate may arrive only after the handshake (TLS 1.3), with the first bytes read.
#[derive(Debug)]
pub struct ClientSession {
    connection: ClientConnection,
    explain: Explain,
    /// Decrypted and not yet read: no more than one [`Self::receive`] brought, and what was there before.
    incoming: BytesMut,
    is_closed: bool,
}

impl ClientSession {
    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// There is ciphertext for [`Self::write_tls`] to send.
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// One `write` of ciphertext to the socket.
    pub fn write_tls(&mut self, socket: &mut dyn Write) -> io::Result<usize> {
        self.connection.write_tls(socket)
    }

    /// Takes all the ciphertext a socket gave. After an error [`Self::wants_write`] may hold an alert for the peer.
    pub fn receive(&mut self, mut ciphertext: &[u8]) -> Result<(), TlsError> {
        while !ciphertext.is_empty() && !self.is_closed {
            self.connection.read_tls(&mut ciphertext).map_err(|error| self.explain.io(&error))?;
            let state = self.connection.process_new_packets().map_err(|error| self.explain.rustls(&error))?;
            self.is_closed = state.peer_has_closed();
            // rustls takes no more ciphertext while it holds 16 KiB of plaintext.
            let mut left = state.plaintext_bytes_to_read();
            while left > 0 {
                let mut reader = self.connection.reader();
                let chunk = reader.fill_buf().map_err(|error| self.explain.io(&error))?;
                let count = chunk.len();
                self.incoming.extend_from_slice(chunk);
                reader.consume(count);
                left = left.saturating_sub(count.max(1));
            }
        }
        Ok(())
    }

    /// Plaintext that has arrived; `WouldBlock` if there is none, 0 at the peer's close.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.incoming.is_empty() {
            return if self.is_closed { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let count = buffer.len().min(self.incoming.len());
        self.incoming.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }

    /// True if [`Self::read`] has something to give.
    pub fn has_plaintext(&self) -> bool {
        !self.incoming.is_empty()
    }

    /// Plaintext to send: encrypted into the buffer of [`Self::write_tls`], as far as it has room (64 KiB).
    pub fn write(&mut self, plaintext: &[u8]) -> io::Result<usize> {
        self.connection.writer().write(plaintext)
    }

    /// The whole story for an error of the socket.
    pub fn failed(&self, error: &io::Error) -> TlsError {
        self.explain.io(error)
    }

    /// The socket ended before the server said anything: what that may mean.
    pub fn closed(&self) -> TlsError {
        self.explain.closed()
    }
}
