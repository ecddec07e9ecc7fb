//! Paged decoding: the same numbers as a full pass, and the same bits in any company.

use candle_core::DType;
use updraft_model::{Adapter, Architecture, Batch, BlockTables, Decoder, KvPages, LoraConfig};

use crate::world::{World, documents};

pub(crate) const BLOCK_SIZE: usize = 4;

/// Pages of a sequence, scattered so that no order is taken for granted.
fn table(sequence: usize, len: usize) -> Vec<u32> {
    (0..len.div_ceil(BLOCK_SIZE))
        .map(|block| ((block * 7 + sequence * 3 + 1) * 5 % 64) as u32)
        .collect()
}

pub(crate) fn step(sequences: &[(usize, &[u32], usize, Option<usize>)]) -> Batch {
    let mut batch = Batch::default();
    let mut tables = Vec::new();
    for &(sequence, ids, start, adapter) in sequences {
        let rows = batch.push(ids, start as u32);
        batch.logit_rows.extend(rows);
        batch.adapters.push(adapter);
        tables.push(table(sequence, start + ids.len()));
    }
    batch.kv = Some(BlockTables {
        block_size: BLOCK_SIZE,
        tables,
    });
    batch
}

pub(crate) fn run(
    decoder: &Decoder,
    adapters: &[&Adapter],
    pages: &mut KvPages,
    batch: &Batch,
) -> Vec<Vec<f32>> {
    let hidden = decoder
        .forward(batch, adapters, Some(pages))
        .expect("a sound batch");
    decoder
        .logits(&hidden)
        .and_then(|logits| Ok(logits.to_tensor()?.to_vec2()?))
        .expect("logits")
}

fn pages(decoder: &Decoder) -> KvPages {
    decoder.new_pages(64, BLOCK_SIZE).expect("64 pages")
}

#[test]
fn cached_decoding_equals_a_full_pass() {
    for architecture in [
        Architecture::Llama,
        Architecture::Qwen2,
        Architecture::Qwen3,
    ] {
        let world = World::new(architecture);
        let (decoder, adapter) = (
            world.decoder(DType::F32, 1),
            world.adapter(&LoraConfig::default(), 2),
        );
        let ids = &documents(&[23], 8)[0].0;
        let mut full = Batch::packed([&ids[..]]);
        full.logit_rows = (0..23).collect();
        full.adapters = vec![Some(0)];
        let hidden = decoder
            .forward(&full, &[&adapter], None)
            .expect("a sound batch");
        let full: Vec<Vec<f32>> = decoder
            .logits(&hidden)
            .and_then(|logits| Ok(logits.to_tensor()?.to_vec2()?))
            .expect("logits");
        let mut pages = pages(&decoder);
        let mut cached = run(
            &decoder,
            &[&adapter],
            &mut pages,
            &step(&[(0, &ids[..10], 0, Some(0))]),
        );
        for position in 10..ids.len() {
            let batch = step(&[(0, &ids[position..=position], position, Some(0))]);
            cached.extend(run(&decoder, &[&adapter], &mut pages, &batch));
        }
        let pairs = full.iter().flatten().zip(cached.iter().flatten());
        let error = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 1e-4, "{architecture:?}: {error:e}");
    }
}

#[test]
fn weights_kept_in_bf16_give_the_bits_of_widened_ones() {
    for architecture in [Architecture::Llama, Architecture::Qwen2] {
        let world = World::new_bf16(architecture);
        let adapter = world.adapter(&LoraConfig::default(), 2);
        let ids = &documents(&[23], 8)[0].0;
        let logits = [DType::F32, DType::BF16].map(|dtype| {
            let decoder = world.decoder(dtype, 2);
            assert_eq!(decoder.dtype(), DType::F32);
            let mut pages = pages(&decoder);
            let batches = [
                step(&[(0, &ids[..10], 0, Some(0))]),
                step(&[(0, &ids[10..], 10, Some(0))]),
            ];
            batches.map(|batch| run(&decoder, &[&adapter], &mut pages, &batch))
        });
        assert_eq!(logits[0], logits[1], "{architecture:?}");
    }
}

#[test]
fn bits_do_not_depend_on_company_or_chunks() {
    let world = World::new(Architecture::Qwen3);
    let (first, second) = (
        world.adapter(&LoraConfig::default(), 2),
        world.adapter(&LoraConfig::default(), 3),
    );
    let adapters = [&first, &second];
    let documents = documents(&[19, 11, 30], 8);
    let choice = [Some(1), None, Some(0)];

    let decoder = world.decoder(DType::F32, 1);
    let alone: Vec<Vec<Vec<f32>>> = documents
        .iter()
        .enumerate()
        .map(|(s, (ids, _))| {
            run(
                &decoder,
                &adapters,
                &mut pages(&decoder),
                &step(&[(s, ids, 0, choice[s])]),
            )
        })
        .collect();

    // All three together in chunks of 1, 3, 4 and what is left, on two threads.
    let decoder = world.decoder(DType::F32, 2);
    let (mut memory, mut together) = (pages(&decoder), vec![Vec::new(); 3]);
    for (start, end) in [(0, 1), (1, 4), (4, 8), (8, 30)] {
        let chunks: Vec<_> = documents
            .iter()
            .enumerate()
            .filter(|(_, (ids, _))| start < ids.len())
            .map(|(s, (ids, _))| (s, &ids[start..end.min(ids.len())], start, choice[s]))
            .collect();
        let mut rows = run(&decoder, &adapters, &mut memory, &step(&chunks)).into_iter();
        for (s, ids, ..) in chunks {
            together[s].extend(rows.by_ref().take(ids.len()));
        }
    }
    assert!(alone == together, "a row's bits changed with its company");
}

#[test]
fn a_chunk_in_the_middle_of_a_prompt_asks_for_no_logits() {
    let world = World::new(Architecture::Llama);
    let decoder = world.decoder(DType::F32, 1);
    let mut batch = step(&[(0, &[1, 2, 3], 0, None)]);
    batch.logit_rows.clear();
    assert!(run(&decoder, &[], &mut pages(&decoder), &batch).is_empty());
}

#[test]
fn a_batch_that_does_not_fit_its_pages_is_an_error() {
    let world = World::new(Architecture::Llama);
    let decoder = world.decoder(DType::F32, 1);
    let refused = |edit: fn(&mut Batch), expected: &str| {
        let mut batch = step(&[(0, &[1, 2, 3, 4, 5], 0, None)]);
        edit(&mut batch);
        let error = decoder
            .forward(&batch, &[], Some(&mut pages(&decoder)))
            .expect_err("must be refused")
            .to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(|batch| batch.kv = None, "block tables need pages");
    refused(
        |batch| batch.kv.as_mut().expect("paged").block_size = 8,
        "block tables of 8 tokens for pages of 4",
    );
    refused(
        |batch| batch.kv.as_mut().expect("paged").tables[0][1] = 64,
        "names page 64 of 64",
    );
    refused(
        |batch| batch.kv.as_mut().expect("paged").tables[0].truncate(1),
        "has only 1 pages",
    );
    refused(
        |batch| batch.kv.as_mut().expect("paged").tables.clear(),
        "0 block tables for 1 sequences",
    );
    refused(|batch| batch.adapters = vec![Some(0)], "adapter 0 of 0");
    refused(|batch| batch.positions[4] = 9, "do not rise by one");
    refused(
        |batch| batch.positions = (252..257).collect(),
        "the model ends at 256",
    );
    refused(|batch| batch.logit_rows.push(5), "logit row 5 is beyond");
    refused(|batch| batch.seq_starts = vec![0, 0, 5], "has no tokens");
}
