//! Products, and the LM head with its loss.

use super::*;

pub(super) fn products_agree<T: Number>(gpu: &Gpu) {
    let threads = Threads::single();
    let (rows, inner, cols) = (5, 24, 9);
    let (x, w) = (
        input::<T>(gpu, rows * inner, 1),
        input::<T>(gpu, cols * inner, 2),
    );
    let mut y = input::<T>(gpu, rows * cols, 3);
    let (x_mat, w_mat) = (x.device.mat(rows, inner), w.device.mat(cols, inner));
    linear::forward(gpu, 2.0, x_mat, w_mat, 0.5, &y.device.mat_mut(rows, cols)).expect("launched");
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
        let mut scratch = poison::<T>(gpu, linear_cross_entropy::chunk_rows(rows, vocab) * vocab);
        let (hidden_mat, head_mat) = (hidden.device.mat(rows, cols), head.device.mat(vocab, cols));
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
