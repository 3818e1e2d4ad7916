//! Dropout on the adapters' inputs: masks that are a function of seed, step, micro-batch, layer, module and element alone.

mod emulated;
mod reference_case;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use emulated::placement_test;
use qlora::data::Batch;
use qlora::device::Placement;
use qlora::infer::{LogProbs, evaluate};
use qlora::model::{ActivationPolicy, Decoder};
use qlora::ops::dropout::{Dropout, Mask};
use qlora::ops::linear::{self, Lora, LoraGrad};
use qlora::ops::weight::{DenseCache, Weight};
use qlora::quant::{DenseTensor, FrozenWeight};
use qlora::store::Adapter;
use qlora::train::config::Resume;
use qlora::train::{TrainConfig, Trainer};
use reference_case::{
    CASES, ReferenceCase, decoder_with_adapter, micro_batch, relative_error, trained, values,
};
use safetensors::SafeTensors;

const P: f64 = 0.1;

fn mask(p: f64, [seed, step, micro_batch, layer, module]: [usize; 5]) -> Mask {
    let dropout = Dropout::new(p, seed as u64, step, micro_batch).unwrap();
    dropout.mask(layer, module)
}

fn place(t: Tensor, at: &Placement) -> Tensor {
    t.to_dtype(at.dtype)
        .unwrap()
        .copy()
        .unwrap()
        .to_device(&at.device)
        .unwrap()
}

fn ones(shape: (usize, usize), at: &Placement) -> Tensor {
    place(Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap(), at)
}

fn identity(n: usize, at: &Placement) -> Tensor {
    place(Tensor::eye(n, DType::F32, &Device::Cpu).unwrap(), at)
}

/// A weight of zeros, which leaves the adapter alone in sight.
fn no_weight(d_out: usize, d_in: usize, at: &Placement) -> Weight {
    let zeros = vec![0.0; d_out * d_in];
    let zeros = FrozenWeight::Dense(DenseTensor::from_f32(vec![d_out, d_in], &zeros));
    if !at.uses_kernels() {
        return zeros.into();
    }
    let cache = DenseCache::new(&[], &at.device).unwrap();
    Weight::on_device(zeros, &cache.into()).unwrap()
}

/// `mask keep_scale` as the forward pass applies it: an input of ones through `A = 1`.
fn shown_by_forward(mask: Mask, (n, d): (usize, usize), at: &Placement) -> Vec<f32> {
    let (a, b) = (identity(d, at), ones((1, d), at));
    let lora = Lora {
        a: &a,
        b: &b,
        scaling: 1.0,
        mask: Some(mask),
        compute_dtype: at.compute_dtype,
    };
    let weight = no_weight(1, d, at);
    let (_, u) = linear::forward(&ones((n, d), at), &weight, None, Some(lora)).unwrap();
    f32s(&u.unwrap())
}

/// The same from the gradient of A, where `du` is the identity, and from that of the input, where `du A` is all ones.
fn shown_by_backward(mask: Mask, (n, d): (usize, usize), at: &Placement) -> [Vec<f32>; 2] {
    let (a, b) = (ones((n, d), at), identity(n, at));
    let lora = Lora {
        a: &a,
        b: &b,
        scaling: 1.0,
        mask: Some(mask),
        compute_dtype: at.compute_dtype,
    };
    let (dy, x, u) = (identity(n, at), ones((n, d), at), ones((n, n), at));
    let zeros = |shape| Tensor::zeros(shape, DType::F32, &at.device).unwrap();
    let (d_a, d_b) = (zeros((n, d)), zeros((n, n)));
    let grad = LoraGrad {
        d_a: &d_a,
        d_b: &d_b,
    };
    let du = linear::backward_lora(&dy, &x, &u, lora, grad).unwrap();
    let weight = no_weight(n, d, at);
    let dx = linear::backward_input(&dy, &weight, Some((&du, lora)), None).unwrap();
    [f32s(&d_a), f32s(&dx)]
}

fn f32s(t: &Tensor) -> Vec<f32> {
    values(&t.to_dtype(DType::F32).unwrap())
}

#[test]
fn the_masks_are_those_of_the_golden_file() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dropout.safetensors");
    let data = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&data).unwrap();
    let cases = tensors.len() / 3;
    assert_eq!(cases, 4);
    for case in 0..cases {
        let tensor = |name: &str| tensors.tensor(&format!("{name}.{case}")).unwrap();
        let place = tensor("place").data().as_chunks().0.to_vec();
        let place: Vec<usize> = place.into_iter().map(usize::from_le_bytes).collect();
        let p = f64::from_le_bytes(tensor("p").data().try_into().unwrap());
        let mask = mask(p, place.try_into().unwrap());
        let kept = tensor("kept");
        let shown = shown_by_forward(mask, (kept.shape()[0], kept.shape()[1]), &Placement::cpu());
        let expected: Vec<f32> = kept
            .data()
            .iter()
            .map(|&kept| f32::from(kept) * mask.keep_scale())
            .collect();
        assert!(shown == expected, "case {case}");
    }
}

placement_test!(every_product_has_the_mask_that_the_cpu_shows, |placement| {
    for (n, d) in [(40, 72), (21, 37), (70, 136)] {
        let mask = mask(0.3, [1, 2, 3, 4, 5]);
        let expected = shown_by_forward(mask, (n, d), &Placement::cpu());
        let kept = expected.iter().filter(|&&factor| factor != 0.0).count();
        assert!(kept > 0 && kept < n * d);
        let [d_a, dx] = shown_by_backward(mask, (n, d), &Placement::cpu());
        assert!(d_a == expected && dx == expected, "on the CPU, [{n}, {d}]");
        let [d_a, dx] = shown_by_backward(mask, (n, d), placement);
        assert!(d_a == expected, "dA, [{n}, {d}]");
        let rounded = |factors: &[f32]| -> Vec<f32> {
            let round = |&factor: &f32| half::bf16::from_f32(factor).to_f32();
            factors.iter().map(round).collect()
        };
        assert!(dx == rounded(&expected), "dx, [{n}, {d}]");
        let u = shown_by_forward(mask, (n, d), placement);
        assert!(u == rounded(&expected), "u, [{n}, {d}]");
    }
});

/// Which of `[256, 512]` elements are dropped.
fn dropped(p: f64, place: [usize; 5]) -> Vec<bool> {
    let factors = mask(p, place).reference(256, 512).unwrap();
    let factors: Vec<f64> = factors.flatten_all().unwrap().to_vec1().unwrap();
    factors.into_iter().map(|factor| factor == 0.0).collect()
}

/// Asserts that `count` of `n` is what probability `p` gives, within five standard deviations.
fn assert_share(count: usize, n: usize, p: f64, what: &str) {
    let (n, deviation) = (n as f64, 5.0 * (n as f64 * p * (1.0 - p)).sqrt());
    let difference = count as f64 - n * p;
    assert!(
        difference.abs() < deviation,
        "{what}: {count} of {n}, {difference} off"
    );
}

#[test]
fn as_many_are_dropped_as_p_says() {
    for p in [0.05, 0.1, 0.5, 0.9] {
        for module in 0..7 {
            let dropped = dropped(p, [0, 3, 1, 2, module]);
            let count = dropped.iter().filter(|&&d| d).count();
            assert_share(count, dropped.len(), p, &format!("p {p}, module {module}"));
        }
    }
}

#[test]
fn masks_of_modules_layers_micro_batches_steps_and_seeds_are_independent() {
    let mut places = vec![[0; 5], [1, 1, 1, 1, 1]];
    for coordinate in 0..5 {
        for value in [1, 2, 6] {
            let mut place = [0; 5];
            place[coordinate] = value;
            places.push(place);
        }
    }
    let masks: Vec<_> = places.iter().map(|&place| dropped(P, place)).collect();
    for (i, a) in masks.iter().enumerate() {
        for (j, b) in masks.iter().enumerate().skip(i + 1) {
            let both = a.iter().zip(b).filter(|(a, b)| **a && **b).count();
            let what = format!("{:?} and {:?}", places[i], places[j]);
            assert_share(both, a.len(), P * P, &what);
        }
    }
}

#[test]
fn elements_of_a_mask_are_independent_of_their_neighbours() {
    let mask = dropped(P, [0; 5]);
    // Neighbours in a word, in a call, in a row, and in a column.
    for distance in [1, 2, 7, 8, 128, 512] {
        let pairs = mask.iter().zip(&mask[distance..]);
        let both = pairs.filter(|(a, b)| **a && **b).count();
        let what = format!("{distance} apart");
        assert_share(both, mask.len() - distance, P * P, &what);
    }
}

/// The gradients of all adapters after a backward pass over the case's batch for each dropout, one on top of the other.
fn gradients(
    case: &ReferenceCase,
    at: &Placement,
    policies: [ActivationPolicy; 2],
    dropouts: &[Option<Dropout>],
) -> Vec<f32> {
    let decoder = case.decoder_at(at);
    let batch = case.batch();
    for &dropout in dropouts {
        decoder
            .backward(&[micro_batch(&batch, dropout)], 0.01, &policies)
            .unwrap();
    }
    all_gradients(&decoder)
}

fn all_gradients(decoder: &Decoder) -> Vec<f32> {
    decoder
        .trainables()
        .flat_map(|(_, t)| values(&t.grad))
        .collect()
}

fn recomputing_gives_the_bits_of_keeping(cases: &[&str], at: &Placement) {
    use ActivationPolicy::{Keep, Recompute};
    let dropout = [Dropout::new(P, 1, 2, 3)];
    for name in cases {
        let case = ReferenceCase::read(name);
        let kept = gradients(&case, at, [Keep, Keep], &dropout);
        for policies in [[Recompute, Recompute], [Keep, Recompute]] {
            let recomputed = gradients(&case, at, policies, &dropout);
            assert!(recomputed == kept, "{name} {policies:?}");
        }
        assert!(
            kept != gradients(&case, at, [Keep, Keep], &[None]),
            "{name}"
        );
    }
}

#[test]
fn recomputing_gives_the_bits_of_keeping_on_the_cpu() {
    recomputing_gives_the_bits_of_keeping(&CASES, &Placement::cpu());
}

placement_test!(
    recomputing_through_the_kernels_gives_the_bits_of_keeping,
    |placement| {
        recomputing_gives_the_bits_of_keeping(&["llama_odd", "qwen3"], placement);
    }
);

placement_test!(
    gradients_through_the_masks_are_those_of_the_cpu,
    |placement| {
        let keep = [ActivationPolicy::Keep; 2];
        let (masks, others) = (Dropout::new(P, 1, 2, 3), Dropout::new(P, 1, 2, 4));
        for name in ["llama_gqa", "llama_odd", "qwen3"] {
            let case = ReferenceCase::read(name);
            let expected = gradients(&case, &Placement::cpu(), keep, &[masks]);
            let error = relative_error(&gradients(&case, placement, keep, &[masks]), &expected);
            assert!(error < 0.02, "{name}: {error}");
            let other = gradients(&case, &Placement::cpu(), keep, &[others]);
            let apart = relative_error(&other, &expected);
            assert!(apart > 0.06, "{name}: other masks are only {apart} off");
        }
    }
);

/// Two steps of two micro-batches each, on a new adapter whose B is not zero after the first step.
fn config(output_dir: &Path, lora_dropout: Option<f64>) -> TrainConfig {
    let case = ReferenceCase::read("llama_gqa").dir;
    TrainConfig {
        dataset: case.join("train/data.jsonl").into(),
        model_name_or_path: case,
        output_dir: output_dir.to_path_buf(),
        lora_r: Some(4),
        lora_dropout,
        learning_rate: 5e-3,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        max_steps: 4,
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

fn a_run_repeats_and_resumes_bit_for_bit(at: &Placement) {
    let dir = tempfile::tempdir().unwrap();
    let config = || TrainConfig {
        per_device_train_batch_size: 1,
        max_steps: 3,
        ..config(dir.path(), Some(P))
    };
    let (losses, adapter) = trained(config(), at);
    let mut first = Trainer::new(config(), at).unwrap();
    for loss in &losses[..2] {
        assert_eq!(first.step().unwrap().loss, *loss);
    }
    let resumed = TrainConfig {
        resume_from_checkpoint: Resume::From(first.save_checkpoint().unwrap()),
        ..config()
    };
    let (rest, same_adapter) = trained(resumed, at);
    assert!(rest == losses[2..] && same_adapter == adapter);
}

#[test]
fn a_run_repeats_and_resumes_bit_for_bit_on_the_cpu() {
    a_run_repeats_and_resumes_bit_for_bit(&Placement::cpu());
}

#[test]
fn another_seed_has_other_masks() {
    let dir = tempfile::tempdir().unwrap();
    let run = |seed| {
        let config = TrainConfig {
            seed,
            // The same start: only the masks differ.
            adapter: Some(
                ReferenceCase::read("llama_gqa")
                    .dir
                    .join("train/init_adapter"),
            ),
            ..config(dir.path(), Some(P))
        };
        trained(config, &Placement::cpu())
    };
    assert!(run(0) != run(1));
}

placement_test!(a_run_through_the_kernels_repeats_and_resumes, |placement| {
    a_run_repeats_and_resumes_bit_for_bit(placement);
});

#[test]
fn a_step_has_a_mask_for_each_of_its_micro_batches() {
    let dir = tempfile::tempdir().unwrap();
    let case = ReferenceCase::read("llama_gqa");
    let rows: String = ["{\"input_ids\":[5,6,7,8,9,10],\"labels\":[5,6,7,8,9,10]}\n"; 4].concat();
    let dataset = dir.path().join("rows.jsonl");
    std::fs::write(&dataset, rows).unwrap();
    let config = TrainConfig {
        adapter: Some(case.dir.join("adapter")),
        dataset: dataset.into(),
        per_device_train_batch_size: 1,
        ..config(dir.path(), Some(P))
    };
    let mut trainer = Trainer::new(config.clone(), &Placement::cpu()).unwrap();
    trainer.step().unwrap();

    let decoder = case.decoder();
    let batch = Batch::from_examples(&[&trainer.data().train_example(0)]);
    let with = |micro_batches: [usize; 2]| {
        qlora::ops::adamw::zero(decoder.parameters().grads()).unwrap();
        for number in micro_batches {
            let dropout = Dropout::new(P, config.seed, 0, number);
            let d_loss = 1.0 / (2 * batch.target_count()) as f32;
            let policies = &trainer.plan().policies;
            let losses = decoder.backward(&[micro_batch(&batch, dropout)], d_loss, policies);
            losses.unwrap();
        }
        all_gradients(&decoder)
    };
    assert!(all_gradients(trainer.decoder()) == with([0, 1]));
    assert!(with([0, 0]) != with([0, 1]));
}

#[test]
fn evaluation_drops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let case = ReferenceCase::read("llama_gqa");
    let config = TrainConfig {
        eval_dataset_size: Some(3),
        ..config(dir.path(), Some(0.5))
    };
    let mut trainer = Trainer::new(config, &Placement::cpu()).unwrap();
    for _ in 0..2 {
        trainer.step().unwrap();
    }
    let found = trainer.evaluate().unwrap().unwrap().eval_loss;
    let checkpoint = trainer.save_checkpoint().unwrap();
    let decoder = decoder_with_adapter(&case.dir, &checkpoint, &Placement::cpu());
    let rows = trainer.data().eval_examples().unwrap();
    let expected = evaluate(&decoder, rows, LogProbs::Omit, |_, _| Ok(())).unwrap();
    assert_eq!(found, expected.loss);
}

#[test]
fn the_adapter_says_what_dropout_it_was_trained_with() {
    let dir = tempfile::tempdir().unwrap();
    let recorded = |config: TrainConfig| {
        let trainer = Trainer::new(config, &Placement::cpu()).unwrap();
        let checkpoint = trainer.save_checkpoint().unwrap();
        let adapter = Adapter::read(&checkpoint).unwrap();
        (checkpoint, adapter.config.lora_dropout)
    };
    assert_eq!(recorded(config(dir.path(), None)).1, 0.0);
    let (adapter, p) = recorded(config(dir.path(), Some(P)));
    assert_eq!(p, P);
    let from_adapter = |lora_dropout| TrainConfig {
        adapter: Some(adapter.clone()),
        resume_from_checkpoint: Resume::Never,
        ..config(&dir.path().join("second"), lora_dropout)
    };
    assert_eq!(recorded(from_adapter(None)).1, P);
    assert_eq!(recorded(from_adapter(Some(0.0))).1, 0.0);
}

#[test]
fn a_run_cannot_be_resumed_with_another_dropout() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(config(dir.path(), Some(P)), &Placement::cpu()).unwrap();
    trainer.step().unwrap();
    let checkpoint = trainer.save_checkpoint().unwrap();
    for (p, found) in [
        (None, "is 0, but 0.1 in "),
        (Some(0.2), "is 0.2, but 0.1 in "),
    ] {
        let config = TrainConfig {
            resume_from_checkpoint: Resume::From(checkpoint.clone()),
            ..config(dir.path(), p)
        };
        let error = Trainer::new(config, &Placement::cpu()).err().unwrap();
        let expected = format!("config key `lora_dropout`: {found}");
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
}
