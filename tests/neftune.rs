//! NEFTune's noise: as large as the paper says, a function of seed, step, micro-batch and element alone, in training only.

mod emulated;
mod reference_case;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use emulated::placement_test;
use qlora::Result;
use qlora::data::Batch;
use qlora::device::Placement;
use qlora::infer::{LogProbs, evaluate};
use qlora::model::{ActivationPolicy, Decoder, DecoderConfig, WeightSource};
use qlora::ops::neftune::{self, Noise};
use qlora::ops::philox::philox;
use qlora::quant::{DenseTensor, FrozenWeight};
use qlora::store::Checkpoint;
use qlora::train::config::Resume;
use qlora::train::{TrainConfig, Trainer};
use reference_case::{ReferenceCase, decoder_with_adapter, micro_batch, trained, values};

const ALPHA: f64 = 5.0;

/// What is added to zeros, `[N, d]` for sequences that end at these rows.
fn noise(at: [usize; 3], d: usize, cu_seqlens: &[usize]) -> Vec<f32> {
    let [seed, step, micro_batch] = at;
    let n = cu_seqlens[cu_seqlens.len() - 1];
    let x = Tensor::zeros((n, d), DType::F32, &Device::Cpu).unwrap();
    let noise = Noise::new(ALPHA, seed as u64, step, micro_batch).unwrap();
    neftune::forward(&x, noise, cu_seqlens).unwrap();
    values(&x)
}

#[test]
fn the_noise_is_uniform_within_alpha_over_the_root_of_tokens_and_width() {
    let (d, cu_seqlens) = (256, [0, 300, 340]);
    let noise = noise([1, 2, 3], d, &cu_seqlens);
    for rows in cu_seqlens.windows(2) {
        let noise = &noise[rows[0] * d..rows[1] * d];
        let n = noise.len() as f64;
        let bound = ALPHA / n.sqrt();
        let largest = noise.iter().fold(0f32, |largest, v| largest.max(v.abs()));
        assert!(
            f64::from(largest) <= bound * 1.000_001,
            "{largest} of {bound}"
        );
        assert!(f64::from(largest) > bound * 0.999, "{largest} of {bound}");
        let moment = |power: i32| {
            let unit = |v: &f32| (f64::from(*v) / bound).powi(power);
            noise.iter().map(unit).sum::<f64>() / n
        };
        // Five standard deviations of a uniform number's mean and of its square's.
        assert!(
            moment(1).abs() < 5.0 * (1.0 / 3.0 / n).sqrt(),
            "{}",
            moment(1)
        );
        let off = (moment(2) - 1.0 / 3.0).abs();
        assert!(off < 5.0 * (4.0 / 45.0 / n).sqrt(), "{}", moment(2));
    }
}

/// A model whose table of embeddings is multiplied when it is read, and a head that is not.
struct Multiplied<'a> {
    checkpoint: &'a Checkpoint,
    by: f32,
}

impl WeightSource for Multiplied<'_> {
    fn weight(&self, name: &str) -> Result<FrozenWeight> {
        const EMBEDDING: &str = "model.embed_tokens.weight";
        let factor = match name {
            EMBEDDING => self.by,
            "lm_head.weight" => 1.0,
            _ => return self.checkpoint.weight(name),
        };
        let table = self.checkpoint.tensor(EMBEDDING)?;
        let values = table.to_f32_vec().into_iter();
        let values: Vec<f32> = values.map(|value| factor * value).collect();
        Ok(FrozenWeight::Dense(DenseTensor::from_f32(
            table.shape,
            &values,
        )))
    }

    fn vector(&self, name: &str) -> Result<DenseTensor> {
        self.checkpoint.tensor(name)
    }
}

/// Gemma's noise is added to embeddings that were multiplied by the root of the hidden size, as in a model that multiplies them
/// first.
#[test]
fn a_model_with_scaled_embeddings_has_the_noise_beside_what_they_are_scaled_to() {
    let otherwise =
        |config: &mut DecoderConfig| std::mem::replace(&mut config.embedding_scale, 1.0);
    assert_noise_of_multiplied("gemma3", otherwise, |_| 50.0, 50.0);
}

/// Granite multiplies embeddings after they are looked up, and so the noise that has been added to them.
#[test]
fn a_model_that_multiplies_embeddings_multiplies_the_noise() {
    let otherwise =
        |config: &mut DecoderConfig| std::mem::replace(&mut config.embedding_multiplier, 1.0);
    assert_noise_of_multiplied("granite", otherwise, |factor| 5.0 * factor, 5.0);
}

/// Holds the losses of a case, without noise and with that of `alpha`, against those of a model whose table is multiplied when
/// it is read, by the factor that `otherwise` takes out of its config, with noise of `alpha_of_multiplied` that factor.
fn assert_noise_of_multiplied(
    case: &str,
    otherwise: impl Fn(&mut DecoderConfig) -> f64,
    alpha_of_multiplied: impl Fn(f64) -> f64,
    alpha: f64,
) {
    let case = ReferenceCase::read(case);
    let checkpoint = Checkpoint::open(&case.dir).unwrap();
    let plain = Decoder::load(&checkpoint, None, &Placement::cpu()).unwrap();
    let mut config = plain.config().clone();
    let factor = otherwise(&mut config);
    assert_ne!(factor, 1.0);
    config.tie_word_embeddings = false;
    let source = Multiplied {
        checkpoint: &checkpoint,
        by: factor as f32,
    };
    let multiplied = Decoder::from_source(&source, config, None, &Placement::cpu()).unwrap();
    let batch = case.batch();
    let [clean, noisy] = [0.0, alpha].map(|alpha| loss(&plain, &batch, alpha));
    assert!((noisy - clean).abs() > 1e-3 * clean, "{clean} {noisy}");
    for (alpha, expected) in [(0.0, clean), (alpha_of_multiplied(factor), noisy)] {
        let found = loss(&multiplied, &batch, alpha);
        let error = (found - expected).abs() / expected;
        assert!(error < 1e-5, "alpha {alpha}: {found} instead of {expected}");
    }
}

/// The loss with the noise of this alpha.
fn loss(decoder: &Decoder, batch: &Batch, alpha: f64) -> f64 {
    let mut micro_batch = micro_batch(batch, None);
    micro_batch.regularization.noise = Noise::new(alpha, 1, 2, 3);
    let losses = decoder.backward(&[micro_batch], 1.0, &[ActivationPolicy::Recompute; 2]);
    let losses = losses.unwrap().remove(0).read().unwrap();
    losses.iter().map(|l| f64::from(l.loss)).sum()
}

#[test]
fn the_noise_is_that_of_single_calls_of_philox() {
    let (seed, step, micro_batch) = ((1 << 40) + 7, 1875, 15);
    let (d, n) = (37, 50);
    let found = noise([seed, step, micro_batch], d, &[0, n]);
    let seed = [seed as u32, (seed >> 32) as u32];
    let [k0, k1, ..] = philox(seed, [step as u32, micro_batch as u32, 0x6e6f_6973, 0]);
    let scale = (ALPHA / ((n * d) as f64).sqrt()) as f32;
    for (element, found) in found.into_iter().enumerate() {
        let word = philox([k0, k1], [element as u32 / 4, 0, 0, 0])[element % 4];
        let expected = scale * ((word >> 8) as f32 / 8_388_608.0 - 1.0);
        assert_eq!(found, expected, "element {element}");
    }
}

#[test]
fn seeds_steps_and_micro_batches_have_noise_of_their_own() {
    let places = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]];
    let all = places.map(|at| noise(at, 256, &[0, 256]));
    let n = all[0].len() as f64;
    for (i, a) in all.iter().enumerate() {
        for (j, b) in all.iter().enumerate().skip(i + 1) {
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum()
            };
            let correlation = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
            assert!(
                correlation.abs() < 5.0 / n.sqrt(),
                "{:?} and {:?}",
                places[i],
                places[j]
            );
        }
    }
}

placement_test!(in_every_order the_kernel_gives_the_bits_of_the_cpu, |placement| {
    for (d, cu_seqlens) in [(37, &[0, 5, 14][..]), (64, &[0, 70]), (1, &[0, 1])] {
        let n = cu_seqlens[cu_seqlens.len() - 1];
        let values: Vec<f32> = (0..n * d).map(|i| (i % 113) as f32 / 64.0 - 0.9).collect();
        let x = Tensor::from_vec(values, (n, d), &Device::Cpu).unwrap();
        let x = x.to_dtype(DType::BF16).unwrap();
        let on_device = x.copy().unwrap().to_device(&placement.device).unwrap();
        let on_cpu = x.to_dtype(DType::F32).unwrap();
        let noise = Noise::new(20.0, 3, 4, 5).unwrap();
        neftune::forward(&on_device, noise, cu_seqlens).unwrap();
        neftune::forward(&on_cpu, noise, cu_seqlens).unwrap();
        let rounded = on_cpu.to_dtype(DType::BF16).unwrap();
        let f32s = |t: &Tensor| reference_case::values(&t.to_dtype(DType::F32).unwrap());
        assert!(f32s(&on_device) == f32s(&rounded), "[{n}, {d}]");
        assert!(f32s(&rounded) != f32s(&x), "[{n}, {d}]");
    }
});

#[test]
fn sequences_that_are_not_those_of_the_rows_are_refused() {
    let x = Tensor::zeros((4, 8), DType::F32, &Device::Cpu).unwrap();
    let noise = Noise::new(ALPHA, 0, 0, 0).unwrap();
    let error = neftune::forward(&x, noise, &[0, 3]).unwrap_err();
    assert!(error.to_string().contains("sequences of 4 rows"), "{error}");
}

fn config(output_dir: &Path, neftune_noise_alpha: Option<f64>) -> TrainConfig {
    let case = ReferenceCase::read("llama_gqa").dir;
    TrainConfig {
        dataset: case.join("train/data.jsonl").into(),
        model_name_or_path: case,
        output_dir: output_dir.to_path_buf(),
        eval_dataset_size: Some(3),
        lora_r: Some(4),
        neftune_noise_alpha,
        learning_rate: 5e-3,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        max_steps: 4,
        ..TrainConfig::default()
    }
}

#[test]
fn an_alpha_of_0_gives_the_bits_of_no_noise() {
    let dir = tempfile::tempdir().unwrap();
    let run = |alpha| trained(config(dir.path(), alpha), &Placement::cpu());
    let without = run(None);
    assert!(run(Some(0.0)) == without);
    assert!(run(Some(ALPHA)) != without);
}

#[test]
fn a_noisy_run_repeats_and_resumes_bit_for_bit_with_any_policy() {
    let dir = tempfile::tempdir().unwrap();
    let config = || config(dir.path(), Some(ALPHA));
    let (losses, adapter) = trained(config(), &Placement::cpu());
    let recomputed = TrainConfig {
        gradient_checkpointing: Some(true),
        ..config()
    };
    assert!(trained(recomputed, &Placement::cpu()) == (losses.clone(), adapter.clone()));
    let mut first = Trainer::new(config(), &Placement::cpu()).unwrap();
    for loss in &losses[..2] {
        assert_eq!(first.step().unwrap().loss, *loss);
    }
    let resumed = TrainConfig {
        resume_from_checkpoint: Resume::From(first.save_checkpoint().unwrap()),
        ..config()
    };
    let (rest, same_adapter) = trained(resumed, &Placement::cpu());
    assert!(rest == losses[2..] && same_adapter == adapter);
}

#[test]
fn evaluation_adds_no_noise() {
    let dir = tempfile::tempdir().unwrap();
    let case = ReferenceCase::read("llama_gqa");
    let mut trainer = Trainer::new(config(dir.path(), Some(ALPHA)), &Placement::cpu()).unwrap();
    trainer.step().unwrap();
    let found = trainer.evaluate().unwrap().unwrap().eval_loss;
    let checkpoint = trainer.save_checkpoint().unwrap();
    let decoder = decoder_with_adapter(&case.dir, &checkpoint, &Placement::cpu());
    let rows = trainer.data().eval_examples().unwrap();
    let expected = evaluate(&decoder, rows, LogProbs::Omit, |_, _| Ok(())).unwrap();
    assert_eq!(found, expected.loss);
}
