use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

use super::*;

/// A replica of hand: what it does with each connection is told by a function.
struct Backend {
    address: SocketAddr,
    seen: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Backend {
    async fn new<F, T>(serve: F) -> Self
    where
        F: Fn(TcpStream) -> T + Send + Sync + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("port");
        let address = listener.local_addr().expect("bound");
        let seen = Arc::new(AtomicUsize::new(0));
        let count = seen.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(serve(stream));
            }
        });
        Self {
            address,
            seen,
            task,
        }
    }

    async fn saying(word: &'static str) -> Self {
        Self::new(move |mut stream| async move {
            read_request(&mut stream).await;
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{word}",
                word.len()
            );
            let _ = stream.write_all(answer.as_bytes()).await; // the client may have gone
        })
        .await
    }

    fn seen(&self) -> usize {
        self.seen.load(Ordering::Relaxed)
    }
}

async fn read_request(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer).await.expect("request");
        text.extend_from_slice(&buffer[..read]);
        let head = String::from_utf8_lossy(&text).into_owned();
        let Some((top, body)) = head.split_once("\r\n\r\n") else {
            continue;
        };
        let length = top.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.parse::<usize>().ok())?
        });
        if read == 0 || body.len() >= length.unwrap_or(0) {
            return head;
        }
    }
}

async fn gateway(backends: &[&Backend], load_balancing: LoadBalancing) -> Gateway {
    let options = GatewayOptions {
        load_balancing,
        ..GatewayOptions::default()
    };
    let gateway = Gateway::bind("127.0.0.1:0".parse().expect("address"), options)
        .await
        .expect("bind");
    let routes: Vec<_> = (1..)
        .zip(backends.iter().map(|backend| backend.address))
        .collect();
    gateway.route(&routes);
    gateway
}

async fn post(address: SocketAddr, body: &str) -> (StatusCode, Result<String, BoxError>) {
    let stream = TcpStream::connect(address).await.expect("connect");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .expect("handshake");
    tokio::spawn(connection);
    let request = Request::post("/v1/x?y=z")
        .header(header::HOST, "service")
        .body(Full::new(Bytes::from(body.to_owned())))
        .expect("request");
    let response = sender.send_request(request).await.expect("an answer");
    let status = response.status();
    let body = response.into_body().collect().await;
    (
        status,
        body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned())
            .map_err(Into::into),
    )
}

#[tokio::test]
async fn requests_go_round_and_arrive_whole() {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let kept = requests.clone();
    let echo = Backend::new(move |mut stream| {
        let kept = kept.clone();
        async move {
            let request = read_request(&mut stream).await;
            kept.lock().expect("kept").push(request);
            stream
                .write_all(b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\nok")
                .await
                .expect("answer");
        }
    })
    .await;
    let other = Backend::saying("other").await;
    let gateway = gateway(&[&echo, &other], LoadBalancing::RoundRobin).await;
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(post(gateway.address(), "{\"a\": 1}").await.1.expect("body"));
    }
    answers.sort();
    assert_eq!(answers, ["ok", "ok", "other", "other"]);
    let request = requests.lock().expect("kept")[0].clone();
    assert!(
        request.starts_with("POST /v1/x?y=z HTTP/1.1\r\n"),
        "{request}"
    );
    assert!(request.ends_with("\r\n\r\n{\"a\": 1}"), "{request}");
}

#[tokio::test]
async fn a_replica_that_is_gone_or_hangs_up_costs_no_client_an_error() {
    let gone = Backend::saying("gone").await;
    gone.task.abort();
    let _ = (&mut { gone.task }).await; // aborted, and with it the listener
    let rude = Backend::new(|mut stream| async move {
        read_request(&mut stream).await; // and closes without a word
    })
    .await;
    let good = Backend::saying("good").await;
    let dead = SocketAddr::from(([127, 0, 0, 1], 1));
    let gateway = gateway(&[], LoadBalancing::RoundRobin).await;
    gateway.route(&[(1, dead), (2, rude.address), (3, good.address)]);
    for _ in 0..6 {
        let (status, body) = post(gateway.address(), "x").await;
        assert_eq!(
            (status, body.expect("body").as_str()),
            (StatusCode::OK, "good")
        );
    }
    assert!(rude.seen() > 0);
}

#[tokio::test]
async fn after_the_first_byte_nothing_is_tried_again() {
    let breaks = Backend::new(|mut stream| async move {
        read_request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
            .await
            .expect("half");
    })
    .await;
    let good = Backend::saying("good").await;
    let gateway = gateway(&[&breaks], LoadBalancing::RoundRobin).await;
    gateway.route(&[(1, breaks.address)]);
    let (status, body) = post(gateway.address(), "x").await;
    assert_eq!(status, StatusCode::OK);
    assert!(body.is_err(), "half an answer must not look whole");
    assert_eq!((breaks.seen(), good.seen()), (1, 0));
}

#[tokio::test]
async fn bodies_stream_as_they_come() {
    let go = Arc::new(Notify::new());
    let gate = go.clone();
    let slow = Backend::new(move |mut stream| {
        let gate = gate.clone();
        async move {
            read_request(&mut stream).await;
            let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n";
            stream.write_all(head).await.expect("first");
            gate.notified().await; // the rest only when the client has the first piece
            stream
                .write_all(b"3\r\ntwo\r\n0\r\n\r\n")
                .await
                .expect("rest");
        }
    })
    .await;
    let gateway = gateway(&[&slow], LoadBalancing::LeastLoad).await;
    let mut stream = TcpStream::connect(gateway.address())
        .await
        .expect("connect");
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("request");
    let mut text = String::new();
    let mut buffer = [0; 1024];
    while !text.contains("two") {
        let read = stream.read(&mut buffer).await.expect("read");
        text.push_str(&String::from_utf8_lossy(&buffer[..read]));
        if text.contains("one") {
            go.notify_one();
        }
    }
    let withdrawn = gateway.withdraw(1).expect("routed");
    while withdrawn.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_least_loaded_gets_the_next() {
    let held = Backend::new(|stream| async move {
        std::future::pending::<()>().await;
        drop(stream);
    })
    .await;
    let free = Backend::saying("free").await;
    let gateway = gateway(&[&held], LoadBalancing::LeastLoad).await;
    let address = gateway.address();
    let stuck = tokio::spawn(async move { post(address, "x").await });
    while held.seen() == 0 {
        tokio::task::yield_now().await;
    }
    gateway.route(&[(1, held.address), (2, free.address)]);
    for _ in 0..4 {
        assert_eq!(post(address, "x").await.1.expect("body"), "free");
    }
    assert_eq!(held.seen(), 1);
    stuck.abort();
}

#[tokio::test]
async fn without_replicas_the_answer_says_so() {
    let gateway = gateway(&[], LoadBalancing::LeastLoad).await;
    let (status, body) = post(gateway.address(), "x").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(body.expect("body"), "no replica is ready; try again later");
}

/// Sends a request whose body is cut into chunks, the next of which is asked for each time.
async fn begin_upload(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("connect");
    let head = "POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("head");
    stream
}

#[tokio::test]
async fn a_request_streams_as_it_comes() {
    let (sender, mut pieces) = tokio::sync::mpsc::unbounded_channel();
    let reads = Backend::new(move |mut stream| {
        let sender = sender.clone();
        async move {
            let (mut text, mut buffer) = (String::new(), [0; 1024]);
            while !text.ends_with("0\r\n\r\n") {
                let read = stream.read(&mut buffer).await.expect("read");
                text.push_str(&String::from_utf8_lossy(&buffer[..read]));
                sender.send(text.clone()).expect("heard");
            }
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
            stream.write_all(answer).await.expect("answer");
        }
    })
    .await;
    let gateway = gateway(&[&reads], LoadBalancing::LeastLoad).await;
    let mut client = begin_upload(gateway.address()).await;
    // Each piece is there before the next is sent.
    for word in ["one", "two"] {
        let piece = format!("3\r\n{word}\r\n");
        client.write_all(piece.as_bytes()).await.expect("piece");
        let arrived = async {
            while let Some(text) = pieces.recv().await {
                if text.contains(word) {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), arrived)
            .await
            .expect("the piece is passed on before the request is whole");
    }
    client.write_all(b"0\r\n\r\n").await.expect("end");
    let mut buffer = [0; 1024];
    let read = client.read(&mut buffer).await.expect("answer");
    assert!(buffer[..read].starts_with(b"HTTP/1.1 200 OK"));
}

#[tokio::test]
async fn a_large_request_arrives_whole_and_is_sent_once() {
    let large = "x".repeat(3 * upload::REPLAY_BYTES);
    let lengths = Arc::new(Mutex::new(Vec::new()));
    let kept = lengths.clone();
    let rude = Backend::new(move |mut stream| {
        let kept = kept.clone();
        async move {
            let request = read_request(&mut stream).await;
            let body = request.split_once("\r\n\r\n").expect("a body").1;
            kept.lock().expect("kept").push(body.len()); // and closes without a word
        }
    })
    .await;
    let good = Backend::saying("good").await;
    let gateway = gateway(&[&rude], LoadBalancing::RoundRobin).await;
    gateway.route(&[(1, rude.address)]);
    let (status, said) = post(gateway.address(), &large).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(said.expect("body").contains("too large to be kept"));
    assert_eq!(*lengths.lock().expect("kept"), [large.len()]);
    gateway.route(&[(2, good.address)]);
    let (status, said) = post(gateway.address(), &large).await;
    assert_eq!(
        (status, said.expect("body").as_str()),
        (StatusCode::OK, "good")
    );
}

#[tokio::test]
async fn a_slow_client_is_not_the_replicas_fault() {
    let good = Backend::saying("good").await;
    let options = GatewayOptions {
        first_byte: Some(Duration::from_secs(2)),
        ..GatewayOptions::default()
    };
    let any = "127.0.0.1:0".parse().expect("address");
    let gateway = Gateway::bind(any, options).await.expect("bind");
    gateway.route(&[(1, good.address)]);
    let mut client = TcpStream::connect(gateway.address())
        .await
        .expect("connect");
    let head = "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\na";
    client.write_all(head.as_bytes()).await.expect("half");
    while good.seen() == 0 {
        tokio::task::yield_now().await;
    }
    // Longer than the replica may be: no answer can be owed before the request is whole.
    tokio::time::sleep(Duration::from_millis(2200)).await;
    client.write_all(b"b").await.expect("the other half");
    let mut buffer = [0; 1024];
    let read = client.read(&mut buffer).await.expect("answer");
    assert!(buffer[..read].starts_with(b"HTTP/1.1 200 OK"));
}
