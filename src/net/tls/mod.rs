//! TLS for both sides of a connection, by rustls, with what ZEO's users have: self-signed certificates that are their own CA,
//! without subjectAltName, keys encrypted by old OpenSSL.
//!
//! [`ServerTls`] and [`ClientTls`] are made from the keys of ZEO's `<ssl>` sections, hold what was read, can be told to read it again,
//! and open sessions. TLS 1.2 and 1.3 only; no session resumption, because a resumed session would not look at the
//! certificate again, and ZEO connections live long. `docs/tls.md` is the user's view of the rules.

mod certificate;
mod client;
mod explain;
mod key;
mod pem;
mod server;
mod trust;
mod verify;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustls::crypto::CryptoProvider;

pub use client::{ClientSession, ClientTls, ClientTlsOptions, TlsVersion};
pub use explain::{TLS_HELLO, looks_like_tls};
pub use key::Password;
pub use server::{ServerStream, ServerTls, ServerTlsOptions};

use certificate::Certificate;
use pem::PemFile;
use trust::TrustStore;

/// Whose certificates are accepted: the `authenticate` key of ZEO's sections.
#[derive(Debug, Clone)]
pub enum Authenticate {
    /// Certificates of peers, or of the CAs that issued them, and revocation lists, in PEM.
    File(PathBuf),
    /// An OpenSSL directory (`openssl rehash`). Read again when it changes.
    Directory(PathBuf),
    /// Nobody at first; the program adds certificates ([`ServerTls::trust`], [`ClientTls::trust`]).
    Dynamic,
    /// What the operating system trusts. For clients.
    System,
    /// Certificates in DER, and where they come from.
    Certificates { from: String, certificates: Vec<Vec<u8>> },
}

impl Authenticate {
    /// A server's `authenticate`: a directory, a file, or the word `DYNAMIC`.
    pub fn for_server(value: &str) -> Result<Self, TlsError> {
        if value == "DYNAMIC" { Ok(Self::Dynamic) } else { Self::from_path(value) }
    }

    /// A client's: absent and `DYNAMIC` both mean the system's certificate authorities, as in ZEO.
    pub fn for_client(value: Option<&str>) -> Result<Self, TlsError> {
        match value {
            None | Some("DYNAMIC") => Ok(Self::System),
            Some(path) => Self::from_path(path),
        }
    }

    fn from_path(value: &str) -> Result<Self, TlsError> {
        let path = PathBuf::from(value);
        if path.is_dir() {
            return Ok(Self::Directory(path));
        }
        if matches!(value, "-" | "SIGNED") && !path.exists() {
            return Err(TlsError::AuthenticateWord(value.to_owned()));
        }
        Ok(Self::File(path))
    }

    fn load(&self) -> Result<TrustStore, TlsError> {
        match self {
            Self::File(path) => TrustStore::from_file(path),
            Self::Directory(path) => TrustStore::from_directory(path),
            Self::Dynamic => Ok(TrustStore::empty("the certificates added by the program")),
            Self::System => TrustStore::from_system(),
            Self::Certificates { from, certificates } => {
                let mut store = TrustStore::empty(from.clone());
                for der in certificates {
                    let certificate = Certificate::parse(&der.as_slice().into())
                        .map_err(|why| TlsError::BadCertificate { name: from.clone(), why })?;
                    store.add(certificate);
                }
                Ok(store)
            }
        }
    }
}

/// What cannot be used, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    #[error("TLS: cannot read the {what} {}: {source}", .path.display())]
    Read {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("TLS: {name} cannot be read as PEM: {why}")]
    NotPem { name: String, why: String },
    #[error("TLS: there is no certificate (-----BEGIN CERTIFICATE-----) in {name}")]
    NoCertificate { name: String },
    #[error("TLS: a certificate in {name} cannot be read: {why}")]
    BadCertificate { name: String, why: String },
    #[error("TLS: a certificate revocation list in {name} cannot be used: {why}")]
    BadCrl { name: String, why: String },
    #[error("TLS: there is no private key in {name}; give the key's file with key")]
    NoKey { name: String },
    #[error("TLS: the private key in {name} cannot be used: {why}")]
    Key { name: String, why: String },
    #[error("TLS: the private key in {} is encrypted; give its password (password-function, or password=)", .path.display())]
    KeyNeedsPassword { path: PathBuf },
    #[error("TLS: the password does not decrypt the private key in {}", .path.display())]
    WrongPassword { path: PathBuf },
    #[error("TLS: no password for the private key in {}: {why}", .path.display())]
    PasswordFailed { path: PathBuf, why: String },
    #[error("TLS: the private key in {} is not that of the certificate '{subject}' in {}", .key.display(), .certificate.display())]
    KeyMismatch { certificate: PathBuf, subject: String, key: PathBuf },
    #[error(
        "TLS: authenticate {0} does not work (nor does it with ZEO, which takes it for a file name): give a file or directory with \
         the certificates to accept, or those of their CA"
    )]
    AuthenticateWord(String),
    #[error(
        "TLS: the authenticate directory {} has no certificates under hashed names (0123abcd.0), which are the only ones looked at; \
         run: openssl rehash DIRECTORY", .path.display()
    )]
    NoHashedCertificates { path: PathBuf },
    #[error(
        "TLS: no certificates of this operating system's trust store were found ({why}); give authenticate"
    )]
    NoSystemTrust { why: String },
    #[error("TLS: {0:?} is not a host name or IP address; give server-hostname")]
    HostName(String),
    #[error(
        "TLS: there is no host name to check in a Unix socket's address; give server-hostname, or switch check-hostname off"
    )]
    NoHostName,
    #[error("TLS: {0}")]
    Unsupported(String),
    /// The client closed the connection before it said anything: a port scan, a probe.
    #[error("TLS: the client closed the connection without a word")]
    HungUp,
    /// A connection failed: the whole story, with the peer's name.
    #[error("{0}")]
    Failed(String),
}

/// A trust store that follows its source: replaced when told, when the program adds to it, when the directory has changed.
#[derive(Debug)]
struct Trust {
    source: Authenticate,
    current: Mutex<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    store: Arc<TrustStore>,
    modified: Option<SystemTime>,
    /// What the program added, kept over [`Trust::reload`].
    added: Vec<PemFile>,
}

impl Trust {
    fn load(source: Authenticate) -> Result<Self, TlsError> {
        let modified = directory_time(&source);
        let store = Arc::new(source.load()?);
        Ok(Self { source, current: Mutex::new(Loaded { store, modified, added: Vec::new() }) })
    }

    /// What to check a new connection with. One `stat` if the source is a directory, else one short lock.
    fn current(&self) -> Arc<TrustStore> {
        let modified = directory_time(&self.source);
        let mut current = self.lock();
        if modified != current.modified {
            current.modified = modified;
            match self.build(&current.added) {
                Ok(store) => current.store = Arc::new(store),
                Err(error) => tracing::error!("the certificates read before stay in force: {error}"),
            }
        }
        current.store.clone()
    }

    fn reload(&self) -> Result<(), TlsError> {
        let modified = directory_time(&self.source);
        let mut current = self.lock();
        current.store = Arc::new(self.build(&current.added)?);
        current.modified = modified;
        Ok(())
    }

    fn add(&self, file: PemFile) -> Result<(), TlsError> {
        let mut current = self.lock();
        current.added.push(file);
        match self.build(&current.added) {
            Ok(store) => current.store = Arc::new(store),
            Err(error) => {
                current.added.pop();
                return Err(error);
            }
        }
        Ok(())
    }

    fn build(&self, added: &[PemFile]) -> Result<TrustStore, TlsError> {
        let mut store = self.source.load()?;
        added.iter().try_for_each(|file| store.add_pem(file))?;
        Ok(store)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Loaded> {
        // Nothing in it is left half changed.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn directory_time(source: &Authenticate) -> Option<SystemTime> {
    let Authenticate::Directory(path) = source else { return None };
    std::fs::metadata(path).and_then(|found| found.modified()).ok()
}

/// Certificates given by the program, as PEM text or the path of a PEM file.
fn read_added(pem: PemSource<'_>) -> Result<PemFile, TlsError> {
    let file = match pem {
        PemSource::File(path) => PemFile::read(path, "certificate file")?,
        PemSource::Text(text) => PemFile::parse(text, "the certificates given".into())?,
    };
    if file.certificates()?.is_empty() && file.crls().next().is_none() {
        return Err(TlsError::NoCertificate { name: file.name });
    }
    Ok(file)
}

/// Where a program takes certificates to trust from.
#[derive(Debug, Clone, Copy)]
pub enum PemSource<'a> {
    File(&'a Path),
    Text(&'a [u8]),
}

/// rustls with ring, whatever default another library of the process may have installed.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
