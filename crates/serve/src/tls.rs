//! TLS: a certificate chain and its private key, ready for handshakes.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::error::{BoxError, Error, Result};
use crate::peer::Peer;

/// What the server shows to clients that speak TLS 1.2 or 1.3, and HTTP/2 or HTTP/1.1 in it.
#[derive(Clone)]
pub struct Tls(TlsAcceptor);

impl Tls {
    /// From two PEM files: the certificates, the server's own first, and its private key.
    ///
    /// # Errors
    /// [`Error::Tls`] naming the file that is missing, holds nothing of its kind, or does not fit
    /// the other.
    pub fn from_pem_files(certificates: &Path, private_key: &Path) -> Result<Self> {
        let chain = read(certificates, |pem| {
            CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>()
        })?;
        if chain.is_empty() {
            return Err(unusable(certificates, "it holds no certificate"));
        }
        let key = read(private_key, PrivateKeyDer::from_pem_slice)?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|config| config.with_no_client_auth().with_single_cert(chain, key));
        let mut config = config.map_err(|source| unusable(private_key, source))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// Shakes hands, or gives up when it takes too long.
    pub(crate) async fn accept(
        &self,
        stream: Peer,
        timeout: Duration,
    ) -> std::io::Result<TlsStream<Peer>> {
        tokio::time::timeout(timeout, self.0.accept(stream)).await?
    }
}

fn read<T>(
    path: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T, rustls::pki_types::pem::Error>,
) -> Result<T> {
    let pem = std::fs::read(path).map_err(|source| unusable(path, source))?;
    parse(&pem).map_err(|source| unusable(path, source))
}

fn unusable(path: &Path, source: impl Into<BoxError>) -> Error {
    Error::Tls {
        path: path.display().to_string(),
        source: source.into(),
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}
