//! HTTPS: the certificate and its key, and the handshake.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;

use super::options::TlsFiles;
use crate::error::{Error, Result};

/// Largest file of certificates or of a key.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// What connections are encrypted with.
#[derive(Clone)]
pub(super) struct Tls(TlsAcceptor);

impl Tls {
    /// Reads the certificate and its key.
    ///
    /// # Errors
    /// [`Error::Serve`] naming the file that cannot be read or does not hold what it should, or both if they do not
    /// belong together.
    pub fn load(files: &TlsFiles) -> Result<Tls> {
        let (certificate, key) = (files.certificate.display(), files.key.display());
        let certificates = certificates(&files.certificate)?;
        let private = private_key(&files.key)?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::Serve(format!("cannot set up TLS: {error}")))?
            .with_no_client_auth()
            .with_single_cert(certificates, private);
        let mut config = config.map_err(|error| {
            Error::Serve(match error {
                rustls::Error::InconsistentKeys(_) => {
                    format!("{key} is not the key of the first certificate in {certificate}")
                }
                rustls::Error::InvalidCertificate(error) => {
                    format!("the first certificate in {certificate} is not valid: {error}")
                }
                error => format!("cannot use {certificate} with the key {key}: {error}"),
            })
        })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Tls(TlsAcceptor::from(Arc::new(config))))
    }

    /// Shakes hands with a client.
    ///
    /// # Errors
    /// Where the client breaks off, or speaks something else.
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<TlsStream<S>> {
        self.0.accept(stream).await
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |error: io::Error| Error::Serve(format!("cannot read {}: {error}", path.display()));
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(MAX_PEM_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    match bytes.len() as u64 > MAX_PEM_BYTES {
        true => {
            let path = path.display();
            Err(Error::Serve(format!(
                "{path} has more than {MAX_PEM_BYTES} bytes; expected a certificate or key in PEM"
            )))
        }
        false => Ok(bytes),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(missing(path, "certificate", "-----BEGIN CERTIFICATE-----", "")),
        Err(error) => Err(broken(path, &error)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| match error {
        pem::Error::NoItemsFound => {
            let hint = "; one that is encrypted has to be decrypted first, as with openssl pkey";
            missing(path, "private key", "-----BEGIN PRIVATE KEY-----", hint)
        }
        error => broken(path, &error),
    })
}

fn missing(path: &Path, what: &str, begin: &str, hint: &str) -> Error {
    Error::Serve(format!("{} has no {what} in PEM, which begins with {begin}{hint}", path.display()))
}

fn broken(path: &Path, error: &pem::Error) -> Error {
    Error::Serve(format!("{} is not valid PEM: {error}", path.display()))
}
