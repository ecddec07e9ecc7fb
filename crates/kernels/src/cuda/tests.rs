//! Every kernel against the CPU's operation in f64, on the emulator and on a GPU if there is one: random inputs, ragged
//! lengths, outputs that hold NaNs before, in f32, f16 and bf16.

#![cfg_attr(
    feature = "cuda",
    expect(clippy::print_stderr, reason = "says what it skips")
)]

mod attention;
mod steps;

use half::{bf16, f16};

use super::memory::Number;
use super::{Buffer, Gpu, cast, embedding, linear, linear_cross_entropy};
use super::{noise, paged_attention, rms_norm, rope, swiglu};
use crate::attention::Heads;
use crate::testing::random;
use crate::{Mat, MatMut, Threads};

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
    swiglu_agrees,
    embedding_agrees,
    products_agree,
    cross_entropy_agrees,
    dropout_drops_the_same_numbers,
    attention_agrees,
    attention_of_a_sequence_ignores_its_neighbours,
    paged_attention_agrees,
    casts_round_to_nearest,
    sums_of_matrices_agree,
);

mod checks {
    pub(super) use super::attention::{
        attention_agrees, attention_of_a_sequence_ignores_its_neighbours, paged_attention_agrees,
    };
    use super::*;

    pub(super) fn rms_norm_agrees<T: Number>(gpu: &Gpu) {
        let threads = Threads::single();
        for (rows, cols) in [(3, 64), (2, 7), (5, 896), (1, 2056)] {
            let (x, weight) = (input::<T>(gpu, rows * cols, 1), input::<T>(gpu, cols, 2));
            let mut y = poison::<T>(gpu, rows * cols);
            let mut inv_rms = poison::<f32>(gpu, rows);
            let (mut expected, mut roots) = (vec![0.0; rows * cols], vec![0.0; rows]);
            let x_mat = x.device.mat(rows, cols);
            let weight_view = weight.device.view();
            rms_norm::forward(
                gpu,
                x_mat,
                weight_view,
                1e-6,
                y.view_mut(),
                &inv_rms.view_mut(),
            )
            .expect("launched");
            crate::rms_norm::forward(
                &threads,
                &x.host,
                &weight.host,
                1e-6,
                &mut expected,
                &mut roots,
            );
            check("norm", gpu, &y, &expected);
            check::<f32>("roots", gpu, &inv_rms, &roots);

            let mut residual = input::<T>(gpu, rows * cols, 3);
            let mut y = poison::<T>(gpu, rows * cols);
            rms_norm::add_forward(
                gpu,
                x.device.view(),
                residual.device.view_mut(),
                weight.device.view(),
                1e-6,
                y.view_mut(),
                &inv_rms.view_mut(),
            )
            .expect("launched");
            crate::rms_norm::add_forward(
                &threads,
                &x.host,
                &mut residual.host,
                &weight.host,
                1e-6,
                &mut expected,
                &mut roots,
            );
            check("residual", gpu, &residual.device, &residual.host);
            check("norm of the sum", gpu, &y, &expected);

            let (dy, mut dx) = (
                input::<T>(gpu, rows * cols, 4),
                input::<T>(gpu, rows * cols, 5),
            );
            let mut dweight = input::<T>(gpu, cols, 6);
            crate::rms_norm::forward(
                &threads,
                &x.host,
                &weight.host,
                1e-6,
                &mut expected,
                &mut roots,
            );
            let inv_rms = of_values::<f32>(gpu, &crate::testing::narrow(&roots)).device;
            rms_norm::backward(
                gpu,
                x.device.mat(rows, cols),
                weight.device.view(),
                inv_rms.view(),
                dy.device.view(),
                &dx.device.mat_mut(rows, cols),
            )
            .expect("launched");
            crate::rms_norm::backward(
                &threads,
                &x.host,
                &weight.host,
                &roots,
                &dy.host,
                &mut dx.host,
            );
            check("dx", gpu, &dx.device, &dx.host);
            let dweight_view = dweight.device.view_mut();
            rms_norm::backward_weight(
                gpu,
                x.device.view(),
                inv_rms.view(),
                dy.device.view(),
                &dweight_view,
            )
            .expect("launched");
            crate::rms_norm::backward_weight(&x.host, &roots, &dy.host, &mut dweight.host);
            check("dweight", gpu, &dweight.device, &dweight.host);
        }
    }

    /// The heads of q and k in rows that hold v too.
    pub(super) fn rms_norm_of_strided_rows_agrees<T: Number>(gpu: &Gpu) {
        let (rows, cols, stride) = (4, 32, 48);
        let (x, weight) = (input::<T>(gpu, rows * stride, 1), input::<T>(gpu, cols, 2));
        let mut y = poison::<T>(gpu, rows * cols);
        let mut inv_rms = poison::<f32>(gpu, rows);
        let x_mat = x.device.mat(rows, stride).cols(8..8 + cols);
        let weight_view = weight.device.view();
        rms_norm::forward(
            gpu,
            x_mat,
            weight_view,
            1e-6,
            y.view_mut(),
            &inv_rms.view_mut(),
        )
        .expect("launched");
        let rows_of = |row: usize| &x.host[row * stride + 8..row * stride + 8 + cols];
        let gathered: Vec<f64> = (0..rows).flat_map(rows_of).copied().collect();
        let (mut expected, mut roots) = (vec![0.0; rows * cols], vec![0.0; rows]);
        let threads = Threads::single();
        crate::rms_norm::forward(
            &threads,
            &gathered,
            &weight.host,
            1e-6,
            &mut expected,
            &mut roots,
        );
        check("norm of columns", gpu, &y, &expected);
    }

    pub(super) fn rope_turns_and_turns_back<T: Number>(gpu: &Gpu) {
        let threads = Threads::single();
        for (head_dim, heads, rest) in [(64, 3, 16), (6, 2, 1)] {
            let frequencies: Vec<f32> = (0..head_dim / 2)
                .map(|i| 10_000_f32.powf(-2.0 * i as f32 / head_dim as f32))
                .collect();
            let (positions, stride) = ([0_u32, 7, 1, 99, 3], head_dim * heads + rest);
            let on_device = crate::rope::Table::<f32>::new(&frequencies, 100, 1.0);
            let on_device = rope::Table::new(gpu, &on_device).expect("memory");
            let table = crate::rope::Table::<f64>::new(&frequencies, 100, 1.0);
            let mut x = input::<T>(gpu, positions.len() * stride, 1);
            let before = x.host.clone();
            let device_positions = gpu.upload(&positions).expect("memory");
            let turn = |x: &mut Buffer<T>, back: bool| {
                let mat = x.mat_mut(positions.len(), stride).cols(0..head_dim * heads);
                let run = if back { rope::backward } else { rope::forward };
                run(gpu, &on_device, device_positions.view(), &mat).expect("launched");
            };
            turn(&mut x.device, false);
            let mat = MatMut::new(&mut x.host, positions.len(), stride);
            let (mat, _) = mat.split_cols(head_dim * heads);
            crate::rope::forward(&threads, &table, &positions, mat);
            check("turned", gpu, &x.device, &x.host);
            turn(&mut x.device, true);
            close::<T>("turned back", &values(gpu, &x.device), &before);
        }
    }

    pub(super) fn swiglu_agrees<T: Number>(gpu: &Gpu) {
        let threads = Threads::single();
        for (rows, inner) in [(3, 48), (2, 5), (4, 4864)] {
            let mut gate_up = input::<T>(gpu, rows * 2 * inner, 1);
            let mut h = poison::<T>(gpu, rows * inner);
            swiglu::forward(
                gpu,
                gate_up.device.mat(rows, 2 * inner),
                &h.mat_mut(rows, inner),
            )
            .expect("launched");
            let mut expected = vec![0.0; rows * inner];
            let mat = Mat::new(&gate_up.host, rows, 2 * inner);
            let out = MatMut::new(&mut expected, rows, inner);
            crate::swiglu::forward(
                &threads,
                mat.cols(0..inner),
                mat.cols(inner..2 * inner),
                out,
            );
            check("h", gpu, &h, &expected);

            let mut dh = input::<T>(gpu, rows * inner, 2);
            swiglu::backward_recompute(
                gpu,
                &gate_up.device.mat_mut(rows, 2 * inner),
                &dh.device.mat_mut(rows, inner),
            )
            .expect("launched");
            let mat = MatMut::new(&mut gate_up.host, rows, 2 * inner);
            let (gate, up) = mat.split_cols(inner);
            let dh_mat = MatMut::new(&mut dh.host, rows, inner);
            crate::swiglu::backward_recompute(&threads, gate, up, dh_mat);
            check(
                "the gradient of gate and up",
                gpu,
                &gate_up.device,
                &gate_up.host,
            );
            check("h once more", gpu, &dh.device, &dh.host);
        }
    }

    pub(super) fn embedding_agrees<T: Number>(gpu: &Gpu) {
        for cols in [64, 5] {
            let ids = [3_u32, 0, 3, 6, 3];
            let mut table = input::<T>(gpu, 7 * cols, 1);
            let device_ids = gpu.upload(&ids).expect("memory");
            let mut out = poison::<T>(gpu, ids.len() * cols);
            let out_mat = out.mat_mut(ids.len(), cols);
            embedding::forward(gpu, table.device.mat(7, cols), device_ids.view(), &out_mat)
                .expect("launched");
            let row = |id: &u32| *id as usize * cols..(*id as usize + 1) * cols;
            let expected: Vec<f64> = ids
                .iter()
                .flat_map(|id| table.host[row(id)].iter().copied())
                .collect();
            assert_eq!(values(gpu, &out), expected);

            let dout = input::<T>(gpu, ids.len() * cols, 2);
            let table_mat = table.device.mat_mut(7, cols);
            embedding::backward(
                gpu,
                device_ids.view(),
                dout.device.mat(ids.len(), cols),
                &table_mat,
            )
            .expect("launched");
            for (t, id) in ids.iter().enumerate() {
                for c in 0..cols {
                    table.host[*id as usize * cols + c] += dout.host[t * cols + c];
                }
            }
            check("the table's gradient", gpu, &table.device, &table.host);

            let places = [4_u32, 1];
            let device_places = gpu.upload(&places).expect("memory");
            let mut spread = gpu.zeros::<T>(7 * cols).expect("memory");
            let from = dout.device.mat(ids.len(), cols).rows(0..2);
            embedding::scatter(gpu, from, device_places.view(), &spread.mat_mut(7, cols))
                .expect("launched");
            let mut expected = vec![0.0; 7 * cols];
            expected[4 * cols..5 * cols].copy_from_slice(&dout.host[..cols]);
            expected[cols..2 * cols].copy_from_slice(&dout.host[cols..2 * cols]);
            assert_eq!(values(gpu, &spread), expected);
        }
    }

    pub(super) fn products_agree<T: Number>(gpu: &Gpu) {
        let threads = Threads::single();
        let (rows, inner, cols) = (5, 24, 9);
        let (x, w) = (
            input::<T>(gpu, rows * inner, 1),
            input::<T>(gpu, cols * inner, 2),
        );
        let mut y = input::<T>(gpu, rows * cols, 3);
        let (x_mat, w_mat) = (x.device.mat(rows, inner), w.device.mat(cols, inner));
        linear::forward(gpu, 2.0, x_mat, w_mat, 0.5, &y.device.mat_mut(rows, cols))
            .expect("launched");
        let host_x = Mat::new(&x.host, rows, inner);
        let host_w = Mat::new(&w.host, cols, inner);
        let host_y = MatMut::new(&mut y.host, rows, cols);
        crate::linear::forward(&threads, 2.0, host_x, host_w, 0.5, host_y);
        check("y", gpu, &y.device, &y.host);

        let dy = input::<T>(gpu, rows * cols, 4);
        let mut dx = poison::<T>(gpu, rows * inner);
        let dy_mat = dy.device.mat(rows, cols);
        linear::backward_input(gpu, 1.0, dy_mat, w_mat, 0.0, &dx.mat_mut(rows, inner))
            .expect("launched");
        let mut expected = vec![0.0; rows * inner];
        let host_dy = Mat::new(&dy.host, rows, cols);
        let host_dx = MatMut::new(&mut expected, rows, inner);
        crate::linear::backward_input(&threads, 1.0, host_dy, host_w, 0.0, host_dx);
        check("dx", gpu, &dx, &expected);

        let mut dw = input::<f32>(gpu, cols * inner, 5);
        linear::backward_weight(
            gpu,
            0.5,
            dy_mat,
            x_mat,
            1.0,
            &dw.device.mat_mut(cols, inner),
        )
        .expect("launched");
        let host_dw = MatMut::new(&mut dw.host, cols, inner);
        crate::linear::backward_weight(&threads, 0.5, host_dy, host_x, 1.0, host_dw);
        check("dw in f32", gpu, &dw.device, &dw.host);

        let (bias, mut dbias) = (input::<T>(gpu, cols, 6), input::<T>(gpu, cols, 7));
        linear::add_bias(gpu, bias.device.view(), &y.device.mat_mut(rows, cols)).expect("launched");
        for (y, bias) in y.host.iter_mut().zip(bias.host.iter().cycle()) {
            *y += bias;
        }
        check("y with its bias", gpu, &y.device, &y.host);
        linear::backward_bias(gpu, dy_mat, &dbias.device.view_mut()).expect("launched");
        crate::linear::backward_bias(host_dy, &mut dbias.host);
        check("dbias", gpu, &dbias.device, &dbias.host);
    }

    pub(super) fn cross_entropy_agrees<T: Number>(gpu: &Gpu) {
        let threads = Threads::single();
        for (rows, cols, vocab) in [(5, 16, 40), (3, 8, 2051)] {
            let (hidden, head) = (
                input::<T>(gpu, rows * cols, 1),
                input::<T>(gpu, vocab * cols, 2),
            );
            let labels: Vec<u32> = (0..rows as u32).map(|row| (row * 13 + 7) % 40).collect();
            let device_labels = gpu.upload(&labels).expect("memory");
            let mut losses = poison::<f32>(gpu, rows);
            let mut scratch =
                poison::<T>(gpu, linear_cross_entropy::chunk_rows(rows, vocab) * vocab);
            let (hidden_mat, head_mat) =
                (hidden.device.mat(rows, cols), head.device.mat(vocab, cols));
            linear_cross_entropy::forward(
                gpu,
                hidden_mat,
                head_mat,
                device_labels.view(),
                &losses.view_mut(),
                &mut scratch.view_mut(),
            )
            .expect("launched");
            let host_hidden = Mat::new(&hidden.host, rows, cols);
            let host_head = Mat::new(&head.host, vocab, cols);
            let expected: Vec<f64> = (0..rows)
                .map(|row| {
                    let (row_hidden, row_label) =
                        (host_hidden.rows(row..row + 1), &labels[row..row + 1]);
                    crate::linear_cross_entropy::forward(
                        &threads,
                        row_hidden,
                        host_head,
                        row_label,
                        &mut Vec::new(),
                    )
                })
                .collect();
            close::<T>("losses", &values(gpu, &losses), &expected);

            let mut losses = poison::<f32>(gpu, rows);
            let mut dhidden = poison::<T>(gpu, rows * cols);
            linear_cross_entropy::forward_backward(
                gpu,
                hidden_mat,
                head_mat,
                device_labels.view(),
                0.25,
                &mut dhidden.mat_mut(rows, cols),
                &losses.view_mut(),
                &mut scratch.view_mut(),
            )
            .expect("launched");
            close::<T>("losses again", &values(gpu, &losses), &expected);
            let mut expected = vec![0.0; rows * cols];
            let grads = crate::linear_cross_entropy::Grads {
                dhidden: MatMut::new(&mut expected, rows, cols),
                dhead: None,
            };
            crate::linear_cross_entropy::forward_backward(
                &threads,
                host_hidden,
                host_head,
                &labels,
                4.0,
                grads,
                &mut Vec::new(),
            );
            check("dhidden", gpu, &dhidden, &expected);
        }
    }

    pub(super) fn dropout_drops_the_same_numbers<T: Number>(gpu: &Gpu) {
        let (rows, cols, p) = (4, 70, 0.25);
        let keys: Vec<u64> = (0..rows as u64)
            .map(|row| crate::noise::derive(9, row))
            .collect();
        let device_keys = gpu.upload(&keys).expect("memory");
        let x = input::<T>(gpu, rows * cols, 1);
        let mut out = poison::<T>(gpu, rows * cols);
        let x_mat = x.device.mat(rows, cols);
        noise::dropout(gpu, p, device_keys.view(), x_mat, &out.mat_mut(rows, cols))
            .expect("launched");
        let threads = Threads::single();
        let mut expected = vec![0.0; rows * cols];
        let host_x = Mat::new(&x.host, rows, cols);
        let host_out = MatMut::new(&mut expected, rows, cols);
        crate::noise::dropout(&threads, p, &keys, host_x, host_out);
        check("kept", gpu, &out, &expected);
        let zeros = |values: &[f64]| values.iter().map(|x| *x == 0.0).collect::<Vec<_>>();
        assert_eq!(zeros(&values(gpu, &out)), zeros(&expected));

        let mut dx = input::<T>(gpu, rows * cols, 2);
        let dx_mat = dx.device.mat_mut(rows, cols);
        noise::dropout_backward(gpu, p, device_keys.view(), x_mat, &dx_mat).expect("launched");
        let host_dx = MatMut::new(&mut dx.host, rows, cols);
        crate::noise::dropout_backward(&threads, p, &keys, host_x, host_dx);
        check("dx", gpu, &dx.device, &dx.host);
    }

    pub(super) fn casts_round_to_nearest<T: Number>(gpu: &Gpu) {
        if T::NAME == "f32" {
            return; // to itself there is no cast
        }
        let special = [
            0.0,
            -0.0,
            1.0,
            -1.5,
            f32::INFINITY,
            65519.0,
            65520.0,
            1e-7,
            -6e-8,
            5.96e-8,
        ];
        let mut wide: Vec<f32> = special.to_vec();
        wide.extend(random::<f32>(1000, 1));
        wide.extend(random::<f32>(200, 2).iter().map(|x| x * 1e-5));
        wide.push(f32::NAN);
        let device = gpu.upload(&wide).expect("memory");
        let mut narrow = gpu.zeros::<T>(wide.len()).expect("memory");
        cast::cast(gpu, device.view(), &narrow.view_mut()).expect("launched");
        let mut back = poison::<f32>(gpu, wide.len());
        cast::cast(gpu, narrow.view(), &back.view_mut()).expect("launched");
        let actual = gpu.download(back.view()).expect("finished");
        for (actual, wide) in actual.iter().zip(&wide) {
            let expected = T::narrow(*wide).widen();
            assert!(
                actual.to_bits() == expected.to_bits() || actual.is_nan() && expected.is_nan(),
                "{wide} in {}: {actual}, expected {expected}",
                T::NAME
            );
        }
    }

    pub(super) fn sums_of_matrices_agree<T: Number>(gpu: &Gpu) {
        let (rows, cols) = (3, 10);
        let from = input::<T>(gpu, rows * 16, 1);
        let mut to = input::<T>(gpu, rows * cols, 2);
        let from_mat = from.device.mat(rows, 16).cols(2..2 + cols);
        cast::axpby(gpu, 2.0, from_mat, 0.5, &to.device.mat_mut(rows, cols)).expect("launched");
        for row in 0..rows {
            for c in 0..cols {
                let sum = &mut to.host[row * cols + c];
                *sum = 0.5 * *sum + 2.0 * from.host[row * 16 + 2 + c];
            }
        }
        check("sum", gpu, &to.device, &to.host);
        let mut poisoned = poison::<T>(gpu, rows * cols);
        cast::axpby(gpu, 1.0, from_mat, 0.0, &poisoned.mat_mut(rows, cols)).expect("launched");
        let row = |row: usize| from.host[row * 16 + 2..row * 16 + 2 + cols].to_vec();
        assert_eq!(
            values(gpu, &poisoned),
            (0..rows).flat_map(row).collect::<Vec<_>>()
        );
    }
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
