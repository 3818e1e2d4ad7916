//! The kernels of `cuda/linear_cross_entropy.cu` against the formulas in f64.

use half::bf16;

use crate::device_under_test::{Arg, Buffer, DeviceUnderTest, assert_kernel_close};
use crate::kernel_test;
use crate::random_values::random;

/// (rows, words): fewer words than threads, rows that 16-byte accesses can and cannot take, one and several tiles of 8192.
const SIZES: [(usize, usize); 8] = [
    (3, 1),
    (42, 5),
    (16, 1000),
    (9, 1001),
    (2, 8192),
    (2, 8196),
    (2, 16_391),
    (1, 20_000),
];

const D_LOSS: f32 = 1.0 / 37.0;

fn logits(rows: usize, vocab: usize) -> Vec<f32> {
    random(1, rows * vocab).iter().map(|z| 4.0 * z).collect()
}

fn labels(rows: usize, vocab: usize) -> Vec<u32> {
    (0..rows).map(|row| (row * 977 % vocab) as u32).collect()
}

/// Results in f64, and with the kernel's formats from the first word to the last.
struct Values<L> {
    exact: Vec<f64>,
    low_precision: Vec<L>,
}

impl<L> Values<L> {
    fn new() -> Self {
        Self {
            exact: Vec::new(),
            low_precision: Vec::new(),
        }
    }

    fn push(&mut self, exact: f64, low_precision: L) {
        self.exact.push(exact);
        self.low_precision.push(low_precision);
    }
}

struct Expected {
    loss: Values<f32>,
    confidence: Values<f32>,
    dz: Values<bf16>,
    prediction: Vec<u32>,
}

fn expected(logits: &[f32], labels: &[u32], vocab: usize) -> Expected {
    let mut expected = Expected {
        loss: Values::new(),
        confidence: Values::new(),
        dz: Values::new(),
        prediction: Vec::new(),
    };
    for (z, &label) in logits.chunks_exact(vocab).zip(labels) {
        let label = label as usize;
        let largest = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let prediction = z.iter().position(|&z| z == largest).unwrap();
        expected.prediction.push(prediction as u32);

        let term = |z: f32| (z - largest).exp();
        let exact_term = |z: f32| (f64::from(z) - f64::from(largest)).exp();
        let sum: f32 = z.iter().copied().map(term).sum();
        let exact_sum: f64 = z.iter().copied().map(exact_term).sum();
        let loss = largest + sum.ln() - z[label];
        let exact_loss = f64::from(largest) + exact_sum.ln() - f64::from(z[label]);
        expected.loss.push(exact_loss, loss);
        expected.confidence.push(1.0 / exact_sum, 1.0 / sum);
        for (word, &z) in z.iter().enumerate() {
            let onehot = if word == label { 1.0 } else { 0.0 };
            let exact_dz = f64::from(D_LOSS) * (exact_term(z) / exact_sum - f64::from(onehot));
            let dz = D_LOSS * (term(z) / sum - onehot);
            expected.dz.push(exact_dz, bf16::from_f32(dz));
        }
    }
    expected
}

/// What both kernels make of each row.
struct Outputs {
    loss: Buffer,
    confidence: Buffer,
    prediction: Buffer,
}

impl Outputs {
    fn new(device: &DeviceUnderTest, rows: usize) -> Self {
        Self {
            loss: device.poisoned::<f32>(rows),
            confidence: device.poisoned::<f32>(rows),
            prediction: device.poisoned::<u32>(rows),
        }
    }

    fn check(&self, device: &DeviceUnderTest, expected: &Expected) {
        let check = |name,
                     buffer,
                     Values {
                         exact,
                         low_precision,
                     }: &Values<f32>| {
            assert_kernel_close(name, &device.download::<f32>(buffer), exact, low_precision);
        };
        check("loss", &self.loss, &expected.loss);
        check("confidence", &self.confidence, &expected.confidence);
        let prediction = device.download::<u32>(&self.prediction);
        assert_eq!(prediction, expected.prediction);
    }
}

fn forward(device: &DeviceUnderTest, logits: &[f32], labels: &[u32]) -> Outputs {
    let rows = labels.len();
    let outputs = Outputs::new(device, rows);
    let vocab = logits.len() / rows;
    let (logits, labels) = (device.upload(logits), device.upload(labels));
    device.launch(
        "linear_cross_entropy_forward_f32",
        [rows as u32, 1, 1],
        0,
        &[
            Arg::Buffer(&logits),
            Arg::Buffer(&labels),
            Arg::U32(rows as u32),
            Arg::U32(vocab as u32),
            Arg::Buffer(&outputs.loss),
            Arg::Buffer(&outputs.confidence),
            Arg::Buffer(&outputs.prediction),
        ],
    );
    outputs
}

/// The outputs, and the bf16 at the start of each row's memory.
fn backward(device: &DeviceUnderTest, logits: &[f32], labels: &[u32]) -> (Outputs, Vec<bf16>) {
    let rows = labels.len();
    let outputs = Outputs::new(device, rows);
    let vocab = logits.len() / rows;
    let (logits, labels) = (device.upload(logits), device.upload(labels));
    device.launch(
        "linear_cross_entropy_backward_f32",
        [rows as u32, 1, 1],
        0,
        &[
            Arg::Buffer(&logits),
            Arg::Buffer(&labels),
            Arg::U32(rows as u32),
            Arg::U32(vocab as u32),
            Arg::F32(D_LOSS),
            Arg::Buffer(&outputs.loss),
            Arg::Buffer(&outputs.confidence),
            Arg::Buffer(&outputs.prediction),
        ],
    );
    let memory = device.download::<bf16>(&logits);
    let dz = memory.chunks_exact(2 * vocab).flat_map(|row| &row[..vocab]);
    (outputs, dz.copied().collect())
}

kernel_test!(forward_is_the_loss_of_each_row, |device| {
    for (rows, vocab) in SIZES {
        let (logits, labels) = (logits(rows, vocab), labels(rows, vocab));
        let outputs = forward(device, &logits, &labels);
        outputs.check(device, &expected(&logits, &labels, vocab));
    }
});

kernel_test!(
    backward_leaves_the_gradient_in_the_place_of_the_logits,
    |device| {
        for (rows, vocab) in SIZES {
            let (logits, labels) = (logits(rows, vocab), labels(rows, vocab));
            let (outputs, dz) = backward(device, &logits, &labels);
            let expected = expected(&logits, &labels, vocab);
            outputs.check(device, &expected);
            let Values {
                exact,
                low_precision,
            } = &expected.dz;
            let ones = vec![1.0; exact.len()];
            let relative = |dz: &[bf16]| -> Vec<f64> {
                let ratio = |(dz, &exact): (&bf16, &f64)| {
                    if exact == 0.0 {
                        1.0 + dz.to_f64()
                    } else {
                        dz.to_f64() / exact
                    }
                };
                dz.iter().zip(exact).map(ratio).collect()
            };
            // Most are tiny beside that of the label.
            assert_kernel_close("dz", &relative(&dz), &ones, &relative(low_precision));
        }
    }
);

kernel_test!(the_lowest_of_equal_words_is_predicted, |device| {
    for vocab in [5, 1000, 9001] {
        let mut logits = vec![0f32; 2 * vocab];
        // All equal in the first row, and in the second two equals that different threads meet, the later one first.
        (logits[vocab + vocab / 2], logits[2 * vocab - 1]) = (3.0, 3.0);
        let outputs = forward(device, &logits, &[0, 1]);
        let prediction = device.download::<u32>(&outputs.prediction);
        assert_eq!(prediction, [0, vocab as u32 / 2], "{vocab} words");
    }
});

kernel_test!(words_without_a_chance_have_no_part, |device| {
    let vocab = 2000;
    let mut logits = vec![f32::NEG_INFINITY; vocab];
    (logits[7], logits[1500]) = (-1e30, -1e30);
    let (outputs, dz) = backward(device, &logits, &[7]);
    let loss = device.download::<f32>(&outputs.loss)[0];
    assert!((f64::from(loss) - 2f64.ln()).abs() < 1e-6, "{loss}");
    let half = bf16::from_f32(D_LOSS / 2.0);
    for (word, dz) in dz.into_iter().enumerate() {
        let expected = match word {
            7 => -half,
            1500 => half,
            _ => bf16::ZERO,
        };
        assert_eq!(dz, expected, "word {word}");
    }
});
