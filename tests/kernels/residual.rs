//! The kernel of `cuda/residual.cu` gives the bits of a sum in f32, rounded once.

use half::bf16;

use crate::device_under_test::Arg;
use crate::kernel_test;
use crate::random_values::random_bf16;

/// One element, short of a vector of eight, a tail, and more than one block takes at once.
const SIZES: [usize; 5] = [1, 7, 42, 2053, 5000];

kernel_test!(the_sum_is_rounded_once_wherever_it_goes, |device| {
    for n in SIZES {
        let (x, branch) = (random_bf16(1, n), random_bf16(2, n));
        let sum = |(x, branch): (&bf16, &bf16)| bf16::from_f32(x.to_f32() + branch.to_f32());
        let expected: Vec<bf16> = x.iter().zip(&branch).map(sum).collect();
        let (x, branch) = (device.upload(&x), device.upload(&branch));
        let apart = device.poisoned::<bf16>(n);
        for sum in [&apart, &branch] {
            device.launch(
                "residual_forward_bf16",
                [2, 1, 1],
                0,
                &[
                    Arg::Buffer(&x),
                    Arg::Buffer(&branch),
                    Arg::U64(n as u64),
                    Arg::Buffer(sum),
                ],
            );
            assert_eq!(device.download::<bf16>(sum), expected, "{n} elements");
        }
    }
});
