//! Weights that are streamed from the host give the bits of weights that stay on the device.
//!
//! The emulator does a copy as late as it may, and refuses one over weights that a launch may still read.

mod emulated;

use candle_core::Tensor;
use emulated::placement_test;
use qlora::device::{Placement, Residence, Residency};
use qlora::model::{
    ActivationPolicy, Decoder, InitLoraWeights, KvCache, MicroBatch, Regularization, Sequences,
};
use qlora::ops::dropout::Dropout;
use qlora::quant::{DenseTensor, QuantizeOptions};
use qlora::store::{AdapterConfig, Checkpoint, TargetModules};
use qlora::train::{Shape, SyntheticRun, TrainConfig, Trainer};

const LAYERS: usize = 5;
const SHAPE: Shape = Shape {
    hidden_size: 128,
    intermediate_size: 352,
    num_hidden_layers: LAYERS,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    vocab_size: 256,
    tie_word_embeddings: true,
};

fn synthetic(options: QuantizeOptions) -> SyntheticRun {
    SyntheticRun::create(&SHAPE, 9, 8, options).unwrap()
}

fn streamed(placement: &Placement, slots: usize) -> Placement {
    Placement {
        residence: Residence {
            weights: Residency::Streamed { slots },
            ..placement.residence
        },
        ..placement.clone()
    }
}

fn decoder(run: &SyntheticRun, placement: &Placement, targets: &str) -> Decoder {
    let checkpoint = Checkpoint::open(run.model()).unwrap();
    let mut decoder = Decoder::load(&checkpoint, None, placement).unwrap();
    let config = AdapterConfig {
        r: 4,
        target_modules: TargetModules::parse(targets).unwrap(),
        ..AdapterConfig::default()
    };
    decoder
        .add_lora(&config, InitLoraWeights::Default, 7)
        .unwrap();
    decoder
}

/// With adapters of DoRA's whose B is no longer zero, so that the norms of the merged weights take every part of them.
fn dora_decoder(run: &SyntheticRun, placement: &Placement) -> Decoder {
    let checkpoint = Checkpoint::open(run.model()).unwrap();
    let mut decoder = Decoder::load(&checkpoint, None, placement).unwrap();
    let config = AdapterConfig {
        r: 4,
        lora_alpha: 8.0,
        target_modules: TargetModules::AllLinear,
        use_dora: true,
        ..AdapterConfig::default()
    };
    decoder
        .add_lora(&config, InitLoraWeights::Default, 7)
        .unwrap();
    let mut adapter = decoder.adapter(&config).unwrap();
    let bs = adapter.tensors.iter_mut();
    for (_, b) in bs.filter(|(name, _)| name.contains("lora_B")) {
        let values: Vec<f32> = (0..b.numel()).map(|i| 0.1 * (i as f32).sin()).collect();
        *b = DenseTensor::from_f32(b.shape.clone(), &values);
    }
    decoder.load_adapter(&adapter).unwrap();
    decoder
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

const IDS: [u32; 7] = [3, 200, 17, 5, 5, 90, 41];
const POSITIONS: [u32; 7] = [0, 1, 2, 3, 4, 5, 6];
const LABELS: [i64; 7] = [200, 17, 5, 5, 90, 41, -100];

fn sequences() -> Sequences<'static> {
    Sequences {
        input_ids: &IDS,
        positions: &POSITIONS,
        cu_seqlens: &[0, 7],
    }
}

fn gradients(decoder: &Decoder) -> (Vec<f32>, Vec<f32>) {
    gradients_with(decoder, [ActivationPolicy::Recompute; LAYERS], None)
}

/// Gradients after two backward passes, with logits and a decoded token between them: blocks are entered upwards after they
/// were left downwards, upwards and upwards again.
fn gradients_with(
    decoder: &Decoder,
    policies: [ActivationPolicy; LAYERS],
    dropout: Option<Dropout>,
) -> (Vec<f32>, Vec<f32>) {
    let micro_batch = MicroBatch {
        sequences: sequences(),
        labels: &LABELS,
        regularization: Regularization {
            dropout,
            ..Regularization::default()
        },
    };
    decoder.backward(&[micro_batch], 0.1, &policies).unwrap();
    let mut logits = values(&decoder.logits(sequences()).unwrap());
    let mut cache = KvCache::new(decoder, 8).unwrap();
    logits.extend(values(&decoder.decode(&IDS, &mut cache).unwrap()));
    logits.extend(values(&decoder.decode(&[9], &mut cache).unwrap()));
    decoder
        .backward(&[micro_batch, micro_batch], 0.1, &policies)
        .unwrap();
    (logits, values(decoder.parameters().grads()))
}

placement_test!(
    any_number_of_slots_gives_the_bits_of_resident_weights,
    |placement| {
        let run = synthetic(QuantizeOptions::default());
        let expected = gradients(&decoder(&run, placement, "all-linear"));
        for slots in 1..=LAYERS + 1 {
            let found = gradients(&decoder(&run, &streamed(placement, slots), "all-linear"));
            assert!(found == expected, "{slots} slots");
        }
    }
);

placement_test!(
    a_backward_pass_that_ends_half_way_down_is_followed_by_one_from_below,
    |placement| {
        let run = synthetic(QuantizeOptions::default());
        let targets = r"model\.layers\.[34]\..*";
        let expected = gradients(&decoder(&run, placement, targets));
        let found = gradients(&decoder(&run, &streamed(placement, 2), targets));
        assert!(found == expected);
        // What was asked for below the last block of the pass is still on its way when the next one begins.
        let found = emulated::with_slow_copies(|| {
            gradients(&decoder(&run, &streamed(placement, 2), targets))
        });
        assert!(found == expected);
    }
);

placement_test!(
    scales_without_double_quantization_are_streamed_too,
    |placement| {
        let options = QuantizeOptions {
            double_quant: qlora::quant::DoubleQuant::No,
            ..QuantizeOptions::default()
        };
        let run = synthetic(options);
        let expected = gradients(&decoder(&run, placement, "all-linear"));
        let found = gradients(&decoder(&run, &streamed(placement, 2), "all-linear"));
        assert!(found == expected);
    }
);

placement_test!(
    dora_on_streamed_weights_has_the_bits_of_resident_ones_whatever_is_kept,
    |placement| {
        use ActivationPolicy::{Keep, Offload, Recompute};
        let run = synthetic(QuantizeOptions::default());
        let streamed = streamed(placement, 2);
        // Without dropout the norm scales the one product with W; with it there are two.
        let mixed = [Keep, Recompute, Offload, Offload, Keep];
        for (dropout, kept) in [
            (
                None,
                &[[Keep; LAYERS], [Recompute; LAYERS], [Offload; LAYERS]][..],
            ),
            (Dropout::new(0.1, 1, 2, 0), &[mixed]),
        ] {
            let resident = dora_decoder(&run, placement);
            let expected = gradients_with(&resident, [Keep; LAYERS], dropout);
            for (name, trainable) in resident.trainables() {
                let is_zero = |g: &f32| *g == 0.0;
                assert!(!values(&trainable.grad).iter().all(is_zero), "{name}");
            }
            for &policies in kept {
                let found = gradients_with(&dora_decoder(&run, &streamed), policies, dropout);
                assert!(found == expected, "{policies:?}, {dropout:?}");
            }
        }
    }
);

/// Losses of three steps and the adapter after them.
fn trained(
    run: &SyntheticRun,
    placement: &Placement,
    limit: Option<u64>,
) -> (Trainer, Vec<f64>, Vec<f32>) {
    let mut keys = vec![
        ("gradient_accumulation_steps".to_string(), "3".to_string()),
        ("lora_r".into(), "4".into()),
        ("lora_dropout".into(), "0.1".into()),
        ("lora_matrix_dropout".into(), "0.5".into()),
        ("learning_rate".into(), "1e-3".into()),
    ];
    keys.extend(limit.map(|limit| ("vram_limit".into(), limit.to_string())));
    let mut config = TrainConfig::load_partial(None, &keys).unwrap();
    config.model_name_or_path = run.model();
    config.dataset = run.dataset().into();
    config.output_dir = run.output_dir();
    let mut trainer = Trainer::new(config, placement).unwrap();
    let losses = (0..3).map(|_| trainer.step().unwrap().loss).collect();
    let masters = trainer.decoder().trainables();
    let adapter = masters.flat_map(|(_, t)| t.master().unwrap()).collect();
    (trainer, losses, adapter)
}

placement_test!(
    a_limit_below_the_weights_streams_them_with_the_same_result,
    |placement| {
        let run = synthetic(QuantizeOptions::default());
        let (resident, losses, adapter) = trained(&run, placement, None);
        assert_eq!(resident.plan().residence.weights, Residency::Resident);
        let least = resident.plan().peak.total();
        let streams = |limit: &u64| {
            let keys = [("vram_limit".to_string(), limit.to_string())];
            let config = TrainConfig::load_partial(None, &keys).unwrap();
            let plan = qlora::train::plan::Plan::within(resident.workload(), &config, *limit);
            plan.is_ok_and(|plan| {
                plan.residence.weights != Residency::Resident && plan.together == 3
            })
        };
        let limit = (1..2000).map(|kib| least - kib * 1024).find(streams);
        assert!(limit.is_some());
        let (trainer, streamed_losses, streamed_adapter) = trained(&run, placement, limit);
        assert_eq!(trainer.plan().together, 3);
        assert!(streamed_losses == losses && streamed_adapter == adapter);
    }
);

/// What the other tests lean on: the emulator does not let a wrong order of copies and launches pass.
#[test]
fn the_emulator_refuses_a_copy_over_what_a_launch_may_still_read() {
    use emulated::copies::{byte, mark, note_launch, queue, reach};
    let (from, mut to) = (vec![7u8; 64], vec![0u8; 64]);
    let address = to.as_mut_ptr() as u64;
    let before = mark();
    note_launch(&[byte(address + 16)]).unwrap();
    assert!(queue(&from, address, None).is_err());
    assert!(queue(&from, address, Some(&before)).is_err());
    let copy = queue(&from, address, Some(&mark())).unwrap();
    assert!(
        to.iter().all(|&byte| byte == 0),
        "done before it was waited for"
    );
    reach(&copy).unwrap();
    assert_eq!(to, from);
}
