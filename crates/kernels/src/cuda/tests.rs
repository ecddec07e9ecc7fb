//! Every kernel against the CPU's operation in f64, on the emulator and on a GPU if there is one: random inputs, ragged
//! lengths, outputs that hold NaNs before, in f32, f16 and bf16.

#![cfg_attr(
    feature = "cuda",
    expect(clippy::print_stderr, reason = "says what it skips")
)]

mod attention;
mod numbers;
mod paged_attention;
mod products;
mod rows;
mod sampling;
mod steps;

use half::{bf16, f16};

use super::memory::Number;
use super::{Buffer, Gpu, cast, embedding, linear, linear_cross_entropy};
use super::{noise, rms_norm, rope, swiglu};
use crate::attention::Heads;
use crate::{Float, Mat, MatMut, Threads};

/// The devices to test: the emulator if it was compiled, and the first GPU.
fn gpus() -> Vec<Gpu> {
    let mut gpus = Vec::new();
    #[cfg(feature = "cuda-emulator")]
    gpus.push(Gpu::emulated());
    #[cfg(feature = "cuda")]
    match Gpu::new(0) {
        Ok(gpu) => gpus.push(gpu),
        Err(error) => {
            assert!(
                std::env::var_os("UPDRAFT_NEEDS_GPU").is_none(),
                "UPDRAFT_NEEDS_GPU is set: {error}"
            );
            eprintln!("skipped on a GPU: {error}");
        }
    }
    gpus
}

/// The largest relative error that a type's rounding explains: ‖actual − expected‖ / ‖expected‖.
fn tolerance<T: Number>() -> f64 {
    match T::NAME {
        "f32" => 1e-5,
        "f16" => 1e-3,
        _ => 1e-2,
    }
}

/// Numbers in `-1..1`, others for each `UPDRAFT_TEST_SEED`, which is 0 unless it is set.
fn random<F: Float>(len: usize, seed: u64) -> Vec<F> {
    let run = std::env::var("UPDRAFT_TEST_SEED").ok();
    let run: u64 = run.map_or(0, |run| run.parse().expect("a number in UPDRAFT_TEST_SEED"));
    crate::testing::random(len, seed.wrapping_add(run << 32))
}

/// The same random numbers on the device and, as they were rounded, in f64.
struct Input<T> {
    device: Buffer<T>,
    host: Vec<f64>,
}

fn input<T: Number>(gpu: &Gpu, len: usize, seed: u64) -> Input<T> {
    of_values(gpu, &random::<f32>(len, seed))
}

fn of_values<T: Number>(gpu: &Gpu, values: &[f32]) -> Input<T> {
    let rounded: Vec<T> = values.iter().map(|&value| T::narrow(value)).collect();
    Input {
        device: gpu.upload(&rounded).expect("memory"),
        host: rounded
            .iter()
            .map(|value| f64::from(value.widen()))
            .collect(),
    }
}

/// The same numbers in rows that lie apart, NaNs between them.
fn apart<T: Number>(gpu: &Gpu, packed: &[f64], cols: usize, stride: usize) -> Buffer<T> {
    let mut values = Vec::new();
    for row in packed.chunks(cols) {
        values.extend(row.iter().map(|&value| T::narrow(value as f32)));
        values.resize(values.len() + stride - cols, T::narrow(f32::NAN));
    }
    gpu.upload(&values).expect("memory")
}

/// The numbers of rows that lie apart in what was poisoned before, between which nobody may have written.
#[track_caller]
fn together(all: &[f64], cols: usize, stride: usize) -> Vec<f64> {
    let mut packed = Vec::new();
    for row in all.chunks(stride) {
        packed.extend_from_slice(&row[..cols]);
        assert!(row[cols..].iter().all(|number| number.is_nan()));
    }
    packed
}

/// Memory that nobody may leave as it is.
fn poison<T: Number>(gpu: &Gpu, len: usize) -> Buffer<T> {
    gpu.upload(&vec![T::narrow(f32::NAN); len]).expect("memory")
}

fn values<T: Number>(gpu: &Gpu, buffer: &Buffer<T>) -> Vec<f64> {
    let values = gpu.download(buffer.view()).expect("finished");
    values
        .iter()
        .map(|value| f64::from(value.widen()))
        .collect()
}

#[track_caller]
fn check<T: Number>(what: &str, gpu: &Gpu, actual: &Buffer<T>, expected: &[f64]) {
    close::<T>(what, &values(gpu, actual), expected);
}

#[track_caller]
fn close<T: Number>(what: &str, actual: &[f64], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let square = |x: f64| x * x;
    let error: f64 = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| square(a - e))
        .sum();
    let size: f64 = expected.iter().map(|&e| square(e)).sum();
    let relative = (error / size.max(1e-30)).sqrt();
    let tolerance = tolerance::<T>();
    assert!(
        relative <= tolerance,
        "{what} in {}: a relative error of {relative:.1e}, {tolerance:.0e} is allowed",
        T::NAME
    );
}

/// Runs a generic check for each number type on each device.
macro_rules! on_all {
    ($($check:ident),* $(,)?) => {
        $(
            #[test]
            fn $check() {
                for gpu in gpus() {
                    checks::$check::<f32>(&gpu);
                    checks::$check::<f16>(&gpu);
                    checks::$check::<bf16>(&gpu);
                }
            }
        )*
    };
}
on_all!(
    rms_norm_agrees,
    rms_norm_of_strided_rows_agrees,
    rope_turns_and_turns_back,
    qkv_is_finished_at_once,
    swiglu_agrees,
    embedding_agrees,
    products_agree,
    cross_entropy_agrees,
    dropout_drops_the_same_numbers,
    attention_agrees,
    attention_of_a_sequence_ignores_its_neighbours,
    paged_attention_agrees,
    paged_attention_of_any_heads_agrees,
    paged_attention_of_large_scores_agrees,
    chunks_of_a_prompt_agree_with_all_of_it,
    casts_round_to_nearest,
    sums_of_matrices_agree,
);

mod checks {
    pub(super) use super::attention::{
        attention_agrees, attention_of_a_sequence_ignores_its_neighbours,
    };
    pub(super) use super::numbers::{
        casts_round_to_nearest, dropout_drops_the_same_numbers, sums_of_matrices_agree,
    };
    pub(super) use super::paged_attention::{
        chunks_of_a_prompt_agree_with_all_of_it, paged_attention_agrees,
        paged_attention_of_any_heads_agrees, paged_attention_of_large_scores_agrees,
    };
    pub(super) use super::products::{cross_entropy_agrees, products_agree};
    pub(super) use super::rows::{
        embedding_agrees, qkv_is_finished_at_once, rms_norm_agrees,
        rms_norm_of_strided_rows_agrees, rope_turns_and_turns_back, swiglu_agrees,
    };
}

/// Products in halves and plain copies instead of asynchronous ones.
#[cfg(feature = "cuda-emulator")]
#[test]
fn f16_takes_tensor_cores_before_sm_80() {
    let gpu = Gpu::emulated_as(75);
    checks::attention_agrees::<f16>(&gpu);
    checks::attention_of_a_sequence_ignores_its_neighbours::<f16>(&gpu);
    checks::chunks_of_a_prompt_agree_with_all_of_it::<f16>(&gpu);
}

#[test]
fn copies_are_equal() {
    for gpu in gpus() {
        let from = gpu.upload(&[1_u32, 2, 3]).expect("memory");
        let mut to = gpu.zeros::<u32>(2).expect("memory");
        gpu.copy(from.view().part(1..3), &to.view_mut())
            .expect("launched");
        assert_eq!(gpu.download(to.view()).expect("finished"), [2, 3]);
    }
}

#[cfg(feature = "cuda-emulator")]
#[test]
#[should_panic(expected = "memory of another device")]
fn memory_of_another_device_is_refused() {
    let (one, other) = (Gpu::emulated(), Gpu::emulated());
    let (x, mut h) = (
        one.zeros::<f32>(8).expect("memory"),
        other.zeros::<f32>(4).expect("memory"),
    );
    let _ = swiglu::forward(&one, x.mat(1, 8), &h.mat_mut(1, 4));
}
