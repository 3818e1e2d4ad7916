//! The randomized singular value decomposition finds the best approximation of its rank, with any number of threads.

use candle_core::Device;
use qlora::ops::low_rank::{
    PowerIterations, SvdOptions, TruncatedSvd, leading_qr, subtract_product, truncated_svd,
};
use qlora::ops::philox::Normal;

const CONVERGED: PowerIterations = PowerIterations::UntilConverged { tolerance: 1e-7 };

fn options(rank: usize, power_iterations: PowerIterations) -> SvdOptions {
    SvdOptions {
        rank,
        power_iterations,
        seed: 7,
        device: Device::Cpu,
    }
}

/// A matrix with the singular values `values` and random vectors: a sum of outer products of orthonormal vectors.
fn matrix_with(values: &[f32], (m, n): (usize, usize)) -> Vec<f32> {
    let random = |len: usize, stream: u32| {
        let mut normal = Normal::new(11, [stream, 0]);
        (0..len).map(|_| normal.next_f32()).collect::<Vec<f32>>()
    };
    let count = values.len();
    // The first columns of a random matrix made orthonormal.
    let orthonormal = |len: usize, stream: u32| {
        let random = random(len * count, stream);
        leading_qr(&random, (len, count), count, &Device::Cpu)
            .unwrap()
            .q
    };
    let (u, v) = (orthonormal(m, 1), orthonormal(n, 2));
    let mut b = vec![0f32; m * count];
    for (t, &value) in values.iter().enumerate() {
        (0..m).for_each(|i| b[i * count + t] = u[t * m + i] * value);
    }
    let mut w = vec![0f32; m * n];
    subtract_product(&mut w, &b, &v, count, -1.0);
    w
}

/// `|W - left^T diag(values) right|`.
fn error(w: &[f32], svd: &TruncatedSvd, m: usize) -> f64 {
    let rank = svd.values.len();
    let mut b = vec![0f32; m * rank];
    for (t, &value) in svd.values.iter().enumerate() {
        (0..m).for_each(|i| b[i * rank + t] = svd.left[t * m + i] * value);
    }
    let mut rest = w.to_vec();
    subtract_product(&mut rest, &b, &svd.right, rank, 1.0);
    norm(&rest)
}

fn norm(values: &[f32]) -> f64 {
    let squares = values.iter().map(|&v| f64::from(v).powi(2));
    squares.sum::<f64>().sqrt()
}

/// Like the weights of a language model: a few large values and a long tail.
fn long_tail(count: usize) -> Vec<f32> {
    (1..=count).map(|i| 10.0 / (i as f32).sqrt()).collect()
}

#[test]
fn the_singular_values_are_found_and_the_error_is_that_of_the_tail() {
    // Exact below 128, randomized above; wide, tall and square.
    for (m, n) in [(40, 90), (90, 40), (200, 333), (333, 200), (150, 150)] {
        let values = long_tail(m.min(n));
        let w = matrix_with(&values, (m, n));
        let rank = 8;
        let svd = truncated_svd(&w, (m, n), &options(rank, CONVERGED)).unwrap();
        for (found, expected) in svd.values.iter().zip(&values) {
            assert!((found / expected - 1.0).abs() < 1e-3, "{found} {expected}");
        }
        let tail = norm(&values[rank..]);
        let error = error(&w, &svd, m);
        assert!(error < 1.0001 * tail, "{m} x {n}: {error} {tail}");
        assert!(error > 0.9999 * tail, "nothing of this rank is better");
    }
}

#[test]
fn few_power_iterations_are_close_and_more_are_closer() {
    let (m, n, rank) = (300, 400, 16);
    let values = long_tail(300);
    let w = matrix_with(&values, (m, n));
    let tail = norm(&values[rank..]);
    let errors = [0, 1, 4, 16].map(|count| {
        let fixed = options(rank, PowerIterations::Fixed(count));
        let svd = truncated_svd(&w, (m, n), &fixed).unwrap();
        assert_eq!(svd.power_iterations, count);
        error(&w, &svd, m) / tail
    });
    assert!(errors.is_sorted_by(|a, b| a >= b), "{errors:?}");
    assert!(errors[0] < 1.2 && errors[3] < 1.0001, "{errors:?}");
}

#[test]
fn a_matrix_of_lower_rank_is_given_back() {
    let (m, n) = (140, 160);
    let w = matrix_with(&[3.0, 1.0], (m, n));
    let svd = truncated_svd(&w, (m, n), &options(5, CONVERGED)).unwrap();
    assert!(error(&w, &svd, m) < 1e-5);
    assert!(
        svd.values[2..].iter().all(|&s| s < 1e-5),
        "{:?}",
        svd.values
    );
    let zeros = vec![0.0; m * n];
    let svd = truncated_svd(&zeros, (m, n), &options(5, CONVERGED)).unwrap();
    assert!(svd.values.iter().all(|&s| s == 0.0));
    let factors = [svd.left, svd.right].concat();
    assert!(factors.iter().all(|v| v.is_finite()));
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let (m, n) = (260, 600);
    let w = matrix_with(&long_tail(260), (m, n));
    let with_threads = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let pool = pool.build().unwrap();
        pool.install(|| truncated_svd(&w, (m, n), &options(12, PowerIterations::Fixed(3))))
    };
    let bits = |svd: &TruncatedSvd| -> Vec<u32> {
        let all = [&svd.left, &svd.values, &svd.right].into_iter().flatten();
        all.map(|v| v.to_bits()).collect()
    };
    let one = with_threads(1).unwrap();
    for threads in [2, 5] {
        assert!(bits(&with_threads(threads).unwrap()) == bits(&one));
    }
}

#[test]
fn the_first_columns_are_the_product_of_q_and_r() {
    let (m, n, rank) = (70, 90, 6);
    let w = matrix_with(&long_tail(70), (m, n));
    let qr = leading_qr(&w, (m, n), rank, &Device::Cpu).unwrap();
    let mut b = vec![0f32; m * rank];
    for t in 0..rank {
        (0..m).for_each(|i| b[i * rank + t] = qr.q[t * m + i]);
    }
    let mut rest = w.clone();
    subtract_product(&mut rest, &b, &qr.r, rank, 1.0);
    for row in rest.chunks(n) {
        assert!(
            row[..rank].iter().all(|v| v.abs() < 1e-5),
            "{:?}",
            &row[..rank]
        );
    }
    // What is left is orthogonal to Q.
    for q in qr.q.chunks(m) {
        for j in 0..n {
            let dot: f64 = (0..m)
                .map(|i| f64::from(q[i]) * f64::from(rest[i * n + j]))
                .sum();
            assert!(dot.abs() < 1e-4, "{dot}");
        }
    }
}

#[test]
fn a_rank_larger_than_the_matrix_is_an_error() {
    let w = vec![1.0; 6 * 9];
    for rank in [0, 7] {
        let error = truncated_svd(&w, (6, 9), &options(rank, CONVERGED)).unwrap_err();
        assert!(error.to_string().contains("rank from 1 to 6"), "{error}");
        assert!(leading_qr(&w, (6, 9), rank, &Device::Cpu).is_err());
    }
}
