//! Every kernel against the CPU's operation in f64, on the emulator and on a GPU if there is one: random inputs, ragged
//! lengths, outputs that hold NaNs before, in f32, f16 and bf16.

#![cfg_attr(
    feature = "cuda",
    expect(clippy::print_stderr, reason = "says what it skips")
)]

use half::{bf16, f16};

use super::memory::Number;
use super::{Buffer, Gpu, attention, cast, embedding, linear, linear_cross_entropy};
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

    /// Head dims of tensor cores and others, groups of heads, lengths around the tiles' own.
    pub(super) fn attention_agrees<T: Number>(gpu: &Gpu) {
        for (head_dim, num_heads, num_kv_heads) in [(64, 4, 2), (128, 2, 1), (24, 2, 1)] {
            let heads = heads(head_dim, num_heads, num_kv_heads);
            for lengths in [&[1_usize, 15, 16][..], &[17, 63], &[64, 65], &[0, 129]] {
                let case = AttentionCase::<T>::new(gpu, &heads, lengths);
                let (out, lse, dqkv) = case.run(gpu);
                let (expected_out, expected_lse, expected_dqkv) = case.expect();
                let what = format!("head dim {head_dim}, lengths {lengths:?}");
                close::<T>(&format!("out, {what}"), &out, &expected_out);
                close::<T>(&format!("lse, {what}"), &lse, &expected_lse);
                let (q, kv) = (num_heads * head_dim, num_kv_heads * head_dim);
                for (name, cols) in [("dq", 0..q), ("dk", q..q + kv), ("dv", q + kv..q + 2 * kv)] {
                    let part = |all: &[f64]| -> Vec<f64> {
                        all.chunks(q + 2 * kv)
                            .flat_map(|row| row[cols.clone()].to_vec())
                            .collect()
                    };
                    close::<T>(
                        &format!("{name}, {what}"),
                        &part(&dqkv),
                        &part(&expected_dqkv),
                    );
                }
            }
        }
    }

    /// What a sequence gets, and its gradients, have the same bits beside any other sequence of the same length.
    pub(super) fn attention_of_a_sequence_ignores_its_neighbours<T: Number>(gpu: &Gpu) {
        for head_dim in [64, 16] {
            let heads = heads(head_dim, 2, 1);
            let lengths = [37_usize, 70];
            let mut case = AttentionCase::<T>::new(gpu, &heads, &lengths);
            let (out, lse, dqkv) = case.run(gpu);
            let width = 4 * head_dim;
            let mut changed: Vec<f32> = case.qkv.host.iter().map(|&x| x as f32).collect();
            for value in &mut changed[..lengths[0] * width] {
                *value = -3.0 * *value + 1.0;
            }
            case.qkv = of_values(gpu, &changed);
            let (out_after, lse_after, dqkv_after) = case.run(gpu);
            assert_eq!(
                out[lengths[0] * 2 * head_dim..],
                out_after[lengths[0] * 2 * head_dim..]
            );
            assert_eq!(lse[lengths[0] * 2..], lse_after[lengths[0] * 2..]);
            assert_eq!(dqkv[lengths[0] * width..], dqkv_after[lengths[0] * width..]);
            assert_ne!(
                out[..lengths[0] * 2 * head_dim],
                out_after[..lengths[0] * 2 * head_dim]
            );
        }
    }

    fn heads(head_dim: usize, num_heads: usize, num_kv_heads: usize) -> Heads<f32> {
        Heads {
            num_heads,
            num_kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
        }
    }

    struct AttentionCase<T> {
        heads: Heads<f32>,
        seq_starts: Vec<u32>,
        qkv: Input<T>,
        dout: Input<T>,
    }

    impl<T: Number> AttentionCase<T> {
        fn new(gpu: &Gpu, heads: &Heads<f32>, lengths: &[usize]) -> Self {
            let mut seq_starts = vec![0_u32];
            for &length in lengths {
                seq_starts.push(seq_starts[seq_starts.len() - 1] + length as u32);
            }
            let rows = *seq_starts.last().expect("a sequence") as usize;
            let width = heads.num_heads * heads.head_dim;
            let all = width + 2 * heads.num_kv_heads * heads.head_dim;
            Self {
                heads: *heads,
                seq_starts,
                qkv: input(gpu, rows * all, 1),
                dout: input(gpu, rows * width, 2),
            }
        }

        fn rows(&self) -> usize {
            *self.seq_starts.last().expect("a sequence") as usize
        }

        fn widths(&self) -> (usize, usize) {
            let d = self.heads.head_dim;
            (self.heads.num_heads * d, self.heads.num_kv_heads * d)
        }

        fn run(&self, gpu: &Gpu) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
            let (rows, (q, kv)) = (self.rows(), self.widths());
            let sequences = attention::Sequences::new(gpu, &self.seq_starts).expect("memory");
            let all = self.qkv.device.mat(rows, q + 2 * kv);
            let qkv = attention::Qkv {
                q: all.cols(0..q),
                k: all.cols(q..q + kv),
                v: all.cols(q + kv..q + 2 * kv),
            };
            let mut out = poison::<T>(gpu, rows * q);
            let mut lse = poison::<f32>(gpu, rows * self.heads.num_heads);
            let (out_mat, lse_view) = (out.mat_mut(rows, q), lse.view_mut());
            attention::forward(gpu, &self.heads, &sequences, qkv, &out_mat, &lse_view)
                .expect("launched");
            let mut dqkv = poison::<T>(gpu, rows * (q + 2 * kv));
            let (dq, rest) = dqkv.mat_mut(rows, q + 2 * kv).split_cols(q);
            let (dk, dv) = rest.split_cols(kv);
            let saved = attention::Saved {
                out: out.mat(rows, q),
                lse: lse.view(),
            };
            let dout = self.dout.device.mat(rows, q);
            let grads = attention::QkvGrads { dq, dk, dv };
            attention::backward(gpu, &self.heads, &sequences, qkv, saved, dout, &grads)
                .expect("launched");
            (values(gpu, &out), values(gpu, &lse), values(gpu, &dqkv))
        }

        fn expect(&self) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
            let (rows, (q, kv)) = (self.rows(), self.widths());
            let threads = Threads::single();
            let heads = Heads {
                num_heads: self.heads.num_heads,
                num_kv_heads: self.heads.num_kv_heads,
                head_dim: self.heads.head_dim,
                scale: 1.0 / (self.heads.head_dim as f64).sqrt(),
            };
            let all = Mat::new(&self.qkv.host, rows, q + 2 * kv);
            let qkv = crate::attention::Qkv {
                q: all.cols(0..q),
                k: all.cols(q..q + kv),
                v: all.cols(q + kv..q + 2 * kv),
            };
            let mut out = vec![0.0; rows * q];
            let mut lse = vec![0.0; rows * heads.num_heads];
            let out_mat = MatMut::new(&mut out, rows, q);
            crate::attention::forward(&threads, &heads, &self.seq_starts, qkv, out_mat, &mut lse);
            let mut dqkv = vec![0.0; rows * (q + 2 * kv)];
            let (dq, rest) = MatMut::new(&mut dqkv, rows, q + 2 * kv).split_cols(q);
            let (dk, dv) = rest.split_cols(kv);
            let saved = crate::attention::Saved {
                out: Mat::new(&out, rows, q),
                lse: &lse,
            };
            let dout = Mat::new(&self.dout.host, rows, q);
            let grads = crate::attention::QkvGrads { dq, dk, dv };
            crate::attention::backward(&threads, &heads, &self.seq_starts, qkv, saved, dout, grads);
            (out, lse, dqkv)
        }
    }

    pub(super) fn paged_attention_agrees<T: Number>(gpu: &Gpu) {
        let threads = Threads::single();
        for (head_dim, num_heads, num_kv_heads, block_size) in [(64, 4, 2, 16), (24, 3, 1, 4)] {
            let heads_f32 = heads(head_dim, num_heads, num_kv_heads);
            let heads = Heads {
                num_heads,
                num_kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f64).sqrt(),
            };
            let context_lens = [1_u32, 7, 700, 40];
            let new_tokens = [1_u32, 3, 1, 40];
            let mut next = 0;
            let block_tables: Vec<Vec<u32>> = context_lens
                .iter()
                .map(|&len| {
                    let blocks = len.div_ceil(block_size as u32);
                    next += blocks;
                    (next - blocks..next).rev().collect()
                })
                .collect();
            let seq_starts = [0, 1, 4, 5, 45];
            let (rows, slots_in_all) = (45, next as usize * block_size);
            let (width, kv_width) = (num_heads * head_dim, num_kv_heads * head_dim);
            let mut keys = input::<T>(gpu, slots_in_all * kv_width, 1);
            let mut values_ = input::<T>(gpu, slots_in_all * kv_width, 2);
            let new = input::<T>(gpu, rows * 2 * kv_width, 3);
            let slots: Vec<u32> = (0..4)
                .flat_map(|s| {
                    let (len, new, table) = (context_lens[s], new_tokens[s], &block_tables[s]);
                    (len - new..len).map(move |token| {
                        let block = block_size as u32;
                        table[(token / block) as usize] * block + token % block
                    })
                })
                .collect();
            let device_slots = gpu.upload(&slots).expect("memory");
            let new_mat = new.device.mat(rows, 2 * kv_width);
            let host_new = Mat::new(&new.host, rows, 2 * kv_width);
            for (cols, pages) in [
                (0..kv_width, &mut keys),
                (kv_width..2 * kv_width, &mut values_),
            ] {
                let from = new_mat.cols(cols.clone());
                paged_attention::kv_scatter(
                    gpu,
                    from,
                    device_slots.view(),
                    &pages.device.view_mut(),
                )
                .expect("launched");
                crate::kv_scatter::forward(host_new.cols(cols), &slots, &mut pages.host);
                assert_eq!(values(gpu, &pages.device), pages.host);
            }
            let q = input::<T>(gpu, rows * width, 4);
            let host = crate::paged_attention::Sequences {
                seq_starts: &seq_starts,
                context_lens: &context_lens,
                block_tables: &block_tables,
            };
            let sequences =
                paged_attention::Sequences::new(gpu, &host, block_size).expect("memory");
            let pages = paged_attention::Pages {
                keys: keys.device.view(),
                values: values_.device.view(),
                block_size,
            };
            let mut out = poison::<T>(gpu, rows * width);
            let q_mat = q.device.mat(rows, width);
            let out_mat = out.mat_mut(rows, width);
            paged_attention::forward(gpu, &heads_f32, &sequences, &pages, q_mat, &out_mat)
                .expect("launched");
            let mut expected = vec![0.0; rows * width];
            let pages = crate::paged_attention::Pages {
                keys: &keys.host,
                values: &values_.host,
                block_size,
            };
            let host_q = Mat::new(&q.host, rows, width);
            let host_out = MatMut::new(&mut expected, rows, width);
            crate::paged_attention::forward(&threads, &heads, &host, &pages, host_q, host_out);
            check("out", gpu, &out, &expected);
        }
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

mod steps {
    use super::super::adamw::{Norm, Tensors, Trained};
    use super::*;
    use crate::adamw::AdamW;

    /// Parameters of several chunks, their gradients and moments.
    struct Run {
        device: Vec<[Buffer<f32>; 4]>,
        host: Vec<[Vec<f32>; 4]>,
    }

    const LENGTHS: [usize; 3] = [5, 4096, 9001];
    const ADAMW: AdamW = AdamW {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.1,
    };

    impl Run {
        fn new(gpu: &Gpu) -> Self {
            let host: Vec<[Vec<f32>; 4]> = LENGTHS
                .iter()
                .map(|&len| {
                    let seed = len as u64;
                    let squares = random::<f32>(len, seed + 3).iter().map(|x| x * x).collect();
                    [
                        random(len, seed),
                        random(len, seed + 1),
                        random(len, seed + 2),
                        squares,
                    ]
                })
                .collect();
            let upload = |values: &[Vec<f32>; 4]| {
                [0, 1, 2, 3].map(|i| gpu.upload(&values[i]).expect("memory"))
            };
            Self {
                device: host.iter().map(upload).collect(),
                host,
            }
        }

        fn step(&mut self, gpu: &Gpu, unscale: f64, max_norm: f64) -> Norm {
            let trained: Vec<Trained<'_>> = self
                .device
                .iter_mut()
                .map(|[param, grad, exp_avg, exp_avg_sq]| Trained {
                    param: param.view_mut(),
                    grad: grad.view(),
                    exp_avg: exp_avg.view_mut(),
                    exp_avg_sq: exp_avg_sq.view_mut(),
                })
                .collect();
            let mut tensors = Tensors::new(gpu, &trained).expect("memory");
            tensors.clip(gpu, unscale, max_norm).expect("launched");
            tensors.step(gpu, &ADAMW, 3).expect("launched");
            tensors.norm(gpu).expect("finished")
        }
    }

    #[test]
    fn a_step_agrees_with_clipping_and_loss_scaling() {
        for gpu in gpus() {
            for (unscale, max_norm) in [(1.0, 1.0), (1.0, 0.0), (1.0, 1e9), (0.125, 0.5)] {
                let mut run = Run::new(&gpu);
                let norm = run.step(&gpu, unscale, max_norm);
                let squares: f64 = run
                    .host
                    .iter()
                    .map(|of| crate::clip::sum_of_squares(&of[1]))
                    .sum();
                let expected = squares.sqrt() * unscale;
                assert!(norm.is_finite && (norm.norm / expected - 1.0).abs() < 1e-12);
                let threads = Threads::single();
                let coefficient = unscale * crate::clip::coefficient(expected, max_norm);
                for (host, device) in run.host.iter_mut().zip(&run.device) {
                    let [param, grad, exp_avg, exp_avg_sq] = host;
                    crate::clip::scale(&threads, coefficient, grad);
                    ADAMW.step(&threads, 3, param, grad, exp_avg, exp_avg_sq);
                    for (i, host) in [(0, param), (2, exp_avg), (3, exp_avg_sq)] {
                        let host: Vec<f64> = host.iter().map(|&x| f64::from(x)).collect();
                        check("after the step", &gpu, &device[i], &host);
                    }
                }
            }
        }
    }

    #[test]
    fn a_step_whose_gradients_overflow_changes_nothing() {
        for gpu in gpus() {
            for bad in [f32::INFINITY, f32::NAN] {
                let mut run = Run::new(&gpu);
                run.host[1][1][7] = bad;
                run.device[1][1] = gpu.upload(&run.host[1][1]).expect("memory");
                assert!(!run.step(&gpu, 1.0, 1.0).is_finite);
                for (host, device) in run.host.iter().zip(&run.device) {
                    for i in [0, 2, 3] {
                        assert_eq!(gpu.download(device[i].view()).expect("finished"), host[i]);
                    }
                }
            }
        }
    }

    #[test]
    fn two_runs_have_the_same_bits() {
        for gpu in gpus() {
            let after = || {
                let mut run = Run::new(&gpu);
                run.step(&gpu, 1.0, 1.0);
                let bits = |of: &[Buffer<f32>; 4]| gpu.download(of[0].view()).expect("finished");
                run.device.iter().map(bits).collect::<Vec<_>>()
            };
            assert_eq!(after(), after());
        }
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
