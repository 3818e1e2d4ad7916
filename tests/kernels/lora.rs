//! The kernels of `cuda/lora.cu` against the products in f64, and their dropout against [`qlora::ops::philox`].

use half::bf16;
use qlora::ops::philox::philox;

use crate::device_under_test::{Arg, Buffer, DeviceUnderTest, assert_kernel_close};
use crate::kernel_test;
use crate::random_values::{exact, random_bf16, round};

/// `x: [n, d]` with adapters of rank `r`; the launches that allow it split their sums into `splits`.
#[derive(Clone, Copy)]
struct Case {
    n: usize,
    d: usize,
    r: usize,
    adapters: usize,
    splits: usize,
}

/// One row, the usual ranks and odd ones, rows that 16-byte accesses can and cannot take, several blocks in each direction,
/// more splits than there is work for, and several adapters, whose ranks do and do not fill blocks and accesses.
const CASES: [Case; 12] = [
    case(1, 8, 1, 1),
    case(42, 136, 16, 1),
    case(130, 264, 64, 2),
    case(65, 520, 72, 3),
    case(5, 37, 3, 1),
    case(67, 131, 17, 2),
    case(3, 24, 8, 5),
    case(33, 128, 130, 1),
    case(67, 136, 16, 2).of(3),
    case(42, 264, 72, 1).of(2),
    case(21, 37, 3, 2).of(3),
    case(5, 24, 130, 1).of(2),
];

const fn case(n: usize, d: usize, r: usize, splits: usize) -> Case {
    Case {
        n,
        d,
        r,
        adapters: 1,
        splits,
    }
}

/// The last arguments of each kernel.
#[derive(Clone, Copy)]
struct Dropout {
    key: [u32; 2],
    /// Of the first adapter; the second word counts the others.
    stream: [u32; 2],
    threshold: u32,
}

const NO_DROPOUT: Dropout = Dropout {
    key: [1, 2],
    stream: [3, 4],
    threshold: 0,
};

/// A quarter is dropped.
const DROPOUT: Dropout = Dropout {
    threshold: 1 << 14,
    ..NO_DROPOUT
};

impl Dropout {
    fn keep_scale(&self) -> f32 {
        65_536.0 / (65_536 - self.threshold) as f32
    }

    /// The 16 random bits of an element for one of the adapters.
    fn number(&self, adapter: usize, element: usize) -> u32 {
        let call = (element / 8) as u64;
        let counter = [
            call as u32,
            (call >> 32) as u32,
            self.stream[0],
            self.stream[1] + adapter as u32,
        ];
        let word = philox(self.key, counter)[element % 8 / 2];
        word >> (16 * (element % 2)) & 0xffff
    }

    /// 0 or the scale of each element for one of the adapters.
    fn factors(&self, adapter: usize, elements: usize) -> Vec<f32> {
        let factor = |element| {
            if self.number(adapter, element) >= self.threshold {
                self.keep_scale()
            } else {
                0.0
            }
        };
        (0..elements).map(factor).collect()
    }

    fn args(&self) -> [Arg<'static>; 6] {
        [
            Arg::U32(self.key[0]),
            Arg::U32(self.key[1]),
            Arg::U32(self.stream[0]),
            Arg::U32(self.stream[1]),
            Arg::U32(self.threshold),
            Arg::F32(self.keep_scale()),
        ]
    }
}

impl Case {
    const fn of(self, adapters: usize) -> Self {
        Self { adapters, ..self }
    }

    fn sizes(&self) -> [Arg<'static>; 4] {
        [self.n, self.d, self.r, self.adapters].map(|size| Arg::U32(size as u32))
    }

    /// Ranks of all adapters together.
    fn ranks(&self) -> usize {
        self.adapters * self.r
    }

    fn x(&self) -> Vec<bf16> {
        random_bf16(1, self.n * self.d)
    }

    fn a(&self) -> Vec<bf16> {
        random_bf16(2, self.ranks() * self.d)
    }

    fn du(&self) -> Vec<bf16> {
        random_bf16(3, self.n * self.ranks())
    }

    /// Room for the sums of each split of a result, and what takes its place where there is one split.
    fn partial(&self, device: &DeviceUnderTest, results: usize) -> Option<Buffer> {
        (self.splits > 1).then(|| device.poisoned::<f32>(self.splits * results))
    }

    fn sum_splits(
        &self,
        device: &DeviceUnderTest,
        kernel: &str,
        partial: &Option<Buffer>,
        result: &Buffer,
        count: usize,
    ) {
        if let Some(partial) = partial {
            device.launch(
                kernel,
                [2, 1, 1],
                0,
                &[
                    Arg::Buffer(partial),
                    Arg::U32(self.splits as u32),
                    Arg::U64(count as u64),
                    Arg::Buffer(result),
                ],
            );
        }
    }

    fn down(
        &self,
        device: &DeviceUnderTest,
        x: &[bf16],
        a: &[bf16],
        dropout: Dropout,
    ) -> Vec<bf16> {
        let (x, a) = (device.upload(x), device.upload(a));
        let count = self.n * self.ranks();
        let u = device.poisoned::<bf16>(count);
        let partial = self.partial(device, count);
        let blocks = self.n.div_ceil(64) * self.adapters * self.r.div_ceil(64);
        let mut args = vec![Arg::Buffer(&x), Arg::Buffer(&a)];
        args.extend(self.sizes());
        args.extend([Arg::Buffer(&u), or_null(&partial)]);
        args.extend(dropout.args());
        device.launch(
            "lora_down_bf16",
            [blocks as u32, self.splits as u32, 1],
            0,
            &args,
        );
        self.sum_splits(device, "lora_down_sum_bf16", &partial, &u, count);
        device.download(&u)
    }

    fn grad_a(
        &self,
        device: &DeviceUnderTest,
        x: &[bf16],
        du: &[bf16],
        before: f32,
        dropout: Dropout,
    ) -> Vec<f32> {
        let (x, du) = (device.upload(x), device.upload(du));
        let count = self.ranks() * self.d;
        let d_a = device.upload(&vec![before; count]);
        let partial = self.partial(device, count);
        let blocks = self.d.div_ceil(128) * self.adapters * self.r.div_ceil(64);
        let mut args = vec![Arg::Buffer(&x), Arg::Buffer(&du)];
        args.extend(self.sizes());
        args.extend([Arg::Buffer(&d_a), or_null(&partial)]);
        args.extend(dropout.args());
        device.launch(
            "lora_grad_a_bf16",
            [blocks as u32, self.splits as u32, 1],
            0,
            &args,
        );
        self.sum_splits(device, "lora_grad_a_sum_f32", &partial, &d_a, count);
        device.download(&d_a)
    }

    fn up(
        &self,
        device: &DeviceUnderTest,
        du: &[bf16],
        a: &[bf16],
        dx: &[bf16],
        dropout: Dropout,
    ) -> Vec<bf16> {
        let [du, a, dx] = [du, a, dx].map(|values| device.upload(values));
        let grid = [self.d.div_ceil(128) as u32, self.n.div_ceil(64) as u32, 1];
        let mut args = vec![Arg::Buffer(&du), Arg::Buffer(&a)];
        args.extend(self.sizes());
        args.push(Arg::Buffer(&dx));
        args.extend(dropout.args());
        device.launch("lora_up_bf16", grid, 0, &args);
        device.download(&dx)
    }
}

fn or_null(buffer: &Option<Buffer>) -> Arg<'_> {
    buffer.as_ref().map_or(Arg::Null, Arg::Buffer)
}

/// `sum over k of a(i, k) b(k, j)` for each i and j, in f64 and in f32.
fn product(
    [rows, inner, cols]: [usize; 3],
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> (Vec<f64>, Vec<f32>) {
    let (a, b) = (&a, &b);
    let of_element = |i: usize, j: usize| {
        let terms = (0..inner).map(move |k| (a(i, k), b(k, j)));
        let exact: f64 = terms
            .clone()
            .map(|(a, b)| f64::from(a) * f64::from(b))
            .sum();
        let low_precision: f32 = terms.map(|(a, b)| a * b).sum();
        (exact, low_precision)
    };
    (0..rows * cols)
        .map(|e| of_element(e / cols, e % cols))
        .unzip()
}

/// What dropout leaves of `x` for each adapter.
fn dropped(x: &[bf16], case: Case, dropout: Dropout) -> Vec<Vec<f32>> {
    let for_adapter = |adapter| {
        let factors = dropout.factors(adapter, x.len());
        let kept = x.iter().zip(factors);
        kept.map(|(x, factor)| x.to_f32() * factor).collect()
    };
    (0..case.adapters).map(for_adapter).collect()
}

kernel_test!(down_multiplies_what_dropout_leaves_of_x, |device| {
    for case in CASES {
        let Case { n, d, r, .. } = case;
        for dropout in [NO_DROPOUT, DROPOUT] {
            let (x, a) = (case.x(), case.a());
            let kept = dropped(&x, case, dropout);
            // The ranks of the adapters are the columns of u, one adapter after another.
            let (mut u, mut rounded) = (Vec::new(), Vec::new());
            for row in 0..n {
                for (adapter, kept) in kept.iter().enumerate() {
                    let a = &a[adapter * r * d..];
                    let x = &kept[row * d..];
                    let (row, _) = product([1, d, r], |_, k| x[k], |k, j| a[j * d + k].to_f32());
                    rounded.extend(round(&row));
                    u.extend(row);
                }
            }
            let got = case.down(device, &x, &a, dropout);
            assert_kernel_close("u", &got, &u, &rounded);
        }
    }
});

kernel_test!(
    grad_a_adds_the_product_with_what_dropout_leaves_of_x,
    |device| {
        for case in CASES {
            let Case { n, d, r, .. } = case;
            for dropout in [NO_DROPOUT, DROPOUT] {
                let (x, du) = (case.x(), case.du());
                let (mut d_a, mut low_precision) = (Vec::new(), Vec::new());
                for (adapter, kept) in dropped(&x, case, dropout).iter().enumerate() {
                    let du = |k: usize, i: usize| du[k * case.ranks() + adapter * r + i];
                    let (exact, low) =
                        product([r, n, d], |i, k| du(k, i).to_f32(), |k, j| kept[k * d + j]);
                    d_a.extend(exact.iter().map(|d_a| d_a + 0.25));
                    low_precision.extend(low.iter().map(|d_a| d_a + 0.25));
                }
                let got = case.grad_a(device, &x, &du, 0.25, dropout);
                assert_kernel_close("d_a", &got, &d_a, &low_precision);
            }
        }
    }
);

kernel_test!(up_adds_what_dropout_leaves_of_the_products, |device| {
    for case in CASES {
        let Case { n, d, r, .. } = case;
        for dropout in [NO_DROPOUT, DROPOUT] {
            let (du, a, before) = (case.du(), case.a(), random_bf16(4, n * d));
            let mut dx = exact(&before);
            // A result in bf16 is rounded after each adapter.
            let mut rounded = before.clone();
            for adapter in 0..case.adapters {
                let du = |i: usize, k: usize| du[i * case.ranks() + adapter * r + k];
                let a = &a[adapter * r * d..];
                let (product, _) = product(
                    [n, r, d],
                    |i, k| du(i, k).to_f32(),
                    |k, j| a[k * d + j].to_f32(),
                );
                let factors = exact(&dropout.factors(adapter, n * d));
                for (i, (product, factor)) in product.into_iter().zip(factors).enumerate() {
                    dx[i] += factor * product;
                    rounded[i] = bf16::from_f64(rounded[i].to_f64() + factor * product);
                }
            }
            let got = case.up(device, &du, &a, &before, dropout);
            assert_kernel_close("dx", &got, &dx, &rounded);
        }
    }
});

/// The identity, with which a product shows its other factor.
fn identity(size: usize) -> Vec<bf16> {
    let one_on_diagonal = |i| {
        if i % (size + 1) == 0 {
            bf16::ONE
        } else {
            bf16::ZERO
        }
    };
    (0..size * size).map(one_on_diagonal).collect()
}

kernel_test!(the_three_kernels_drop_what_philox_says, |device| {
    // The threshold is the number of one element, which is just kept: of an odd one, of an even one, and of one in a row that
    // does not start at the first of eight numbers.
    for ((n, d), just_kept) in [((40, 72), 29), ((40, 72), 30), ((21, 37), 50)] {
        let dropout = Dropout {
            threshold: DROPOUT.number(0, just_kept),
            ..DROPOUT
        };
        let of_rank = |r| case(n, d, r, 1);
        let ones = |count| vec![bf16::ONE; count];
        let factors = dropout.factors(0, n * d);
        let shown_by_down = of_rank(d).down(device, &ones(n * d), &identity(d), dropout);
        assert_eq!(shown_by_down, round(&factors), "down, [{n}, {d}]");
        let shown_by_grad_a = of_rank(n).grad_a(device, &ones(n * d), &identity(n), 0.0, dropout);
        assert_eq!(shown_by_grad_a, factors, "grad_a, [{n}, {d}]");
        let zeros = vec![bf16::ZERO; n * d];
        let shown_by_up = of_rank(n).up(device, &identity(n), &ones(n * d), &zeros, dropout);
        assert_eq!(shown_by_up, round(&factors), "up, [{n}, {d}]");
    }
});

kernel_test!(a_tenth_is_dropped_where_a_tenth_is_asked_for, |device| {
    let case = case(64, 1024, 1, 1);
    let elements = case.n * case.d;
    let dropout = Dropout {
        threshold: 6554,
        ..NO_DROPOUT
    };
    let (du, a) = (vec![bf16::ONE; case.n], vec![bf16::ONE; case.d]);
    let dx = case.up(device, &du, &a, &vec![bf16::ZERO; elements], dropout);
    let dropped = dx.iter().filter(|&&dx| dx == bf16::ZERO).count() as f64;
    // Four standard deviations.
    let allowed = 4.0 * (elements as f64 * 0.1 * 0.9).sqrt();
    let expected = 0.1 * elements as f64;
    assert!(
        (dropped - expected).abs() < allowed,
        "{dropped} of {elements}"
    );
});

kernel_test!(without_dropout_the_random_numbers_have_no_part, |device| {
    let case = CASES[1].of(3);
    let other_numbers = Dropout {
        key: [7, 8],
        stream: [9, 10],
        ..NO_DROPOUT
    };
    let (x, a, du) = (case.x(), case.a(), case.du());
    let all = |dropout| {
        (
            case.down(device, &x, &a, dropout),
            case.grad_a(device, &x, &du, 0.0, dropout),
            case.up(device, &du, &a, &x, dropout),
        )
    };
    assert!(all(NO_DROPOUT) == all(other_numbers));
});
