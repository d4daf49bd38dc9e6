//! Which server certificates a TLS connection trusts, and which certificates of this client it offers.
//!
//! webpki checks certificates, and this verifier makes one addition. A server's own certificate may be among the
//! trusted ones, as the documentation of registries suggests. There, `openssl req -x509` makes a self-signed
//! certificate that is marked as an authority, and the client gets a copy. webpki refuses an authority that acts as a
//! server. OpenSSL and Go accept a certificate that is itself trusted, and so does this verifier. It checks the
//! dates, the names and the permitted use of that certificate like those of any other.
//!
//! Conversely, a trusted server certificate that is no authority must not vouch for others. webpki takes every
//! trusted certificate for an authority, so this module withholds trusted certificates that are no authorities.
//!
//! Of several certificates of the client, the connection offers the first one that an authority has signed that the
//! server names. If the server names none, or none of these, it offers the first one that the server can check.
//!
//! ring encrypts connections. aws-lc verifies signatures, because it supports what OpenSSL and Go accept and ring
//! does not: the curve P-521, and mixed hashes such as P-384 with SHA-512. aws-lc's random numbers are used only
//! where they are needed. Collecting their seed takes 25 ms or more, which every mount would show.

use std::collections::HashSet;
use std::sync::Arc;

use ::aws_lc_rs::agreement;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::{ActiveKeyExchange, CryptoProvider, SharedSecret, SupportedKxGroup, aws_lc_rs, ring};
use rustls::ffdhe_groups::FfdheGroup;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, NamedGroup, PeerMisbehaved, RootCertStore,
    SignatureScheme,
};
use x509_cert::Certificate;
use x509_cert::certificate::Version;
use x509_cert::der::oid::db::rfc5280;
use x509_cert::der::{Decode as _, Encode as _};
use x509_cert::ext::pkix::{BasicConstraints, ExtendedKeyUsage};

/// Whom a connection trusts.
#[derive(Debug)]
pub(super) enum ServerTrust {
    /// Servers for which one of these certificates vouches, and no others of this machine.
    Certificates(Vec<CertificateDer<'static>>),
    /// Every server.
    Anybody,
}

/// A certificate of this client with its intermediates, and its key.
#[derive(Debug)]
pub(super) struct ClientIdentity {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

impl Clone for ClientIdentity {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

impl ClientIdentity {
    fn certified(self, provider: &CryptoProvider) -> Result<CertifiedKey, Error> {
        let key = provider.key_provider.load_private_key(self.key)?;
        let certified = CertifiedKey::new(self.chain, key);
        certified.keys_match()?;
        Ok(certified)
    }
}

/// Checks that a key is usable and is that of the certificate.
pub(super) fn check(client: &ClientIdentity) -> Result<(), Error> {
    client.clone().certified(&provider()).map(drop)
}

/// Makes a configuration with this trust that offers one of these certificates to servers that want one.
pub(super) fn config(trust: ServerTrust, clients: Vec<ClientIdentity>) -> Result<ClientConfig, Error> {
    let provider = provider();
    let mut offered = Vec::new();
    for client in clients {
        offered.push(Arc::new(client.certified(&provider)?));
    }
    let versions = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let verifier: Arc<dyn ServerCertVerifier> = match trust {
        ServerTrust::Anybody => Arc::new(Unverified(provider)),
        ServerTrust::Certificates(trusted) => match chains(&trusted, provider)? {
            Some(chains) => Arc::new(Verifier {
                chains,
                trusted: trusted.into_iter().collect(),
            }),
            None => {
                // Every certificate then has an unknown issuer.
                let nobody = versions.with_root_certificates(RootCertStore::empty());
                return Ok(offering(nobody, offered));
            }
        },
    };
    let builder = versions.dangerous().with_custom_certificate_verifier(verifier);
    Ok(offering(builder, offered))
}

fn offering(
    builder: rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>,
    offered: Vec<Arc<CertifiedKey>>,
) -> ClientConfig {
    match offered.is_empty() {
        true => builder.with_no_client_auth(),
        false => builder.with_client_cert_resolver(Arc::new(Offered(offered))),
    }
}

/// Returns the check of certificate chains, or none if no certificate is trusted.
fn chains(
    trusted: &[CertificateDer<'static>],
    provider: Arc<CryptoProvider>,
) -> Result<Option<Arc<WebPkiServerVerifier>>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(trusted.iter().filter(|certificate| may_sign(certificate)).cloned());
    if roots.is_empty() {
        if trusted.is_empty() {
            return Ok(None);
        }
        // A verifier needs an authority. This one vouches for no certificate, because it has no key.
        roots.roots.push(nobody());
    }
    let built = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build();
    built.map(Some).map_err(|error| Error::General(error.to_string()))
}

/// Returns the algorithms of ring, with aws-lc's for signatures. Adds key exchange over P-521, for servers that offer
/// nothing else.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.signature_verification_algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
    provider.kx_groups.push(&P521);
    Arc::new(provider)
}

#[derive(Debug)]
struct Verifier {
    chains: Arc<WebPkiServerVerifier>,
    trusted: HashSet<CertificateDer<'static>>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self
            .chains
            .verify_server_cert(certificate, intermediates, name, ocsp, now);
        match verified {
            Err(error) if is_about_the_issuer(&error) && self.trusted.contains(certificate) => {
                if !may_serve(certificate) {
                    return Err(Error::InvalidCertificate(CertificateError::InvalidPurpose));
                }
                rustls::client::verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

/// Trusts every certificate of a server. The user said so of the host.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The certificates of this client.
#[derive(Debug)]
struct Offered(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for Offered {
    fn resolve(&self, authorities: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let fitting = || {
            self.0
                .iter()
                .filter(|offered| offered.key.choose_scheme(schemes).is_some())
        };
        let mut named = fitting().filter(|offered| is_issued_by(offered, authorities));
        named.next().or_else(|| fitting().next()).cloned()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Whether one of these authorities has signed a certificate of the chain. Authorities are names in DER.
fn is_issued_by(certified: &CertifiedKey, authorities: &[&[u8]]) -> bool {
    let issuers = certified.cert.iter().filter_map(|certificate| {
        let parsed = Certificate::from_der(certificate).ok()?;
        parsed.tbs_certificate().issuer().to_der().ok()
    });
    issuers
        .into_iter()
        .any(|issuer| authorities.contains(&issuer.as_slice()))
}

/// Whether a trusted certificate may vouch for others. It must say that it is an authority (RFC 5280, 4.2.1.9). A
/// certificate of version 1 has no way to say so, and may.
fn may_sign(certificate: &CertificateDer<'_>) -> bool {
    let Ok(certificate) = Certificate::from_der(certificate) else {
        // webpki decides about a certificate that does not parse here.
        return true;
    };
    let parsed = certificate.tbs_certificate();
    match parsed.get_extension::<BasicConstraints>() {
        Ok(Some((_, constraints))) => constraints.ca,
        Ok(None) => parsed.version() == Version::V1,
        Err(_) => false,
    }
}

/// Whether a certificate may be a server's. One that states its permitted uses must permit this use (RFC 5280,
/// 4.2.1.12).
fn may_serve(certificate: &CertificateDer<'_>) -> bool {
    let Ok(certificate) = Certificate::from_der(certificate) else {
        return false;
    };
    match certificate.tbs_certificate().get_extension::<ExtendedKeyUsage>() {
        Ok(Some((_, usage))) => {
            let mut usage = usage.0.iter();
            usage.any(|id| [rfc5280::ID_KP_SERVER_AUTH, rfc5280::ANY_EXTENDED_KEY_USAGE].contains(id))
        }
        Ok(None) => true,
        Err(_) => false,
    }
}

/// An authority without a key.
fn nobody() -> TrustAnchor<'static> {
    TrustAnchor {
        subject: Vec::new().into(),
        subject_public_key_info: Vec::new().into(),
        name_constraints: None,
    }
}

/// Whether a certificate was refused because of its issuer. webpki checks the dates first, so they are valid then.
fn is_about_the_issuer(error: &Error) -> bool {
    let Error::InvalidCertificate(error) = error else {
        return false;
    };
    match error {
        CertificateError::UnknownIssuer => true,
        CertificateError::Other(other) => {
            let webpki = other.0.downcast_ref::<webpki::Error>();
            matches!(webpki, Some(webpki::Error::CaUsedAsEndEntity))
        }
        _ => false,
    }
}

/// Elliptic-curve key exchange over P-521, for which rustls has no group.
#[derive(Debug)]
struct P521;

impl SupportedKxGroup for P521 {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        let failed = |_| Error::FailedToGetRandomBytes;
        let private = agreement::PrivateKey::generate(&agreement::ECDH_P521).map_err(failed)?;
        let public = private.compute_public_key().map_err(failed)?;
        Ok(Box::new(SecpExchange { private, public }))
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        None
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

struct SecpExchange {
    private: agreement::PrivateKey,
    public: agreement::PublicKey,
}

impl ActiveKeyExchange for SecpExchange {
    fn complete(self: Box<Self>, peer: &[u8]) -> Result<SharedSecret, Error> {
        let invalid = Error::PeerMisbehaved(PeerMisbehaved::InvalidKeyShare);
        // TLS allows uncompressed points only (RFC 8446 section 4.2.8.2).
        if peer.first() != Some(&4) {
            return Err(invalid);
        }
        let peer = agreement::UnparsedPublicKey::new(&agreement::ECDH_P521, peer);
        agreement::agree(&self.private, peer, invalid, |secret| Ok(SharedSecret::from(secret)))
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        None
    }

    fn pub_key(&self) -> &[u8] {
        self.public.as_ref()
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}
