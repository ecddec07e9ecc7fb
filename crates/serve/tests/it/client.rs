//! A server on a free port, and the few lines of HTTP/1.1 it takes to talk to it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use updraft_serve::{Clock, EchoEngine, Engine, ServeOptions, listen, serve};

/// When the tests take place, in seconds since the Unix epoch.
pub(crate) const NOW: u64 = 1_795_305_600;

pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    pub(crate) task: JoinHandle<()>,
    stop: Option<oneshot::Sender<()>>,
}

impl Server {
    pub(crate) async fn echo() -> Self {
        Self::start(Arc::new(EchoEngine::new(["echo"])), ServeOptions::default()).await
    }

    pub(crate) async fn start(engine: Arc<dyn Engine>, options: ServeOptions) -> Self {
        let listener = listen(([127, 0, 0, 1], 0).into())
            .await
            .expect("a free port");
        let addr = listener.local_addr().expect("bound");
        let (stop, stopped) = oneshot::channel::<()>();
        let clock = Clock::fixed(Duration::from_secs(NOW));
        let options = ServeOptions { clock, ..options };
        let task = tokio::spawn(serve(listener, engine, options, async {
            // A dropped sender must not stop a server that a test still uses.
            if stopped.await.is_err() {
                std::future::pending::<()>().await;
            }
        }));
        Self {
            addr,
            task,
            stop: Some(stop),
        }
    }

    pub(crate) fn stop(&mut self) {
        self.stop
            .take()
            .expect("stopped once")
            .send(())
            .expect("it runs");
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "", None).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, &body.to_string()).await
    }

    pub(crate) async fn post_text(&self, path: &str, body: &str) -> Answer {
        self.request(
            "POST",
            path,
            "Content-Type: application/json\r\n",
            Some(body),
        )
        .await
    }

    /// `headers` end in `\r\n` each.
    pub(crate) async fn request(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: Option<&str>,
    ) -> Answer {
        let mut stream = self.send(method, path, headers, body).await;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.expect("an answer");
        Answer::parse(&bytes)
    }

    /// Sends a request and hands out the connection, to read from or to drop.
    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: Option<&str>,
    ) -> TcpStream {
        let mut stream = TcpStream::connect(self.addr).await.expect("it listens");
        let body = body.unwrap_or_default();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{headers}\
             Content-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.expect("sent");
        // A server that refuses the head may close before the body is through.
        let _ = stream.write_all(body.as_bytes()).await;
        stream
    }
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
        let mut lines = head.lines();
        let status = lines
            .next()
            .and_then(|line| line.split(' ').nth(1))
            .expect("a status line");
        let header = |line: &str| {
            let (name, value) = line.split_once(": ").expect("a header");
            (name.to_ascii_lowercase(), value.to_owned())
        };
        let headers: Vec<_> = lines.map(header).collect();
        let chunked = headers
            .iter()
            .any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let body = if chunked {
            unchunk(body)
        } else {
            body.to_owned()
        };
        Self {
            status: status.parse().expect("a number"),
            headers,
            body,
        }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.body))
    }

    /// Checks an error's status and `code`, and returns it; its form is OpenAI's.
    #[track_caller]
    pub(crate) fn error(&self, status: u16, code: Option<&str>) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        let error = self.json()["error"].clone();
        assert!(
            error["message"].is_string() && error["type"].is_string(),
            "{error}"
        );
        assert!(
            error["param"].is_string() || error["param"].is_null(),
            "{error}"
        );
        assert_eq!(error["code"].as_str(), code, "{error}");
        assert!(
            error["code"].is_string() || error["code"].is_null(),
            "{error}"
        );
        error
    }

    /// The chunks of a stream, which must end in `[DONE]`.
    #[track_caller]
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let data = self.body.split("\n\n").filter(|frame| !frame.is_empty());
        let mut data: Vec<&str> = data
            .map(|frame| frame.strip_prefix("data: ").expect("only data frames"))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.into_iter()
            .map(|chunk| serde_json::from_str(chunk).expect("JSON"))
            .collect()
    }
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("a chunk's size");
        if size == 0 {
            break;
        }
        whole.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
    whole
}
