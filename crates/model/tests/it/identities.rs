//! Ways of computing the same thing that must agree, most of them to the bit.

use candle_core::{DType, Device};
use updraft_model::{
    Activations, Adapter, Architecture, Batch, Decoder, Gradients, LoraConfig, Part, SINGLE_FILE,
    Threads, Weights, merge,
};

use crate::world::{World, documents, one_part, uneven_lora};

fn gradients(
    decoder: &Decoder,
    adapter: &Adapter,
    parts: &[Part],
    activations: Activations,
) -> (f64, Vec<f64>) {
    let mut gradients = Gradients::zeros(adapter).expect("zeros");
    let denom = parts.iter().map(Part::num_labels).sum::<usize>() as f64;
    let loss = decoder
        .loss_and_backward(parts, adapter, denom, &mut gradients, activations)
        .expect("sound parts");
    (loss, gradients.to_vec().expect("readable"))
}

#[test]
fn recomputed_activations_give_the_same_bits() {
    for architecture in [Architecture::Qwen2, Architecture::Qwen3] {
        let world = World::new(architecture);
        let (decoder, adapter) = (
            world.decoder(DType::F32, 1),
            world.adapter(&uneven_lora(), 4),
        );
        let parts = [one_part(&documents(&[13, 5, 8], 1))];
        let stored = gradients(&decoder, &adapter, &parts, Activations::Stored);
        assert_eq!(
            stored,
            gradients(&decoder, &adapter, &parts, Activations::Recomputed)
        );
    }
}

#[test]
fn packed_documents_give_the_gradients_of_single_ones() {
    let world = World::new(Architecture::Llama);
    let decoder = world.decoder(DType::F64, 1);
    let adapter = world
        .adapter(&LoraConfig::default(), 4)
        .to_dtype(DType::F64)
        .expect("to f64");
    let documents = documents(&[3, 21, 8, 2], 6);
    let (packed_loss, packed) = gradients(
        &decoder,
        &adapter,
        &[one_part(&documents)],
        Activations::Stored,
    );
    let parts: Vec<_> = documents.chunks(1).map(one_part).collect();
    let (loss, single) = gradients(&decoder, &adapter, &parts, Activations::Stored);
    assert!((packed_loss - loss).abs() < 1e-10 * loss);
    let scale = single.iter().fold(0.0_f64, |max, g| max.max(g.abs()));
    assert!(
        packed
            .iter()
            .zip(&single)
            .all(|(p, s)| (p - s).abs() < 1e-12 * scale)
    );
}

#[test]
fn parts_side_by_side_give_the_bits_of_parts_in_turn() {
    let world = World::new(Architecture::Qwen2);
    let adapter = world.adapter(&LoraConfig::default(), 4);
    let documents = documents(&[3, 21, 8, 12], 6);
    let parts: Vec<_> = documents.chunks(2).map(one_part).collect();
    let together = gradients(
        &world.decoder(DType::F32, 2),
        &adapter,
        &parts,
        Activations::Stored,
    );
    assert_eq!(
        together,
        gradients(
            &world.decoder(DType::F32, 2),
            &adapter,
            &parts,
            Activations::Stored
        )
    );

    // Two parts on two threads are two sums added up, which one decoder can also do in two calls.
    let alone = world.decoder(DType::F32, 1);
    let denom = parts.iter().map(Part::num_labels).sum::<usize>() as f64;
    let mut halves = parts.iter().map(|part| {
        let mut gradients = Gradients::zeros(&adapter).expect("zeros");
        let part = std::slice::from_ref(part);
        let loss =
            alone.loss_and_backward(part, &adapter, denom, &mut gradients, Activations::Stored);
        (loss.expect("a sound part"), gradients)
    });
    let (Some((first_loss, mut sum)), Some((second_loss, second))) = (halves.next(), halves.next())
    else {
        panic!("two halves");
    };
    sum.add(&second).expect("the same adapter's");
    assert_eq!(
        together,
        (first_loss + second_loss, sum.to_vec().expect("readable"))
    );
}

#[test]
fn a_document_does_not_feel_its_neighbours() {
    let world = World::new(Architecture::Qwen3);
    let (decoder, adapter) = (
        world.decoder(DType::F32, 1),
        world.adapter(&LoraConfig::default(), 4),
    );
    let hidden = |first: &[u32]| {
        let mut batch = Batch::packed([first, &[7, 8, 9, 10, 11]]);
        batch.adapters = vec![Some(0); 2];
        batch.logit_rows = (3..8).collect();
        decoder
            .forward(&batch, &[&adapter], None)
            .and_then(|hidden| hidden.to_vec())
            .expect("a sound batch")
    };
    assert_eq!(hidden(&[1, 2, 3]), hidden(&[90, 50, 4]));
}

/// The gradient that reaches a document's embeddings: another document beside it changes no bit.
#[test]
fn the_gradient_of_a_documents_input_does_not_feel_its_neighbours() {
    let world = World::new(Architecture::Llama); // Its head is no embedding.
    assert!(!world.config.tie_word_embeddings);
    let lora = LoraConfig {
        modules_to_save: vec!["embed_tokens".to_owned()],
        ..LoraConfig::default()
    };
    let (decoder, adapter) = (world.decoder(DType::F32, 1), world.adapter(&lora, 4));
    let table = adapter.parameters().last().expect("the table").clone();
    assert!(table.name.ends_with("embed_tokens.weight"));
    let own = [7, 8, 9, 10, 11];
    // The rows of the table that the second document alone uses hold the gradient of its input.
    let input_gradient = |first: &[u32], stored| {
        let mut part = Part::default();
        part.push(first, std::slice::from_ref(&(1..first.len())));
        part.push(&own, std::slice::from_ref(&(2..5)));
        let mut gradients = Gradients::zeros(&adapter).expect("zeros");
        decoder
            .loss_and_backward(&[part], &adapter, 1.0, &mut gradients, stored)
            .expect("a sound part");
        let width = table.shape[1];
        let rows = own.map(|id| {
            let start = table.range.start + id as usize * width;
            let row = gradients.with(|values| values[start..start + width].to_vec());
            row.expect("f32")
        });
        rows.concat()
    };
    for stored in [Activations::Stored, Activations::Recomputed] {
        let calm = input_gradient(&[1, 2, 3, 4, 5, 6], stored);
        // The last token is nobody's input; every other has a gradient.
        let hidden = table.shape[1];
        assert!(calm[..4 * hidden].iter().any(|&x| x != 0.0));
        for first in [[90, 50, 4, 60, 61, 62], [1, 2, 3, 4, 5, 60]] {
            let other = input_gradient(&first, stored);
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&other), bits(&calm));
        }
    }
}

#[test]
fn merged_weights_run_like_the_adapter() {
    for architecture in [Architecture::Llama, Architecture::Qwen2] {
        let world = World::new(architecture);
        let adapter = world.adapter(&uneven_lora(), 8);
        let files: Vec<_> = merge::merge(&world.weights, &world.config, &adapter)
            .expect("they fit")
            .map(|file| {
                file.map(|(name, bytes)| (name, bytes.into()))
                    .expect("a merged file")
            })
            .collect();
        assert_eq!(files[0].0, SINGLE_FILE);
        let merged = Weights::from_files(files).expect("sound files");
        let threads = Threads::single();
        let merged = Decoder::load(&world.config, &merged, DType::F32, &Device::Cpu, &threads)
            .expect("loads");
        let parts = [one_part(&documents(&[20, 9], 3))];
        let expected = world
            .decoder(DType::F32, 1)
            .loss(&parts, Some(&adapter))
            .expect("a sound part");
        let actual = merged.loss(&parts, None).expect("a sound part");
        assert!(
            (actual - expected).abs() < 1e-5 * expected,
            "{actual} against {expected}"
        );
    }
}

#[test]
fn a_decoder_and_all_it_needs_may_be_shared_by_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<(
        Decoder,
        Adapter,
        Gradients,
        Weights,
        updraft_model::KvPages,
        Part,
    )>();
}

#[test]
fn what_cannot_be_loaded_is_named() {
    let world = World::new(Architecture::Llama);
    let refused = |config: &updraft_model::ModelConfig, dtype: DType| {
        let loaded = Decoder::load(
            config,
            &world.weights,
            dtype,
            &Device::Cpu,
            &Threads::single(),
        );
        loaded.expect_err("must be refused").to_string()
    };
    assert!(refused(&world.config, DType::F16).starts_with("computing in F16 is not supported"));
    let mut deeper = world.config.clone();
    deeper.num_hidden_layers = 3;
    assert!(refused(&deeper, DType::F32).starts_with("tensor model.layers.2."));
    let mut wider = world.config.clone();
    wider.vocab_size = 97;
    assert!(
        refused(&wider, DType::F32)
            .contains("embed_tokens.weight has shape [96, 32] where the model needs [97, 32]")
    );
}
