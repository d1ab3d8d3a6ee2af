//! PEM files as OpenSSL writes and reads them: text around the blocks, several blocks in a file, RFC 1421 headers.
//!
//! `rustls-pki-types` does not know the headers (`Proc-Type: 4,ENCRYPTED`) that ZEO's own test keys carry, so the blocks are
//! split by the `pem` crate; what is in them is for [`super::key`] and [`super::certificate`].

use std::path::Path;

use rustls::pki_types::CertificateDer;

use super::TlsError;

/// Largest file read as PEM: a system bundle has 0.2 MB, so this stops a path to a Data.fs without reading it all.
const MAX_PEM_FILE: u64 = 16 << 20;

/// The blocks of a file, in order.
#[derive(Debug)]
pub(super) struct PemFile {
    /// What errors call it: the path, or "the data passed".
    pub(super) name: String,
    pub(super) blocks: Vec<pem::Pem>,
}

impl PemFile {
    /// Reads a file. Errors name the path, and say so if the file is DER or has a block that is cut off.
    pub(super) fn read(path: &Path, what: &'static str) -> Result<Self, TlsError> {
        let unreadable = |source| TlsError::Read { what, path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(unreadable)?.len();
        if size > MAX_PEM_FILE {
            let why = format!("{size} bytes are too many for certificates");
            return Err(TlsError::NotPem { name: path.display().to_string(), why });
        }
        let data = std::fs::read(path).map_err(unreadable)?;
        Self::parse(&data, path.display().to_string())
    }

    pub(super) fn parse(data: &[u8], name: String) -> Result<Self, TlsError> {
        let begins = memchr::memmem::find_iter(data, b"-----BEGIN ").count();
        if begins == 0 {
            // A certificate, CRL or key in DER is one SEQUENCE with a two-byte length.
            let why = if data.starts_with(&[0x30, 0x82]) {
                "it is in DER, not PEM; convert it with: openssl x509 -inform DER -in FILE -out FILE.pem (keys: openssl pkey)"
            } else if data.is_empty() {
                "the file is empty"
            } else {
                "it has no line -----BEGIN ...-----"
            };
            return Err(TlsError::NotPem { name, why: why.into() });
        }
        let blocks = pem::parse_many(data)
            .map_err(|error| TlsError::NotPem { name: name.clone(), why: error.to_string() })?;
        if blocks.len() != begins {
            let why = format!("only {} of its {begins} blocks have an end line", blocks.len());
            return Err(TlsError::NotPem { name, why });
        }
        Ok(Self { name, blocks })
    }

    /// The certificates. OpenSSL's private `TRUSTED CERTIFICATE` is refused, not passed over: the file would trust less than it seems to.
    pub(super) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let mut found = Vec::new();
        for block in &self.blocks {
            match block.tag() {
                "CERTIFICATE" | "X509 CERTIFICATE" => {
                    found.push(CertificateDer::from(block.contents().to_vec()))
                }
                "TRUSTED CERTIFICATE" => {
                    return Err(TlsError::NotPem {
                        name: self.name.clone(),
                        why: "a TRUSTED CERTIFICATE block is OpenSSL's own; convert it with: openssl x509 -in FILE -out FILE.pem"
                            .into(),
                    });
                }
                _ => {}
            }
        }
        Ok(found)
    }

    pub(super) fn crls(&self) -> impl Iterator<Item = &[u8]> {
        self.blocks.iter().filter(|block| block.tag() == "X509 CRL").map(pem::Pem::contents)
    }

    /// The first private key, encrypted or not.
    pub(super) fn key(&self) -> Option<&pem::Pem> {
        self.blocks.iter().find(|block| block.tag().ends_with("PRIVATE KEY"))
    }
}
