//! Any workers, interrupted anywhere, resumed by any others: each row once, in one order.

use futures::TryStreamExt as _;
use updraft_chat::Example;
use updraft_dataset::{PretokenizeOptions, Reader, ReaderOptions, Shuffle, Worker};
use updraft_store::{FinishedStage, Store};

use crate::world::{import_into, options, pretokenize_into, source};

const ROWS: u64 = 95;

async fn ready() -> FinishedStage {
    let store = Store::memory();
    let standardized = import_into(&store, &source(ROWS as usize), &options())
        .await
        .expect("import");
    pretokenize_into(&store, &standardized, &PretokenizeOptions::default())
        .await
        .expect("pretokenize")
}

/// Windows of about three of the ten shards.
fn shuffled() -> ReaderOptions {
    ReaderOptions {
        seed: 3,
        shuffle: Shuffle::Windows { tokens: 3_000 },
    }
}

async fn read(reader: &Reader, epoch: u64, from: u64) -> Vec<Example> {
    reader.read(epoch, from).try_collect().await.expect("read")
}

#[tokio::test]
async fn every_place_resumes_to_the_exact_next_row() {
    let stage = ready().await;
    let reader = Reader::open(&stage, shuffled()).await.expect("reader");
    for epoch in [0, 1] {
        let whole = read(&reader, epoch, 0).await;
        for place in 0..=ROWS {
            // Twice in a row, each time by a new process.
            let resumed = Reader::open(&stage, shuffled()).await.expect("reader");
            assert_eq!(
                read(&resumed, epoch, place).await,
                whole[place as usize..],
                "from {place}"
            );
        }
    }
}

#[tokio::test]
async fn the_order_is_the_one_row_tells_and_has_each_row_once() {
    let stage = ready().await;
    let reader = Reader::open(&stage, shuffled()).await.expect("reader");
    let stored = Reader::open(
        &stage,
        ReaderOptions {
            shuffle: Shuffle::Off,
            ..shuffled()
        },
    )
    .await
    .expect("reader");
    let stored = read(&stored, 0, 0).await;
    let mut orders = Vec::new();
    for epoch in 0..3 {
        let order: Vec<u64> = (0..reader.num_rows())
            .map(|place| reader.row(epoch, place))
            .collect();
        let expected: Vec<Example> = order
            .iter()
            .map(|&row| stored[row as usize].clone())
            .collect();
        assert_eq!(read(&reader, epoch, 0).await, expected);
        let mut rows = order.clone();
        rows.sort_unstable();
        assert!(rows.into_iter().eq(0..ROWS));
        orders.push(order);
    }
    assert!(
        orders[0] != orders[1] && orders[1] != orders[2] && orders[0].iter().copied().ne(0..ROWS)
    );
}

/// Any number of workers, stopped anywhere, and any number after them.
#[tokio::test]
async fn any_workers_take_over_from_any_others() {
    let stage = ready().await;
    let reader = Reader::open(&stage, shuffled()).await.expect("reader");
    let whole = read(&reader, 0, 0).await;
    for stop in 0..=ROWS {
        let resumed = read(&reader, 0, stop).await;
        for (before, after) in (1..=8).flat_map(|before| (1..=8).map(move |after| (before, after)))
        {
            let mut taken: Vec<Option<&Example>> = vec![None; ROWS as usize];
            let runs = [(before, 0..stop, &whole), (after, stop..ROWS, &resumed)];
            for (workers, places, examples) in runs {
                for index in 0..workers {
                    let worker = Worker::new(index, workers).expect("valid");
                    let mine = places
                        .clone()
                        .zip(examples)
                        .filter(|(place, _)| worker.takes(*place));
                    for (place, example) in mine {
                        let twice = taken[place as usize].replace(example);
                        assert!(twice.is_none(), "place {place} twice");
                    }
                }
            }
            assert!(
                taken.into_iter().eq(whole.iter().map(Some)),
                "{before} workers, then {after} from {stop}"
            );
        }
    }
}

#[tokio::test]
async fn another_seed_or_option_is_another_id() {
    let stage = ready().await;
    let id = async |options| {
        Reader::open(&stage, options)
            .await
            .expect("reader")
            .id()
            .to_owned()
    };
    let one = id(shuffled()).await;
    assert_eq!(one, id(shuffled()).await);
    assert_ne!(
        one,
        id(ReaderOptions {
            seed: 4,
            ..shuffled()
        })
        .await
    );
    assert_ne!(
        one,
        id(ReaderOptions {
            shuffle: Shuffle::Off,
            ..shuffled()
        })
        .await
    );
}

#[tokio::test]
async fn a_dropped_stream_stops_and_a_damaged_shard_is_named() {
    let stage = ready().await;
    let reader = Reader::open(&stage, shuffled()).await.expect("reader");
    let mut stream = reader.read(0, 0);
    stream.try_next().await.expect("one").expect("example");
    drop(stream);
    let shard = &stage.manifest().await.expect("manifest").objects[4];
    stage
        .store()
        .put(&stage.path(&shard.path), bytes::Bytes::from_static(b"PAR1"))
        .await
        .expect("put");
    let err = Reader::open(&stage, shuffled()).await.expect_err("damaged");
    assert!(err.to_string().contains(&shard.path), "{err}");
}
