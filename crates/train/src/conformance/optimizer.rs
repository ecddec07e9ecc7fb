//! What every [`Optimizer`] promises.

use crate::{Error, Optimizer};

/// Makes one test of each promise. The expression is evaluated for each and
/// must give a fresh optimizer.
///
/// ```
/// # use updraft_train::optim::Sgd;
/// mod sgd {
///     updraft_train::optimizer_tests!(updraft_train::optim::Sgd::new(0.0));
/// }
/// ```
#[macro_export]
macro_rules! optimizer_tests {
    ($optimizer:expr) => {
        $crate::optimizer_tests!(@each $optimizer;
            a_step_goes_against_the_gradient
            a_zero_learning_rate_changes_nothing
            the_order_of_parameters_does_not_show
            a_restored_optimizer_continues_to_the_bit
            a_wrong_length_is_an_error
            it_finds_the_bottom_of_a_bowl
        );
        $crate::optimizer_gpu_tests!($optimizer);
    };
    (@each $optimizer:expr; $($promise:ident)+) => {
        $(
            #[test]
            fn $promise() {
                $crate::conformance::optimizer::$promise(&mut || Box::new($optimizer));
            }
        )+
    };
}

/// Those of the promises that concern a GPU, on the emulator if it was compiled.
#[cfg(feature = "cuda-emulator")]
#[doc(hidden)]
#[macro_export]
macro_rules! optimizer_gpu_tests {
    ($optimizer:expr) => {
        $crate::optimizer_tests!(@each $optimizer;
            steps_on_a_gpu_are_those_of_the_host
            it_goes_on_here_and_there
        );
    };
}

#[cfg(not(feature = "cuda-emulator"))]
#[doc(hidden)]
#[macro_export]
macro_rules! optimizer_gpu_tests {
    ($optimizer:expr) => {};
}

/// Makes a fresh optimizer.
pub type Make<'a> = &'a mut dyn FnMut() -> Box<dyn Optimizer>;

const NAMES: [&str; 2] = [
    "layers.0.q_proj.lora_A.weight",
    "layers.0.q_proj.lora_B.weight",
];

fn gradient(parameter: usize, step: usize) -> [f32; 3] {
    [0, 1, 2].map(|i| ((parameter * 7 + step * 3 + i * 5) as f32 * 0.7).sin())
}

fn step(
    optimizer: &mut dyn Optimizer,
    values: &mut [[f32; 3]; 2],
    number: usize,
    order: [usize; 2],
) {
    optimizer.begin_step(0.01);
    for parameter in order {
        optimizer
            .update(
                NAMES[parameter],
                &mut values[parameter],
                &gradient(parameter, number),
            )
            .expect("an update");
    }
}

/// A first step from any gradient lowers a positive slope's parameter.
pub fn a_step_goes_against_the_gradient(make: Make<'_>) {
    let mut optimizer = make();
    let mut values = [0.0f32, 0.0];
    optimizer.begin_step(0.1);
    optimizer
        .update(NAMES[0], &mut values, &[1.0, -1.0])
        .expect("an update");
    assert!(values[0] < 0.0 && values[1] > 0.0, "{values:?}");
}

/// The first step of a warm-up has learning rate zero.
pub fn a_zero_learning_rate_changes_nothing(make: Make<'_>) {
    let mut optimizer = make();
    let mut values = [0.25f32, -3.0];
    optimizer.begin_step(0.0);
    optimizer
        .update(NAMES[0], &mut values, &[1.0, -1.0])
        .expect("an update");
    assert_eq!(values, [0.25, -3.0]);
}

/// Parameters may be updated in any order.
pub fn the_order_of_parameters_does_not_show(make: Make<'_>) {
    let (mut forwards, mut backwards) = (make(), make());
    let mut values = [[[0.5f32; 3]; 2]; 2];
    for number in 0..4 {
        step(forwards.as_mut(), &mut values[0], number, [0, 1]);
        step(backwards.as_mut(), &mut values[1], number, [1, 0]);
    }
    assert_eq!(values[0], values[1]);
    let states = [&forwards, &backwards].map(|one| one.state().expect("readable"));
    assert_eq!(states[0], states[1]);
}

/// Ten steps equal five, a restore into a fresh optimizer, and five.
pub fn a_restored_optimizer_continues_to_the_bit(make: Make<'_>) {
    let mut whole = make();
    let mut expected = [[0.5f32; 3]; 2];
    let mut halfway = None;
    for number in 0..10 {
        if number == 5 {
            halfway = Some((whole.state().expect("readable").into_owned(), expected));
        }
        step(whole.as_mut(), &mut expected, number, [0, 1]);
    }
    let (state, mut values) = halfway.expect("five steps");
    let mut resumed = make();
    resumed.restore(state).expect("its own state");
    for number in 5..10 {
        step(resumed.as_mut(), &mut values, number, [0, 1]);
    }
    assert_eq!(values, expected);
    let states = [&resumed, &whole].map(|one| one.state().expect("readable"));
    assert_eq!(states[0], states[1]);
}

/// A gradient of another length is refused and nothing moves.
pub fn a_wrong_length_is_an_error(make: Make<'_>) {
    let mut optimizer = make();
    optimizer.begin_step(0.1);
    let mut values = [1.0f32, 2.0];
    let error = optimizer
        .update(NAMES[0], &mut values, &[1.0])
        .expect_err("one gradient for two values");
    assert!(
        matches!(
            error,
            Error::Shape {
                expected: 2,
                actual: 1,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(values, [1.0, 2.0]);
}

/// Following `2·(x − 3)` leads to 3.
pub fn it_finds_the_bottom_of_a_bowl(make: Make<'_>) {
    let mut optimizer = make();
    let mut x = [0.0f32];
    for _ in 0..2000 {
        optimizer.begin_step(0.02);
        let slope = [2.0 * (x[0] - 3.0)];
        optimizer
            .update(NAMES[0], &mut x, &slope)
            .expect("an update");
    }
    assert!((x[0] - 3.0).abs() < 0.01, "{x:?}");
}

#[cfg(feature = "cuda-emulator")]
pub use gpu::{it_goes_on_here_and_there, steps_on_a_gpu_are_those_of_the_host};

/// Promises of a [`GpuOptimizer`](crate::optim::GpuOptimizer).
#[cfg(feature = "cuda-emulator")]
mod gpu {
    use updraft_model::{Gpu, Parameter, Projection, Role};

    use super::{Make, NAMES, gradient};
    use crate::Optimizer;

    /// Parameters with their own names, learning rates and decays, and a gap between them.
    fn parameters() -> Vec<Parameter> {
        let norm = "layers.0.input_layernorm.weight";
        let of = |(i, name): (usize, &str)| Parameter {
            name: name.to_owned(),
            shape: vec![3],
            range: 4 * i..4 * i + 3,
            role: Role::A(Projection::Q, 0),
        };
        let names = NAMES.into_iter().chain([norm]);
        names.enumerate().map(of).collect()
    }

    const LEN: usize = 11;

    fn gradients(number: usize) -> Vec<f32> {
        let mut flat = vec![0.0; LEN];
        for (i, parameter) in parameters().iter().enumerate() {
            flat[parameter.range.clone()].copy_from_slice(&gradient(i, number));
        }
        flat
    }

    fn here(optimizer: &mut dyn Optimizer, values: &mut [f32], number: usize) {
        optimizer.begin_step(0.01);
        let gradients = gradients(number);
        for Parameter { name, range, .. } in parameters() {
            optimizer
                .update(&name, &mut values[range.clone()], &gradients[range])
                .expect("an update");
        }
    }

    /// The same step, if the optimizer can, from gradients that are scaled by eight; and their norm.
    fn there(
        optimizer: &mut dyn Optimizer,
        values: &mut Vec<f32>,
        number: usize,
        gpu: &Gpu,
    ) -> Option<f64> {
        optimizer.on_gpu()?;
        let scaled: Vec<f32> = gradients(number).iter().map(|g| 8.0 * g).collect();
        let gradients = gpu.upload(&scaled).expect("memory");
        let mut on_gpu = gpu.upload(values).expect("memory");
        let power = optimizer.on_gpu()?;
        let norm = power
            .clip(gpu, &parameters(), gradients.view(), 0.125, 0.0)
            .expect("clipped");
        optimizer.begin_step(0.01);
        optimizer
            .on_gpu()?
            .update_all(on_gpu.view_mut(), gradients.view())
            .expect("a step");
        *values = gpu.download(on_gpu.view()).expect("finished");
        Some(norm)
    }

    fn check_close(values: &[f32], expected: &[f32]) {
        for (value, expected) in values.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-6, "{value}, {expected}");
        }
    }

    /// Steps on a GPU are those of the host, loss scaling taken out.
    pub fn steps_on_a_gpu_are_those_of_the_host(make: Make<'_>) {
        let gpu = Gpu::emulated();
        let (mut optimizer, mut reference) = (make(), make());
        let (mut values, mut expected) = (vec![0.5; LEN], vec![0.5; LEN]);
        for number in 0..4 {
            here(reference.as_mut(), &mut expected, number);
            let norm = match there(optimizer.as_mut(), &mut values, number, &gpu) {
                Some(norm) => norm,
                None => return, // It has no such power.
            };
            let squares = gradients(number).into_iter().map(|g| f64::from(g).powi(2));
            assert!((norm - squares.sum::<f64>().sqrt()).abs() < 1e-6, "{norm}");
            check_close(&values, &expected);
        }
    }

    /// Moments are the same wherever the last steps were: on another GPU, on the host, in a state that another restores.
    pub fn it_goes_on_here_and_there(make: Make<'_>) {
        let gpus = [Gpu::emulated(), Gpu::emulated()];
        let (mut optimizer, mut reference) = (make(), make());
        let (mut values, mut expected) = (vec![0.5; LEN], vec![0.5; LEN]);
        for number in 0..10 {
            here(reference.as_mut(), &mut expected, number);
            let step = match number {
                0..3 => there(optimizer.as_mut(), &mut values, number, &gpus[0]),
                3..5 => there(optimizer.as_mut(), &mut values, number, &gpus[1]),
                8.. => there(optimizer.as_mut(), &mut values, number, &gpus[0]),
                _ => {
                    here(optimizer.as_mut(), &mut values, number);
                    Some(0.0)
                }
            };
            if step.is_none() {
                return; // It has no such power.
            }
            if number % 4 == 3 {
                let state = optimizer.state().expect("readable").into_owned();
                let known = reference.state().expect("readable");
                assert_eq!(state.step, known.step);
                let names = |of: &crate::optim::OptimizerState<'_>| -> Vec<String> {
                    of.tensors.keys().cloned().collect()
                };
                assert_eq!(names(&state), names(&known));
                for (own, known) in state.tensors.values().zip(known.tensors.values()) {
                    check_close(own, known);
                }
                optimizer = make();
                optimizer.restore(state).expect("its own state");
            }
            check_close(&values, &expected);
        }
    }
}
