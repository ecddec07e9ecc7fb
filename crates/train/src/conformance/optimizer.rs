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
    assert_eq!(forwards.state(), backwards.state());
}

/// Ten steps equal five, a restore into a fresh optimizer, and five.
pub fn a_restored_optimizer_continues_to_the_bit(make: Make<'_>) {
    let mut whole = make();
    let mut expected = [[0.5f32; 3]; 2];
    let mut halfway = None;
    for number in 0..10 {
        if number == 5 {
            halfway = Some((whole.state().into_owned(), expected));
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
    assert_eq!(resumed.state(), whole.state());
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
