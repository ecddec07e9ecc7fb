//! A stage of several shards, killed, failed and doubled at every store call.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::json;
use updraft_store::conformance::survives_every_fault;
use updraft_store::{
    FinishedStage, JournalEntry, ManifestDraft, Opened, Reject, Result, StageId, Store, current,
    open_stage, sha256_hex,
};

pub(crate) const SHARDS: u32 = 4;

/// What a well-behaved stage looks like: shards named by content, journalled one by one.
pub(crate) async fn toy_stage(store: Store) -> Result<FinishedStage> {
    let id = StageId::standardized("owner/toy")?;
    let stage = match open_stage(&store, &id, "toy", &json!({"shards": SHARDS})).await? {
        Opened::Finished(finished) => return Ok(finished),
        Opened::Open(stage) => stage,
    };
    let mut journal = stage.journal().await?;
    let mut draft = ManifestDraft::default();
    for index in 0..SHARDS {
        let entry = match journal.remove(&index) {
            Some(entry) => entry,
            None => {
                let rows = format!("rows of shard {index}\n").repeat(10);
                let name = format!(
                    "shard-{index:05}-{}.txt",
                    &sha256_hex(rows.as_bytes())[..16]
                );
                let object = stage.put_object(&name, rows.into()).await?.with_rows(10);
                let entry = JournalEntry {
                    objects: vec![object],
                    counts: BTreeMap::from([("rows".to_owned(), 10)]),
                    rejects: vec![Reject {
                        source: "toy".to_owned(),
                        row: u64::from(index) * 11,
                        reason: "every eleventh".to_owned(),
                    }],
                    cursor: json!(index + 1),
                    ..JournalEntry::default()
                };
                stage.put_journal(index, &entry).await?
            }
        };
        draft.objects.extend(entry.objects);
        draft.rejects.extend(entry.rejects);
        for (name, count) in entry.counts {
            *draft.counts.entry(name).or_default() += count;
        }
    }
    stage.commit(draft).await
}

/// One object too large for a single PUT, under a name that does not tell its content.
pub(crate) async fn large_stage(store: Store) -> Result<FinishedStage> {
    let id = StageId::models("toy")?;
    let stage = match open_stage(&store, &id, "import-model", &json!(1)).await? {
        Opened::Finished(finished) => return Ok(finished),
        Opened::Open(stage) => stage,
    };
    let mut writer = stage.object_writer("model.safetensors")?;
    for chunk in 0..17u8 {
        writer.write(Bytes::from(vec![chunk; 1 << 20])).await?;
    }
    let object = writer.finish().await?;
    stage
        .commit(ManifestDraft {
            objects: vec![object],
            ..ManifestDraft::default()
        })
        .await
}

#[tokio::test(start_paused = true)]
async fn shards_end_the_same_whatever_happens_at_any_call() {
    let calls = survives_every_fault(async || Store::memory(), toy_stage).await;
    // current, manifest, journal list, 4 × (shard, entry), list, manifest, current.
    assert_eq!(calls, 14);
}

#[tokio::test(start_paused = true)]
async fn a_large_object_ends_the_same_whatever_happens_at_any_call() {
    survives_every_fault(async || Store::memory(), large_stage).await;
}

#[tokio::test(start_paused = true)]
async fn a_folder_ends_the_same_whatever_happens_at_any_call() {
    survives_every_fault(async || crate::folder_store(), toy_stage).await;
}

#[tokio::test]
async fn several_processes_at_once_make_one_result() {
    let store = Store::memory();
    let runs = (0..4).map(|_| tokio::spawn(toy_stage(store.clone())));
    let mut manifests = Vec::new();
    for run in runs {
        let finished = run.await.expect("no panic").expect("finishes");
        manifests.push(finished.manifest().await.expect("manifest"));
    }
    assert!(manifests.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(manifests[0].counts["rows"], 40);
    assert_eq!(manifests[0].rejects.len(), 4);
}

#[tokio::test]
async fn over_a_foreign_s3_it_survives_every_fault_too() {
    if crate::s3_store("kill").await.is_none() {
        return;
    }
    let fresh = async || crate::s3_store("kill").await.expect("asked above");
    survives_every_fault(fresh, toy_stage).await;
}

/// `a/b` with `c` and `a` with `b/c` make one path: it stays the first pair's.
#[tokio::test]
async fn a_folder_belongs_to_one_pair_of_names() -> Result<()> {
    let store = Store::memory();
    let commit = async |id: &StageId, input: u32| -> Result<FinishedStage> {
        match open_stage(&store, id, "toy", &input).await? {
            Opened::Open(stage) => stage.commit(ManifestDraft::default()).await,
            Opened::Finished(finished) => Ok(finished),
        }
    };
    let first = StageId::done("a/b", "c")?;
    let finished = commit(&first, 1).await?;
    let second = StageId::done("a", "b/c")?;
    let refused = commit(&second, 2).await.expect_err("another's folder");
    assert_eq!(
        refused.to_string(),
        "memory:/done/a/b/c is already that of a dataset named 'c'; give this dataset another name"
    );
    // By its path, as a person types it, it is found whoever made it; the first pair goes on.
    let typed: StageId = "done/a/b/c".parse()?;
    let found = current(&store, &typed).await?.expect("finished");
    assert_eq!(found.key(), finished.key());
    assert!(!commit(&first, 3).await?.reused());
    Ok(())
}
