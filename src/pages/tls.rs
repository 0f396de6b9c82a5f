//! TLS between a dump and a page server. Each end has a certificate, and verifies that of the other.
//!
//! The files and their default places are those of CRIU, which uses GnuTLS.

use std::{
    fmt,
    io::{self, IoSlice, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, Error, RootCertStore,
    ServerConfig, ServerConnection, SignatureScheme, StreamOwned,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
        pem::{self, PemObject},
    },
    server::{VerifierBuilderError, WebPkiClientVerifier},
};

/// The default places of the files (`criu/tls.c`).
const CACERT: &str = "/etc/pki/CA/cacert.pem";
const CACRL: &str = "/etc/pki/CA/cacrl.pem";
const CERT: &str = "/etc/pki/criu/cert.pem";
const KEY: &str = "/etc/pki/criu/private/key.pem";

/// The options of TLS: files, unless they are in their default places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// Certificates of trusted authorities.
    pub cacert: Option<PathBuf>,
    /// Lists of revoked certificates.
    pub cacrl: Option<PathBuf>,
    /// Our certificate, then those of intermediate authorities.
    pub cert: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
    /// Accept a server whose certificate does not have the address that was connected to.
    pub any_name: bool,
}

/// Why there is no encrypted connection.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The processor lacks instructions.
    #[error("--tls needs a processor with {missing}")]
    Processor {
        /// The first feature that is missing.
        missing: &'static str,
    },
    /// A file cannot be used.
    #[error("read {path} ({option})", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The option that names another one.
        option: &'static str,
        /// The cause.
        source: pem::Error,
    },
    /// A file has no certificate.
    #[error("{path} ({option}) has no certificate in PEM form", path = .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// The option that names another one.
        option: &'static str,
    },
    /// The certificates and the key do not make a configuration.
    #[error("use the certificate {cert} with its key", cert = .cert.display())]
    Certificate {
        /// The certificate.
        cert: PathBuf,
        /// The cause.
        source: Error,
    },
    /// The authorities cannot be used.
    #[error("use the certificates of authorities and the lists of revoked ones")]
    Authorities(#[from] VerifierBuilderError),
    /// Protocol versions that the provider does not have.
    #[error("prepare TLS")]
    Protocol(#[source] Error),
    /// The other end was not accepted, or has not accepted us.
    #[error("agree on TLS with the other end")]
    Handshake(#[source] io::Error),
}

/// A connection that may be encrypted.
pub enum Secured<S: Read + Write> {
    /// As it is.
    Plain(S),
    /// Encrypted, and we have connected.
    Client(Box<StreamOwned<ClientConnection, S>>),
    /// Encrypted, and the other end has connected.
    Server(Box<StreamOwned<ServerConnection, S>>),
}

/// Encrypts a connection to the server `host`; without a name, any one that our authorities know.
///
/// # Errors
/// [`TlsError`].
pub fn connect<S: Read + Write>(
    options: &TlsOptions,
    host: Option<&str>,
    mut socket: S,
) -> Result<Secured<S>, TlsError> {
    let Parts { provider, authorities, revoked, chain, key, cert } = Parts::read(options)?;
    let mut verifier =
        WebPkiServerVerifier::builder_with_provider(authorities, Arc::clone(&provider));
    if !revoked.is_empty() {
        verifier = verifier.with_crls(revoked).allow_unknown_revocation_status();
    }
    let verifier = verifier.build()?;
    let name = host.and_then(|host| ServerName::try_from(host.to_owned()).ok());
    let any_name = options.any_name || name.is_none();
    let verifier: Arc<dyn ServerCertVerifier> =
        if any_name { Arc::new(AnyName(verifier)) } else { verifier };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Protocol)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(chain, key)
        .map_err(|source| TlsError::Certificate { cert, source })?;
    // An address is never sent as a name.
    let unnamed = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    let connection = ClientConnection::new(Arc::new(config), name.unwrap_or(unnamed));
    let mut connection = connection.map_err(TlsError::Protocol)?;
    connection.complete_io(&mut socket).map_err(TlsError::Handshake)?;
    Ok(Secured::Client(Box::new(StreamOwned::new(connection, socket))))
}

/// Encrypts the connection of a client, which must have a certificate.
///
/// # Errors
/// [`TlsError`].
pub fn accept<S: Read + Write>(
    options: &TlsOptions,
    mut socket: S,
) -> Result<Secured<S>, TlsError> {
    let Parts { provider, authorities, revoked, chain, key, cert } = Parts::read(options)?;
    let mut verifier =
        WebPkiClientVerifier::builder_with_provider(authorities, Arc::clone(&provider));
    if !revoked.is_empty() {
        verifier = verifier.with_crls(revoked).allow_unknown_revocation_status();
    }
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Protocol)?
        .with_client_cert_verifier(verifier.build()?)
        .with_single_cert(chain, key)
        .map_err(|source| TlsError::Certificate { cert, source })?;
    // A client connects once.
    config.send_tls13_tickets = 0;
    let connection = ServerConnection::new(Arc::new(config));
    let mut connection = connection.map_err(TlsError::Protocol)?;
    connection.complete_io(&mut socket).map_err(TlsError::Handshake)?;
    Ok(Secured::Server(Box::new(StreamOwned::new(connection, socket))))
}

/// Checks the files of the options, before there is a connection.
///
/// # Errors
/// As [`connect`].
pub fn check(options: &TlsOptions) -> Result<(), TlsError> {
    Parts::read(options).map(drop)
}

/// What both ends need.
struct Parts {
    provider: Arc<CryptoProvider>,
    authorities: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    cert: PathBuf,
}

impl Parts {
    fn read(options: &TlsOptions) -> Result<Self, TlsError> {
        check_processor()?;
        let place =
            |option: &Option<PathBuf>, usual: &str| option.clone().unwrap_or_else(|| usual.into());
        let cacert = place(&options.cacert, CACERT);
        let mut authorities = RootCertStore::empty();
        let (added, _) = authorities.add_parsable_certificates(read(&cacert, "--tls-cacert")?);
        if added == 0 {
            return Err(TlsError::Empty { path: cacert, option: "--tls-cacert" });
        }
        let cacrl = place(&options.cacrl, CACRL);
        let revoked = if options.cacrl.is_some() || cacrl.exists() {
            read(&cacrl, "--tls-cacrl")?
        } else {
            Vec::new()
        };
        let cert = place(&options.cert, CERT);
        let chain: Vec<CertificateDer> = read(&cert, "--tls-cert")?;
        if chain.is_empty() {
            return Err(TlsError::Empty { path: cert, option: "--tls-cert" });
        }
        let key_file = place(&options.key, KEY);
        let key = PrivateKeyDer::from_pem_file(&key_file).map_err(|source| TlsError::File {
            path: key_file,
            option: "--tls-key",
            source,
        })?;
        let provider = Arc::new(rustls_graviola::default_provider());
        Ok(Self { provider, authorities: Arc::new(authorities), revoked, chain, key, cert })
    }
}

/// Reads all objects of a kind in a PEM file.
fn read<T: PemObject>(path: &Path, option: &'static str) -> Result<Vec<T>, TlsError> {
    T::pem_file_iter(path).and_then(Iterator::collect).map_err(|source| TlsError::File {
        path: path.to_owned(),
        option,
        source,
    })
}

/// Checks for the instructions that `graviola` uses, which has no other way.
fn check_processor() -> Result<(), TlsError> {
    #[cfg(target_arch = "x86_64")]
    let found = [
        ("aes", is_x86_feature_detected!("aes")),
        ("ssse3", is_x86_feature_detected!("ssse3")),
        ("pclmulqdq", is_x86_feature_detected!("pclmulqdq")),
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("adx", is_x86_feature_detected!("adx")),
        ("bmi1", is_x86_feature_detected!("bmi1")),
        ("bmi2", is_x86_feature_detected!("bmi2")),
    ];
    #[cfg(target_arch = "aarch64")]
    let found = {
        use std::arch::is_aarch64_feature_detected;
        [
            ("aes", is_aarch64_feature_detected!("aes")),
            ("sha2", is_aarch64_feature_detected!("sha2")),
            ("pmull", is_aarch64_feature_detected!("pmull")),
            ("neon", is_aarch64_feature_detected!("neon")),
        ]
    };
    match found.iter().find(|(_, is_there)| !is_there) {
        Some((missing, _)) => Err(TlsError::Processor { missing }),
        None => Ok(()),
    }
}

/// Verifies a server like the verifier inside, but accepts any name.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // The name is verified last.
        match self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

impl<S: Read + Write> Secured<S> {
    /// Tells the other end that nothing follows. What it has sent can still be read.
    ///
    /// # Errors
    /// The other end has gone.
    pub fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Client(stream) => {
                stream.conn.send_close_notify();
                stream.flush()
            }
            Self::Server(stream) => {
                stream.conn.send_close_notify();
                stream.flush()
            }
        }
    }

    /// Returns the connection below.
    pub fn socket(&mut self) -> &mut S {
        match self {
            Self::Plain(socket) => socket,
            Self::Client(stream) => &mut stream.sock,
            Self::Server(stream) => &mut stream.sock,
        }
    }
}

impl<S: Read + Write> Read for Secured<S> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(bytes),
            Self::Client(stream) => stream.read(bytes),
            Self::Server(stream) => stream.read(bytes),
        }
    }
}

impl<S: Read + Write> Write for Secured<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Client(stream) => stream.write(bytes),
            Self::Server(stream) => stream.write(bytes),
        }
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write_vectored(slices),
            Self::Client(stream) => stream.write_vectored(slices),
            Self::Server(stream) => stream.write_vectored(slices),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Client(stream) => stream.flush(),
            Self::Server(stream) => stream.flush(),
        }
    }
}

impl<S: Read + Write> fmt::Debug for Secured<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Plain",
            Self::Client(_) => "Client",
            Self::Server(_) => "Server",
        })
    }
}
