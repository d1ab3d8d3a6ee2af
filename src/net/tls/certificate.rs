//! What is read from a certificate: names, validity, key, signature; and OpenSSL's idea of a host name matching it.
//!
//! webpki refuses to parse what ZEO's users have (X.509 v1, a CA as end entity) and reads no common name, so the details
//! come from `x509-parser`; signatures are still checked by webpki's algorithms.

use std::fmt;
use std::net::IpAddr;

use rustls::CertificateError;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use x509_parser::asn1_rs::{Any, BitString, FromDer};
use x509_parser::prelude::{ASN1Time, GeneralName, X509Certificate, X509Name, X509Version};

use super::trust::Refused;

/// A parsed certificate, owning its bytes.
#[derive(Debug, Clone)]
pub(super) struct Certificate {
    pub(super) der: CertificateDer<'static>,
    pub(super) subject: String,
    pub(super) issuer: String,
    pub(super) subject_der: Vec<u8>,
    pub(super) issuer_der: Vec<u8>,
    pub(super) serial: Vec<u8>,
    pub(super) spki: SubjectPublicKeyInfoDer<'static>,
    pub(super) is_v3: bool,
    /// May sign certificates: basicConstraints say CA, and keyUsage, if there, keyCertSign.
    pub(super) is_ca: bool,
    pub(super) has_name_constraints: bool,
    signed: Signed,
    names: Names,
    not_before: ASN1Time,
    not_after: ASN1Time,
}

/// The names a server certificate is for, as OpenSSL's `X509_check_host` takes them.
#[derive(Debug, Clone, Default)]
struct Names {
    dns: Vec<String>,
    ip: Vec<IpAddr>,
    common: Vec<String>,
}

impl Certificate {
    pub(super) fn parse(der: &CertificateDer<'_>) -> Result<Self, String> {
        let (rest, parsed) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
        if !rest.is_empty() {
            return Err(format!("{} bytes follow the certificate", rest.len()));
        }
        if parsed.signature_algorithm != parsed.tbs_certificate.signature {
            return Err("it names two different signature algorithms".into());
        }
        let is_v3 = parsed.version() == X509Version::V3;
        let constraints = parsed.basic_constraints().map_err(|error| error.to_string())?;
        let key_usage = parsed.key_usage().map_err(|error| error.to_string())?;
        let name_constraints = parsed.name_constraints().map_err(|error| error.to_string())?;
        let is_ca = is_v3
            && constraints.is_some_and(|found| found.value.ca)
            && key_usage.is_none_or(|found| found.value.key_cert_sign());
        Ok(Self {
            subject: name_text(parsed.subject()),
            issuer: name_text(parsed.issuer()),
            subject_der: parsed.subject().as_raw().to_vec(),
            issuer_der: parsed.issuer().as_raw().to_vec(),
            serial: parsed.raw_serial().to_vec(),
            spki: SubjectPublicKeyInfoDer::from(parsed.public_key().raw.to_vec()),
            is_v3,
            is_ca,
            has_name_constraints: name_constraints.is_some(),
            signed: Signed::parse(der).ok_or("its signature cannot be read")?,
            names: Names::of(&parsed)?,
            not_before: parsed.validity().not_before,
            not_after: parsed.validity().not_after,
            der: der.clone().into_owned(),
        })
    }

    pub(super) fn is_self_signed(&self) -> bool {
        self.subject_der == self.issuer_der
    }

    /// Expired and not yet valid count for pinned certificates too, as with OpenSSL.
    pub(super) fn check_validity(&self, now: UnixTime) -> Result<(), Refused> {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        if now > self.not_after.timestamp() {
            let text = format!("expired on {}", date(self.not_after));
            return Err(Refused { error: CertificateError::Expired, text });
        }
        if now < self.not_before.timestamp() {
            let text =
                format!("is not valid before {}; is the clock of this machine right?", date(self.not_before));
            return Err(Refused { error: CertificateError::NotValidYet, text });
        }
        Ok(())
    }

    /// Subject alternative names count; the common name does if there is no DNS name among them; for an IP address only an IP address counts.
    pub(super) fn check_hostname(&self, expected: &ServerName<'_>) -> Result<(), Refused> {
        let matches = match expected {
            ServerName::DnsName(host) => {
                let names = if self.names.dns.is_empty() { &self.names.common } else { &self.names.dns };
                let host = host.as_ref().strip_suffix('.').unwrap_or(host.as_ref());
                names.iter().any(|name| name_matches(name, host))
            }
            ServerName::IpAddress(ip) => self.names.ip.contains(&IpAddr::from(*ip)),
            _ => false,
        };
        if matches {
            return Ok(());
        }
        let text = format!(
            "is for {}, not for {:?}; set server-hostname to a name it has, issue it with subjectAltName={}:{}, \
             or switch check-hostname off",
            self.names,
            expected.to_str(),
            if matches!(expected, ServerName::IpAddress(_)) { "IP" } else { "DNS" },
            expected.to_str(),
        );
        Err(Refused { error: CertificateError::NotValidForName, text })
    }

    /// Whether the holder of `issuer` signed this certificate.
    pub(super) fn is_signed_by(
        &self,
        issuer: &SubjectPublicKeyInfoDer<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> bool {
        self.signed.verifies(issuer, algorithms)
    }
}

impl Names {
    fn of(certificate: &X509Certificate<'_>) -> Result<Self, String> {
        let mut names = Self::default();
        let alternative = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
        for name in alternative.iter().flat_map(|found| &found.value.general_names) {
            match name {
                GeneralName::DNSName(name) => names.dns.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => {
                    if let Ok(bytes) = <[u8; 4]>::try_from(*bytes) {
                        names.ip.push(bytes.into());
                    } else if let Ok(bytes) = <[u8; 16]>::try_from(*bytes) {
                        names.ip.push(bytes.into());
                    }
                }
                _ => {}
            }
        }
        let common = certificate.subject().iter_common_name();
        names.common = common.filter_map(|name| name.as_str().ok().map(str::to_owned)).collect();
        Ok(names)
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dns = if self.dns.is_empty() { &self.common } else { &self.dns };
        let mut all: Vec<String> = dns.iter().map(|name| format!("{name:?}")).collect();
        all.extend(self.ip.iter().map(|ip| format!("{ip}")));
        if all.is_empty() { f.write_str("no host name at all") } else { f.write_str(&all.join(", ")) }
    }
}

/// A whole leftmost label may be `*`, with two more labels at least after it.
fn name_matches(name: &str, host: &str) -> bool {
    if let Some(domain) = name.strip_prefix("*.") {
        let Some((label, rest)) = host.split_once('.') else { return false };
        return !label.is_empty() && domain.contains('.') && rest.eq_ignore_ascii_case(domain);
    }
    !name.is_empty() && name.eq_ignore_ascii_case(host)
}

/// The outside of certificates and CRLs: what is signed, by which algorithm, the signature.
#[derive(Debug, Clone)]
pub(super) struct Signed {
    message: Vec<u8>,
    /// Contents of the AlgorithmIdentifier, as webpki compares them.
    algorithm: Vec<u8>,
    signature: Vec<u8>,
}

impl Signed {
    pub(super) fn parse(der: &[u8]) -> Option<Self> {
        let (_, outer) = Any::from_der(der).ok()?;
        let (after_message, _) = Any::from_der(outer.data).ok()?;
        let message = outer.data.get(..outer.data.len() - after_message.len())?;
        let (after_algorithm, algorithm) = Any::from_der(after_message).ok()?;
        let (_, signature) = BitString::from_der(after_algorithm).ok()?;
        Some(Self {
            message: message.to_vec(),
            algorithm: algorithm.data.to_vec(),
            signature: signature.data.to_vec(),
        })
    }

    pub(super) fn verifies(
        &self,
        issuer: &SubjectPublicKeyInfoDer<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> bool {
        let Ok(key) = webpki::RawPublicKeyEntity::try_from(issuer) else { return false };
        algorithms.all.iter().any(|algorithm| {
            algorithm.signature_alg_id().as_ref() == self.algorithm
                && key.verify_signature(*algorithm, &self.message, &self.signature).is_ok()
        })
    }
}

/// As `openssl x509 -subject` prints it, nearly: `CN=zeo.example.com, O=Example`. It comes from the peer and goes to the log, so
/// control characters are escaped.
pub(super) fn name_text(name: &X509Name<'_>) -> String {
    let text = name.to_string();
    if text.is_empty() {
        return "(empty subject)".into();
    }
    text.chars()
        .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() })
        .collect()
}

pub(super) fn date(time: ASN1Time) -> String {
    let time = time.to_datetime();
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02} UTC",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute()
    )
}
