//! What works on one number at a time: dropout, casts, sums.

use super::*;

pub(super) fn dropout_drops_the_same_numbers<T: Number>(gpu: &Gpu) {
    let (rows, cols, p) = (4, 70, 0.25);
    let keys: Vec<u64> = (0..rows as u64)
        .map(|row| crate::noise::derive(9, row))
        .collect();
    let device_keys = gpu.upload(&keys).expect("memory");
    let use_ = (3 << 8) | 5;
    let keys: Vec<u64> = keys
        .iter()
        .map(|&key| crate::noise::derive(key, use_))
        .collect();
    let device_keys = (device_keys.view(), use_);
    let x = input::<T>(gpu, rows * cols, 1);
    let mut out = poison::<T>(gpu, rows * cols);
    let x_mat = x.device.mat(rows, cols);
    noise::dropout(gpu, p, device_keys, x_mat, &out.mat_mut(rows, cols)).expect("launched");
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
    noise::dropout_backward(gpu, p, device_keys, x_mat, &dx_mat).expect("launched");
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
