//! Weights that are dequantized beside the product before their own give the bits of weights dequantized in front of it.
//!
//! The emulator runs a launch aside as late as it may, and refuses what uses its memory before it was waited for.

mod emulated;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use emulated::{Requests, copies, on_one_queue, requests_of};
use proptest::collection::vec;
use proptest::prelude::*;
use qlora::device::{Dequantized, Placement, Residence, Residency};
use qlora::model::{
    ActivationPolicy, Decoder, InitLoraWeights, KvCache, MicroBatch, Regularization, Sequences,
};
use qlora::ops::dropout::Dropout;
use qlora::ops::linear;
use qlora::ops::weight::{DenseCache, Weight};
use qlora::quant::{DenseTensor, FrozenWeight, Params4bit, QuantizeOptions};
use qlora::store::{AdapterConfig, Checkpoint, TargetModules};
use qlora::train::{Shape, SyntheticRun};

const IN_FRONT: &str = "nf4_dequantize_bf16";
const ASIDE: &str = "nf4_dequantize_bf16 aside";
const WAITS: &str = "wait for a launch aside";

/// Columns of the weights that are asked for by themselves.
const D_IN: usize = 64;

fn count(requests: &Requests, name: &str) -> usize {
    requests.get(name).copied().unwrap_or_default()
}

fn values(t: &Tensor) -> Vec<f32> {
    let t = t.to_dtype(DType::F32).unwrap();
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Weights of so many rows, no two alike, in a ring with room for so many elements.
fn weights(rows: &[usize], room: usize) -> Vec<Weight> {
    emulated::placement();
    let cache = Arc::new(DenseCache::new(&[room], &Device::Cpu).unwrap());
    let weight = |(number, &rows): (usize, &usize)| {
        let value = |i: usize| ((i * 37 + number * 11) % 101) as f32 / 50.0 - 1.0;
        let values: Vec<f32> = (0..rows * D_IN).map(value).collect();
        let dense = DenseTensor::from_f32(vec![rows, D_IN], &values);
        let params = Params4bit::quantize("w", &dense, QuantizeOptions::default()).unwrap();
        Weight::on_device(FrozenWeight::Quantized(params), &cache).unwrap()
    };
    rows.iter().enumerate().map(weight).collect()
}

/// The product of a fixed input and the weight.
fn product(weight: &Weight) -> Vec<f32> {
    let x: Vec<f32> = (0..2 * D_IN).map(|i| (i % 7) as f32 - 3.0).collect();
    let x = Tensor::from_vec(x, (2, D_IN), &Device::Cpu).unwrap();
    let x = x.to_dtype(DType::BF16).unwrap();
    values(&linear::forward(&x, weight, None, None).unwrap().0)
}

fn largest(rows: &[usize]) -> usize {
    rows.iter().max().unwrap() * D_IN
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    /// What is announced and what is asked for have nothing to do with each other here.
    #[test]
    fn weights_in_any_order_have_their_bits(
        rows in vec(1..40usize, 1..6),
        more_room in 0..5000usize,
        blocks in vec((vec(any::<prop::sample::Index>(), 0..8), vec(any::<prop::sample::Index>(), 0..8)), 1..4),
    ) {
        let expected: Vec<_> = rows.iter().enumerate().map(|(i, _)| {
            product(&weights(&rows, largest(&rows))[i])
        }).collect();
        let weights = weights(&rows, largest(&rows) + more_room);
        for (announced, asked) in blocks {
            let _order = Weight::announce(announced.iter().map(|i| i.get(&weights)));
            for index in asked {
                let i = index.index(rows.len());
                prop_assert_eq!(&product(&weights[i]), &expected[i]);
            }
        }
        prop_assert!(copies::is_idle());
    }

    /// Each weight is asked for once or twice on end, as the layers of DoRA do.
    #[test]
    fn an_order_that_is_kept_dequantizes_nothing_more(
        rows in vec(1..40usize, 1..6),
        more_room in 0..5000usize,
        asked in vec((any::<prop::sample::Index>(), 1..3usize), 0..10),
    ) {
        let ask = |announce: bool| {
            let weights = weights(&rows, largest(&rows) + more_room);
            let order = asked.iter().map(|(index, _)| index.get(&weights));
            requests_of(|| {
                let _order = announce.then(|| Weight::announce(order.clone()));
                for (weight, (_, times)) in order.zip(&asked) {
                    (0..*times).for_each(|_| drop(product(weight)));
                }
            }).1
        };
        let (plain, ahead) = (ask(false), ask(true));
        prop_assert_eq!(count(&plain, ASIDE), 0);
        prop_assert_eq!(count(&ahead, IN_FRONT) + count(&ahead, ASIDE), count(&plain, IN_FRONT));
        prop_assert_eq!(count(&ahead, WAITS), count(&ahead, ASIDE));
    }
}

#[test]
fn every_weight_but_the_first_is_dequantized_aside_where_all_have_room() {
    let rows = [10, 30, 2, 17];
    let weights = weights(&rows, 64 * D_IN);
    let (_, requests) = requests_of(|| {
        let _order = Weight::announce(&weights);
        weights.iter().for_each(|weight| drop(product(weight)));
    });
    assert_eq!(count(&requests, IN_FRONT), 1);
    assert_eq!(count(&requests, ASIDE), rows.len() - 1);
}

#[test]
fn weights_without_room_for_two_are_dequantized_in_front() {
    let rows = [10, 10, 10];
    let weights = weights(&rows, 18 * D_IN);
    let (_, requests) = requests_of(|| {
        let _order = Weight::announce(&weights);
        weights.iter().for_each(|weight| drop(product(weight)));
    });
    assert_eq!(count(&requests, IN_FRONT), rows.len());
    assert_eq!(count(&requests, ASIDE), 0);
}

#[test]
fn a_weight_that_nobody_asked_for_is_waited_for_at_the_end_of_the_order() {
    let weights = weights(&[10, 10], 64 * D_IN);
    let order = Weight::announce(&weights);
    product(&weights[0]);
    assert!(!copies::is_idle(), "done before it was waited for");
    let (_, requests) = requests_of(|| drop(order));
    assert_eq!(count(&requests, WAITS), 1);
    assert!(copies::is_idle());
    let (_, requests) = requests_of(|| product(&weights[1]));
    assert_eq!(count(&requests, IN_FRONT), 0, "it is there nonetheless");
}

#[test]
fn a_weight_that_is_overtaken_is_waited_for_before_the_next_is_dequantized_aside() {
    let rows = [10, 11, 12, 13];
    let expected = product(&weights(&rows, 64 * D_IN)[1]);
    let weights = weights(&rows, 64 * D_IN);
    product(&weights[2]);
    let _order = Weight::announce(&weights);
    product(&weights[0]);
    // It is there, and the one behind it is not.
    product(&weights[2]);
    assert!(!copies::is_idle());
    assert_eq!(product(&weights[1]), expected);
}

#[test]
fn the_memory_of_a_weight_that_is_not_waited_for_is_held() {
    let weights = weights(&[10, 10], 64 * D_IN);
    let order = Weight::announce(&weights);
    product(&weights[0]);
    drop(weights);
    assert!(!copies::is_idle());
    drop(order);
    assert!(copies::is_idle());
}

const LAYERS: usize = 4;

const SHAPE: Shape = Shape {
    hidden_size: 64,
    intermediate_size: 96,
    num_hidden_layers: LAYERS,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    vocab_size: 256,
    tie_word_embeddings: false,
};

/// Adapters on blocks 1 to 3, so that the input of block 1 needs no gradient.
fn decoder(run: &SyntheticRun, residence: Residence, use_dora: bool) -> Decoder {
    let placement = Placement {
        residence,
        ..emulated::placement()
    };
    let checkpoint = Checkpoint::open(run.model()).unwrap();
    let mut decoder = Decoder::load(&checkpoint, None, &placement).unwrap();
    let config = AdapterConfig {
        r: 4,
        target_modules: TargetModules::parse(r"model\.layers\.[123]\..*").unwrap(),
        use_dora,
        ..AdapterConfig::default()
    };
    decoder
        .add_lora(&config, InitLoraWeights::Default, 7)
        .unwrap();
    decoder
}

const IDS: [u32; 7] = [3, 200, 17, 5, 5, 90, 41];

fn sequences() -> Sequences<'static> {
    Sequences {
        input_ids: &IDS,
        positions: &[0, 1, 2, 3, 4, 5, 6],
        cu_seqlens: &[0, 7],
    }
}

fn micro_batch(dropout: f64) -> MicroBatch<'static> {
    MicroBatch {
        sequences: sequences(),
        labels: &[200, 17, 5, 5, 90, 41, -100],
        regularization: Regularization {
            dropout: Dropout::new(dropout, 1, 2, 3),
            ..Regularization::default()
        },
    }
}

/// Gradients of a step of two micro-batches that go through the blocks together and of one of one, logits and decoded tokens.
fn outputs(decoder: &Decoder, policies: [ActivationPolicy; LAYERS]) -> Vec<f32> {
    let step = |batches: &[MicroBatch<'_>]| decoder.backward(batches, 0.1, &policies).unwrap();
    step(&[micro_batch(0.1), micro_batch(0.0)]);
    step(&[micro_batch(0.0)]);
    let mut outputs = values(decoder.parameters().grads());
    outputs.extend(values(&decoder.logits(sequences()).unwrap()));
    let mut cache = KvCache::new(decoder, 8).unwrap();
    outputs.extend(values(&decoder.decode(&IDS, &mut cache).unwrap()));
    outputs.extend(values(&decoder.decode(&[9], &mut cache).unwrap()));
    outputs
}

#[test]
fn a_second_queue_changes_no_bit_of_a_step() {
    use ActivationPolicy::{Keep, Offload, Recompute};
    let run = SyntheticRun::create(&SHAPE, 6, 8, QuantizeOptions::default()).unwrap();
    for use_dora in [false, true] {
        let plain = || outputs(&decoder(&run, Residence::DEVICE, use_dora), [Keep; LAYERS]);
        let expected = on_one_queue(plain);
        assert!(expected.iter().any(|value| *value != 0.0));
        for weights in [
            Residency::Resident,
            Residency::Streamed { slots: 1 },
            Residency::Streamed { slots: 2 },
        ] {
            for dequantized in [Dequantized::Block, Dequantized::Weight] {
                for policies in [
                    [Keep; LAYERS],
                    [Recompute; LAYERS],
                    [Keep, Recompute, Offload, Keep],
                ] {
                    let residence = Residence {
                        weights,
                        dequantized,
                        ..Residence::DEVICE
                    };
                    let decoder = decoder(&run, residence, use_dora);
                    let (found, requests) = requests_of(|| outputs(&decoder, policies));
                    let case = format!("{use_dora}, {weights:?}, {dequantized:?}, {policies:?}");
                    assert!(found == expected, "{case}");
                    assert!(copies::is_idle(), "{case}");
                    let aside = count(&requests, ASIDE);
                    assert_eq!(count(&requests, WAITS), aside, "{case}");
                    assert!(aside > 0, "{case}");
                }
            }
        }
    }
}

/// How often a step of one micro-batch dequantizes in front of products, and aside.
fn dequantizations(
    (run, residence, use_dora): (&SyntheticRun, Residence, bool),
    policy: ActivationPolicy,
) -> (usize, usize) {
    let decoder = decoder(run, residence, use_dora);
    let step = || decoder.backward(&[micro_batch(0.0)], 0.1, &[policy; LAYERS]);
    let (losses, requests) = requests_of(step);
    losses.unwrap();
    (count(&requests, IN_FRONT), count(&requests, ASIDE))
}

#[test]
fn a_block_that_fits_dequantizes_each_weight_but_its_first_aside() {
    use ActivationPolicy::{Keep, Recompute};
    let run = SyntheticRun::create(&SHAPE, 6, 8, QuantizeOptions::default()).unwrap();
    let [q, rest, mlp_and_o] = [1, 6, 3];
    for weights in [Residency::Resident, Residency::Streamed { slots: 2 }] {
        let residence = Residence {
            weights,
            ..Residence::DEVICE
        };
        // Block 3 is still there from forward, block 0 has no backward, and in that of block 1 only DoRA needs q, k and v
        // where nothing is computed again.
        for (policy, use_dora, of_block_1) in [
            (Recompute, false, rest),
            (Recompute, true, rest),
            (Keep, false, mlp_and_o),
            (Keep, true, rest),
        ] {
            let found = dequantizations((&run, residence, use_dora), policy);
            let passes = LAYERS + 1;
            let expected = (q * (passes + 1), rest * passes + of_block_1);
            assert_eq!(found, expected, "{policy:?}, {use_dora}, {weights:?}");
        }
    }
}

#[test]
fn where_one_weight_has_room_nothing_is_dequantized_ahead() {
    use ActivationPolicy::{Keep, Recompute};
    let square = Shape {
        intermediate_size: SHAPE.hidden_size,
        num_key_value_heads: SHAPE.num_attention_heads,
        ..SHAPE
    };
    let run = SyntheticRun::create(&square, 6, 8, QuantizeOptions::default()).unwrap();
    let residence = Residence {
        dequantized: Dequantized::Weight,
        ..Residence::DEVICE
    };
    // All weights are of one size. Backward asks for seven, and for six of them in the half of forward before that; the
    // input of block 1 needs no gradient. Block 3 finds its last weight there from forward.
    let forward = 7 * LAYERS;
    for (policy, backward) in [(Keep, 7 + 7 + 4 - 1), (Recompute, 13 + 13 + 10)] {
        let found = dequantizations((&run, residence, false), policy);
        assert_eq!(found, (forward + backward, 0), "{policy:?}");
    }
}

/// What the other tests lean on: the emulator does not let a kernel pass that races with one aside.
mod the_emulator_refuses {
    use super::copies::{byte, mark, note_launch, queue_aside, reach};
    use std::ops::Range;

    use super::*;

    fn aside(
        memory: &Range<u64>,
        after: &qlora::device::Marker,
    ) -> qlora::Result<qlora::device::Marker> {
        queue_aside(
            (vec![memory.end + 8], memory.clone()),
            after,
            Box::new(|| Ok(())),
        )
    }

    fn memory(bytes: &[u8; 64]) -> Range<u64> {
        let start = bytes.as_ptr() as u64;
        start..start + 32
    }

    #[test]
    fn a_launch_between_the_mark_and_the_launch_aside() {
        let bytes = [0; 64];
        let memory = memory(&bytes);
        let before = mark();
        note_launch(&[byte(memory.start + 16)]).unwrap();
        assert!(aside(&memory, &before).is_err());
        let done = aside(&memory, &mark()).unwrap();
        reach(&done).unwrap();
    }

    #[test]
    fn a_launch_before_the_wait() {
        let bytes = [0; 64];
        let memory = memory(&bytes);
        let done = aside(&memory, &mark()).unwrap();
        let inside = [byte(memory.start + 16)];
        note_launch(&[byte(memory.end)]).unwrap();
        assert!(note_launch(&inside).is_err());
        reach(&done).unwrap();
        note_launch(&inside).unwrap();
    }

    #[test]
    fn a_copy_before_the_wait_and_one_that_comes_after_a_mark_before_it() {
        let (from, mut bytes) = (vec![7u8; 8], [0; 64]);
        let memory = memory(&bytes);
        let read = bytes.as_mut_ptr() as u64 + 40;
        let done = aside(&memory, &mark()).unwrap();
        let before = mark();
        for to in [memory.start, read] {
            assert!(copies::queue(&from, to, Some(&before)).is_err());
        }
        reach(&done).unwrap();
        for to in [memory.start, read] {
            assert!(copies::queue(&from, to, Some(&before)).is_err());
            reach(&copies::queue(&from, to, Some(&mark())).unwrap()).unwrap();
        }
    }

    #[test]
    fn a_launch_aside_that_reads_what_is_still_being_copied() {
        let (from, mut bytes) = (vec![7u8; 8], [0; 64]);
        let memory = memory(&bytes);
        let read = bytes.as_mut_ptr() as u64 + 40;
        let copy = copies::queue(&from, read, Some(&mark())).unwrap();
        assert!(aside(&memory, &mark()).is_err());
        reach(&copy).unwrap();
        reach(&aside(&memory, &mark()).unwrap()).unwrap();
    }
}
