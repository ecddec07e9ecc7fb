//! How long a request to a store may take, by what it carries.
//!
//! An answer that falls silent is given up soon. What is being sent is given time by its bytes: a
//! slow link is no silent one, and while a body goes out no answer can come.

use std::time::Duration;

use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService, ReqwestConnector,
};

/// The deadlines of every request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// How long a request that carries nothing may wait for its answer's next bytes.
    pub(crate) silence: Duration,
    /// How long any request may take, its own body not counted.
    pub(crate) request: Duration,
    /// The slowest link a body may go out by, in bytes per second.
    pub(crate) slowest_upload: u64,
    /// A header for every request.
    pub(crate) header: Option<(&'static str, &'static str)>,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(60),
            request: Duration::from_secs(300),
            slowest_upload: 64 << 10,
            header: None,
        }
    }
}

impl HttpConnector for Patience {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let reading = (options.clone())
            .with_timeout(self.request)
            .with_read_timeout(self.silence);
        let writing = (options.clone())
            .with_timeout_disabled()
            .with_read_timeout_disabled();
        let connector = ReqwestConnector::default();
        Ok(HttpClient::new(Patient {
            patience: *self,
            reading: connector.connect(&reading)?,
            writing: connector.connect(&writing)?,
        }))
    }
}

/// Two clients, because the deadlines of one would cut what the other sends.
#[derive(Debug)]
struct Patient {
    patience: Patience,
    reading: HttpClient,
    writing: HttpClient,
}

#[async_trait]
impl HttpService for Patient {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if let Some((name, value)) = self.patience.header
            && let Ok(value) = value.parse()
        {
            request.headers_mut().insert(name, value);
        }
        let bytes = request.body().content_length() as u64;
        if bytes == 0 {
            return self.reading.execute(request).await;
        }
        // The answer to what was sent is short: it is read here, within the deadline.
        let answer = async {
            let (head, body) = self.writing.execute(request).await?.into_parts();
            let body = body.bytes().await?;
            Ok(HttpResponse::from_parts(head, HttpResponseBody::from(body)))
        };
        let sending = Duration::from_secs(bytes / self.patience.slowest_upload);
        tokio::time::timeout(self.patience.request + sending, answer)
            .await
            .unwrap_or_else(|late| Err(HttpError::new(HttpErrorKind::Timeout, late)))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use object_store::client::HttpRequestBody;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const SILENCE: Duration = Duration::from_millis(100);
    const BODY_BYTES: usize = 256 << 10;

    /// Takes a body in six sips, and longer over it than `SILENCE`; then begins an answer, and
    /// ends it only if there was a body.
    async fn slow_server() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            while let Ok((mut connection, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(connection.read_u8().await.expect("a request"));
                    }
                    if head.starts_with(b"HEAD") {
                        let told = head.windows(6).any(|bytes| bytes == b"x-a: b");
                        let answer = format!("HTTP/1.1 {}\r\n\r\n", if told { 200 } else { 400 });
                        connection.write_all(answer.as_bytes()).await.expect("sent");
                        return;
                    }
                    if head.starts_with(b"GET") {
                        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nsome";
                        connection.write_all(answer).await.expect("sent");
                        return std::future::pending().await;
                    }
                    let mut left = vec![0; BODY_BYTES];
                    for sip in left.chunks_mut(BODY_BYTES / 6) {
                        tokio::time::sleep(SILENCE).await;
                        connection.read_exact(sip).await.expect("a body");
                    }
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone";
                    connection.write_all(answer).await.expect("sent");
                });
            }
        });
        format!("http://{address}/")
    }

    async fn ask(
        patience: Patience,
        method: &str,
        body: HttpRequestBody,
    ) -> Result<Bytes, HttpError> {
        let answer = execute(patience, method, body).await?;
        answer.into_body().bytes().await
    }

    async fn execute(
        patience: Patience,
        method: &str,
        body: HttpRequestBody,
    ) -> Result<HttpResponse, HttpError> {
        crate::tls::install();
        let client = patience
            .connect(&ClientOptions::new().with_allow_http(true))
            .expect("a client");
        let mut request = HttpRequest::new(body);
        *request.method_mut() = method.parse().expect("a method");
        *request.uri_mut() = slow_server().await.parse().expect("an address");
        client.execute(request).await
    }

    #[tokio::test]
    async fn a_body_that_is_taken_slowly_arrives() {
        let patience = Patience {
            silence: SILENCE,
            request: 2 * SILENCE,
            slowest_upload: (BODY_BYTES / 4) as u64,
            header: None,
        };
        let body = || HttpRequestBody::from(vec![7; BODY_BYTES]);
        let answer = ask(patience, "PUT", body()).await;
        assert_eq!(answer.expect("in time"), "done");

        let hasty = Patience {
            slowest_upload: u64::MAX,
            ..patience
        };
        let late = ask(hasty, "PUT", body()).await.expect_err("too slow");
        assert_eq!(late.kind(), HttpErrorKind::Timeout);
    }

    #[tokio::test]
    async fn an_answer_that_falls_silent_ends() {
        let patience = Patience {
            silence: SILENCE,
            ..Patience::default()
        };
        let silent = ask(patience, "GET", HttpRequestBody::empty()).await;
        assert_eq!(silent.expect_err("silent").kind(), HttpErrorKind::Timeout);
    }

    #[tokio::test]
    async fn every_request_has_the_header() {
        let status = async |header| {
            let patience = Patience {
                header,
                ..Patience::default()
            };
            let answer = execute(patience, "HEAD", HttpRequestBody::empty()).await;
            answer.expect("an answer").status().as_u16()
        };
        assert_eq!(status(Some(("x-a", "b"))).await, 200);
        assert_eq!(status(None).await, 400);
    }
}
