use std::collections::HashMap;

use safetensors::tensor::TensorView;

use super::*;

fn file(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Bytes {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (
            *name,
            TensorView::new(*dtype, shape.to_vec(), bytes).expect("a test's own tensor"),
        )
    });
    safetensors::serialize(views, None::<HashMap<String, String>>)
        .expect("sound")
        .into()
}

fn single(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Weights {
    Weights::from_files(vec![(SINGLE_FILE.to_owned(), file(tensors))]).expect("sound")
}

fn index(map: &[(&str, &str)]) -> (String, Bytes) {
    let map: BTreeMap<_, _> = map.iter().copied().collect();
    let json = serde_json::json!({ "metadata": { "total_size": 8 }, "weight_map": map });
    (
        INDEX_FILE.to_owned(),
        serde_json::to_vec(&json).expect("JSON").into(),
    )
}

#[test]
fn every_float_type_widens_exactly() {
    let weights = single(&[
        ("f32", Dtype::F32, &[1], &0.1_f32.to_le_bytes()),
        ("f64", Dtype::F64, &[1], &0.1_f64.to_le_bytes()),
        (
            "f16",
            Dtype::F16,
            &[1],
            &half::f16::from_f32(0.1).to_le_bytes(),
        ),
        (
            "bf16",
            Dtype::BF16,
            &[1],
            &half::bf16::from_f32(0.1).to_le_bytes(),
        ),
        ("i64", Dtype::I64, &[1], &1_i64.to_le_bytes()),
    ]);
    let number = |name: &str| {
        weights
            .tensor(name)
            .and_then(|t| Ok(t.to_vec1::<f32>()?[0]))
    };
    assert_eq!(number("f32").expect("f32"), 0.1);
    assert_eq!(number("f64").expect("f64"), 0.1);
    assert_eq!(
        number("f16").expect("f16"),
        half::f16::from_f32(0.1).to_f32()
    );
    assert_eq!(
        number("bf16").expect("bf16"),
        half::bf16::from_f32(0.1).to_f32()
    );
    let exact = weights
        .load("f64", &[1], DType::F64, &Device::Cpu)
        .and_then(|t| Ok(t.to_vec1::<f64>()?[0]));
    assert_eq!(exact.expect("f64"), 0.1_f64);
    let refused = weights.tensor("i64").expect_err("not a weight").to_string();
    assert_eq!(
        refused,
        "tensor i64 is stored as I64; convert the model to f32, f16 or bf16"
    );
}

#[test]
fn a_missing_or_misshapen_tensor_is_named() {
    let weights = single(&[("w", Dtype::F32, &[1, 2], &[0; 8])]);
    let missing = weights.tensor("v").expect_err("missing").to_string();
    assert!(
        missing.starts_with("tensor v is in none of the 1 weight file(s)"),
        "{missing}"
    );
    let shape = weights
        .load("w", &[2, 1], DType::F32, &Device::Cpu)
        .expect_err("misshapen")
        .to_string();
    assert!(
        shape.starts_with("tensor w has shape [1, 2] where the model needs [2, 1]"),
        "{shape}"
    );
}

#[test]
fn hostile_and_truncated_files_are_refused() {
    let good = file(&[("w", Dtype::F32, &[2], &[0; 8])]);
    let header = |json: &str, data: usize| {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        Bytes::from(bytes)
    };
    for (what, bytes) in [
        ("empty", Bytes::new()),
        ("truncated", good.slice(..good.len() - 1)),
        (
            "longer than its header says",
            [&good[..], &[0]].concat().into(),
        ),
        (
            "a header longer than the file",
            Bytes::from_static(&[255; 16]),
        ),
        ("no JSON", header("pickle", 0)),
        (
            "offsets beyond the end",
            header(
                r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,800]}}"#,
                8,
            ),
        ),
        (
            "shape and bytes differ",
            header(
                r#"{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}"#,
                8,
            ),
        ),
        (
            "a shape that overflows",
            header(
                r#"{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
                0,
            ),
        ),
        (
            "overlapping tensors",
            header(
                r#"{"v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
                8,
            ),
        ),
    ] {
        let error = Weights::from_files(vec![(SINGLE_FILE.to_owned(), bytes)])
            .expect_err(what)
            .to_string();
        assert!(
            error.starts_with("model.safetensors is not a sound safetensors file: "),
            "{what}: {error}"
        );
    }
}

#[test]
fn shards_are_what_the_index_says() {
    let one = (
        "a.safetensors".to_owned(),
        file(&[("v", Dtype::F32, &[1], &1_f32.to_le_bytes())]),
    );
    let two = (
        "b.safetensors".to_owned(),
        file(&[("w", Dtype::F32, &[1], &2_f32.to_le_bytes())]),
    );
    let map = index(&[("w", "b.safetensors"), ("v", "a.safetensors")]);
    let weights = Weights::from_files(vec![two.clone(), map, one.clone()]).expect("complete");
    assert!(weights.names().eq(["v", "w"]));
    assert!(
        weights
            .shards()
            .iter()
            .map(|shard| shard.name.as_str())
            .eq(["a.safetensors", "b.safetensors"])
    );

    let incomplete = Weights::from_files(vec![one.clone(), index(&[("w", "b.safetensors")])]);
    assert!(
        incomplete
            .expect_err("a shard is missing")
            .to_string()
            .starts_with("tensor w is in none of the 0")
    );
    let elsewhere = Weights::from_files(vec![one.clone(), index(&[("v", "../a.safetensors")])]);
    assert!(
        elsewhere
            .expect_err("leaves the folder")
            .to_string()
            .contains("is not a weight file's name")
    );
    let twice = vec![
        one.clone(),
        ("c.safetensors".to_owned(), one.1),
        index(&[("v", "a.safetensors"), ("w", "c.safetensors")]),
    ];
    assert!(
        Weights::from_files(twice)
            .expect_err("twice")
            .to_string()
            .contains("tensor v is also in a.safetensors")
    );
}

#[test]
fn a_folder_opens_as_its_files_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = Weights::from_dir(folder.path())
        .expect_err("nothing there")
        .to_string();
    assert!(missing.contains("has no model.safetensors"), "{missing}");
    std::fs::write(
        folder.path().join("a.safetensors"),
        file(&[("v", Dtype::F32, &[1], &1_f32.to_le_bytes())]),
    )
    .expect("written");
    let (name, bytes) = index(&[("v", "a.safetensors")]);
    std::fs::write(folder.path().join(name), bytes).expect("written");
    let weights = Weights::from_dir(folder.path()).expect("sharded");
    assert_eq!(weights.shape("v").expect("there"), [1]);
    std::fs::write(folder.path().join("a.safetensors"), b"").expect("written");
    assert!(
        Weights::from_dir(folder.path())
            .expect_err("empty")
            .to_string()
            .starts_with("a.safetensors is not a sound")
    );
}
