//! Loss and gradients against the oracle and against finite differences, in f64.

use candle_core::DType;
use updraft_model::{
    Activations, Adapter, Architecture, Gradients, LoraConfig, Part, TargetModules,
};

use crate::oracle::Oracle;
use crate::world::{Numbers, World, documents, one_part, uneven_lora};

const ALL: [Architecture; 4] = [
    Architecture::Llama,
    Architecture::Mistral,
    Architecture::Qwen2,
    Architecture::Qwen3,
];

#[test]
fn products_in_bf16_follow_those_in_f32() {
    let world = World::new_bf16(Architecture::Qwen2);
    let adapter = world.adapter(&uneven_lora(), 3);
    let parts = [one_part(&documents(&[9, 1, 17, 2], 5))];
    let run = |dtype| {
        let decoder = world.decoder(dtype, 1);
        let mut gradients = Gradients::zeros(&adapter).expect("zeros");
        let loss = decoder
            .loss_and_backward(&parts, &adapter, 3.0, &mut gradients, Activations::Stored)
            .expect("a sound part");
        let evaluated = decoder.loss(&parts, Some(&adapter)).expect("a sound part");
        assert_eq!(evaluated, loss, "{dtype:?}");
        (loss, gradients.with(<[f32]>::to_vec).expect("f32"))
    };
    let ((loss, gradients), (expected_loss, expected)) = (run(DType::BF16), run(DType::F32));
    assert!(
        (loss / expected_loss - 1.0).abs() < 1e-2,
        "{loss}, {expected_loss}"
    );
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
    let difference = norm(&mut gradients.iter().zip(&expected).map(|(a, b)| a - b));
    let error = difference / norm(&mut expected.iter().copied());
    assert!(error > 0.0 && error < 2e-2, "relative error {error:e}");
}

#[test]
fn every_family_agrees_with_autograd_over_naive_operations() {
    for architecture in ALL {
        for lora in [
            LoraConfig {
                r: 4,
                ..LoraConfig::default()
            },
            uneven_lora(),
        ] {
            agrees(architecture, &lora);
        }
    }
}

#[test]
fn weights_that_are_trained_whole_agree_with_autograd() {
    let saving = |names: &[&str], ensure_weight_tying| LoraConfig {
        modules_to_save: names.iter().map(|&name| name.to_owned()).collect(),
        ensure_weight_tying,
        ..uneven_lora()
    };
    for architecture in ALL {
        agrees(architecture, &LoraConfig::full_fine_tuning());
        agrees(architecture, &saving(&["lm_head"], false));
        agrees(architecture, &saving(&["embed_tokens", "norm"], false));
        agrees(architecture, &saving(&["lm_head"], true));
        let gate_up = &["gate_proj", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"];
        let lora = LoraConfig {
            target_modules: TargetModules::Names(vec!["q_proj".to_owned()]),
            ..saving(gate_up, false)
        };
        agrees(architecture, &lora);
    }
}

fn agrees(architecture: Architecture, lora: &LoraConfig) {
    let world = World::new(architecture);
    let adapter = world.adapter(lora, 3);
    let part = one_part(&documents(&[9, 1, 17, 2], 5));
    let oracle = Oracle::new(&world.config, &world.weights, &adapter);
    let expected = oracle.loss(&part).expect("the oracle's forward pass");
    let found = expected.backward().expect("the oracle's backward pass");

    let (decoder, adapter) = (
        world.decoder(DType::F64, 1),
        adapter.to_dtype(DType::F64).expect("to f64"),
    );
    let mut gradients = Gradients::zeros(&adapter).expect("zeros");
    let denom = 3.0;
    let loss = decoder
        .loss_and_backward(
            std::slice::from_ref(&part),
            &adapter,
            denom,
            &mut gradients,
            Activations::Stored,
        )
        .expect("a sound part");
    let expected = expected.to_scalar::<f64>().expect("a scalar");
    assert!(
        (loss - expected).abs() < 1e-9 * expected,
        "{architecture:?}: loss {loss}, oracle {expected}"
    );
    let evaluated = decoder.loss(&[part], Some(&adapter)).expect("a sound part");
    assert!(
        (evaluated - loss).abs() < 1e-9 * loss,
        "evaluated {evaluated}, trained {loss}"
    );

    let gradients = gradients.to_vec().expect("readable");
    for parameter in adapter.parameters() {
        let variable = &oracle.variables[&parameter.name];
        let expected: Vec<f64> = found
            .get(variable)
            .expect("in the graph")
            .flatten_all()
            .and_then(|t| t.to_vec1())
            .expect("f64");
        let error = relative(&gradients[parameter.range.clone()], &expected, 1.0 / denom);
        assert!(
            error < 1e-9,
            "{architecture:?}: {} differs by {error:e}",
            parameter.name
        );
    }
}

/// `‖actual − factor · expected‖ / ‖factor · expected‖`
fn relative(actual: &[f64], expected: &[f64], factor: f64) -> f64 {
    let difference: f64 = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| (a - factor * e).powi(2))
        .sum();
    let norm: f64 = expected.iter().map(|e| (factor * e).powi(2)).sum();
    assert!(norm > 0.0, "nothing to compare");
    (difference / norm).sqrt()
}

#[test]
fn the_slope_in_any_direction_is_the_gradient() {
    let mut part = one_part(&documents(&[11, 6], 2));
    slope_is_gradient(&uneven_lora(), &part);
    // What is dropped and added depends on the seeds alone, so the loss still has a slope.
    part.seeds = vec![3, 4];
    part.neftune_noise_alpha = 5.0;
    let dropping = LoraConfig {
        lora_dropout: 0.3,
        ..uneven_lora()
    };
    slope_is_gradient(&dropping, &part);
    slope_is_gradient(&LoraConfig::full_fine_tuning(), &part);
}

fn slope_is_gradient(lora: &LoraConfig, part: &Part) {
    let world = World::new(Architecture::Qwen2);
    let (decoder, adapter) = (world.decoder(DType::F64, 1), world.adapter(lora, 1));
    let run = |adapter: &Adapter| {
        let exact = adapter.to_dtype(DType::F64).expect("to f64");
        let mut gradients = Gradients::zeros(&exact).expect("zeros");
        let parts = std::slice::from_ref(part);
        let loss = decoder
            .loss_and_backward(parts, &exact, 1.0, &mut gradients, Activations::Stored)
            .expect("a sound part");
        (loss, gradients.to_vec().expect("readable"))
    };
    let (_, gradients) = run(&adapter);
    let mut numbers = Numbers(9);
    let direction: Vec<f32> = (0..adapter.num_parameters())
        .map(|_| numbers.between(-1e-3, 1e-3) as f32)
        .collect();
    let moved = |sign: f32| {
        let mut moved = adapter.to_dtype(DType::F32).expect("a copy");
        moved
            .update(|values| {
                values
                    .iter_mut()
                    .zip(&direction)
                    .for_each(|(value, step)| *value += sign * step);
            })
            .expect("f32 on the CPU");
        (run(&moved).0, moved.values().expect("readable"))
    };
    let ((above, high), (below, low)) = (moved(1.0), moved(-1.0));
    let expected: f64 = gradients
        .iter()
        .zip(high.iter().zip(&low))
        .map(|(gradient, (high, low))| gradient * (f64::from(*high) - f64::from(*low)))
        .sum();
    assert!(
        (above - below - expected).abs() < 1e-4 * expected.abs(),
        "{} against {expected}",
        above - below
    );
}

#[test]
fn dropout_and_noise_know_a_document_by_its_seed() {
    let world = World::new(Architecture::Qwen3);
    let dropping = LoraConfig {
        lora_dropout: 0.5,
        ..LoraConfig::default()
    };
    let documents = documents(&[9, 13, 7], 5);
    let run = |lora: &LoraConfig, cuts: &[std::ops::Range<usize>], seeds: [u64; 3], alpha| {
        let parts: Vec<Part> = cuts
            .iter()
            .map(|cut| Part {
                seeds: seeds[cut.clone()].to_vec(),
                neftune_noise_alpha: alpha,
                ..one_part(&documents[cut.clone()])
            })
            .collect();
        let adapter = world.adapter(lora, 1);
        let mut gradients = Gradients::zeros(&adapter).expect("zeros");
        let decoder = world.decoder(DType::F32, 1);
        let stored = Activations::Recomputed;
        decoder.loss_and_backward(&parts, &adapter, 1.0, &mut gradients, stored)
    };
    let loss = |lora: &LoraConfig, cuts: &[std::ops::Range<usize>], seeds, alpha| {
        run(lora, cuts, seeds, alpha).expect("sound parts")
    };
    let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-5;
    let (whole, cut) = (std::slice::from_ref(&(0..3)), &[0..1, 1..3][..]);
    let plain = loss(&LoraConfig::default(), whole, [1, 2, 3], 0.0);
    for (lora, alpha) in [(&dropping, 0.0), (&LoraConfig::default(), 5.0)] {
        let once = loss(lora, whole, [1, 2, 3], alpha);
        assert!(!close(once, plain), "nothing was drawn");
        assert!(close(once, loss(lora, cut, [1, 2, 3], alpha)));
        assert!(!close(once, loss(lora, whole, [1, 2, 4], alpha)));
    }
    let mut unseeded = one_part(&documents);
    unseeded.neftune_noise_alpha = 5.0;
    let adapter = world.adapter(&LoraConfig::default(), 1);
    let mut gradients = Gradients::zeros(&adapter).expect("zeros");
    let decoder = world.decoder(DType::F32, 1);
    let stored = Activations::Stored;
    let error = decoder
        .loss_and_backward(&[unseeded], &adapter, 1.0, &mut gradients, stored)
        .expect_err("no seeds");
    assert!(
        error.to_string().contains("0 seeds for 3 documents"),
        "{error}"
    );
}

#[test]
fn what_cannot_be_trained_on_is_an_error() {
    let world = World::new(Architecture::Llama);
    let (decoder, adapter) = (
        world.decoder(DType::F32, 1),
        world.adapter(&LoraConfig::default(), 1),
    );
    let good = one_part(&documents(&[5], 1));
    let refused = |part: Part, denom: f64| {
        let mut gradients = Gradients::zeros(&adapter).expect("zeros");
        let result = decoder.loss_and_backward(
            &[part],
            &adapter,
            denom,
            &mut gradients,
            Activations::Stored,
        );
        result.expect_err("must be refused").to_string()
    };
    assert!(refused(one_part(&[(vec![1, 2], 0..1)]), 1.0).contains("no token is to be learned"));
    assert!(refused(good.clone(), 0.0).contains("divided by 0"));
    let mut outside = good.clone();
    outside.labels[0] = 96;
    assert!(refused(outside, 1.0).contains("label 96 is outside the vocabulary of 96"));
    let mut outside = good;
    outside.batch.ids[0] = 100;
    assert!(refused(outside, 1.0).contains("token id 100 is outside"));
    let other = world.adapter(&uneven_lora(), 1);
    let mut gradients = Gradients::zeros(&other).expect("zeros");
    let part = one_part(&documents(&[5], 1));
    let result =
        decoder.loss_and_backward(&[part], &adapter, 1.0, &mut gradients, Activations::Stored);
    assert!(
        result
            .expect_err("must be refused")
            .to_string()
            .contains("gradients of another adapter")
    );
}
