//! Text for a connection that failed: who, what was wrong with which certificate, and what to do.
//!
//! TLS tells the refused side little (an alert, one byte), and ZEO told users less (a timeout), so each side says what it knows:
//! the refusing one the whole reason, the refused one what the alert means for its configuration.

use std::io;
use std::time::Duration;

use rustls::{AlertDescription, Error, InvalidMessage, PeerIncompatible};

use super::TlsError;
use super::verify::Said;

/// How a TLS connection begins on the wire: a handshake record of TLS 1.x.
pub const TLS_HELLO: [u8; 2] = [0x16, 3];

/// True for the first bytes of a TLS client's hello or of a TLS alert, read where ZEO's plain handshake was expected. (As the length of a
/// frame they would announce 350 MB.)
pub fn looks_like_tls(first: &[u8]) -> bool {
    matches!(first, [0x15 | 0x16, 3, 0..=4, ..])
}

/// What is needed to explain a failure of one connection.
#[derive(Debug, Clone)]
pub(super) struct Explain {
    /// "the server zeo.example.com:8100" or "the client 10.0.0.1:4711".
    pub(super) peer: String,
    /// We are the client.
    pub(super) is_client: bool,
    /// Our own certificate: subject and file.
    pub(super) own: Option<String>,
    pub(super) said: Said,
}

impl Explain {
    pub(super) fn rustls(&self, error: &Error) -> TlsError {
        let peer = &self.peer;
        let text = match error {
            Error::InvalidCertificate(reason) => match self.said.refusal() {
                Some(refusal) => format!("refused: {refusal}"),
                None => format!("refused: it does not prove that its certificate is its own ({reason:?})"),
            },
            Error::NoCertificatesPresented => {
                "refused: it shows no certificate; this server requires one (certificate and key in its <ssl> section)".into()
            }
            Error::AlertReceived(alert) => self.alert(*alert),
            Error::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion) => {
                self.plaintext()
            }
            Error::PeerIncompatible(
                PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::Tls13RequiredForQuic
                | PeerIncompatible::SupportedVersionsExtensionRequired,
            ) => "it does not offer TLS 1.2 or 1.3".into(),
            Error::PeerIncompatible(PeerIncompatible::NoCipherSuitesInCommon) => {
                "it offers no cipher that is safe (ECDHE with AES-GCM or ChaCha20 is needed)".into()
            }
            other => other.to_string(),
        };
        TlsError::Failed(format!("TLS with {peer} failed: {text}"))
    }

    pub(super) fn io(&self, error: &io::Error) -> TlsError {
        if let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            return self.rustls(error);
        }
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                self.closed()
            }
            _ => TlsError::Failed(format!("TLS with {} failed: {error}", self.peer)),
        }
    }

    /// The peer closed the connection before the handshake was done, or (TLS 1.3) before it said anything after it.
    pub(super) fn closed(&self) -> TlsError {
        let hint = match &self.own {
            Some(own) => {
                format!("it may not accept our certificate {own}, or not speak TLS; its log should say")
            }
            None => {
                "it may require a client certificate (give certificate and key), or not speak TLS".to_owned()
            }
        };
        TlsError::Failed(format!(
            "TLS with {} failed: it closed the connection without a word: {hint}",
            self.peer
        ))
    }

    pub(super) fn silent(&self, waited: Duration) -> TlsError {
        TlsError::Failed(format!(
            "TLS with {} failed: no TLS hello in {:.0} s. A client without TLS waits for the server to speak first: configure it \
             with ssl",
            self.peer,
            waited.as_secs_f32()
        ))
    }

    fn plaintext(&self) -> String {
        if self.is_client {
            "it does not speak TLS: give the server an <ssl> section, or connect without ssl".into()
        } else {
            "it does not speak TLS: configure the client with ssl, or this server without".into()
        }
    }

    fn alert(&self, alert: AlertDescription) -> String {
        use AlertDescription as A;
        let own =
            self.own.as_deref().map_or("(we have none)".to_owned(), |own| format!("our certificate {own}"));
        let other = if self.is_client { "the server" } else { "the client" };
        match alert {
            A::CertificateRequired => "the server requires a client certificate: give certificate and key".into(),
            A::UnknownCA => {
                format!("{other} does not know {own}: put it, or its CA's, into what {other} is to authenticate")
            }
            A::CertificateExpired => format!("{other} finds {own} expired or not yet valid"),
            A::CertificateRevoked => format!("{other} knows {own} to be revoked"),
            A::BadCertificate if !self.is_client => format!(
                "{other} refuses {own}; perhaps it is not for the host name {other} connects to (server-hostname)"
            ),
            A::BadCertificate | A::UnsupportedCertificate | A::CertificateUnknown | A::AccessDenied => {
                format!("{other} refuses {own} ({alert:?}): its log has the reason")
            }
            A::HandshakeFailure if self.is_client && self.own.is_none() => {
                "the server refuses the handshake; it probably requires a client certificate: give certificate and key".into()
            }
            A::HandshakeFailure | A::ProtocolVersion | A::InsufficientSecurity => {
                format!("{other} finds no TLS version or cipher in common ({alert:?}); 1.2 and 1.3 are offered")
            }
            A::DecodeError | A::UnexpectedMessage => format!("{other} does not understand us ({alert:?})"),
            other_alert => format!("{other} ended it with the alert {other_alert:?}"),
        }
    }
}
