//! Bytes that are nearly right: seeded damage to every kind of file ends in rows, rejects or an
//! error that names the file, and never in a panic that reaches the caller, nor without an end.

use std::time::Duration;

use arrow_ipc::CompressionType;
use futures::TryStreamExt as _;
use updraft_dataset::source::{Cursor, Files};
use updraft_dataset::{Source, SourceOptions};
use updraft_store::Store;

use crate::files::{ARRAY, CSV, LINES, arrow_file, arrow_stream, gzip, parquet, zstd};

/// Damaged copies of each file.
const COPIES: u64 = 150;
/// Longer than any copy takes, by far.
const PATIENCE: Duration = Duration::from_secs(60);

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }
}

/// Flips, overwrites, drops, repeats or cuts off a few bytes.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = [0, 0xff, 0x7f, 0x80, b'"', b'{'][random.below(6)],
            2 => {
                let end = bytes.len().min(at + 8);
                bytes[at..end].fill(0xff);
            }
            3 => drop(bytes.remove(at)),
            4 => {
                let end = bytes.len().min(at + random.below(16));
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            _ => bytes.truncate(at.max(1)),
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
}

/// Reads a file to its end or its error; the number of rows in the first case.
async fn read(name: &str, bytes: Vec<u8>) -> Result<usize, updraft_dataset::Error> {
    let store = Store::memory();
    store.put(name, bytes.into()).await.expect("put");
    let source = Files::in_store(&store, "", &SourceOptions::default())
        .await
        .expect("found");
    let batches: Vec<_> = source.open(Cursor::default()).await?.try_collect().await?;
    Ok(batches.into_iter().map(|batch| batch.rows().len()).sum())
}

/// Returns how many copies could be read to their end.
async fn check(name: &str, whole: Vec<u8>) -> u64 {
    let sound = read(name, whole.clone())
        .await
        .expect("the whole file is sound");
    let (mut failed, mut random) = (0, Random(0x5eed ^ whole.len() as u64));
    for copy in 0..COPIES {
        let mut bytes = whole.clone();
        damage(&mut bytes, &mut random);
        let read = tokio::time::timeout(PATIENCE, read(name, bytes)).await;
        match read.unwrap_or_else(|_| panic!("{name}: copy {copy} does not end")) {
            Ok(rows) => assert!(
                rows <= 40 * (sound + 10),
                "{name}: copy {copy} has {rows} rows"
            ),
            Err(err) => {
                assert!(err.to_string().contains(name), "{name}: copy {copy}: {err}");
                failed += 1;
            }
        }
    }
    COPIES - failed
}

#[tokio::test]
async fn damaged_parquet_ends() {
    assert!(check("a.parquet", parquet()).await > 0);
}

#[tokio::test]
async fn damaged_arrow_ends() {
    assert!(check("a.arrow", arrow_stream()).await > 0);
    for compression in [
        None,
        Some(CompressionType::LZ4_FRAME),
        Some(CompressionType::ZSTD),
    ] {
        assert!(check("b.arrow", arrow_file(compression)).await > 0);
    }
}

#[tokio::test]
async fn damaged_json_ends() {
    assert!(check("a.json", ARRAY.into()).await > 0);
    assert!(check("a.jsonl", LINES.into()).await > 0);
}

#[tokio::test]
async fn damaged_text_ends() {
    assert!(check("a.csv", CSV.into()).await > 0);
    assert!(
        check("a.jsonl.gz", gzip(LINES.as_bytes())).await < COPIES,
        "gzip has a checksum"
    );
    assert!(check("a.jsonl.zst", zstd(LINES.as_bytes())).await < COPIES);
}

/// A Parquet file whose schema is nodes with these many children, by Thrift's compact protocol.
fn parquet_of(children: &[i32]) -> Vec<u8> {
    let number = |bytes: &mut Vec<u8>, mut number: u32| {
        while number >= 0x80 {
            bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        bytes.push(number as u8);
    };
    let mut footer = vec![0x15, 2, 0x19, 0xfc];
    number(&mut footer, children.len() as u32);
    for &children in children {
        footer.extend([0x35, 2, 0x18, 1, b'a', 0x15]);
        number(&mut footer, ((children << 1) ^ (children >> 31)) as u32);
        footer.push(0);
    }
    footer.extend([0x16, 0, 0x19, 0x0c, 0]);
    let length = (footer.len() as u32).to_le_bytes();
    [b"PAR1", &footer[..], &length, b"PAR1"].concat()
}

/// Believed, these would end the process and not just the import: by its stack, or by its memory.
#[tokio::test]
async fn a_schema_that_lies_is_damage() {
    for (schema, words) in [
        (vec![1; 300_000], "more than 100 deep"),
        (vec![i32::MAX, 0], "claims 2147483647 children"),
    ] {
        let bytes = parquet_of(&schema);
        let err = read("a.parquet", bytes.clone()).await.expect_err(words);
        assert!(err.to_string().contains("a.parquet is damaged"), "{err}");
        assert!(err.to_string().contains(words), "{err}");

        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.parquet");
        std::fs::write(&path, bytes).expect("written");
        let spec = path.to_str().expect("UTF-8");
        let source = updraft_dataset::resolve_source(spec, &SourceOptions::default())
            .await
            .expect("found");
        let batches = source.open(Cursor::default()).await.expect("a stream");
        let err = batches.try_collect::<Vec<_>>().await.expect_err(words);
        assert!(err.to_string().contains(words), "{err}");
    }
}
