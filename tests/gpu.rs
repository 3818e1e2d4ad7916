//! The whole engine in bf16 against the engine of the CPU in f32: through its kernels, on the host emulator, and on a GPU where
//! the tests are asked for one; and by the CPU's own code with products in bf16.
//!
//! bf16 rounds to one part in 256; the bounds are a few of those, as far as they add up over two blocks.

mod emulated;
mod reference_case;

use std::ops::ControlFlow;
use std::path::Path;

use emulated::placement_test;
use qlora::device::Placement;
use qlora::infer::{GenerateOptions, LogProbs, Sampler, SamplingOptions, evaluate, generate};
use qlora::model::{ActivationPolicy, KvCache};
use qlora::train::config::Resume;
use qlora::train::{TrainConfig, Trainer};
use reference_case::{
    CASES, ReferenceCase, TRAINED_CASES, micro_batch, relative_error, sequences, values,
};

/// Loss and gradients by name of the mean loss over the case's batch.
fn gradients(
    case: &ReferenceCase,
    placement: &Placement,
    policies: [ActivationPolicy; 2],
) -> (f64, Vec<(String, Vec<f32>)>) {
    let decoder = case.decoder_at(placement);
    let batch = case.batch();
    let targets = batch.target_count();
    let losses = decoder
        .backward(
            &[micro_batch(&batch, None)],
            1.0 / targets as f32,
            &policies,
        )
        .unwrap();
    let losses = losses.into_iter().next().unwrap().read().unwrap();
    let loss = losses.iter().map(|l| f64::from(l.loss)).sum::<f64>() / targets as f64;
    let mut grads: Vec<_> = decoder
        .trainables()
        .map(|(name, t)| (name, values(&t.grad)))
        .collect();
    grads.sort_by(|a, b| a.0.cmp(&b.0));
    (loss, grads)
}

fn all_values(grads: &[(String, Vec<f32>)]) -> Vec<f32> {
    grads
        .iter()
        .flat_map(|(_, values)| values.clone())
        .collect()
}

placement_test!(also_on_the_cpu logits_are_those_of_the_cpu, |placement| {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let batch = case.batch();
        let logits = case
            .decoder_at(placement)
            .logits(sequences(&batch))
            .unwrap();
        let error = relative_error(&values(&logits), &case.logits.concat());
        assert!(error < 0.015, "{name}: {error}");
    }
});

placement_test!(also_on_the_cpu loss_and_gradients_are_those_of_the_cpu, |placement| {
    let of_kinds = ["dora", "dora_olmo2", "modules_to_save", "tied_embedding", "tied_head", "scaled_embedding"];
    let of_kinds = of_kinds.map(|name| (name, ReferenceCase::of_adapter(name)));
    let cases = CASES.map(|name| (name, ReferenceCase::read(name)));
    for (name, case) in cases.into_iter().chain(of_kinds) {
        let (loss, grads) = gradients(&case, placement, [ActivationPolicy::Keep; 2]);
        let error = (loss - f64::from(case.loss)).abs() / f64::from(case.loss);
        assert!(error < 2e-3, "{name}: {loss} instead of {}", case.loss);
        let together = relative_error(&all_values(&grads), &all_values(&case.grads));
        // The gradient of an embedding has come through every rounding there is. Without a rotary embedding scores are far apart:
        // transformers in bf16 is off by 0.0235 in that case, and by 0.014 to 0.019 in others.
        let is_hard = grads.iter().any(|(name, _)| name.contains("embed_tokens")) || name == "smollm3";
        let bound = if is_hard { 0.025 } else { 0.02 };
        assert!(together < bound, "{name}: {together}");
        for ((tensor, found), (expected_name, expected)) in grads.iter().zip(&case.grads) {
            assert_eq!(tensor, expected_name, "{name}");
            let error = relative_error(found, expected);
            assert!(error < 0.06, "{name} {tensor}: {error}");
        }
    }
});

placement_test!(also_on_the_cpu recomputing_gives_the_bits_of_keeping, |placement| {
    use ActivationPolicy::{Keep, Recompute};
    for name in CASES {
        let case = ReferenceCase::read(name);
        let kept = gradients(&case, placement, [Keep, Keep]);
        for policies in [[Recompute, Recompute], [Keep, Recompute]] {
            assert!(
                gradients(&case, placement, policies) == kept,
                "{name} {policies:?}"
            );
        }
    }
});

placement_test!(
    also_on_the_cpu the_cache_gives_the_logits_of_the_whole_sequence,
    |placement| {
        for name in ["llama_odd", "mistral_sw", "qwen3"] {
            let case = ReferenceCase::read(name);
            let decoder = case.decoder_at(placement);
            let ids = &case.examples[0].input_ids;
            let vocab_size = decoder.config().vocab_size;
            let mut cache = KvCache::new(&decoder, ids.len()).unwrap();
            for len in [13, 1, 1, 9] {
                let end = cache.len() + len;
                let logits = values(&decoder.decode(&ids[end - len..end], &mut cache).unwrap());
                let expected = &case.logits[0][(end - 1) * vocab_size..end * vocab_size];
                let error = relative_error(&logits, expected);
                // One row alone is further off than all together.
                assert!(error < 0.03, "{name} at {end}: {error}");
            }
        }
    }
);

placement_test!(also_on_the_cpu text_is_generated_as_on_the_cpu, |placement| {
    let case = ReferenceCase::read("llama_gqa");
    let options = GenerateOptions {
        max_new_tokens: 4,
        stop_ids: Vec::new(),
    };
    let write = |placement: &Placement| {
        let decoder = case.decoder_at(placement);
        let mut sampler = Sampler::new(SamplingOptions::default()).unwrap();
        let go_on = |_| ControlFlow::Continue(());
        generate(&decoder, &case.prompt, &options, &mut sampler, go_on).unwrap()
    };
    assert_eq!(write(placement), write(&Placement::cpu()));
});

placement_test!(also_on_the_cpu evaluation_is_that_of_the_cpu, |placement| {
    let case = ReferenceCase::read("qwen2");
    let run = |placement: &Placement| {
        let decoder = case.decoder_at(placement);
        evaluate(
            &decoder,
            &case.examples,
            LogProbs::EveryToken,
            |_, _| Ok(()),
        )
        .unwrap()
    };
    let (found, expected) = (run(placement), run(&Placement::cpu()));
    assert_eq!(found.tokens, expected.tokens);
    assert!((found.loss - expected.loss).abs() < 2e-3 * expected.loss);
});

/// Twenty steps on the case's rows, from the adapter that its recorded run began with.
fn config(case: &ReferenceCase, output_dir: &Path) -> TrainConfig {
    let run = case.dir.join("train");
    TrainConfig {
        model_name_or_path: case.dir.clone(),
        adapter: Some(run.join("init_adapter")),
        output_dir: output_dir.to_path_buf(),
        dataset: run.join("data.jsonl").into(),
        shuffle: false,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        learning_rate: 1e-3,
        max_steps: 20,
        save_steps: 10,
        ..TrainConfig::default()
    }
}

/// The loss of each step, and the adapter at the end.
fn train(config: TrainConfig, placement: &Placement) -> (Vec<f64>, Vec<(String, Vec<f32>)>) {
    let mut trainer = Trainer::new(config, placement).unwrap();
    let mut losses = Vec::new();
    while trainer.steps_done() < trainer.total_steps() {
        losses.push(trainer.step().unwrap().loss);
    }
    let adapter = trainer.decoder().trainables();
    (
        losses,
        adapter
            .map(|(name, t)| (name, t.master().unwrap()))
            .collect(),
    )
}

placement_test!(also_on_the_cpu twenty_steps_learn_as_on_the_cpu, |placement| {
    for name in TRAINED_CASES {
        let case = ReferenceCase::read(name);
        let out = tempfile::tempdir().unwrap();
        let (losses, adapter) = train(config(&case, out.path()), placement);
        let (expected, expected_adapter) = train(config(&case, out.path()), &Placement::cpu());
        assert_eq!(losses.len(), 20);
        for (step, (found, expected)) in losses.iter().zip(&expected).enumerate() {
            let error = (found - expected).abs() / expected;
            assert!(
                error < 5e-3,
                "{name} step {step}: {found} instead of {expected}"
            );
        }
        let error = relative_error(&all_values(&adapter), &all_values(&expected_adapter));
        assert!(error < 0.1, "{name}: the adapter differs by {error}");
    }
});

placement_test!(also_on_the_cpu a_run_repeats_and_resumes_bit_for_bit, |placement| {
    let case = ReferenceCase::read("llama_gqa");
    let out = tempfile::tempdir().unwrap();
    let short = || TrainConfig {
        max_steps: 5,
        ..config(&case, out.path())
    };
    let whole = train(short(), placement);
    let mut first = Trainer::new(short(), placement).unwrap();
    for loss in &whole.0[..2] {
        assert_eq!(first.step().unwrap().loss, *loss);
    }
    let resumed = TrainConfig {
        resume_from_checkpoint: Resume::From(first.save_checkpoint().unwrap()),
        ..short()
    };
    let (losses, adapter) = train(resumed, placement);
    assert!(losses == whole.0[2..] && adapter == whole.1);
});

placement_test!(also_on_the_cpu threads_get_the_right_text_or_an_error, |placement| {
    let case = ReferenceCase::read("llama_gqa");
    let decoder = case.decoder_at(placement);
    let options = GenerateOptions {
        max_new_tokens: 4,
        stop_ids: Vec::new(),
    };
    let write = || {
        let mut sampler = Sampler::new(SamplingOptions::default()).unwrap();
        let go_on = |_| ControlFlow::Continue(());
        generate(&decoder, &case.prompt, &options, &mut sampler, go_on)
    };
    let alone = write().unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(write)).collect();
        for thread in threads {
            match thread.join().unwrap() {
                Ok(text) => assert_eq!(text, alone),
                Err(error) => assert!(error.to_string().contains("one thread at a time")),
            }
        }
    });
});
