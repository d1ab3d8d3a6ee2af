//! Private keys: PKCS#8, PKCS#1 and SEC 1, plain or encrypted, and the certificate chain that goes with them.
//!
//! Encrypted are PKCS#8 (PBES2; PBES1 is not) and the form of old OpenSSL, `Proc-Type: 4,ENCRYPTED` with a
//! `DEK-Info` of AES or DES in CBC mode, which ZEO's own test keys use.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aes::{Aes128, Aes192, Aes256};
use cbc::Decryptor;
use cbc::cipher::block_padding::Pkcs7;
use cbc::cipher::{BlockModeDecrypt, KeyIvInit};
use des::{Des, TdesEde3};
use md5::{Digest, Md5};
use pkcs8::EncryptedPrivateKeyInfoRef;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{
    PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer, SubjectPublicKeyInfoDer,
};
use rustls::sign::CertifiedKey;

use super::TlsError;
use super::certificate::Certificate;
use super::pem::PemFile;

/// Asked for the password of an encrypted key, and only then; the error is text to show.
#[derive(Clone)]
pub struct Password(Arc<dyn Fn() -> Result<Vec<u8>, String> + Send + Sync>);

impl Password {
    pub fn new(ask: impl Fn() -> Result<Vec<u8>, String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }
}

impl From<&str> for Password {
    fn from(password: &str) -> Self {
        let password = password.as_bytes().to_vec();
        Self::new(move || Ok(password.clone()))
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// The certificate this side shows, with its key.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) certified: Arc<CertifiedKey>,
    /// For messages: subject and file.
    pub(super) name: String,
}

impl Identity {
    /// Reads the chain (this side's own certificate first) and its key, and checks that they belong together.
    pub(super) fn load(
        certificate: &Path,
        key: Option<&Path>,
        password: Option<&Password>,
        provider: &CryptoProvider,
    ) -> Result<Self, TlsError> {
        let file = PemFile::read(certificate, "certificate")?;
        let chain = file.certificates()?;
        let Some(own) = chain.first() else {
            return Err(TlsError::NoCertificate { name: file.name });
        };
        let own = Certificate::parse(own)
            .map_err(|why| TlsError::BadCertificate { name: file.name.clone(), why })?;
        let key_path = key.unwrap_or(certificate);
        let key_file = if key.is_some() { &PemFile::read(key_path, "key")? } else { &file };
        let key = load_key(key_file, key_path, password)?;
        let signer = provider.key_provider.load_private_key(key).map_err(|error| TlsError::Key {
            name: key_file.name.clone(),
            why: format!(
                "{error} (RSA of 2048 bits and more, ECDSA P-256 and P-384, and Ed25519 are supported)"
            ),
        })?;
        let matches =
            signer.public_key().is_none_or(|public: SubjectPublicKeyInfoDer<'_>| public == own.spki);
        if !matches {
            return Err(TlsError::KeyMismatch {
                certificate: certificate.to_owned(),
                subject: own.subject,
                key: key_path.to_owned(),
            });
        }
        if let Err(expired) = own.check_validity(rustls::pki_types::UnixTime::now()) {
            tracing::warn!("the certificate {} of {} {}", own.subject, file.name, expired.text);
        }
        let name = format!("'{}' of {}", own.subject, file.name);
        Ok(Self { certified: Arc::new(CertifiedKey::new(chain, signer)), name })
    }
}

fn load_key(
    file: &PemFile,
    path: &Path,
    password: Option<&Password>,
) -> Result<PrivateKeyDer<'static>, TlsError> {
    let name = || file.name.clone();
    let Some(block) = file.key() else {
        return Err(TlsError::NoKey { name: name() });
    };
    let ask = || -> Result<Vec<u8>, TlsError> {
        let Some(Password(ask)) = password else {
            return Err(TlsError::KeyNeedsPassword { path: path.to_owned() });
        };
        ask().map_err(|why| TlsError::PasswordFailed { path: path.to_owned(), why })
    };
    if block.tag() == "ENCRYPTED PRIVATE KEY" {
        let key = decrypt_pkcs8(block.contents(), &ask()?, path)?;
        return Ok(PrivatePkcs8KeyDer::from(key).into());
    }
    let der = if block.headers().get("Proc-Type").is_some_and(|kind| kind.contains("ENCRYPTED")) {
        let info = block.headers().get("DEK-Info").unwrap_or_default();
        decrypt_legacy(info, block.contents(), &ask()?, path)?
    } else {
        block.contents().to_vec()
    };
    match block.tag() {
        "PRIVATE KEY" => Ok(PrivatePkcs8KeyDer::from(der).into()),
        "RSA PRIVATE KEY" => Ok(PrivatePkcs1KeyDer::from(der).into()),
        "EC PRIVATE KEY" => Ok(PrivateSec1KeyDer::from(der).into()),
        other => Err(TlsError::Key { name: name(), why: format!("a {other} is not supported") }),
    }
}

fn decrypt_pkcs8(der: &[u8], password: &[u8], path: &Path) -> Result<Vec<u8>, TlsError> {
    let info = EncryptedPrivateKeyInfoRef::try_from(der)
        .map_err(|error| unreadable_key(path, format!("its encryption is not understood ({error})")))?;
    match info.decrypt(password) {
        Ok(key) => Ok(key.as_bytes().to_vec()),
        Err(pkcs8::Error::EncryptedPrivateKey(pkcs8::pkcs5::Error::UnsupportedAlgorithm { oid })) => {
            Err(unreadable_key(path, format!("its encryption (algorithm {oid}) is not supported")))
        }
        // A wrong password decrypts to garbage: bad padding or bad DER.
        Err(_) => Err(TlsError::WrongPassword { path: path.to_owned() }),
    }
}

/// The encryption of PEM itself, as OpenSSL did before PKCS#8: the key is MD5 over password and salt, the salt the first 8 bytes of the IV.
fn decrypt_legacy(info: &str, data: &[u8], password: &[u8], path: &Path) -> Result<Vec<u8>, TlsError> {
    let (cipher, iv) = info.split_once(',').unwrap_or((info, ""));
    let iv = parse_hex(iv.trim()).ok_or_else(|| unreadable_key(path, "its DEK-Info has no IV".into()))?;
    let (key_len, iv_len) = match cipher {
        "AES-128-CBC" => (16, 16),
        "AES-192-CBC" => (24, 16),
        "AES-256-CBC" => (32, 16),
        "DES-EDE3-CBC" => (24, 8),
        "DES-CBC" => (8, 8),
        other => return Err(unreadable_key(path, format!("its encryption {other:?} is not supported"))),
    };
    if iv.len() != iv_len {
        return Err(unreadable_key(
            path,
            format!("the IV in its DEK-Info has {} bytes, not {iv_len}", iv.len()),
        ));
    }
    let key = derive_legacy_key(password, &iv, key_len);
    let plain = match cipher {
        "AES-128-CBC" => decrypt::<Decryptor<Aes128>>(&key, &iv, data),
        "AES-192-CBC" => decrypt::<Decryptor<Aes192>>(&key, &iv, data),
        "AES-256-CBC" => decrypt::<Decryptor<Aes256>>(&key, &iv, data),
        "DES-EDE3-CBC" => decrypt::<Decryptor<TdesEde3>>(&key, &iv, data),
        _ => decrypt::<Decryptor<Des>>(&key, &iv, data),
    };
    // Padding happens to be right for one wrong password in 256, so the DER must be whole as well.
    plain
        .filter(|der| is_whole_sequence(der))
        .ok_or_else(|| TlsError::WrongPassword { path: path.to_owned() })
}

fn decrypt<D: KeyIvInit + BlockModeDecrypt>(key: &[u8], iv: &[u8], data: &[u8]) -> Option<Vec<u8>> {
    D::new_from_slices(key, iv).ok()?.decrypt_padded_vec::<Pkcs7>(data).ok()
}

fn derive_legacy_key(password: &[u8], iv: &[u8], length: usize) -> Vec<u8> {
    let salt = iv.get(..8).unwrap_or(iv);
    let mut key = Vec::with_capacity(length + 16);
    let mut previous: Vec<u8> = Vec::new();
    while key.len() < length {
        let digest = Md5::new().chain_update(&previous).chain_update(password).chain_update(salt).finalize();
        previous = digest.to_vec();
        key.extend_from_slice(&previous);
    }
    key.truncate(length);
    key
}

fn parse_hex(text: &str) -> Option<Vec<u8>> {
    if text.is_empty() || !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    let digits = text.as_bytes().chunks(2);
    digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

fn is_whole_sequence(der: &[u8]) -> bool {
    use x509_parser::asn1_rs::{Any, FromDer, Tag};
    matches!(Any::from_der(der), Ok((rest, any)) if rest.is_empty() && any.tag() == Tag::Sequence)
}

fn unreadable_key(path: &Path, why: String) -> TlsError {
    let hint = "convert it with: openssl pkcs8 -topk8 -v2 aes-256-cbc -in KEY -out NEWKEY";
    TlsError::Key { name: PathBuf::from(path).display().to_string(), why: format!("{why}; {hint}") }
}
