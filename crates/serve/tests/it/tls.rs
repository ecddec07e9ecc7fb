//! HTTPS, with a certificate that each test makes for itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use updraft_serve::{EchoEngine, Error, ServeOptions, Tls};

use crate::client::{Answer, Server};
use crate::life::until;

/// A folder with `cert.pem` and `key.pem`.
struct Certificate(tempfile::TempDir);

impl Certificate {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let names = vec!["localhost".to_owned()];
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(names).expect("sound names");
        let write = |name, pem| std::fs::write(folder.path().join(name), pem).expect("written");
        write("cert.pem", cert.pem());
        write("key.pem", signing_key.serialize_pem());
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn tls(&self) -> Tls {
        Tls::from_pem_files(&self.path("cert.pem"), &self.path("key.pem")).expect("a pair")
    }

    /// Shakes hands as a client that trusts this certificate alone and offers one protocol.
    async fn connect(
        &self,
        server: &Server,
        protocol: &[u8],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        let certificate = CertificateDer::from_pem_file(self.path("cert.pem")).expect("PEM");
        roots.add(certificate).expect("a certificate");
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("rustls' own versions")
            .with_root_certificates(roots);
        let mut config = config.with_no_client_auth();
        config.alpn_protocols = vec![protocol.to_vec()];
        let stream = TcpStream::connect(server.addr).await.expect("it listens");
        let name = ServerName::try_from("localhost").expect("a name");
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
    }
}

async fn server(certificate: &Certificate, engine: EchoEngine, options: ServeOptions) -> Server {
    let tls = Some(certificate.tls());
    Server::start(Arc::new(engine), ServeOptions { tls, ..options }).await
}

fn echo() -> EchoEngine {
    EchoEngine::new(["echo"])
}

#[tokio::test]
async fn a_request_is_answered_inside_of_tls() {
    let certificate = Certificate::new();
    let server = server(&certificate, echo(), ServeOptions::default()).await;
    let mut stream = certificate
        .connect(&server, b"http/1.1")
        .await
        .expect("a handshake");
    let body = r#"{"messages": [{"role": "user", "content": "hello"}], "stream": true}"#;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .await
        .expect("an end with a close_notify");
    let chunks = Answer::parse(&answer).chunks();
    let text = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert_eq!(text.collect::<String>(), "hello");
}

#[tokio::test]
async fn clients_may_choose_http2() {
    let certificate = Certificate::new();
    let server = server(&certificate, echo(), ServeOptions::default()).await;
    let mut stream = certificate
        .connect(&server, b"h2")
        .await
        .expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    // A preface and empty settings; the server's own settings frame comes first.
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings].concat();
    stream.write_all(&preface).await.expect("sent");
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).await.expect("a frame");
    assert_eq!(frame[3], 4, "settings");
}

/// Nobody is served without a handshake, and who does not finish one holds up nobody.
#[tokio::test]
async fn what_is_no_handshake_is_closed() {
    let certificate = Certificate::new();
    let options = ServeOptions {
        read_timeout: Duration::from_millis(100),
        ..ServeOptions::default()
    };
    let server = server(&certificate, echo(), options).await;
    for bytes in [
        "",
        "GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01",
    ] {
        let mut stream = TcpStream::connect(server.addr).await.expect("it listens");
        stream.write_all(bytes.as_bytes()).await.expect("sent");
        let mut answer = Vec::new();
        let end = stream.read_to_end(&mut answer);
        // A reset is an end too.
        let _ = tokio::time::timeout(Duration::from_secs(5), end)
            .await
            .expect("closed");
        assert!(!answer.starts_with(b"HTTP"), "{bytes:?}");
    }
    let silent = TcpStream::connect(server.addr).await.expect("it listens");
    certificate
        .connect(&server, b"http/1.1")
        .await
        .expect("the next one is served");
    drop(silent);
    let stranger = Certificate::new();
    stranger
        .connect(&server, b"http/1.1")
        .await
        .expect_err("not the certificate it trusts");
}

/// A reader that stalls is gone inside of TLS too.
#[tokio::test]
async fn a_stalled_reader_loses_its_connection() {
    let certificate = Certificate::new();
    let engine = echo();
    let options = ServeOptions {
        write_timeout: Duration::from_millis(100),
        ..ServeOptions::default()
    };
    let server = server(&certificate, engine.clone(), options).await;
    let mut stream = certificate
        .connect(&server, b"http/1.1")
        .await
        .expect("a handshake");
    let body = r#"{"messages": [{"role": "user", "content": "x"}], "stream": true,
        "ignore_eos": true, "max_tokens": 4000, "n": 64, "logprobs": true, "top_logprobs": 5}"#;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    until("it runs", || engine.running() > 0).await;
    until("it is ended", || engine.running() == 0).await;
}

/// A shutdown does not wait for a client that never shakes hands.
#[tokio::test]
async fn a_half_open_handshake_does_not_hold_up_a_shutdown() {
    let certificate = Certificate::new();
    let mut server = server(&certificate, echo(), ServeOptions::default()).await;
    let _silent = TcpStream::connect(server.addr).await.expect("it listens");
    certificate
        .connect(&server, b"http/1.1")
        .await
        .expect("accepted after the silent one");
    server.stop();
    let stopped = tokio::time::timeout(Duration::from_secs(5), &mut server.task).await;
    stopped.expect("soon").expect("no panic");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let (one, other) = (Certificate::new(), Certificate::new());
    let cert = one.path("cert.pem");
    let refused = |cert: &Path, key: &Path| match Tls::from_pem_files(cert, key) {
        Err(Error::Tls { path, .. }) => path,
        other => panic!("{other:?}"),
    };
    let key = one.path("key.pem");
    for (cert, key, at_fault) in [
        (one.path("none.pem"), key.clone(), "none.pem"),
        (cert.clone(), one.path("none.pem"), "none.pem"),
        (key.clone(), key, "key.pem"),
        (cert.clone(), cert.clone(), "cert.pem"),
        (cert, other.path("key.pem"), "key.pem"),
    ] {
        assert!(refused(&cert, &key).ends_with(at_fault), "{at_fault}");
    }
}
