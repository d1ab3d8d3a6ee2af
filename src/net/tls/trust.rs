//! Whom a side trusts: certificates pinned exactly, certificate authorities, revocation lists.
//!
//! The rules, for a peer's certificate (`docs/tls.md` compares them with OpenSSL's):
//! 1. It must be valid now, and not revoked.
//! 2. If exactly this certificate is configured, it is trusted: self-signed, a CA, X.509 v1 or signed with SHA-1 all the same.
//!    (That the peer has its key is proved by the handshake signature, checked in [`super::verify`].)
//! 3. Otherwise a chain must lead from it to a configured CA that is valid now: webpki's rules, plus X.509 v1 certificates
//!    signed directly by such a CA, which `openssl x509 -req` makes unless told otherwise.
//! 4. If revocation lists are configured, the issuer of a certificate accepted by rule 3 must have one, in date.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use rustls::CertificateError;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::asn1_rs::FromDer;
use x509_parser::prelude::{ASN1Time, CertificateRevocationList};

use super::TlsError;
use super::certificate::{Certificate, Signed, date, name_text};
use super::pem::PemFile;

/// Why a certificate is not accepted: the code the peer gets as an alert, and the text for our own log (follows "the certificate ...").
#[derive(Debug, Clone)]
pub(super) struct Refused {
    pub(super) error: CertificateError,
    pub(super) text: String,
}

impl Refused {
    fn new(error: CertificateError, text: impl Into<String>) -> Self {
        Self { error, text: text.into() }
    }
}

/// What the certificate is shown for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Usage {
    Server,
    Client,
}

/// Everything trusted at one moment; immutable, replaced as a whole.
#[derive(Debug, Default)]
pub(super) struct TrustStore {
    /// For messages: file or directory.
    name: String,
    trusted: Vec<Certificate>,
    /// Of the CAs among `trusted`, with their index.
    anchors: Vec<(TrustAnchor<'static>, usize)>,
    crls: Vec<Crl>,
}

#[derive(Debug)]
struct Crl {
    issuer_der: Vec<u8>,
    revoked: HashSet<Vec<u8>>,
    next_update: Option<ASN1Time>,
    signed: Signed,
}

impl TrustStore {
    pub(super) fn empty(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// The `authenticate` file. One without certificates would refuse everybody, so it is an error.
    pub(super) fn from_file(path: &Path) -> Result<Self, TlsError> {
        let mut store = Self::empty(path.display().to_string());
        store.add_pem(&PemFile::read(path, "authenticate file")?)?;
        if store.trusted.is_empty() {
            return Err(TlsError::NoCertificate { name: store.name });
        }
        Ok(store)
    }

    /// An OpenSSL directory: files named by hash, `0123abcd.0` (certificates) and `0123abcd.r0` (revocation lists). Others are not
    /// looked at, as with OpenSSL, so that removing the link removes the trust.
    pub(super) fn from_directory(path: &Path) -> Result<Self, TlsError> {
        let unreadable =
            |source| TlsError::Read { what: "authenticate directory", path: path.to_owned(), source };
        let mut store = Self::empty(path.display().to_string());
        let mut files: Vec<PathBuf> = Vec::new();
        for entry in std::fs::read_dir(path).map_err(unreadable)? {
            let file = entry.map_err(unreadable)?.path();
            if file.file_name().and_then(|name| name.to_str()).is_some_and(is_hash_name) {
                files.push(file);
            }
        }
        files.sort();
        for file in &files {
            store.add_pem(&PemFile::read(file, "authenticate file")?)?;
        }
        if store.trusted.is_empty() {
            return Err(TlsError::NoHashedCertificates { path: path.to_owned() });
        }
        Ok(store)
    }

    /// The certificate authorities of the operating system (and `SSL_CERT_FILE`, `SSL_CERT_DIR`).
    pub(super) fn from_system() -> Result<Self, TlsError> {
        let mut store = Self::empty("the system's certificate authorities");
        let found = rustls_native_certs::load_native_certs();
        for der in found.certs {
            // Odd certificates in a system store are not this program's business.
            if let Ok(certificate) = Certificate::parse(&der) {
                store.add(certificate);
            }
        }
        if store.trusted.is_empty() {
            let why = found.errors.first().map(ToString::to_string).unwrap_or_default();
            return Err(TlsError::NoSystemTrust { why });
        }
        Ok(store)
    }

    pub(super) fn add_pem(&mut self, file: &PemFile) -> Result<(), TlsError> {
        for der in file.certificates()? {
            let certificate = Certificate::parse(&der)
                .map_err(|why| TlsError::BadCertificate { name: file.name.clone(), why })?;
            self.add(certificate);
        }
        for der in file.crls() {
            let crl = Crl::parse(der).map_err(|why| TlsError::BadCrl { name: file.name.clone(), why })?;
            self.crls.push(crl);
        }
        Ok(())
    }

    pub(super) fn add(&mut self, certificate: Certificate) {
        if self.trusted.iter().any(|known| known.der == certificate.der) {
            return;
        }
        // Only CAs may vouch for others: a pinned certificate stands for itself.
        if certificate.is_ca
            && let Ok(anchor) = webpki::anchor_from_trusted_cert(&certificate.der)
        {
            self.anchors.push((anchor.to_owned(), self.trusted.len()));
        }
        self.trusted.push(certificate);
    }

    /// Rules 1 to 4. One comparison with each configured certificate; chains cost one signature check a link.
    pub(super) fn check(
        &self,
        peer: &Certificate,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), Refused> {
        peer.check_validity(now)?;
        if self.trusted.iter().any(|known| known.der == peer.der) {
            return self.check_pinned_not_revoked(peer, algorithms);
        }
        let issuer = if peer.is_v3 {
            self.check_chain(peer, intermediates, usage, now, algorithms)?
        } else {
            self.check_v1(peer, now, algorithms)?
        };
        self.check_not_revoked(peer, &issuer, now, algorithms)
    }

    /// A chain by webpki; the key of the issuer of `peer` is returned.
    fn check_chain(
        &self,
        peer: &Certificate,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<SubjectPublicKeyInfoDer<'static>, Refused> {
        let end_entity = EndEntityCert::try_from(&peer.der).map_err(|error| {
            Refused::new(CertificateError::BadEncoding, format!("cannot be read: {error}"))
        })?;
        let anchors: Vec<TrustAnchor<'_>> =
            self.anchors_valid_at(now).map(|(anchor, _)| anchor.clone()).collect();
        let usage = match usage {
            Usage::Server => KeyUsage::server_auth(),
            Usage::Client => KeyUsage::client_auth(),
        };
        let path =
            end_entity.verify_for_usage(algorithms.all, &anchors, intermediates, now, usage, None, None);
        match path {
            Ok(path) => Ok(path.issuer_spki().into_owned()),
            Err(error) => Err(self.explain_chain(&error, peer, now)),
        }
    }

    /// webpki refuses to parse X.509 v1, so its rules for a leaf issued by a trust anchor are applied here.
    fn check_v1(
        &self,
        peer: &Certificate,
        now: UnixTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<SubjectPublicKeyInfoDer<'static>, Refused> {
        let issuer = self
            .anchors_valid_at(now)
            .map(|(_, ca)| ca)
            .filter(|ca| ca.subject_der == peer.issuer_der && !ca.has_name_constraints)
            .find(|ca| peer.is_signed_by(&ca.spki, algorithms));
        match issuer {
            Some(ca) => Ok(ca.spki.clone()),
            None => Err(self.explain_chain(&webpki::Error::UnknownIssuer, peer, now)),
        }
    }

    /// OpenSSL checks the dates of the root too; webpki does not.
    fn anchors_valid_at(&self, now: UnixTime) -> impl Iterator<Item = (&TrustAnchor<'static>, &Certificate)> {
        let with_certificate =
            self.anchors.iter().filter_map(|(anchor, at)| Some((anchor, self.trusted.get(*at)?)));
        with_certificate.filter(move |(_, certificate)| certificate.check_validity(now).is_ok())
    }

    fn check_not_revoked(
        &self,
        peer: &Certificate,
        issuer: &SubjectPublicKeyInfoDer<'_>,
        now: UnixTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), Refused> {
        if self.crls.is_empty() {
            return Ok(());
        }
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let mut expired = None;
        let mut in_date = false;
        for crl in self.crls_of(peer, issuer, algorithms) {
            crl.check(peer)?;
            match crl.next_update {
                Some(next) if now > next.timestamp() => expired = Some(next),
                _ => in_date = true,
            }
        }
        if in_date {
            return Ok(());
        }
        let text = match expired {
            Some(next) => format!(
                "cannot be checked: the revocation list of its issuer '{}' in {} expired on {}",
                peer.issuer,
                self.name,
                date(next)
            ),
            None => format!(
                "cannot be checked: {} has revocation lists, but none of its issuer '{}'",
                self.name, peer.issuer
            ),
        };
        Err(Refused::new(CertificateError::UnknownRevocationStatus, text))
    }

    /// A pinned certificate needs no revocation list (it is withdrawn by taking it out of the file), but one that names it counts.
    fn check_pinned_not_revoked(
        &self,
        peer: &Certificate,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), Refused> {
        let issuers = self.trusted.iter().filter(|known| known.subject_der == peer.issuer_der);
        for issuer in issuers {
            self.crls_of(peer, &issuer.spki, algorithms).try_for_each(|crl| crl.check(peer))?;
        }
        Ok(())
    }

    fn crls_of(
        &self,
        peer: &Certificate,
        issuer: &SubjectPublicKeyInfoDer<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> impl Iterator<Item = &Crl> {
        let named = self.crls.iter().filter(move |crl| crl.issuer_der == peer.issuer_der);
        named.filter(move |crl| crl.signed.verifies(issuer, algorithms))
    }

    /// Text for what webpki says in a word.
    fn explain_chain(&self, error: &webpki::Error, peer: &Certificate, now: UnixTime) -> Refused {
        use webpki::Error as E;
        match error {
            E::UnknownIssuer => {
                Refused::new(CertificateError::UnknownIssuer, self.explain_unknown(peer, now))
            }
            E::CaUsedAsEndEntity if peer.is_self_signed() => {
                Refused::new(CertificateError::UnknownIssuer, self.explain_unknown(peer, now))
            }
            E::CaUsedAsEndEntity => Refused::new(
                CertificateError::UnknownIssuer,
                format!("is a CA certificate; only one that is itself in {} may be used so", self.name),
            ),
            E::RequiredEkuNotFoundContext(_) => Refused::new(
                CertificateError::InvalidPurpose,
                "has an extendedKeyUsage that does not allow this use (serverAuth for servers, clientAuth for clients)",
            ),
            E::CertExpired { .. } => Refused::new(
                CertificateError::Expired,
                format!("is issued through a CA certificate that has expired (issuer '{}')", peer.issuer),
            ),
            E::UnsupportedSignatureAlgorithmContext(_) => Refused::new(
                CertificateError::BadSignature,
                "or one in its chain is signed with an algorithm that is no longer safe (SHA-1?); issue it with SHA-256",
            ),
            other => Refused::new(
                CertificateError::UnknownIssuer,
                format!("does not lead to a certificate in {}: {other}", self.name),
            ),
        }
    }

    fn explain_unknown(&self, peer: &Certificate, now: UnixTime) -> String {
        let of_issuer = self.trusted.iter().filter(|known| known.subject_der == peer.issuer_der);
        for known in of_issuer {
            if known.subject_der == peer.subject_der {
                return format!(
                    "is not the one of the same subject in {} (made anew?); put the new one there",
                    self.name
                );
            }
            if let Err(refused) = known.check_validity(now) {
                return format!(
                    "is issued by '{}', whose certificate in {} {}",
                    peer.issuer, self.name, refused.text
                );
            }
            if !known.is_ca {
                return format!(
                    "is issued by '{}', whose certificate in {} is not a CA (basicConstraints CA:TRUE)",
                    peer.issuer, self.name
                );
            }
        }
        let count = self.trusted.len();
        if peer.is_self_signed() {
            return format!(
                "is self-signed and not in {} ({count} certificates); put it there to trust it",
                self.name
            );
        }
        format!(
            "is issued by '{}', and neither is in {} ({count} certificates); put one of them there to trust it",
            peer.issuer, self.name
        )
    }
}

impl Crl {
    fn parse(der: &[u8]) -> Result<Self, String> {
        let (_, parsed) = CertificateRevocationList::from_der(der).map_err(|error| error.to_string())?;
        // Delta lists, lists for part of the certificates, and what is not known here: guessing would un-revoke.
        if let Some(extension) = parsed.extensions().iter().find(|extension| extension.critical) {
            return Err(format!(
                "the critical extension {} of a revocation list is not supported",
                extension.oid
            ));
        }
        let revoked = parsed.iter_revoked_certificates().map(|entry| entry.raw_serial().to_vec()).collect();
        Ok(Self {
            issuer_der: parsed.issuer().as_raw().to_vec(),
            revoked,
            next_update: parsed.next_update(),
            signed: Signed::parse(der).ok_or_else(|| {
                format!("the signature of the list of '{}' cannot be read", name_text(parsed.issuer()))
            })?,
        })
    }

    fn check(&self, peer: &Certificate) -> Result<(), Refused> {
        if self.revoked.contains(&peer.serial) {
            let text = format!("was revoked by its issuer '{}'", peer.issuer);
            return Err(Refused::new(CertificateError::Revoked, text));
        }
        Ok(())
    }
}

fn is_hash_name(name: &str) -> bool {
    let Some((hash, number)) = name.split_once('.') else { return false };
    let number = number.strip_prefix('r').unwrap_or(number);
    let is_hex = |c: char| c.is_ascii_hexdigit() && !c.is_ascii_uppercase();
    hash.len() == 8
        && hash.chars().all(is_hex)
        && !number.is_empty()
        && number.chars().all(|c| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fixture(name: &str) -> Vec<pem::Pem> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name);
        PemFile::read(&path, "fixture").unwrap().blocks
    }

    /// A certificate or list whose bytes are changed at random parses or does not, and is never trusted for it.
    fn damaged() -> impl Strategy<Value = (usize, Vec<(prop::sample::Index, u8)>, Option<prop::sample::Index>)>
    {
        let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4);
        (0..6_usize, changes, prop::option::of(any::<prop::sample::Index>()))
    }

    proptest! {
        #[test]
        fn damaged_certificates_are_never_trusted((which, changes, cut) in damaged()) {
            let files = ["leaf.pem", "leaf-v1.pem", "san.pem", "server.pem", "revoked.pem", "ca.crl"];
            let whole = fixture(files[which])[0].contents().to_vec();
            let mut der = whole.clone();
            for (at, byte) in changes {
                let at = at.index(der.len());
                der[at] = byte;
            }
            if let Some(cut) = cut {
                der.truncate(cut.index(der.len()));
            }
            prop_assume!(der != whole);
            let mut store = TrustStore::empty("test");
            for file in ["ca.pem", "ca.crl"] {
                let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(file);
                store.add_pem(&PemFile::read(&path, "fixture").unwrap()).unwrap();
            }
            let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
            if let Ok(crl) = Crl::parse(&der) {
                let ca = &store.trusted[0].spki;
                prop_assert!(!crl.signed.verifies(ca, &algorithms));
            }
            if let Ok(peer) = Certificate::parse(&CertificateDer::from(der)) {
                let checked = store.check(&peer, &[], Usage::Server, UnixTime::now(), &algorithms);
                prop_assert!(checked.is_err());
            }
        }
    }

    #[test]
    fn hashed_names() {
        for name in ["0123abcd.0", "ffffffff.12", "0123abcd.r0"] {
            assert!(is_hash_name(name), "{name}");
        }
        for name in [
            "0123abcd",
            "0123abcd.",
            "0123abcd.r",
            "0123abcd.pem",
            "0123ABCD.0",
            "123abcd.0",
            "server.pem",
            "0123abcd.0~",
        ] {
            assert!(!is_hash_name(name), "{name}");
        }
    }
}
