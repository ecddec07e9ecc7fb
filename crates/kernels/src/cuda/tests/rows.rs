//! What works on rows: norms, rotations, SwiGLU, tables.

use super::*;

pub(super) fn rms_norm_agrees<T: Number>(gpu: &Gpu) {
    let threads = Threads::single();
    for (rows, cols, stride) in [(3, 64, 64), (2, 7, 9), (5, 896, 912), (1, 2056, 2056)] {
        let (x, weight) = (input::<T>(gpu, rows * cols, 1), input::<T>(gpu, cols, 2));
        let mut y = poison::<T>(gpu, rows * stride);
        let mut inv_rms = poison::<f32>(gpu, rows);
        let (mut expected, mut roots) = (vec![0.0; rows * cols], vec![0.0; rows]);
        let x_mat = x.device.mat(rows, cols);
        let weight_view = weight.device.view();
        rms_norm::forward(
            gpu,
            x_mat,
            weight_view,
            1e-6,
            &y.mat_mut(rows, stride).cols(0..cols),
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
        close::<T>("norm", &together(&values(gpu, &y), cols, stride), &expected);
        check::<f32>("roots", gpu, &inv_rms, &roots);

        let mut residual = input::<T>(gpu, rows * cols, 3);
        let mut y = poison::<T>(gpu, rows * stride);
        rms_norm::add_forward(
            gpu,
            x.device.view(),
            residual.device.view_mut(),
            weight.device.view(),
            1e-6,
            &y.mat_mut(rows, stride).cols(0..cols),
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
        let y = together(&values(gpu, &y), cols, stride);
        close::<T>("norm of the sum", &y, &expected);

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
        &y.mat_mut(rows, cols),
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

/// In one pass what takes four: the bias, the turn, keys and values into their slots.
pub(super) fn qkv_is_finished_at_once<T: Number>(gpu: &Gpu) {
    let threads = Threads::single();
    for (head_dim, with_bias) in [(64, true), (6, false)] {
        let heads = Heads {
            num_heads: 4,
            num_kv_heads: 2,
            head_dim,
            scale: 1.0,
        };
        let (q_dim, kv_dim) = (4 * head_dim, 2 * head_dim);
        let (width, stride) = (q_dim + 2 * kv_dim, q_dim + 2 * kv_dim + 8);
        let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 0.5_f32.powi(i as i32)).collect();
        let (positions, slots) = ([0_u32, 7, 1, 99], [5_u32, 0, 3, 4]);
        let table = crate::rope::Table::<f32>::new(&frequencies, 100, 1.0);
        let there = rope::Table::new(gpu, &table).expect("memory");
        let exact = crate::rope::Table::<f64>::new(&frequencies, 100, 1.0);
        let (bias, x) = (input::<T>(gpu, width, 2), input::<T>(gpu, 4 * stride, 3));

        let mut expected = x.host.clone();
        let mut rows = MatMut::new(&mut expected, 4, stride).split_cols(width).0;
        if with_bias {
            crate::linear::add_bias(&threads, &bias.host, rows.reborrow());
        }
        let (turned, _) = rows.split_cols(q_dim + kv_dim);
        crate::rope::forward(&threads, &exact, &positions, turned);

        for paged in [false, true] {
            let mut qkv = gpu.alloc::<T>(4 * stride).expect("memory");
            gpu.copy(x.device.view(), &qkv.view_mut()).expect("copied");
            let there_positions = gpu.upload(&positions).expect("memory");
            let there_slots = gpu.upload(&slots).expect("memory");
            let mut pages = [poison::<T>(gpu, 6 * kv_dim), poison::<T>(gpu, 6 * kv_dim)];
            let [keys, values_] = &mut pages;
            let new = rope::NewPages {
                slots: there_slots.view(),
                keys: keys.view_mut(),
                values: values_.view_mut(),
            };
            let mat = qkv.mat_mut(4, stride).cols(0..width);
            let bias = with_bias.then(|| bias.device.view());
            let positions = there_positions.view();
            let new = paged.then_some(&new);
            rope::finish_qkv(gpu, &heads, &there, positions, bias, &mat, new).expect("launched");
            let found = values(gpu, &qkv);
            let columns = if paged { q_dim } else { width };
            for row in 0..4 {
                let cols = row * stride..row * stride + columns;
                close::<T>("in place", &found[cols.clone()], &expected[cols]);
            }
            if !paged {
                continue;
            }
            for (page, start) in pages.iter().zip([q_dim, q_dim + kv_dim]) {
                let page = values(gpu, page);
                for (row, &slot) in slots.iter().enumerate() {
                    let slot = slot as usize * kv_dim..(slot as usize + 1) * kv_dim;
                    let cols = row * stride + start..row * stride + start + kv_dim;
                    close::<T>("in its slot", &page[slot], &expected[cols]);
                }
                assert!(
                    page[kv_dim..3 * kv_dim].iter().all(|x| x.is_nan()),
                    "others' slots"
                );
            }
        }
    }
}

pub(super) fn swiglu_agrees<T: Number>(gpu: &Gpu) {
    let threads = Threads::single();
    for (rows, inner, gap) in [(3, 48, 0), (2, 5, 1), (4, 4864, 16)] {
        let mut gate_up = input::<T>(gpu, rows * 2 * inner, 1);
        let (stride, h_stride) = (2 * (inner + gap), inner + gap);
        let mut device = apart::<T>(gpu, &gate_up.host, 2 * inner, stride);
        let mut h = poison::<T>(gpu, rows * h_stride);
        swiglu::forward(
            gpu,
            device.mat(rows, stride).cols(0..2 * inner),
            &h.mat_mut(rows, h_stride).cols(0..inner),
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
        let h = together(&values(gpu, &h), inner, h_stride);
        close::<T>("h", &h, &expected);

        let mut dh = input::<T>(gpu, rows * inner, 2);
        let mut h = apart::<T>(gpu, &dh.host, inner, h_stride);
        swiglu::backward_recompute(
            gpu,
            &device.mat_mut(rows, stride).cols(0..2 * inner),
            &h.mat_mut(rows, h_stride).cols(0..inner),
        )
        .expect("launched");
        let mat = MatMut::new(&mut gate_up.host, rows, 2 * inner);
        let (gate, up) = mat.split_cols(inner);
        let dh_mat = MatMut::new(&mut dh.host, rows, inner);
        crate::swiglu::backward_recompute(&threads, gate, up, dh_mat);
        let gradient = together(&values(gpu, &device), 2 * inner, stride);
        close::<T>("the gradient of gate and up", &gradient, &gate_up.host);
        let h = together(&values(gpu, &h), inner, h_stride);
        close::<T>("h once more", &h, &dh.host);
    }
}

pub(super) fn embedding_agrees<T: Number>(gpu: &Gpu) {
    for (cols, stride) in [(64, 64), (64, 72), (5, 6)] {
        let ids = [3_u32, 0, 3, 6, 3];
        let mut table = input::<T>(gpu, 7 * cols, 1);
        let device_ids = gpu.upload(&ids).expect("memory");
        let mut out = poison::<T>(gpu, ids.len() * stride);
        let out_mat = out.mat_mut(ids.len(), stride).cols(0..cols);
        embedding::forward(gpu, table.device.mat(7, cols), device_ids.view(), &out_mat)
            .expect("launched");
        let row = |id: &u32| *id as usize * cols..(*id as usize + 1) * cols;
        let expected: Vec<f64> = ids
            .iter()
            .flat_map(|id| table.host[row(id)].iter().copied())
            .collect();
        assert_eq!(together(&values(gpu, &out), cols, stride), expected);

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
        let from = apart::<T>(gpu, &dout.host, cols, stride);
        let from = from.mat(ids.len(), stride).cols(0..cols).rows(0..2);
        let mut spread = gpu.zeros::<T>(7 * stride).expect("memory");
        let to = spread.mat_mut(7, stride).cols(0..cols);
        embedding::scatter(gpu, from, device_places.view(), &to).expect("launched");
        let mut expected = vec![0.0; 7 * stride];
        expected[4 * stride..][..cols].copy_from_slice(&dout.host[..cols]);
        expected[stride..][..cols].copy_from_slice(&dout.host[cols..2 * cols]);
        assert_eq!(values(gpu, &spread), expected);
    }
}
