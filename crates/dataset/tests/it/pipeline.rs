//! Rows in, examples out: nothing lost, nothing twice, nothing written again.

use futures::TryStreamExt as _;
use updraft_chat::{Conversation, Message};
use updraft_dataset::{PretokenizeOptions, Reader, ReaderOptions, Shuffle};
use updraft_store::Store;

use crate::world::{chat, import_into, options, pretokenize_into, source};

/// What row `i` must become.
fn expected(i: usize) -> updraft_chat::Example {
    let answer = "word ".repeat(i % 7 + 1) + &i.to_string();
    let conversation = Conversation::new([
        Message::user(format!("question {i}")),
        Message::assistant(answer),
    ]);
    chat().example(&conversation).expect("an example")
}

#[tokio::test]
async fn what_is_written_is_what_is_read() {
    let store = Store::memory();
    let standardized = import_into(&store, &source(95), &options())
        .await
        .expect("import");
    let manifest = standardized.manifest().await.expect("manifest");
    assert_eq!(manifest.objects.len(), 10);
    assert_eq!(
        (
            manifest.counts["rows"],
            manifest.attributes["format"].as_str()
        ),
        (95, Some("sharegpt"))
    );

    let ready = pretokenize_into(&store, &standardized, &PretokenizeOptions::default())
        .await
        .expect("pretokenize");
    let stored = ReaderOptions {
        shuffle: Shuffle::Off,
        ..ReaderOptions::default()
    };
    let reader = Reader::open(&ready, stored).await.expect("reader");
    let examples: Vec<_> = reader.read(0, 0).try_collect().await.expect("read");
    assert_eq!(examples, (0..95).map(expected).collect::<Vec<_>>());

    let sizes: Vec<_> = examples
        .iter()
        .map(|example| (example.len() as u32, example.trained_tokens()))
        .collect();
    assert!(
        sizes.iter().copied().eq(reader
            .lengths()
            .iter()
            .copied()
            .zip(reader.trained_tokens().iter().copied()))
    );
    let counts = ready.counts();
    assert_eq!(
        counts["tokens"],
        sizes.iter().map(|size| u64::from(size.0)).sum::<u64>()
    );
    assert_eq!(
        counts["trained_tokens"],
        sizes.iter().map(|size| u64::from(size.1)).sum::<u64>()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn stages_run_as_tasks_of_their_own() {
    let run = tokio::spawn(async {
        let store = Store::memory();
        let standardized = import_into(&store, &source(30), &options()).await?;
        pretokenize_into(&store, &standardized, &PretokenizeOptions::default()).await
    });
    let ready = run.await.expect("no panic").expect("pretokenize");
    assert_eq!(ready.counts()["rows"], 30);
}
