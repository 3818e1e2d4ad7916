//! The decoder against transformers and PEFT in f32 on the same 4-bit weights: logits, loss, gradients, generation.

mod reference_case;

use std::ops::ControlFlow;

use qlora::IGNORE_INDEX;
use qlora::data::Batch;
use qlora::infer::{
    Finish, GenerateOptions, LogProbs, Sampler, SamplingOptions, evaluate, generate,
};
use qlora::model::{ActivationPolicy, Decoder, KvCache, MLP_TILE_ROWS, Sequences};
use qlora::ops::dropout::Dropout;
use reference_case::{
    CASES, ReferenceCase, largest_difference, micro_batch, relative_error, sequences, values,
};

/// Loss and gradients by name of the mean loss over the case's batch.
fn gradients(
    case: &ReferenceCase,
    policies: &[ActivationPolicy],
) -> (f64, Vec<(String, Vec<f32>)>) {
    let decoder = case.decoder();
    let batch = case.batch();
    let targets = batch.target_count();
    let d_loss = 1.0 / targets as f32;
    let losses = decoder
        .backward(&[micro_batch(&batch, None)], d_loss, policies)
        .unwrap()
        .remove(0)
        .read()
        .unwrap();
    let loss = losses.iter().map(|l| f64::from(l.loss)).sum::<f64>() / targets as f64;
    (loss, sorted_gradients(&decoder))
}

fn sorted_gradients(decoder: &Decoder) -> Vec<(String, Vec<f32>)> {
    let mut grads: Vec<_> = decoder
        .trainables()
        .map(|(name, t)| (name, values(&t.grad)))
        .collect();
    grads.sort_by(|a, b| a.0.cmp(&b.0));
    grads
}

fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(f)
}

#[test]
fn logits_are_those_of_transformers() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let logits = values(&case.decoder().logits(sequences(&case.batch())).unwrap());
        let difference = largest_difference(&logits, &case.logits.concat());
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn loss_is_that_of_transformers() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let (loss, _) = gradients(&case, &[ActivationPolicy::Keep; 2]);
        let error = (loss - f64::from(case.loss)).abs() / f64::from(case.loss);
        assert!(error < 1e-5, "{name}: {loss} instead of {}", case.loss);
    }
}

#[test]
fn every_adapter_gradient_is_that_of_peft() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let (_, grads) = gradients(&case, &[ActivationPolicy::Keep; 2]);
        let names =
            |grads: &[(String, Vec<f32>)]| grads.iter().map(|g| g.0.clone()).collect::<Vec<_>>();
        assert_eq!(names(&grads), names(&case.grads), "{name}");
        for ((tensor, found), (_, expected)) in grads.iter().zip(&case.grads) {
            let error = relative_error(found, expected);
            assert!(error < 1e-4, "{name} {tensor}: {error}");
        }
    }
}

#[test]
fn recomputing_gives_the_bits_of_keeping() {
    use ActivationPolicy::{Keep, Recompute};
    for name in CASES {
        let case = ReferenceCase::read(name);
        let kept = gradients(&case, &[Keep, Keep]);
        for policies in [[Recompute, Recompute], [Keep, Recompute], [Recompute, Keep]] {
            assert!(gradients(&case, &policies) == kept, "{name} {policies:?}");
        }
    }
}

/// A batch that goes through the MLP in several tiles, the last of them short.
#[test]
fn more_tokens_than_a_tile_have_the_gradient_of_all_of_them() {
    use ActivationPolicy::{Keep, Recompute};
    // The last has no norm between the residual stream and the MLP.
    for name in ["llama_gqa", "olmo2"] {
        let case = ReferenceCase::read(name);
        let once = case.batch();
        let copies = 2 * MLP_TILE_ROWS / once.input_ids.len() + 1;
        let examples = std::iter::repeat_n(&case.examples, copies).flatten();
        let batch = Batch::from_examples(&examples.collect::<Vec<_>>());
        assert!(batch.input_ids.len() > 2 * MLP_TILE_ROWS);
        let decoder = case.decoder();
        let gradients = |batch: &Batch, policy, dropout| {
            for (_, trainable) in decoder.trainables() {
                trainable.grad.zero_set().unwrap();
            }
            let batch = micro_batch(batch, dropout);
            decoder.backward(&[batch], 0.5, &[policy; 2]).unwrap();
            sorted_gradients(&decoder)
        };
        let all = gradients(&batch, Keep, None);
        for ((tensor, all), (_, once)) in all.iter().zip(gradients(&once, Keep, None)) {
            let expected: Vec<f32> = once.iter().map(|g| copies as f32 * g).collect();
            assert!(relative_error(all, &expected) < 1e-5, "{name} {tensor}");
        }
        assert!(gradients(&batch, Recompute, None) == all);
        let dropout = Dropout::new(0.1, 1, 2, 3);
        let kept = gradients(&batch, Keep, dropout);
        assert!(kept != all);
        assert!(gradients(&batch, Recompute, dropout) == kept);
    }
}

#[test]
fn gradients_do_not_depend_on_the_number_of_threads() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let run =
            |threads| with_threads(threads, || gradients(&case, &[ActivationPolicy::Keep; 2]));
        let one = run(1);
        assert!(run(2) == one && run(3) == one, "{name}");
    }
}

#[test]
fn a_second_backward_adds_to_the_gradient() {
    let case = ReferenceCase::read("llama_gqa");
    let (decoder, batch) = (case.decoder(), case.batch());
    let backward = || {
        decoder
            .backward(
                &[micro_batch(&batch, None)],
                0.5,
                &[ActivationPolicy::Keep; 2],
            )
            .unwrap()
    };
    backward();
    let once = sorted_gradients(&decoder);
    backward();
    for ((name, twice), (_, once)) in sorted_gradients(&decoder).iter().zip(&once) {
        let doubled: Vec<f32> = once.iter().map(|g| 2.0 * g).collect();
        assert!(relative_error(twice, &doubled) < 1e-6, "{name}");
    }
}

#[test]
fn greedy_generation_is_that_of_transformers() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let options = GenerateOptions {
            max_new_tokens: case.generated.len(),
            stop_ids: Vec::new(),
        };
        let mut seen = Vec::new();
        let mut sampler = Sampler::new(SamplingOptions::default()).unwrap();
        let generated = generate(
            &case.decoder(),
            &case.prompt,
            &options,
            &mut sampler,
            |token| {
                seen.push(token);
                ControlFlow::Continue(())
            },
        )
        .unwrap();
        assert_eq!(generated.ids, case.generated, "{name}");
        assert_eq!(seen, generated.ids, "{name}");
        assert_eq!(generated.finish, Finish::Length, "{name}");
    }
}

#[test]
fn a_stop_token_ends_the_text_and_is_not_part_of_it() {
    let case = ReferenceCase::read("mistral_sw");
    let options = GenerateOptions {
        max_new_tokens: case.generated.len(),
        stop_ids: vec![case.generated[5]],
    };
    let mut sampler = Sampler::new(SamplingOptions::default()).unwrap();
    let go_on = |_| ControlFlow::Continue(());
    let generated = generate(&case.decoder(), &case.prompt, &options, &mut sampler, go_on).unwrap();
    assert_eq!(generated.ids, case.generated[..5]);
    assert_eq!(generated.finish, Finish::Stop);
}

#[test]
fn the_cache_gives_the_logits_of_the_whole_sequence_however_it_is_fed() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let decoder = case.decoder();
        let ids = &case.examples[0].input_ids;
        let vocab_size = decoder.config().vocab_size;
        for lengths in [&[ids.len()][..], &[1; 30], &[13, 1, 1, 9, 6]] {
            let mut cache = KvCache::new(&decoder, ids.len()).unwrap();
            for &len in lengths {
                let end = cache.len() + len;
                let logits = values(&decoder.decode(&ids[end - len..end], &mut cache).unwrap());
                let rope = &decoder.config().rope;
                if rope.is_long(end) != rope.is_long(ids.len()) {
                    // The whole has other frequencies than so much of it alone.
                    continue;
                }
                let expected = &case.logits[0][(end - 1) * vocab_size..end * vocab_size];
                let difference = largest_difference(&logits, expected);
                assert!(
                    difference < 1e-4,
                    "{name} {lengths:?} at {end}: {difference}"
                );
            }
        }
    }
}

/// Of a text that is longer than there was memory for at first.
#[test]
fn the_cache_grows_with_the_text() {
    let case = ReferenceCase::read("llama_gqa");
    let decoder = case.decoder();
    let ids: Vec<u32> = (0..600).map(|i| i * 37 % 250).collect();
    let positions: Vec<u32> = (0..600).collect();
    let sequences = Sequences {
        input_ids: &ids,
        positions: &positions,
        cu_seqlens: &[0, 600],
    };
    let expected = values(&decoder.logits(sequences).unwrap());
    let vocab_size = decoder.config().vocab_size;
    let mut cache = KvCache::new(&decoder, 600).unwrap();
    for len in [250, 6, 1, 1, 200, 142] {
        let end = cache.len() + len;
        let logits = values(&decoder.decode(&ids[end - len..end], &mut cache).unwrap());
        let expected = &expected[(end - 1) * vocab_size..end * vocab_size];
        let difference = largest_difference(&logits, expected);
        assert!(difference < 1e-4, "at {end}: {difference}");
    }
    assert!(
        decoder.decode(&[1], &mut cache).is_err(),
        "there is no more room"
    );
}

#[test]
fn evaluation_is_that_of_the_reference_logits() {
    for name in CASES {
        let case = ReferenceCase::read(name);
        let mut log_probs = Vec::new();
        let found = evaluate(
            &case.decoder(),
            &case.examples,
            LogProbs::EveryToken,
            |row, values| {
                assert_eq!(row, log_probs.len());
                log_probs.push(values.unwrap());
                Ok(())
            },
        )
        .unwrap();
        let without = evaluate(
            &case.decoder(),
            &case.examples,
            LogProbs::Omit,
            |_, values| {
                assert!(values.is_none());
                Ok(())
            },
        )
        .unwrap();
        assert!(
            (found.loss - f64::from(case.loss)).abs() < 1e-5,
            "{name}: {found:?}"
        );
        assert!((found.perplexity - found.loss.exp()).abs() < 1e-9);
        assert!(
            (found.loss - without.loss).abs() < 1e-6 && found.tokens == without.tokens,
            "{name}"
        );

        let (mut tokens, mut correct) = (0, 0);
        for ((example, logits), log_probs) in case.examples.iter().zip(&case.logits).zip(&log_probs)
        {
            let vocab_size = logits.len() / example.input_ids.len();
            let rows: Vec<&[f32]> = logits.chunks_exact(vocab_size).collect();
            let expected: Vec<f32> = (1..rows.len())
                .map(|t| log_softmax(rows[t - 1], example.input_ids[t] as usize))
                .collect();
            let difference = largest_difference(log_probs, &expected);
            assert!(
                difference < 1e-4,
                "{name} line {}: {difference}",
                example.line
            );
            for t in (1..rows.len()).filter(|&t| example.labels[t] != IGNORE_INDEX) {
                tokens += 1;
                let largest = rows[t - 1]
                    .iter()
                    .copied()
                    .fold(f32::NEG_INFINITY, f32::max);
                correct += usize::from(rows[t - 1][example.labels[t] as usize] == largest);
            }
        }
        assert_eq!(found.tokens, tokens, "{name}");
        assert!(
            (found.token_accuracy - correct as f64 / tokens as f64).abs() < 1e-12,
            "{name}"
        );
    }
}

fn log_softmax(logits: &[f32], token: usize) -> f32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - largest).exp()).sum();
    (f64::from(logits[token] - largest) - sum.ln()) as f32
}

#[test]
fn labels_that_differ_from_the_tokens_count_for_the_loss_alone() {
    let case = ReferenceCase::read("qwen3");
    let decoder = case.decoder();
    let mut examples = vec![case.examples[0].clone()];
    let run = |examples: &[_], log_probs| {
        let mut rows = Vec::new();
        let evaluation = evaluate(&decoder, examples, log_probs, |_, row| {
            rows.extend(row);
            Ok(())
        });
        (evaluation.unwrap(), rows)
    };
    let (_, unchanged) = run(&examples, LogProbs::EveryToken);
    let last = examples[0].labels.last_mut().unwrap();
    *last = (*last + 1) % 256;
    let (with, rows) = run(&examples, LogProbs::EveryToken);
    let (without, _) = run(&examples, LogProbs::Omit);
    assert_eq!(with, without);
    assert_eq!(rows, unchanged);
}
