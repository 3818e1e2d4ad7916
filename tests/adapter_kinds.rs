//! Each kind of PEFT adapter computes what it computes in PEFT: logits, gradients, generation, merged weights, and its files.

mod reference_case;

use std::borrow::Cow;
use std::fs;
use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use qlora::device::Placement;
use qlora::infer::{GenerateOptions, Sampler, SamplingOptions, generate};
use qlora::model::{ActivationPolicy, Block, Decoder, KvCache, Layout, LoraDropout, Module};
use qlora::ops::attention::{Segment, Segments};
use qlora::ops::rope::Positions;
use qlora::quant::QuantizeOptions;
use qlora::store::{Adapter, Checkpoint};
use qlora::train::{Shape, SyntheticRun, TrainConfig, Trainer};
use reference_case::{
    ADAPTER_CASES, ReferenceCase, floats, largest_difference, micro_batch, relative_error,
    sequences, values,
};
use safetensors::SafeTensors;
use serde_json::Value;

fn each(check: impl Fn(&str, &ReferenceCase)) {
    for name in ADAPTER_CASES {
        check(name, &ReferenceCase::of_adapter(name));
    }
}

/// Loss and gradients by name of the mean loss over the case's batch.
fn gradients(
    case: &ReferenceCase,
    policies: &[ActivationPolicy],
) -> (f32, Vec<(String, Vec<f32>)>) {
    let decoder = case.decoder();
    let batch = case.batch();
    let d_loss = 1.0 / batch.target_count() as f32;
    let losses = decoder.backward(&[micro_batch(&batch, None)], d_loss, policies);
    let losses = losses.unwrap().remove(0).read().unwrap();
    let mut grads: Vec<_> = decoder
        .trainables()
        .map(|(name, t)| (name, values(&t.grad)))
        .collect();
    grads.sort_by(|a, b| a.0.cmp(&b.0));
    (losses.iter().map(|l| l.loss).sum::<f32>() * d_loss, grads)
}

#[test]
fn logits_are_those_of_peft() {
    each(|name, case| {
        let logits = values(&case.decoder().logits(sequences(&case.batch())).unwrap());
        let difference = largest_difference(&logits, &case.logits.concat());
        assert!(difference < 1e-4, "{name}: {difference}");
    });
}

#[test]
fn every_gradient_is_that_of_peft() {
    each(|name, case| {
        let (loss, grads) = gradients(case, &[ActivationPolicy::Keep; 2]);
        assert!(
            (loss - case.loss).abs() < 1e-5 * case.loss,
            "{name}: {loss}"
        );
        let names =
            |grads: &[(String, Vec<f32>)]| grads.iter().map(|g| g.0.clone()).collect::<Vec<_>>();
        assert_eq!(names(&grads), names(&case.grads), "{name}");
        for ((tensor, found), (_, expected)) in grads.iter().zip(&case.grads) {
            let error = relative_error(found, expected);
            assert!(error < 1e-4, "{name} {tensor}: {error}");
        }
    });
}

#[test]
fn recomputing_gives_the_bits_of_keeping() {
    use ActivationPolicy::{Keep, Recompute};
    each(|name, case| {
        let kept = gradients(case, &[Keep, Keep]);
        for policies in [[Recompute, Recompute], [Keep, Recompute]] {
            assert!(gradients(case, &policies) == kept, "{name} {policies:?}");
        }
    });
}

#[test]
fn greedy_generation_with_a_cache_is_that_of_peft() {
    each(|name, case| {
        let options = GenerateOptions {
            max_new_tokens: case.generated.len(),
            stop_ids: Vec::new(),
        };
        let mut sampler = Sampler::new(SamplingOptions::default()).unwrap();
        let go_on = |_| ControlFlow::Continue(());
        let generated = generate(&case.decoder(), &case.prompt, &options, &mut sampler, go_on);
        assert_eq!(generated.unwrap().ids, case.generated, "{name}");
    });
}

/// The output of a block for some rows.
fn output(block: &Block, decoder: &Decoder, rows: usize) -> Vec<f32> {
    let width = decoder.config().hidden_size;
    let x: Vec<f32> = (0..rows * width).map(|i| (i as f32).sin()).collect();
    let positions: Vec<u32> = (0..rows as u32).collect();
    let segment = Segment {
        queries: 0..rows,
        keys: 0..rows,
    };
    let layout = Layout {
        positions: &Positions::new(&positions),
        segments: &Segments::from(vec![segment]),
        rope: &decoder.rope_tables(rows).unwrap(),
        dropout: LoraDropout::default(),
    };
    let x = Tensor::from_vec(x, (rows, width), &Device::Cpu).unwrap();
    let y = block.forward(&x, &layout, ActivationPolicy::Recompute);
    values(&y.unwrap().0)
}

#[test]
fn a_block_that_is_not_trained_keeps_the_scales_of_dora_and_gives_the_same_bits() {
    for name in ["dora", "dora_patterns"] {
        let decoder = ReferenceCase::of_adapter(name).decoder();
        let blocks = decoder.blocks().iter();
        let lasting: Vec<_> = blocks.clone().map(Block::lasting).collect();
        assert!(lasting.iter().any(|block| matches!(block, Cow::Owned(_))));
        for rows in [7, 1, 1, 3] {
            for (block, lasting) in blocks.clone().zip(&lasting) {
                let [found, expected] = [lasting, block].map(|b| output(b, &decoder, rows));
                assert!(found == expected, "{name} {rows}");
            }
        }
    }
    let plain = ReferenceCase::of_adapter("rslora_q_v").decoder();
    let mut lasting = plain.blocks().iter().map(Block::lasting);
    assert!(lasting.all(|block| matches!(block, Cow::Borrowed(_))));
}

#[test]
fn what_is_written_between_steps_of_training_has_the_scales_of_that_step() {
    let shape = Shape {
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        vocab_size: 128,
        tie_word_embeddings: true,
    };
    let run = SyntheticRun::create(&shape, 6, 8, QuantizeOptions::default()).unwrap();
    let keys = [
        ("use_dora", "true"),
        ("lora_r", "4"),
        ("learning_rate", "1e-2"),
    ];
    let keys = keys.map(|(key, value)| (key.to_string(), value.to_string()));
    let mut config = TrainConfig::load_partial(None, &keys).unwrap();
    config.model_name_or_path = run.model();
    config.dataset = run.dataset().into();
    config.output_dir = run.output_dir();
    let adapter_config = config.new_adapter_config();
    let mut trainer = Trainer::new(config, &Placement::cpu()).unwrap();
    let logits = |decoder: &Decoder| {
        let mut cache = KvCache::new(decoder, 4).unwrap();
        decoder.decode(&[3, 17, 5], &mut cache).unwrap();
        values(&decoder.decode(&[9], &mut cache).unwrap())
    };
    let mut before = Vec::new();
    for step in 0..3 {
        trainer.step().unwrap();
        let found = logits(trainer.decoder());
        let checkpoint = Checkpoint::open(run.model()).unwrap();
        let mut fresh = Decoder::load(&checkpoint, None, &Placement::cpu()).unwrap();
        let adapter = trainer.decoder().adapter(&adapter_config).unwrap();
        fresh.load_adapter(&adapter).unwrap();
        assert!(found == logits(&fresh) && found != before, "{step}");
        before = found;
    }
}

#[test]
fn merged_weights_are_those_of_peft() {
    each(|name, case| {
        let bytes = fs::read(&case.reference).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let decoder = case.decoder();
        for (layer, module) in [(0, Module::Q), (1, Module::Down)] {
            let key = format!("merged.{}", decoder.config().linear_path(layer, module));
            let linear = decoder.linear(layer, module);
            if linear.lora.is_none() {
                assert!(tensors.tensor(&key).is_err(), "{name} {key}");
                continue;
            }
            let found = linear.merged_weight().unwrap();
            assert_eq!(
                found.shape,
                tensors.tensor(&key).unwrap().shape(),
                "{name} {key}"
            );
            let error = relative_error(&found.to_f32_vec(), &floats(&tensors, &key));
            assert!(error < 1e-6, "{name} {key}: {error}");
        }
    });
}

#[test]
fn an_adapter_is_written_as_peft_writes_it() {
    each(|name, case| {
        let stored = Adapter::read(&case.adapter).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let written = case.decoder().adapter(&stored.config).unwrap();
        written.write(dir.path()).unwrap();
        let read = Adapter::read(dir.path()).unwrap();
        assert_eq!(read.tensors.len(), stored.tensors.len(), "{name}");
        for (tensor, stored) in &stored.tensors {
            let read = &read.tensors[tensor];
            assert!(
                (&read.shape, &read.data) == (&stored.shape, &stored.data),
                "{name} {tensor}"
            );
        }
        let config = |path: &std::path::Path| -> Value {
            let text = fs::read(path.join("adapter_config.json")).unwrap();
            serde_json::from_slice(&text).unwrap()
        };
        let (ours, theirs) = (config(dir.path()), config(&case.adapter));
        for (key, ours) in ours.as_object().unwrap() {
            let as_list = match &theirs[key] {
                Value::String(one) if key == "layers_pattern" => Value::from(vec![one.clone()]),
                other => other.clone(),
            };
            assert_eq!(*ours, as_list, "{name} {key}");
        }
    });
}
