//! Products in bf16 against the same products of the rounded numbers in f64, by every kind of instructions that there is; all
//! products with one thread against those with many.

use super::*;
use crate::quant::{DenseTensor, Params4bit, QuantizeOptions};

/// Numbers of about 1, of which the product takes what bf16 leaves.
struct Numbers(u32);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    fn take(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }

    /// Where a matrix of that shape can be read, whichever way.
    fn matrix(&mut self, rows: usize, cols: usize) -> Owned {
        let stride = rows.max(cols) + 3;
        let data = self.take(stride * stride);
        Owned { data, stride }
    }
}

struct Owned {
    data: Vec<f32>,
    stride: usize,
}

impl Owned {
    fn mat(&self, rows: usize, cols: usize, is_transposed: bool) -> Mat<'_> {
        match is_transposed {
            false => Mat::strided(&self.data, rows, cols, self.stride),
            true => Mat::strided(&self.data, cols, rows, self.stride).t(),
        }
    }
}

type Product = Box<dyn Fn(&mut MatMut<'_>, Into, &[Term<'_>]) + Sync>;

/// Every way to make a product here.
fn ways() -> Vec<(String, Product)> {
    let mut ways: Vec<(String, Product)> =
        vec![("rounded".into(), Box::new(super::sum_of_rounded))];
    #[cfg(target_arch = "x86_64")]
    if let Some(best) = bf16::available() {
        for instructions in [bf16::Instructions::Avx512Bf16, best] {
            ways.push((
                format!("{instructions:?}"),
                Box::new(move |dst, into, terms| bf16::product(instructions, dst, into, terms)),
            ));
        }
    }
    ways
}

/// Of each element: its value, and the sum of what it is made of without signs.
fn exact(dst: &[f32], into: Into, terms: &[Term<'_>], cols: usize) -> Vec<(f64, f64)> {
    let mut sums: Vec<(f64, f64)> = dst
        .iter()
        .map(|&value| match into {
            Into::Overwrite => (0.0, 0.0),
            Into::Add => (value.into(), value.abs().into()),
        })
        .collect();
    for Term { lhs, rhs, factor } in terms {
        let Lhs::Bf16(lhs) = lhs else { unreachable!() };
        let k = lhs.cols;
        let lhs = lhs.rounded(1.0);
        let rhs = with_values(rhs, |rhs| rhs.rounded(*factor));
        for (at, sum) in sums.iter_mut().enumerate() {
            let (row, col) = (at / cols, at % cols);
            for i in 0..k {
                let product = f64::from(lhs[row * k + i]) * f64::from(rhs[i * cols + col]);
                sum.0 += product;
                sum.1 += product.abs();
            }
        }
    }
    sums
}

/// Holds each way, also with left-hand sides that are packed before, against the exact sum.
fn check(terms: &[Term<'_>], rows: usize, cols: usize) {
    let steps: usize = terms.iter().map(|term| term.rhs.dims().0).sum();
    let bound = (steps + 4) as f64 * f64::from(f32::EPSILON);
    let shared: Vec<_> = terms
        .iter()
        .map(|term| match term.lhs {
            Lhs::Bf16(lhs) => SharedLhs::new(lhs, ComputeDtype::Bf16),
            _ => unreachable!(),
        })
        .collect();
    let packed: Vec<_> = terms
        .iter()
        .zip(&shared)
        .map(|(term, lhs)| Term {
            lhs: lhs.lhs(),
            ..term.clone()
        })
        .collect();
    for into in [Into::Overwrite, Into::Add] {
        // What is overwritten may be anything; what lies between the rows has to stay.
        let (before, stride) = match into {
            Into::Overwrite => (f32::NAN, cols + 5),
            Into::Add => (0.75, cols + 5),
        };
        let want = exact(&vec![before; rows * cols], into, terms, cols);
        for (name, product) in ways() {
            for terms in [terms, &packed] {
                if name == "rounded" && !matches!(terms[0].lhs, Lhs::Bf16(_) | Lhs::Rounded(_)) {
                    continue;
                }
                let mut data = vec![before; rows * stride];
                for row in data.chunks_exact_mut(stride) {
                    row[cols..].fill(7.0);
                }
                let shared = Shared::new(&mut data);
                // SAFETY: the only matrix of this data.
                product(
                    &mut unsafe { shared.mat(0, rows, cols, stride) },
                    into,
                    terms,
                );
                for (row, values) in data.chunks_exact(stride).enumerate() {
                    assert_eq!(
                        values[cols..],
                        [7.0; 5],
                        "{name}: past the end of row {row}"
                    );
                    let want = &want[row * cols..][..cols];
                    for (col, (&value, (sum, size))) in values.iter().zip(want).enumerate() {
                        assert!(
                            (f64::from(value) - sum).abs() <= bound * size,
                            "{name}, {rows} x {cols}: {value} at {row}, {col} instead of {sum}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn products_in_bf16_are_those_of_the_rounded_numbers() {
    let mut numbers = Numbers(1);
    for (rows, k, cols) in [
        (1, 1, 1),
        (16, 32, 32),
        (17, 33, 31),
        (32, 64, 16),
        (33, 31, 300),
        (70, 100, 64),
        (5, 2100, 40),
        (40, 1025, 9),
        (3, 0, 4),
    ] {
        for way in 0..4 {
            let (lhs, rhs) = (numbers.matrix(rows, k), numbers.matrix(k, cols));
            let term = Term {
                lhs: lhs.mat(rows, k, way % 2 == 1).to(ComputeDtype::Bf16),
                rhs: rhs.mat(k, cols, way / 2 == 1).into(),
                factor: 0.3,
            };
            check(&[term], rows, cols);
        }
    }
}

#[test]
fn sums_in_bf16_of_windows_of_weights_and_an_adapter_are_those_of_the_rounded_numbers() {
    let mut numbers = Numbers(2);
    let (outs, ins, n, r) = (300, 1100, 45, 8);
    let values = DenseTensor::from_f32(vec![outs, ins], &numbers.take(outs * ins));
    let params = Params4bit::quantize("w", &values, QuantizeOptions::default()).unwrap();
    for weight in [FrozenWeight::Dense(values), FrozenWeight::Quantized(params)] {
        let window = |outs, ins| Window {
            weight: &weight,
            outs,
            ins,
        };
        for (base, k, cols) in [
            (Rhs::Transposed(window(7..277, 3..1091)), 1088, 270),
            (Rhs::Weight(window(9..290, 65..400)), 281, 335),
        ] {
            let (x, u) = (numbers.matrix(n, k), numbers.matrix(n, r));
            let b = numbers.matrix(cols, r);
            let terms = [
                Term {
                    lhs: x.mat(n, k, false).to(ComputeDtype::Bf16),
                    rhs: base,
                    factor: 1.0,
                },
                Term {
                    lhs: u.mat(n, r, false).to(ComputeDtype::Bf16),
                    rhs: b.mat(r, cols, true).into(),
                    factor: 2.0,
                },
            ];
            check(&terms, n, cols);
        }
    }
}

#[test]
#[should_panic(expected = "a sum in f32 and bf16")]
fn a_sum_is_in_one_type() {
    let values = [1.0; 4];
    let (mat, mut sums) = (Mat::new(&values, 2, 2), [0.0; 4]);
    let terms = [ComputeDtype::F32, ComputeDtype::Bf16].map(|dtype| Term {
        lhs: mat.to(dtype),
        rhs: mat.into(),
        factor: 1.0,
    });
    matmul_sum(&mut MatMut::new(&mut sums, 2, 2), Into::Overwrite, &terms);
}

#[test]
fn few_rows_are_multiplied_with_a_weight_in_f32() {
    let mut numbers = Numbers(3);
    let values = DenseTensor::from_f32(vec![70, 90], &numbers.take(70 * 90));
    let weight = FrozenWeight::Dense(values);
    for rows in [1, MIN_PACKED_ROWS - 1] {
        let x = numbers.take(rows * 90);
        let product = |dtype| {
            let lhs = SharedLhs::new(Mat::new(&x, rows, 90), dtype);
            let rhs = Rhs::Transposed(Window {
                weight: &weight,
                outs: 0..70,
                ins: 0..90,
            });
            let mut y = vec![0.0; rows * 70];
            matmul(
                &mut MatMut::new(&mut y, rows, 70),
                Into::Overwrite,
                lhs.lhs(),
                rhs,
                1.0,
            );
            y
        };
        assert_eq!(product(ComputeDtype::Bf16), product(ComputeDtype::F32));
    }
}

/// Every way to make a product here in f32.
fn ways_in_f32() -> Vec<(String, Product)> {
    fn in_f32<'a>(terms: &[Term<'a>]) -> Vec<F32Term<'a>> {
        terms.iter().filter_map(Term::in_f32).collect()
    }
    let mut ways: Vec<(String, Product)> = vec![(
        "crate".into(),
        Box::new(move |dst, into, terms| sum_by_crate(dst, into, &in_f32(terms))),
    )];
    #[cfg(target_arch = "x86_64")]
    if packed::is_available() {
        ways.push((
            "packed".into(),
            // SAFETY: just checked.
            Box::new(move |dst, into, terms| unsafe { packed::product(dst, into, &in_f32(terms)) }),
        ));
    }
    ways
}

/// The same bytes come out of a run with any number of threads.
#[test]
fn an_element_has_the_same_bits_with_any_number_of_threads() {
    let mut numbers = Numbers(4);
    for (rows, k, cols) in [
        (200, 1100, 300),
        (300, 1100, 200),
        (97, 600, 8),
        (3, 600, 700),
        (40, 700, 257),
        (300, 64, 2),
    ] {
        let values = DenseTensor::from_f32(vec![cols, k], &numbers.take(cols * k));
        let weight = FrozenWeight::Dense(values);
        let (x, b) = (numbers.matrix(rows, k), numbers.matrix(k, cols));
        let terms = |in_rows: Range<usize>, in_cols: Range<usize>, dtype| {
            let lhs = |is_transposed| x.mat(rows, k, is_transposed).rows(in_rows.clone());
            let window = Window {
                weight: &weight,
                outs: in_cols.clone(),
                ins: 0..k,
            };
            let base = Term {
                lhs: lhs(false).to(dtype),
                rhs: Rhs::Transposed(window),
                factor: 1.0,
            };
            let adapter = Term {
                lhs: lhs(true).to(dtype),
                rhs: b.mat(k, cols, false).cols(in_cols).into(),
                factor: 0.7,
            };
            [base, adapter]
        };
        for (dtype, ways) in [
            (ComputeDtype::F32, ways_in_f32()),
            (ComputeDtype::Bf16, ways()),
        ] {
            for (name, product) in ways {
                let bits = |threads: usize, by_rows: bool| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let mut sums = vec![0.0; rows * cols];
                    let fill = |dst: Shared<'_>| match by_rows {
                        true => for_each_row_tile(dst, (rows, cols), 256, |mut tile, rows| {
                            product(&mut tile, Into::Overwrite, &terms(rows, 0..cols, dtype));
                        }),
                        false => for_each_column_tile(dst, (rows, cols), 256, |mut tile, cols| {
                            product(&mut tile, Into::Overwrite, &terms(0..rows, cols, dtype));
                        }),
                    };
                    pool.unwrap().install(|| fill(Shared::new(&mut sums)));
                    sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>()
                };
                for by_rows in [true, false] {
                    let of_one = bits(1, by_rows);
                    for threads in [2, 3, 40] {
                        assert!(
                            bits(threads, by_rows) == of_one,
                            "{name}, {rows} x {k} x {cols}, tiles of rows {by_rows}, {threads} threads"
                        );
                    }
                }
            }
        }
    }
}
