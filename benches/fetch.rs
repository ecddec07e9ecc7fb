//! How fast do weights come from an S3 store into memory, hashed, where a single connection is slow
//! and where it is not?
//!
//! One object of a finished stage on an S3 server of this process. Between the two a relay lets
//! each connection have so many MB/s, as object stores do; without a limit, memory and SHA-256 are
//! what there is to wait for. The baseline is one request for the whole object, hashed at its end.
//!
//! ```sh
//! cargo bench --bench fetch
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::time::Instant;
use updraft::store::conformance::s3::S3Server;
use updraft::store::{
    FinishedStage, ManifestDraft, ObjectEntry, Opened, StageId, Store, open_stage,
};

const OBJECT_BYTES: usize = 256 << 20;
/// What a connection may have, in bytes per second; none is no limit.
const LIMITS: [(&str, Option<f64>); 2] = [("unlimited", None), ("64MBps", Some(64e6))];

fn main() {
    let mut criterion = Criterion::default().configure_from_args().sample_size(10);
    let runtime = Runtime::new().expect("a runtime");
    let server = runtime.block_on(S3Server::start());
    let (stage, object) = runtime.block_on(finished(&server.store("fetch")));
    for (name, limit) in LIMITS {
        let store = runtime.block_on(behind_relay(&server, limit));
        let stage = runtime.block_on(reopened(&store, &stage));
        let mut group = criterion.benchmark_group(format!("fetch/{name}"));
        group.throughput(Throughput::Bytes(OBJECT_BYTES as u64));
        group.measurement_time(Duration::from_secs(10));
        group.bench_function("stage", |bench| {
            bench.iter(|| runtime.block_on(stage.read(&object)).expect("read"));
        });
        group.bench_function("one_request", |bench| {
            let path = stage.path(&object.path);
            bench.iter(|| {
                let bytes = runtime
                    .block_on(store.get(&path))
                    .expect("read")
                    .expect("there");
                assert_eq!(hex(&bytes), object.sha256);
                bytes
            });
        });
        group.finish();
    }
    criterion.final_summary();
}

fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A stage of one object.
async fn finished(store: &Store) -> (FinishedStage, ObjectEntry) {
    let id = StageId::models("fetch").expect("a name");
    let Opened::Open(writer) = open_stage(store, &id, "fetch", &()).await.expect("opened") else {
        panic!("the server is new");
    };
    let bytes: Vec<u8> = (0..=250_u8).cycle().take(OBJECT_BYTES).collect();
    let object = writer
        .put_object("model.safetensors", bytes.into())
        .await
        .expect("put");
    let draft = ManifestDraft {
        objects: vec![object.clone()],
        ..ManifestDraft::default()
    };
    (writer.commit(draft).await.expect("committed"), object)
}

/// The same stage, read through another store.
async fn reopened(store: &Store, stage: &FinishedStage) -> FinishedStage {
    let found = updraft::store::current(store, stage.id())
        .await
        .expect("read");
    found.expect("finished")
}

/// A store on the server whose connections have this limit.
async fn behind_relay(server: &S3Server, limit: Option<f64>) -> Store {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let relay = listener.local_addr().expect("bound");
    let mut env = server
        .environment()
        .map(|(name, value)| (name.to_owned(), value));
    let endpoint = std::mem::replace(&mut env[0].1, format!("http://{relay}"));
    let server: SocketAddr = endpoint
        .trim_start_matches("http://")
        .parse()
        .expect("an address");
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(relayed(client, server, limit));
        }
    });
    Store::open_with("s3://bucket/fetch", env).expect("the settings fit")
}

/// Passes bytes on, to the client no faster than the limit.
async fn relayed(client: TcpStream, server: SocketAddr, limit: Option<f64>) {
    let server = TcpStream::connect(server)
        .await
        .expect("the server is there");
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
    let mut buffer = vec![0; 256 << 10];
    let mut free = Instant::now();
    while let Ok(read @ 1..) = from_server.read(&mut buffer).await {
        if let Some(limit) = limit {
            tokio::time::sleep_until(free).await;
            free = free.max(Instant::now()) + Duration::from_secs_f64(read as f64 / limit);
        }
        if to_client.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
