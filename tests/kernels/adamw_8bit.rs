//! `adamw_8bit_moments` gives the bits of the plain formula, and the codes of bitsandbytes on its fixture.

use std::path::Path;

use qlora::quant::dynamic_map;
use safetensors::SafeTensors;

use super::adamw::{Master, SIZES, STEPS, Scalars, Update, bits, gradients, update, weights};
use crate::kernel_test;

/// The elements that share the scale of an 8-bit moment.
const BLOCK_SIZE: usize = 256;

/// A moment as 8-bit codes in blocks of 256.
#[derive(Debug, Clone)]
struct Moment {
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl Moment {
    fn zeros(n: usize) -> Self {
        Self {
            codes: vec![0; n],
            absmax: vec![0.0; n.div_ceil(BLOCK_SIZE)],
        }
    }

    fn dequantize(&self, map: &[f32]) -> Vec<f32> {
        let blocks = self.codes.chunks(BLOCK_SIZE).zip(&self.absmax);
        blocks
            .flat_map(|(codes, absmax)| {
                codes
                    .iter()
                    .map(move |&code| map[usize::from(code)] * absmax)
            })
            .collect()
    }

    fn quantize(values: &[f32], map: &[f32]) -> Self {
        let nearest = |value: f32| {
            let below = |pair: &&[f32]| 0.5 * (pair[0] + pair[1]) < value;
            map.windows(2).filter(below).count() as u8
        };
        let (mut codes, mut absmax) = (vec![], vec![]);
        for block in values.chunks(BLOCK_SIZE) {
            let largest = largest_magnitude(block);
            let divisor = if largest == 0.0 { 1.0 } else { largest };
            codes.extend(block.iter().map(|v| nearest(v / divisor)));
            absmax.push(largest);
        }
        Self { codes, absmax }
    }
}

/// `tests/fixtures/make_adamw_8bit.py` says what is in it.
struct Fixture {
    data: Vec<u8>,
}

impl Fixture {
    fn load() -> Self {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adamw_8bit.safetensors");
        Self {
            data: std::fs::read(path).unwrap(),
        }
    }

    fn bytes(&self, name: &str) -> &[u8] {
        SafeTensors::deserialize(&self.data)
            .unwrap()
            .tensor(name)
            .unwrap()
            .data()
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        let (values, _) = self.bytes(name).as_chunks();
        values.iter().map(|&v| f32::from_le_bytes(v)).collect()
    }

    fn maps(&self) -> Maps {
        Maps {
            signed: self.f32s("signed_map"),
            unsigned: self.f32s("unsigned_map"),
        }
    }
}

/// The values of the codes of both moments.
struct Maps {
    signed: Vec<f32>,
    unsigned: Vec<f32>,
}

fn largest_magnitude(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, v| largest.max(v.abs()))
}

impl Update<'_> {
    fn with_8bit_moments(&self, m: &mut Moment, v: &mut Moment, maps: &Maps) {
        let device = self.device;
        let [m_codes, v_codes] = [&m.codes, &v.codes].map(|codes| device.upload(codes));
        let [m_absmax, v_absmax] = [&m.absmax, &v.absmax].map(|absmax| device.upload(absmax));
        let [signed, unsigned] = [&maps.signed, &maps.unsigned].map(|map| device.upload(map));
        self.launch(
            "adamw_8bit_moments",
            &[&m_codes, &m_absmax, &v_codes, &v_absmax, &signed, &unsigned],
        );
        for (moment, codes, absmax) in [(m, m_codes, m_absmax), (v, v_codes, v_absmax)] {
            moment.codes = device.download(&codes);
            moment.absmax = device.download(&absmax);
        }
    }
}

kernel_test!(moments_in_8_bits_follow_the_plain_formula, |device| {
    let maps = Fixture::load().maps();
    for n in SIZES {
        let mut expected_weight = weights(n);
        let master = Master::upload(device, &expected_weight);
        let (mut m, mut v) = (Moment::zeros(n), Moment::zeros(n));
        let (mut expected_m, mut expected_v) = (m.clone(), v.clone());
        for step in 1..=STEPS {
            let scalars = Scalars::from(&update(step));
            let grad = gradients(n, step);
            let launch = Update {
                device,
                grid: step as u32,
                master: &master,
                grad: &grad,
                scalars,
            };
            launch.with_8bit_moments(&mut m, &mut v, &maps);

            let mut m_values = expected_m.dequantize(&maps.signed);
            let mut v_values = expected_v.dequantize(&maps.unsigned);
            let moments = m_values.iter_mut().zip(&mut v_values);
            for ((weight, grad), (m, v)) in expected_weight.iter_mut().zip(&grad).zip(moments) {
                scalars.apply(*grad, weight, m, v);
            }
            expected_m = Moment::quantize(&m_values, &maps.signed);
            expected_v = Moment::quantize(&v_values, &maps.unsigned);

            let case = format!("step {step} of {n}");
            assert_eq!(
                bits(&master.download(device)),
                bits(&expected_weight),
                "{case}"
            );
            for (ours, expected) in [(&m, &expected_m), (&v, &expected_v)] {
                assert_eq!(bits(&ours.absmax), bits(&expected.absmax), "{case}");
                assert_eq!(ours.codes, expected.codes, "{case}");
            }
        }
    }
});

kernel_test!(moments_in_8_bits_take_the_codes_of_bitsandbytes, |device| {
    let fixture = Fixture::load();
    let maps = fixture.maps();
    assert_eq!(bits(&maps.signed), bits(dynamic_map()));
    let weight = fixture.f32s("weight");
    let n = weight.len();
    let master = Master::upload(device, &weight);
    let (mut m, mut v) = (Moment::zeros(n), Moment::zeros(n));
    for step in 1..=STEPS {
        let launch = Update {
            device,
            grid: 1,
            master: &master,
            grad: &fixture.f32s(&format!("grad.{step}")),
            scalars: Scalars::from(&update(step)),
        };
        launch.with_8bit_moments(&mut m, &mut v, &maps);

        let after = |name: &str| format!("after.{step}.{name}");
        for (ours, name, map) in [(&m, "m", &maps.signed), (&v, "v", &maps.unsigned)] {
            let theirs = Moment {
                codes: fixture.bytes(&after(&format!("{name}_codes"))).to_vec(),
                absmax: fixture.f32s(&after(&format!("{name}_absmax"))),
            };
            assert_eq!(ours.codes, theirs.codes, "{name} after step {step}");
            assert_close(&ours.dequantize(map), &theirs.dequantize(map));
        }
        assert_close(&master.download(device), &fixture.f32s(&after("weight")));
    }
});

/// torch rounds some products and sums together: its f32 differ in the last bits.
fn assert_close(ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len());
    for (a, b) in ours.iter().zip(theirs) {
        assert!(
            (a - b).abs() <= 1e-6 * largest_magnitude(theirs),
            "{a:e} and {b:e}"
        );
    }
}
