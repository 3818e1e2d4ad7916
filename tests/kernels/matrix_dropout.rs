//! The kernels of `cuda/matrix_dropout.cu` keep bits as they are and drop whole columns of A and rows of B.

use half::bf16;
use qlora::ops::philox::philox;

use crate::device_under_test::Arg;
use crate::kernel_test;
use crate::random_values::random_bf16;

/// (in, out, rank): rows of whole 16 bytes, of either factor alone, of none; one element; more than a block takes at once.
const SIZES: [(usize, usize, usize); 6] = [
    (64, 40, 16),
    (136, 21, 3),
    (37, 24, 8),
    (21, 13, 5),
    (1, 1, 1),
    (520, 130, 24),
];

const KEY: [u32; 2] = [5, 6];
const LAYER: u32 = 3;
/// Of A and of B.
const STREAMS: [u32; 2] = [10, 11];
/// Three eighths are dropped.
const THRESHOLD: u32 = 3 << 13;

fn is_kept(stream: u32, feature: usize) -> bool {
    let counter = [feature as u32 / 8, 0, LAYER, stream];
    let word = philox(KEY, counter)[feature % 8 / 2];
    word >> (16 * (feature % 2)) & 0xffff >= THRESHOLD
}

/// Whether each element of A, or of B, is kept.
fn kept(factor: usize, (d_in, d_out, r): (usize, usize, usize)) -> Vec<bool> {
    let feature = |i| if factor == 0 { i % d_in } else { i / r };
    let count = r * [d_in, d_out][factor];
    (0..count)
        .map(|i| is_kept(STREAMS[factor], feature(i)))
        .collect()
}

fn numbers((d_in, d_out, r): (usize, usize, usize)) -> [Arg<'static>; 9] {
    let sizes = [d_in, d_out, r].map(|size| size as u32);
    let [d_in, d_out, r] = sizes.map(Arg::U32);
    let masks = [KEY[0], KEY[1], LAYER, STREAMS[0], STREAMS[1], THRESHOLD];
    let [k0, k1, layer, a, b, threshold] = masks.map(Arg::U32);
    [d_in, d_out, r, k0, k1, layer, a, b, threshold]
}

kernel_test!(what_is_kept_is_copied_and_the_rest_is_zero, |device| {
    for size in SIZES {
        let (d_in, d_out, r) = size;
        let factors = [random_bf16(1, r * d_in), random_bf16(2, d_out * r)];
        let on_device = factors.each_ref().map(|factor| device.upload(factor));
        let masked = factors
            .each_ref()
            .map(|factor| device.poisoned::<bf16>(factor.len()));
        let mut arguments = vec![Arg::Buffer(&on_device[0]), Arg::Buffer(&on_device[1])];
        arguments.extend(numbers(size));
        arguments.extend(masked.iter().map(Arg::Buffer));
        device.launch("matrix_dropout_forward_bf16", [2, 1, 1], 0, &arguments);
        for (factor, values) in factors.iter().enumerate() {
            let of = values.iter().zip(kept(factor, size));
            let expected: Vec<bf16> = of
                .map(|(value, kept)| if kept { *value } else { bf16::ZERO })
                .collect();
            let found = device.download::<bf16>(&masked[factor]);
            assert_eq!(found, expected, "factor {factor}, {size:?}");
        }
    }
});

kernel_test!(what_is_kept_of_a_gradient_is_added, |device| {
    for size in SIZES {
        let (d_in, d_out, r) = size;
        let counts = [r * d_in, d_out * r];
        let grads = counts.map(|count| (0..count).map(|i| i as f32 + 0.5).collect::<Vec<_>>());
        // Zeros with a sign: adding nothing is not adding zero.
        let sums = counts.map(|count| vec![-0.0f32; count]);
        let on_device = grads.each_ref().map(|grad| device.upload(grad));
        let sums_on_device = sums.each_ref().map(|sum| device.upload(sum));
        let mut arguments = vec![Arg::Buffer(&on_device[0]), Arg::Buffer(&on_device[1])];
        arguments.extend(numbers(size));
        arguments.extend(sums_on_device.iter().map(Arg::Buffer));
        device.launch("matrix_dropout_backward_f32", [2, 1, 1], 0, &arguments);
        for (factor, grad) in grads.iter().enumerate() {
            let of = grad.iter().zip(kept(factor, size));
            let expected: Vec<u32> = of
                .map(|(grad, kept)| if kept { *grad } else { -0.0 }.to_bits())
                .collect();
            let found = device.download::<f32>(&sums_on_device[factor]);
            let found: Vec<u32> = found.into_iter().map(f32::to_bits).collect();
            assert_eq!(found, expected, "factor {factor}, {size:?}");
        }
    }
});
