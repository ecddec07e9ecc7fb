//! What cannot be trained on is a clear error.

use updraft_chat::Example;
use updraft_train::{
    Error, ExampleSource, MemorySource, OptimizerKind, RunPlan, TrainConfig, Trainer,
};

use crate::world::{adapter, config, decoder, examples, source, span};

fn run(source: &dyn ExampleSource, config: TrainConfig) -> Error {
    let decoder = decoder(2);
    let mut trainer = match Trainer::new(&decoder, adapter(), source, config) {
        Ok(trainer) => trainer,
        Err(error) => return error,
    };
    trainer.run().expect_err("it must be refused")
}

#[test]
fn no_trained_token_at_all() {
    let silent = examples(4).into_iter().map(|example| Example {
        loss_spans: vec![],
        ..example
    });
    let error = run(&MemorySource::new("silent", silent.collect()), config());
    assert!(
        matches!(&error, Error::NothingToLearn { source_id } if source_id.starts_with("silent@")),
        "{error}"
    );
}

#[test]
fn a_step_without_a_trained_token() {
    let mut examples = examples(12);
    examples[6..]
        .iter_mut()
        .for_each(|example| example.loss_spans.clear());
    let half = MemorySource::new("half", examples);
    let error = RunPlan::new(&half, &config()).expect_err("told when it is planned");
    assert!(matches!(error, Error::EmptyStep { step: 2 }), "{error}");
    // A step that the run does not get to is none of its.
    let one_step = TrainConfig {
        max_steps: Some(1),
        ..config()
    };
    RunPlan::new(&half, &one_step).expect("the first step is trained");
}

#[test]
fn a_token_of_another_model() {
    let mut examples = examples(4);
    examples[2].input_ids[3] = 4096;
    let error = run(&MemorySource::new("foreign", examples), config());
    assert!(
        matches!(
            error,
            Error::TokenOutOfRange {
                token: 4096,
                vocab_size: 96
            }
        ),
        "{error}"
    );
}

#[test]
fn an_example_longer_than_the_models_context() {
    let long = Example {
        input_ids: vec![1; 300],
        loss_spans: span(1..300),
    };
    let config = TrainConfig {
        max_seq_len: 512,
        ..config()
    };
    let error = run(&MemorySource::new("long", vec![long]), config);
    assert!(
        matches!(
            error,
            Error::TooLong {
                row: 0,
                tokens: 300,
                limit: 256,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_loss_that_explodes() {
    let config = TrainConfig {
        learning_rate: 1e30,
        optim: OptimizerKind::Sgd,
        max_grad_norm: 0.0,
        warmup_steps: 0,
        ..config()
    };
    let error = run(&source(24), config);
    let not_finite = matches!(
        error,
        Error::LossNotFinite { .. } | Error::GradientNotFinite { .. }
    );
    assert!(not_finite, "{error}");
}

#[test]
fn settings_no_run_could_follow() {
    let error = run(
        &source(24),
        TrainConfig {
            learning_rate: f64::NAN,
            ..config()
        },
    );
    assert!(
        matches!(
            error,
            Error::Config {
                field: "learning_rate",
                ..
            }
        ),
        "{error}"
    );
}
