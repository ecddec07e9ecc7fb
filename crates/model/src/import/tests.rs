use std::path::Path;

use tempfile::TempDir;
use updraft_store::faults::{self, Fault};
use updraft_store::{NoProgress, Store};

use super::*;
use crate::config::Architecture;
use crate::model_files::load_model_files;
use crate::tiny;

/// A model folder with a few files that are none of our business.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let config = tiny::config(Architecture::Qwen2);
    for (name, bytes) in [
        (CONFIG_FILE, tiny::config_json(Architecture::Qwen2)),
        (SINGLE_FILE, tiny::safetensors(&config, 1)),
        (TOKENIZER_FILE, b"{}".to_vec()),
        ("chat_template.jinja", b"{{ messages }}".to_vec()),
        ("pytorch_model.bin", b"pickle".to_vec()),
        ("consolidated.safetensors", b"a second copy".to_vec()),
        ("README.md", b"# Tiny".to_vec()),
    ] {
        std::fs::write(folder.path().join(name), bytes).expect("written");
    }
    folder
}

async fn import(store: &Store, folder: &Path) -> Result<FinishedStage> {
    let source = folder.to_str().expect("a temporary folder's name is UTF-8");
    import_model(store, "tiny", source, &NoProgress, &CancelToken::new()).await
}

#[tokio::test]
async fn a_folder_arrives_whole_and_a_second_time_costs_one_get() {
    let (folder, store) = (folder(), Store::memory());
    let stage = import(&store, folder.path()).await.expect("a sound folder");
    let manifest = stage.manifest().await.expect("committed");
    let names: Vec<_> = manifest
        .objects
        .iter()
        .map(|object| object.path.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "chat_template.jinja",
            CONFIG_FILE,
            SINGLE_FILE,
            TOKENIZER_FILE
        ]
    );
    assert_eq!(
        manifest.counts["parameters"],
        tiny::config(Architecture::Qwen2).num_parameters()
    );

    let (counted, calls) = faults::count(&store);
    let again = import(&counted, folder.path())
        .await
        .expect("finished before");
    assert_eq!(again.key(), stage.key());
    assert_eq!((calls.reads(), calls.writes()), (1, 0));

    let files = load_model_files(&stage, "").await.expect("a model");
    assert_eq!(files.config, tiny::config(Architecture::Qwen2));
    assert_eq!(&files.files["chat_template.jinja"][..], b"{{ messages }}");
    let name = "model.norm.weight";
    let original = tiny::weights(&files.config, 1);
    assert_eq!(
        files.weights.bytes(name).expect("there"),
        original.bytes(name).expect("there")
    );
    let missing = load_model_files(&stage, "fused")
        .await
        .expect_err("no such folder")
        .to_string();
    assert!(missing.contains("has no config.json"), "{missing}");
}

#[tokio::test]
async fn a_local_store_is_mapped_and_a_plain_folder_opens_alike() {
    let (folder, place) = (folder(), tempfile::tempdir().expect("a folder"));
    let store = Store::open(place.path().to_str().expect("UTF-8")).expect("a local store");
    let stage = import(&store, folder.path()).await.expect("a sound folder");
    let (stored, plain) = (
        load_model_files(&stage, "").await,
        crate::ModelFiles::from_dir(folder.path()),
    );
    let (stored, plain) = (stored.expect("a model"), plain.expect("a model"));
    assert_eq!(stored.files, plain.files);
    assert!(stored.weights.names().eq(plain.weights.names()));
    let shard = place.path().join(stage.path(SINGLE_FILE));
    std::fs::write(&shard, b"cut").expect("written");
    let error = load_model_files(&stage, "")
        .await
        .expect_err("damaged")
        .to_string();
    assert!(error.contains("3 bytes where the manifest says"), "{error}");
}

#[tokio::test]
async fn a_run_killed_at_any_call_ends_the_same() {
    let (folder, whole) = (folder(), Store::memory());
    let expected = import(&whole, folder.path())
        .await
        .expect("never killed")
        .manifest()
        .await
        .expect("committed");
    for fault in [Fault::KillBefore, Fault::KillAfter, Fault::LoseAnswer] {
        for at in 1.. {
            let store = Store::memory();
            let (faulty, injected) = faults::inject(&store, fault, at);
            let first = import(&faulty, folder.path()).await;
            if !injected.struck() {
                break;
            }
            let stage = match first {
                Ok(stage) => stage,
                Err(_) => import(&store, folder.path())
                    .await
                    .expect("the next run finishes"),
            };
            assert_eq!(
                stage.manifest().await.ok().as_ref(),
                Some(&expected),
                "{fault:?} at call {at}"
            );
        }
    }
}

#[tokio::test]
async fn what_is_missing_or_unsound_is_refused_before_anything_is_written() {
    for (file, content, expected) in [
        (
            TOKENIZER_FILE,
            None,
            "has no tokenizer.json; save the tokenizer beside the model",
        ),
        (CONFIG_FILE, None, "has no config.json; give a model folder"),
        (
            SINGLE_FILE,
            None,
            "has no model.safetensors; point to a model folder with safetensors weights",
        ),
        (
            CONFIG_FILE,
            Some(tiny::config_json(Architecture::Qwen3)),
            "q_proj.weight has shape",
        ),
        (
            CONFIG_FILE,
            Some(b"{\"model_type\": \"gpt2\"}".to_vec()),
            "config.json: line 1 column 22: missing field",
        ),
        (
            SINGLE_FILE,
            Some(b"\x80\x04pickled".to_vec()),
            "model.safetensors is not a sound safetensors file",
        ),
        (
            SINGLE_FILE,
            Some(tiny::safetensors(&tiny::config(Architecture::Llama), 1)),
            "q_proj.bias is in none of the 1",
        ),
    ] {
        let (folder, store) = (folder(), Store::memory());
        let path = folder.path().join(file);
        match content {
            Some(content) => std::fs::write(path, content),
            None => std::fs::remove_file(path),
        }
        .expect("changed");
        let error = import(&store, folder.path())
            .await
            .expect_err(expected)
            .to_string();
        assert!(error.contains(expected), "{error}");
        assert!(store.list("").await.expect("memory answers").is_empty());
    }
    let store = Store::memory();
    let nowhere = import(&store, Path::new("/nowhere/at/all"))
        .await
        .expect_err("no folder")
        .to_string();
    assert!(
        nowhere.starts_with("/nowhere/at/all is neither a folder nor a Hub id"),
        "{nowhere}"
    );
}

/// Seeded damage to a weight file's header, its length included: refused with a reason, or
/// harmless, and never a panic nor a stage that looks finished.
#[tokio::test]
async fn damaged_headers_are_refused_or_harmless() {
    let folder = folder();
    let path = folder.path().join(SINGLE_FILE);
    let whole = std::fs::read(&path).expect("a file");
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().expect("eight")) as usize;
    let mut state = 0x5eed_u64;
    let mut below = |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % limit as u64) as usize
    };
    let mut refused = 0;
    for _ in 0..COPIES {
        let mut bytes = whole.clone();
        for _ in 0..=below(3) {
            let at = below(header.min(bytes.len()));
            match below(4) {
                0 => bytes[at] ^= 1 << below(8),
                1 => bytes[at] = [0, 0xff, b'"', b'9', b'-', b'}'][below(6)],
                2 => drop(bytes.remove(at)),
                _ => bytes.truncate(at.max(1)),
            }
        }
        std::fs::write(&path, bytes).expect("written");
        let store = Store::memory();
        if let Err(error) = import(&store, folder.path()).await {
            assert!(!error.to_string().is_empty());
            assert!(store.list("").await.expect("memory answers").is_empty());
            refused += 1;
        }
    }
    assert!(refused > COPIES / 4, "{refused} of {COPIES} refused");
}

const COPIES: usize = 200;

#[tokio::test]
async fn a_cancelled_import_goes_on_later() {
    let (folder, store, cancel) = (folder(), Store::memory(), CancelToken::new());
    cancel.cancel();
    let source = folder.path().to_str().expect("UTF-8");
    let stopped = import_model(&store, "tiny", source, &NoProgress, &cancel).await;
    assert!(matches!(stopped, Err(Error::Cancelled)));
    import(&store, folder.path()).await.expect("goes on");
}

#[cfg(feature = "hub")]
mod hub;
