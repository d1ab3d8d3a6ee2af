//! rustls asks here whether it may talk to the peer: trust and host name by [`super::trust`], and the handshake signature, which
//! proves that the peer holds the key of the certificate it shows.
//!
//! The reason of a refusal, which rustls reduces to an alert, is to be told with it. A client's verifier serves one connection and
//! keeps it; a server's, which all connections share, leaves it in its thread, where [`told`] finds it: rustls verifies within
//! one step of a handshake.

use std::cell::RefCell;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerMisbehaved, SignatureScheme,
};

use super::certificate::Certificate;
use super::trust::{Refused, TrustStore, Usage};

thread_local! {
    /// What a verifier without a memory of its own has found wrong.
    static REFUSAL: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Makes a handshake, and keeps in `said` what a shared verifier finds wrong in it.
pub(super) async fn told<F: Future>(said: &Said, handshake: F) -> F::Output {
    let mut handshake = pin!(handshake);
    poll_fn(|cx| {
        REFUSAL.take();
        let polled = handshake.as_mut().poll(cx);
        if let Some(text) = REFUSAL.take() {
            said.keep(text);
        }
        polled
    })
    .await
}

/// Checks the certificates of peers, and says what it found wrong.
pub(super) struct PeerVerifier {
    trust: Arc<TrustStore>,
    /// Clients only: whether the certificate must be for the host.
    check_hostname: bool,
    algorithms: WebPkiSupportedAlgorithms,
    /// `None`: several connections share it.
    said: Option<Said>,
}

/// What was found about the peer's certificate.
#[derive(Debug, Clone, Default)]
pub(super) struct Said(Arc<OnceLock<String>>);

impl Said {
    /// Why the certificate was refused, if it was.
    pub(super) fn refusal(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    /// One connection verifies once; were it twice, the first reason is the one that counts.
    fn keep(&self, text: String) {
        let _ = self.0.set(text);
    }
}

impl PeerVerifier {
    pub(super) fn new(
        trust: Arc<TrustStore>,
        check_hostname: bool,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> (Arc<Self>, Said) {
        let said = Said::default();
        (Arc::new(Self { trust, check_hostname, algorithms, said: Some(said.clone()) }), said)
    }

    /// For all connections of a server; see [`told`].
    pub(super) fn shared(trust: Arc<TrustStore>, algorithms: WebPkiSupportedAlgorithms) -> Arc<Self> {
        Arc::new(Self { trust, check_hostname: false, algorithms, said: None })
    }

    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
        name: Option<&ServerName<'_>>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let peer = Certificate::parse(end_entity).map_err(|why| {
            let text = format!("the certificate it shows cannot be read: {why}");
            self.refuse(CertificateError::BadEncoding, text)
        })?;
        let trusted = self.trust.check(&peer, intermediates, usage, now, &self.algorithms);
        let accepted = trusted.and_then(|()| match name {
            Some(name) if self.check_hostname => peer.check_hostname(name),
            _ => Ok(()),
        });
        accepted.map_err(|Refused { error, text }| {
            self.refuse(error, format!("its certificate '{}' {text}", peer.subject))
        })
    }

    fn refuse(&self, error: CertificateError, text: String) -> Error {
        match &self.said {
            Some(said) => said.keep(text),
            None => drop(REFUSAL.replace(Some(text))),
        }
        Error::InvalidCertificate(error)
    }

    /// Not rustls' own functions, because they parse the certificate by webpki, which knows no X.509 v1.
    fn verify_tls12(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = key_of(certificate)?;
        let key = webpki::RawPublicKeyEntity::try_from(&key).map_err(|_| bad_signature())?;
        let candidates = self.algorithms.mapping.iter().find(|(scheme, _)| *scheme == signed.scheme);
        let Some((_, candidates)) = candidates else {
            return Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into());
        };
        // TLS 1.2 does not tie ECDSA to a curve, so each is tried; verify_signature compares it with the key's.
        let valid = candidates.iter().any(|a| key.verify_signature(*a, message, signed.signature()).is_ok());
        if valid { Ok(HandshakeSignatureValid::assertion()) } else { Err(bad_signature()) }
    }

    fn verify_tls13(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature_with_raw_key(message, &key_of(certificate)?, signed, &self.algorithms)
    }
}

fn key_of(
    certificate: &CertificateDer<'_>,
) -> Result<rustls::pki_types::SubjectPublicKeyInfoDer<'static>, Error> {
    let parsed = Certificate::parse(certificate);
    parsed.map(|parsed| parsed.spki).map_err(|_| CertificateError::BadEncoding.into())
}

fn bad_signature() -> Error {
    CertificateError::BadSignature.into()
}

impl fmt::Debug for PeerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerVerifier").field("check_hostname", &self.check_hostname).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, Usage::Server, Some(server_name), now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_tls12(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_tls13(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    /// None: clients have one certificate and need no hint, and who is trusted is nobody else's business.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, Usage::Client, None, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_tls12(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_tls13(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
