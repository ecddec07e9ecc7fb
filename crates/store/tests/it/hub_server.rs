//! A server that answers as a test tells it, and remembers what it was asked.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use updraft_store::hub::{HubClient, HubConfig, Token};

pub(crate) const TOKEN: &str = "hf_sEcRet";

/// What came in.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Bytes,
}

/// What goes out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Bytes,
    /// Close the connection after this many bytes of the body.
    pub(crate) cut: Option<usize>,
}

pub(crate) fn reply(
    status: u16,
    headers: &[(&'static str, &str)],
    body: impl Into<Bytes>,
) -> Reply {
    let headers = headers
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()))
        .collect();
    Reply {
        status,
        headers,
        body: body.into(),
        cut: None,
    }
}

/// A server on a free port of the loopback, one request per connection, and what it was asked.
#[derive(Clone)]
pub(crate) struct Server {
    /// How long it lets every sixteenth of a body wait.
    sip: Arc<Mutex<Duration>>,
    pub(crate) address: SocketAddr,
    pub(crate) asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    /// `answer` sees the request and how many came before it.
    pub(crate) async fn start(
        answer: impl Fn(&Asked, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let sip = Arc::new(Mutex::new(Duration::ZERO));
        let (log, answer, pause) = (Arc::clone(&asked), Arc::new(answer), Arc::clone(&sip));
        tokio::spawn(async move {
            while let Ok((mut connection, _)) = listener.accept().await {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                let pause = *pause.lock().expect("not poisoned");
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(connection.read_u8().await.expect("a request"));
                    }
                    let mut asked = parse(&String::from_utf8(head).expect("text"));
                    let length = asked.headers.get("content-length");
                    let length = length.map_or(0, |length| length.parse().expect("a number"));
                    let mut body = vec![0; length];
                    for sip in body.chunks_mut((length / 16).max(1024)) {
                        tokio::time::sleep(pause).await;
                        connection.read_exact(sip).await.expect("a body");
                    }
                    asked.body = body.into();
                    let before = {
                        let mut log = log.lock().expect("not poisoned");
                        log.push(asked.clone());
                        log.len() - 1
                    };
                    let reply = answer(&asked, before);
                    let mut out = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", reply.status);
                    for (name, value) in &reply.headers {
                        out += &format!("{name}: {value}\r\n");
                    }
                    out += &format!("content-length: {}\r\n\r\n", reply.body.len());
                    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
                    // The client may hang up first.
                    let _ = connection.write_all(&[out.as_bytes(), body].concat()).await;
                    let _ = connection.shutdown().await;
                });
            }
        });
        Self {
            sip,
            address,
            asked,
        }
    }

    /// From now on every body is taken slowly, in sixteen sips.
    pub(crate) fn sip(&self, pause: Duration) {
        *self.sip.lock().expect("not poisoned") = pause;
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("not poisoned").clone()
    }

    pub(crate) fn client(&self) -> HubClient {
        self.client_within(Duration::from_secs(20))
    }

    pub(crate) fn client_within(&self, deadline: Duration) -> HubClient {
        let token = Some(Token::new(TOKEN));
        let config = HubConfig {
            endpoint: self.url(),
            token,
            deadline,
            ..HubConfig::default()
        };
        HubClient::new(config).expect("a good endpoint")
    }
}

fn parse(head: &str) -> Asked {
    let mut lines = head.lines();
    let mut words = lines.next().expect("a request line").split(' ');
    let (method, target) = (
        words.next().expect("a method"),
        words.next().expect("a target"),
    );
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    Asked {
        method: method.to_owned(),
        target: target.to_owned(),
        headers,
        body: Bytes::new(),
    }
}

/// A file server that obeys Range.
pub(crate) fn ranged(asked: &Asked, whole: &Bytes, etag: &str) -> Reply {
    let Some(range) = asked.headers.get("range") else {
        return reply(200, &[("etag", etag)], whole.clone());
    };
    if asked
        .headers
        .get("if-range")
        .is_some_and(|version| version != etag)
    {
        return reply(200, &[("etag", etag)], whole.clone());
    }
    let (start, end) = range
        .strip_prefix("bytes=")
        .and_then(|r| r.split_once('-'))
        .expect("a range");
    let (start, end): (usize, usize) = (start.parse().expect("start"), end.parse().expect("end"));
    let found = format!("bytes {start}-{end}/{}", whole.len());
    reply(
        206,
        &[("etag", etag), ("content-range", &found)],
        whole.slice(start..=end),
    )
}
