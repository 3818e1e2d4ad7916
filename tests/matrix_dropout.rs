//! Dropout on the adapters' matrices: what it drops, what it leaves alone, and that it comes out the same however it is computed.

mod emulated;
mod reference_case;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use emulated::placement_test;
use qlora::data::Batch;
use qlora::device::Placement;
use qlora::infer::{LogProbs, evaluate};
use qlora::model::{
    ActivationPolicy, Decoder, MLP_TILE_ROWS, MicroBatch, Regularization, Sequences,
};
use qlora::ops::dropout::Mask;
use qlora::ops::linear_cross_entropy;
use qlora::ops::matrix_dropout::{self, FactorMasks, MatrixDropout};
use qlora::ops::philox::philox;
use qlora::store::{Adapter, MatrixDropoutScale, MatrixDropoutSettings, ModulePatterns};
use qlora::train::config::Resume;
use qlora::train::{TrainConfig, Trainer};
use reference_case::{
    ReferenceCase, decoder_with_adapter, micro_batch, relative_error, trained, values,
};

const P: f64 = 0.5;
const KEEP: [ActivationPolicy; 2] = [ActivationPolicy::Keep; 2];

fn dropout(p: f64, [seed, step, micro_batch]: [usize; 3], instances: usize) -> MatrixDropout {
    MatrixDropout::new(p, seed as u64, (step, micro_batch), instances).unwrap()
}

fn kept(mask: &Mask, features: usize) -> Vec<bool> {
    let factors = mask.reference(1, features).unwrap().flatten_all().unwrap();
    let factors: Vec<f64> = factors.to_vec1().unwrap();
    factors.into_iter().map(|factor| factor != 0.0).collect()
}

fn tensor(shape: (usize, usize), value: impl Fn(usize) -> f32) -> Tensor {
    let values: Vec<f32> = (0..shape.0 * shape.1).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

#[test]
fn the_masked_product_has_its_zeros_and_its_mean() {
    const DRAWS: usize = 4000;
    let (d_in, d_out, r) = (7, 5, 3);
    let a = tensor((r, d_in), |i| ((i * 37 + 11) % 19) as f32 / 8.0 - 1.0);
    let b = tensor((d_out, r), |i| ((i * 53 + 5) % 17) as f32 / 8.0 - 0.9);
    let plain = values(&b.matmul(&a).unwrap());
    assert!(plain.iter().all(|entry| entry.abs() > 0.01));
    for p in [0.1, 0.5, 0.8] {
        let mut zeros = vec![0usize; plain.len()];
        let mut sums = vec![0f64; plain.len()];
        for draw in 0..DRAWS {
            let masks = dropout(p, [1, draw, 2], 1).masks(3, 4, 0);
            let (a, b) = matrix_dropout::forward(&a, &b, &masks).unwrap();
            let product = values(&b.matmul(&a).unwrap());
            for (i, entry) in product.into_iter().enumerate() {
                zeros[i] += usize::from(entry == 0.0);
                sums[i] += f64::from(entry * masks.scale());
            }
        }
        // Five standard deviations of what each entry does by itself.
        let n = DRAWS as f64;
        let zero = 2.0 * p - p * p;
        for (i, plain) in plain.iter().enumerate() {
            let off = zeros[i] as f64 - n * zero;
            let bound = 5.0 * (n * zero * (1.0 - zero)).sqrt();
            assert!(off.abs() < bound, "p {p}: {} zeros of {n}", zeros[i]);
            let mean = sums[i] / n / f64::from(*plain);
            let deviation = (zero / (1.0 - zero) / n).sqrt();
            assert!((mean - 1.0).abs() < 5.0 * deviation, "p {p}: mean {mean}");
        }
    }
}

#[test]
fn the_masks_are_those_of_single_calls_of_philox() {
    let (seed, step, micro_batch, layer, module, instance) = ((1 << 40) + 7, 1875, 15, 79, 6, 3);
    let masks = dropout(0.3, [seed, step, micro_batch], 4).masks(layer, module, instance);
    let seed = [seed as u32, (seed >> 32) as u32];
    let [k0, k1, ..] = philox(seed, [step as u32, micro_batch as u32, 0x6d74_7278, 0]);
    let threshold = (0.3f64 * 65_536.0).round() as u32;
    for (factor, mask) in [masks.a, masks.b].iter().enumerate() {
        let layer = layer as u32 | (instance as u32) << 16;
        let module = (2 * module + factor) as u32;
        for (feature, kept) in kept(mask, 137).into_iter().enumerate() {
            let counter = [feature as u32 / 8, 0, layer, module];
            let word = philox([k0, k1], counter)[feature % 8 / 2];
            let number = word >> (16 * (feature % 2)) & 0xffff;
            assert_eq!(kept, number >= threshold, "factor {factor}, {feature}");
        }
    }
}

#[test]
fn masks_of_factors_modules_layers_instances_micro_batches_steps_and_seeds_are_independent() {
    const FEATURES: usize = 1 << 15;
    let p = 0.3;
    let masks = |place: [usize; 3], layer, module, instance| {
        let FactorMasks { a, b } = dropout(p, place, 9).masks(layer, module, instance);
        [a, b]
    };
    let mut all = Vec::new();
    for place in [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]] {
        all.extend(masks(place, 0, 0, 0));
    }
    for (layer, module, instance) in [(1, 0, 0), (0, 1, 0), (0, 6, 0), (0, 0, 1), (0, 0, 8)] {
        all.extend(masks([0, 0, 0], layer, module, instance));
    }
    let ensemble = MatrixDropout::ensemble(p, 0, 2).unwrap();
    all.push(ensemble.masks(0, 0, 0).a);
    all.push(ensemble.masks(0, 0, 1).a);
    let all: Vec<_> = all.iter().map(|mask| kept(mask, FEATURES)).collect();
    for (i, one) in all.iter().enumerate() {
        for (j, other) in all.iter().enumerate().skip(i + 1) {
            let both = one.iter().zip(other).filter(|(a, b)| !**a && !**b).count();
            let n = FEATURES as f64;
            let bound = 5.0 * (n * p * p * (1.0 - p * p)).sqrt();
            let off = both as f64 - n * p * p;
            assert!(off.abs() < bound, "{i} and {j}: {both} of {n}");
        }
    }
}

placement_test!(in_every_order the_device_masks_what_the_cpu_masks, |placement| {
    let place = |t: &Tensor, dtype| t.to_dtype(dtype).unwrap().to_device(&placement.device).unwrap();
    for (d_in, d_out, r) in [(64, 40, 16), (37, 21, 3), (40, 24, 5), (8, 3, 8)] {
        let masks = dropout(0.4, [1, 2, 3], 2).masks(4, 5, 1);
        let a = tensor((r, d_in), |i| (i % 113) as f32 + 1.0);
        let b = tensor((d_out, r), |i| (i % 97) as f32 + 1.0);
        let (masked_a, masked_b) = matrix_dropout::forward(&a, &b, &masks).unwrap();
        let on_device = matrix_dropout::forward(
            &place(&a, DType::BF16),
            &place(&b, DType::BF16),
            &masks,
        );
        let f32s = |t: &Tensor| values(&t.to_dtype(DType::F32).unwrap());
        let (device_a, device_b) = on_device.unwrap();
        assert!(f32s(&device_a) == f32s(&masked_a), "A, {d_in} {d_out} {r}");
        assert!(f32s(&device_b) == f32s(&masked_b), "B, {d_in} {d_out} {r}");
        assert!(f32s(&masked_a) != f32s(&a) && f32s(&masked_b) != f32s(&b));

        let sums = || [tensor((r, d_in), |i| i as f32), tensor((d_out, r), |i| -(i as f32))];
        let expected = sums();
        let add = |of: &Tensor, grads: [&Tensor; 2], sums: &[Tensor; 2]| {
            let [d_a, d_b] = grads;
            matrix_dropout::backward(of, (d_a, d_b), &masks, (&sums[0], &sums[1])).unwrap();
        };
        add(&a, [&a, &b], &expected);
        let found = sums().map(|t| place(&t, DType::F32));
        let grads = [&a, &b].map(|t| place(t, DType::F32));
        add(&place(&a, DType::BF16), [&grads[0], &grads[1]], &found);
        for (found, expected) in found.iter().zip(&expected) {
            assert!(f32s(found) == f32s(expected), "gradients, {d_in} {d_out} {r}");
        }
        // Where the column is dropped, nothing is added.
        let columns = kept(&masks.a, d_in);
        for (i, value) in values(&expected[0]).into_iter().enumerate() {
            assert_eq!(value == i as f32, !columns[i % d_in]);
        }
    }
});

fn regularized(matrix_dropout: MatrixDropout) -> Regularization {
    Regularization {
        matrix_dropout: Some(matrix_dropout),
        ..Regularization::default()
    }
}

/// The gradients of all adapters after a backward pass over the case's batch for each regularization, one on top of the other.
fn gradients(
    decoder: &Decoder,
    case: &ReferenceCase,
    policies: [ActivationPolicy; 2],
    d_loss: f32,
    regularizations: &[Regularization],
) -> Vec<Vec<f32>> {
    qlora::ops::adamw::zero(decoder.parameters().grads()).unwrap();
    let batch = case.batch();
    for &regularization in regularizations {
        let batch = MicroBatch {
            regularization,
            ..micro_batch(&batch, None)
        };
        decoder.backward(&[batch], d_loss, &policies).unwrap();
    }
    decoder.trainables().map(|(_, t)| values(&t.grad)).collect()
}

fn what_is_dropped_gets_exactly_no_gradient(at: &Placement) {
    let case = ReferenceCase::read("llama_odd");
    let decoder = case.decoder_at(at);
    let matrix_dropout = dropout(P, [1, 2, 3], 1);
    let grads = gradients(&decoder, &case, KEEP, 0.01, &[regularized(matrix_dropout)]);
    let mut grads = grads.into_iter();
    let mut dropped = 0;
    for (layer, module) in decoder.config().linears() {
        let masks = matrix_dropout.masks(layer, module as usize, 0);
        let (d_out, d_in) = decoder.config().linear_shape(module);
        let (d_a, d_b) = (grads.next().unwrap(), grads.next().unwrap());
        let r = d_a.len() / d_in;
        let what = format!("{} of layer {layer}", module.name());
        for (feature, kept) in kept(&masks.a, d_in).into_iter().enumerate() {
            let mut column = (0..r).map(|rank| d_a[rank * d_in + feature]);
            assert_eq!(
                column.any(|grad| grad != 0.0),
                kept,
                "A of {what}, {feature}"
            );
            dropped += usize::from(!kept);
        }
        for (feature, kept) in kept(&masks.b, d_out).into_iter().enumerate() {
            let row = &d_b[feature * r..][..r];
            assert_eq!(
                row.iter().any(|grad| *grad != 0.0),
                kept,
                "B of {what}, {feature}"
            );
            dropped += usize::from(!kept);
        }
    }
    assert!(grads.next().is_none() && dropped > 100);
}

#[test]
fn what_is_dropped_gets_exactly_no_gradient_on_the_cpu() {
    what_is_dropped_gets_exactly_no_gradient(&Placement::cpu());
}

placement_test!(
    what_is_dropped_gets_exactly_no_gradient_through_the_kernels,
    |placement| {
        what_is_dropped_gets_exactly_no_gradient(placement);
    }
);

fn flat(grads: &[Vec<f32>]) -> Vec<f32> {
    grads.concat()
}

fn instances_give_the_mean_of_single_ones(at: &Placement, tolerance: f64) {
    let case = ReferenceCase::read("llama_gqa");
    let decoder = case.decoder_at(at);
    let together = dropout(P, [1, 2, 3], 3);
    let each: Vec<_> = (0..3).map(|i| regularized(together.instance(i))).collect();
    for policies in [KEEP, [ActivationPolicy::Recompute; 2]] {
        let found = gradients(&decoder, &case, policies, 0.03, &[regularized(together)]);
        let expected = gradients(&decoder, &case, policies, 0.01, &each);
        let error = relative_error(&flat(&found), &flat(&expected));
        assert!(error < tolerance, "{error}");
        let others = [each[0], each[0], each[1]];
        let others = gradients(&decoder, &case, policies, 0.01, &others);
        let apart = relative_error(&flat(&others), &flat(&expected));
        assert!(apart > 10.0 * tolerance, "other masks are only {apart} off");
    }
}

#[test]
fn instances_give_the_mean_of_single_ones_on_the_cpu() {
    instances_give_the_mean_of_single_ones(&Placement::cpu(), 1e-5);
}

placement_test!(
    instances_give_the_mean_of_single_ones_through_the_kernels,
    |placement| {
        instances_give_the_mean_of_single_ones(placement, 0.01);
    }
);

#[test]
fn instances_that_take_several_tiles_are_still_the_mean_of_single_ones() {
    let case = ReferenceCase::read("llama_gqa");
    let decoder = case.decoder();
    let rows = MLP_TILE_ROWS / 2 + 30;
    let ids: Vec<u32> = (0..rows as u32).map(|i| (i * i + 7 * i) % 256).collect();
    let labels: Vec<i64> = (0..rows as i64).map(|i| (i * 31) % 256).collect();
    let positions: Vec<u32> = (0..rows as u32).map(|i| i % 53).collect();
    let cu_seqlens: Vec<usize> = (0..rows).step_by(53).chain([rows]).collect();
    let gradients = |d_loss, regularizations: &[Regularization]| {
        qlora::ops::adamw::zero(decoder.parameters().grads()).unwrap();
        for &regularization in regularizations {
            let batch = MicroBatch {
                sequences: Sequences {
                    input_ids: &ids,
                    positions: &positions,
                    cu_seqlens: &cu_seqlens,
                },
                labels: &labels,
                regularization,
            };
            let recompute = [ActivationPolicy::Recompute; 2];
            decoder.backward(&[batch], d_loss, &recompute).unwrap();
        }
        values(decoder.parameters().grads())
    };
    let together = dropout(P, [1, 2, 3], 2);
    let each = [0, 1].map(|i| regularized(together.instance(i)));
    let expected = gradients(0.001, &each);
    let error = relative_error(&gradients(0.002, &[regularized(together)]), &expected);
    assert!(error < 1e-5, "{error}");
}

#[test]
fn the_loss_of_a_step_is_the_mean_over_its_instances() {
    let dir = tempfile::tempdir().unwrap();
    let case = ReferenceCase::read("llama_gqa");
    let config = TrainConfig {
        adapter: Some(case.dir.join("adapter")),
        lora_matrix_dropout_instances: 2,
        gradient_accumulation_steps: 1,
        shuffle: false,
        ..config(dir.path(), Some(P))
    };
    let mut trainer = Trainer::new(config, &Placement::cpu()).unwrap();
    let rows = [0, 1].map(|row| trainer.data().train_example(row));
    let batch = Batch::from_examples(&rows.each_ref());
    let decoder = case.decoder();
    let losses = [0, 1].map(|i| {
        let batch = MicroBatch {
            regularization: regularized(dropout(P, [0, 0, 0], 2).instance(i)),
            ..micro_batch(&batch, None)
        };
        let mut losses = decoder.backward(&[batch], 1.0, &KEEP).unwrap();
        let losses = losses.remove(0).read().unwrap();
        linear_cross_entropy::total(&losses)
            / batch.labels.iter().filter(|l| **l >= 0).count() as f64
    });
    let record = trainer.step().unwrap();
    assert!((losses[0] - losses[1]).abs() > 1e-3);
    let mean = (losses[0] + losses[1]) / 2.0;
    assert!(
        (record.loss - mean).abs() < 1e-6,
        "{} and {mean}",
        record.loss
    );
    assert_eq!(record.tokens, batch.input_ids.len());
}

fn recomputing_gives_the_bits_of_keeping(cases: &[&str], at: &Placement) {
    use ActivationPolicy::{Keep, Recompute};
    for name in cases {
        let case = ReferenceCase::read(name);
        let decoder = case.decoder_at(at);
        for instances in [1, 2] {
            let regularized = [regularized(dropout(P, [1, 2, 3], instances))];
            let run = |policies| gradients(&decoder, &case, policies, 0.01, &regularized);
            let kept = run(KEEP);
            for policies in [[Recompute, Recompute], [Keep, Recompute]] {
                assert!(run(policies) == kept, "{name} {policies:?} {instances}");
            }
        }
    }
}

#[test]
fn recomputing_gives_the_bits_of_keeping_on_the_cpu() {
    recomputing_gives_the_bits_of_keeping(&["llama_odd", "qwen3"], &Placement::cpu());
}

placement_test!(
    recomputing_through_the_kernels_gives_the_bits_of_keeping,
    |placement| {
        recomputing_gives_the_bits_of_keeping(&["qwen3"], placement);
    }
);

#[test]
fn micro_batches_together_have_the_bits_of_one_after_another() {
    let case = ReferenceCase::read("llama_gqa");
    let decoder = case.decoder();
    let regularizations = [0, 1].map(|number| regularized(dropout(P, [1, 2, number], 2)));
    let apart = gradients(&decoder, &case, KEEP, 0.01, &regularizations);
    qlora::ops::adamw::zero(decoder.parameters().grads()).unwrap();
    let batch = case.batch();
    let batches = regularizations.map(|regularization| MicroBatch {
        regularization,
        ..micro_batch(&batch, None)
    });
    decoder.backward(&batches, 0.01, &KEEP).unwrap();
    let together: Vec<_> = decoder.trainables().map(|(_, t)| values(&t.grad)).collect();
    assert!(together == apart);
}

/// Two steps of two micro-batches each, on a new adapter whose B is not zero after the first step.
fn config(output_dir: &Path, lora_matrix_dropout: Option<f64>) -> TrainConfig {
    let case = ReferenceCase::read("llama_gqa").dir;
    TrainConfig {
        dataset: case.join("train/data.jsonl").into(),
        model_name_or_path: case,
        output_dir: output_dir.to_path_buf(),
        lora_r: Some(4),
        lora_matrix_dropout,
        learning_rate: 5e-3,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        max_steps: 3,
        ..TrainConfig::default()
    }
}

#[test]
fn p_0_gives_the_bits_of_no_dropout() {
    let dir = tempfile::tempdir().unwrap();
    let run = |p| trained(config(dir.path(), p), &Placement::cpu());
    let without = run(None);
    assert!(run(Some(0.0)) == without);
    assert!(run(Some(P)) != without);
}

fn a_run_repeats_and_resumes_bit_for_bit(at: &Placement) {
    let dir = tempfile::tempdir().unwrap();
    let config = || TrainConfig {
        per_device_train_batch_size: 1,
        lora_matrix_dropout_instances: 2,
        lora_dropout: Some(0.1),
        ..config(dir.path(), Some(P))
    };
    let (losses, adapter) = trained(config(), at);
    let mut first = Trainer::new(config(), at).unwrap();
    for loss in &losses[..2] {
        assert_eq!(first.step().unwrap().loss, *loss);
    }
    let checkpoint = first.save_checkpoint().unwrap();
    let resumed = |p| TrainConfig {
        resume_from_checkpoint: Resume::From(checkpoint.clone()),
        lora_matrix_dropout: p,
        ..config()
    };
    let (rest, same_adapter) = trained(resumed(Some(P)), at);
    assert!(rest == losses[2..] && same_adapter == adapter);
    let refused = Trainer::new(resumed(Some(0.25)), at).err().unwrap();
    let expected = "config key `lora_matrix_dropout`: is 0.25, but 0.5 in ";
    assert!(refused.to_string().starts_with(expected), "{refused}");
}

#[test]
fn a_run_repeats_and_resumes_bit_for_bit_on_the_cpu() {
    a_run_repeats_and_resumes_bit_for_bit(&Placement::cpu());
}

placement_test!(a_run_through_the_kernels_repeats_and_resumes, |placement| {
    a_run_repeats_and_resumes_bit_for_bit(placement);
});

#[test]
fn a_run_does_not_depend_on_the_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let config = config(dir.path(), Some(P));
        pool.unwrap().install(|| trained(config, &Placement::cpu()))
    };
    let one = run(1);
    assert!(run(2) == one && run(3) == one);
}

#[test]
fn without_a_scale_training_is_that_of_a_smaller_alpha() {
    let dir = tempfile::tempdir().unwrap();
    let run = |lora_alpha: f64, scale| {
        let of_some = ("q_proj".to_string(), 2.0 * lora_alpha);
        let config = TrainConfig {
            lora_alpha: Some(lora_alpha),
            alpha_pattern: Some(ModulePatterns::new([of_some]).unwrap()),
            lora_matrix_dropout_scale: Some(scale),
            ..config(dir.path(), Some(P))
        };
        trained(config, &Placement::cpu())
    };
    // The share that is kept of the product is 1/4, and powers of two round nothing.
    assert!(run(16.0, MatrixDropoutScale::None) == run(4.0, MatrixDropoutScale::Inverse));
    assert!(run(16.0, MatrixDropoutScale::None) != run(16.0, MatrixDropoutScale::Inverse));
}

#[test]
fn a_finished_run_has_a_plain_adapter_and_the_settings_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let run = |p, scale| {
        let _ = std::fs::remove_dir_all(dir.path().join("checkpoint-3"));
        let config = TrainConfig {
            seed: 7,
            eval_dataset_size: Some(3),
            lora_matrix_dropout_scale: scale,
            ..config(dir.path(), p)
        };
        let mut trainer = Trainer::new(config, &Placement::cpu()).unwrap();
        let never = std::sync::atomic::AtomicBool::new(false);
        trainer.run(&never, |_| ()).unwrap();
        trainer
    };
    let trainer = run(Some(P), Some(MatrixDropoutScale::None));
    let settings = MatrixDropoutSettings {
        p: P,
        scale: MatrixDropoutScale::None,
        seed: 7,
    };
    for place in [dir.path().to_path_buf(), dir.path().join("checkpoint-3")] {
        assert_eq!(MatrixDropoutSettings::read(&place).unwrap(), Some(settings));
        // A quarter of what training has, which is what is left of the product in the mean.
        assert_eq!(Adapter::read(&place).unwrap().config.lora_alpha, 4.0);
    }
    // Evaluation masks nothing: it is that of the adapter by itself.
    let found = trainer.evaluate().unwrap().unwrap().eval_loss;
    let case = ReferenceCase::read("llama_gqa");
    let decoder = decoder_with_adapter(&case.dir, dir.path(), &Placement::cpu());
    let rows = trainer.data().eval_examples().unwrap();
    let expected = evaluate(&decoder, rows, LogProbs::Omit, |_, _| Ok(())).unwrap();
    assert_eq!(found, expected.loss);
    // A run that starts from it has its dropout, and does not scale it once more.
    let continued = TrainConfig {
        adapter: Some(dir.path().to_path_buf()),
        output_dir: dir.path().join("continued"),
        ..config(dir.path(), None)
    };
    let mut continued = Trainer::new(continued, &Placement::cpu()).unwrap();
    continued.step().unwrap();
    let checkpoint = continued.save_checkpoint().unwrap();
    let read = MatrixDropoutSettings::read(&checkpoint).unwrap().unwrap();
    assert_eq!((read.p, read.scale), (P, MatrixDropoutScale::None));
    assert_eq!(Adapter::read(&checkpoint).unwrap().config.lora_alpha, 4.0);

    // Another run in the same place, without: the file of the first does not stay.
    run(None, None);
    assert_eq!(MatrixDropoutSettings::read(dir.path()).unwrap(), None);
}

#[test]
fn what_says_more_about_nothing_is_refused() {
    let load = |keys: &[(&str, &str)]| {
        let keys: Vec<_> = keys
            .iter()
            .map(|(key, text)| (key.to_string(), text.to_string()))
            .collect();
        TrainConfig::load_partial(None, &keys)
    };
    for key in ["lora_matrix_dropout_instances", "lora_matrix_dropout_scale"] {
        let value = if key.ends_with("scale") { "none" } else { "2" };
        for given in [
            &[(key, value)][..],
            &[(key, value), ("lora_matrix_dropout", "0")],
        ] {
            let error = load(given).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        load(&[(key, value), ("lora_matrix_dropout", "0.5")]).unwrap();
    }
    for (key, value) in [
        ("lora_matrix_dropout", "1"),
        ("lora_matrix_dropout", "-0.1"),
        ("lora_matrix_dropout_instances", "0"),
    ] {
        let error = load(&[(key, value)]).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
    assert!(load(&[("lora_matrix_dropout_scale", "half")]).is_err());
}
