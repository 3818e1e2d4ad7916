//! What waits in host memory comes back with the same bits: inputs of blocks, token embeddings, moments and lower halves.

mod emulated;

use candle_core::{DType, Device, Tensor};
use emulated::{placement_test, requests_of};
use qlora::device::{Dequantized, Placement, Residence, Residency, Side};
use qlora::model::{
    ActivationPolicy, Decoder, InitLoraWeights, KvCache, MicroBatch, Parameters, Regularization,
    Sequences,
};
use qlora::ops::dropout::Dropout;
use qlora::ops::host_memory::HostMemory;
use qlora::ops::paged::{PagedTensor, Pager};
use qlora::quant::QuantizeOptions;
use qlora::store::{AdapterConfig, Checkpoint, TargetModules};
use qlora::train::plan::Plan;
use qlora::train::{Shape, SyntheticRun, TrainConfig, Trainer};

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

fn synthetic(shape: &Shape) -> SyntheticRun {
    SyntheticRun::create(shape, 6, 8, QuantizeOptions::default()).unwrap()
}

fn decoder(run: &SyntheticRun, placement: &Placement) -> Decoder {
    let checkpoint = Checkpoint::open(run.model()).unwrap();
    let mut decoder = Decoder::load(&checkpoint, None, placement).unwrap();
    let config = AdapterConfig {
        base_model_name_or_path: None,
        revision: None,
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.1,
        // Nothing is trained below block 1, whose input needs no gradient.
        target_modules: TargetModules::parse(r"model\.layers\.[123]\..*").unwrap(),
        use_rslora: false,
        ..AdapterConfig::default()
    };
    decoder
        .add_lora(&config, InitLoraWeights::Default, 7)
        .unwrap();
    decoder
}

fn residing(placement: &Placement, residence: Residence) -> Placement {
    Placement {
        residence,
        ..placement.clone()
    }
}

fn floats(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

const IDS: [u32; 7] = [3, 200, 17, 5, 5, 90, 41];

fn sequences(ids: &[u32]) -> Sequences<'_> {
    const POSITIONS: [u32; 7] = [0, 1, 2, 3, 4, 5, 6];
    Sequences {
        input_ids: ids,
        positions: &POSITIONS[..ids.len()],
        cu_seqlens: if ids.len() == 7 { &[0, 7] } else { &[0, 4] },
    }
}

/// Gradients of micro-batches of two lengths that go through the blocks together, and of one alone after them.
fn gradients(decoder: &Decoder, policies: [ActivationPolicy; LAYERS]) -> Vec<f32> {
    const LABELS: [i64; 7] = [200, 17, 5, 5, 90, 41, -100];
    let batch = |len: usize, number| MicroBatch {
        sequences: sequences(&IDS[..len]),
        labels: &LABELS[..len],
        regularization: Regularization {
            dropout: Dropout::new(0.1, 1, 2, number),
            ..Regularization::default()
        },
    };
    let together = [batch(7, 0), batch(4, 1)];
    decoder.backward(&together, 0.1, &policies).unwrap();
    decoder.backward(&[batch(7, 2)], 0.1, &policies).unwrap();
    floats(decoder.parameters().grads())
}

placement_test!(
    inputs_that_were_offloaded_give_the_gradients_of_kept_ones,
    |placement| {
        use ActivationPolicy::{Keep, Offload, Recompute};
        let run = synthetic(&SHAPE);
        let expected = gradients(&decoder(&run, placement), [Keep; LAYERS]);
        assert!(expected.iter().any(|g| *g != 0.0));
        let streamed = Residence {
            weights: Residency::Streamed { slots: 2 },
            ..Residence::DEVICE
        };
        for residence in [Residence::DEVICE, streamed] {
            for policies in [
                [Offload; LAYERS],
                [Offload, Offload, Recompute, Keep],
                [Keep, Recompute, Offload, Offload],
                [Recompute, Offload, Keep, Recompute],
            ] {
                let decoder = decoder(&run, &residing(placement, residence));
                assert!(
                    gradients(&decoder, policies) == expected,
                    "{policies:?}, {residence:?}"
                );
            }
        }
    }
);

placement_test!(
    where_embedding_and_head_lie_and_what_is_dequantized_at_a_time_changes_no_bit,
    |placement| {
        let tied = Shape {
            tie_word_embeddings: true,
            ..SHAPE
        };
        for shape in [SHAPE, tied] {
            let run = synthetic(&shape);
            let outputs = |placement: &Placement| {
                let decoder = decoder(&run, placement);
                let mut outputs = gradients(&decoder, [ActivationPolicy::Recompute; LAYERS]);
                outputs.extend(floats(&decoder.logits(sequences(&IDS)).unwrap()));
                let mut cache = KvCache::new(&decoder, 8).unwrap();
                outputs.extend(floats(&decoder.decode(&IDS, &mut cache).unwrap()));
                outputs.extend(floats(&decoder.decode(&[9], &mut cache).unwrap()));
                outputs
            };
            let expected = outputs(placement);
            for residence in [
                Residence {
                    embedding: Some(Side::Host),
                    ..Residence::DEVICE
                },
                Residence {
                    embedding: Some(Side::Host),
                    head: Some(Side::Host),
                    ..Residence::DEVICE
                },
                Residence {
                    dequantized: Dequantized::Weight,
                    ..Residence::DEVICE
                },
            ] {
                let found = outputs(&residing(placement, residence));
                assert!(found == expected, "{residence:?}");
            }
        }
    }
);

/// A trainer after three steps.
fn trained(run: &SyntheticRun, placement: &Placement, keys: &[(&str, &str)]) -> Trainer {
    let keys = [
        ("lora_r", "8"),
        ("learning_rate", "1e-3"),
        ("gradient_accumulation_steps", "1"),
    ]
    .iter()
    .chain(keys)
    .map(|(key, value)| (key.to_string(), value.to_string()));
    let mut config = TrainConfig::load_partial(None, &keys.collect::<Vec<_>>()).unwrap();
    config.model_name_or_path = run.model();
    config.dataset = run.dataset().into();
    config.output_dir = run.output_dir();
    let mut trainer = Trainer::new(config, placement).unwrap();
    (0..3).for_each(|_| drop(trainer.step().unwrap()));
    trainer
}

/// Masters and moments.
type State = (Vec<Vec<f32>>, Vec<(String, Vec<u8>)>);

fn state(trainer: &Trainer) -> State {
    let checkpoint = trainer.checkpoint().unwrap();
    let masters = trainer.decoder().trainables();
    let moments = checkpoint.moments.into_iter();
    (
        masters.map(|(_, t)| t.master().unwrap()).collect(),
        moments
            .map(|(name, moment)| (name, moment.data.to_vec()))
            .collect(),
    )
}

placement_test!(paged_moments_have_the_bits_of_resident_ones, |placement| {
    // Tensors of more and of fewer than 4096 elements, so that 8-bit ones are in several groups.
    let run = synthetic(&Shape {
        hidden_size: 128,
        intermediate_size: 768,
        ..SHAPE
    });
    for (resident, paged) in [
        ("adamw_torch", "paged_adamw_32bit"),
        ("adamw_8bit", "paged_adamw_8bit"),
    ] {
        for lr_ratio in [&[][..], &[("loraplus_lr_ratio", "4")]] {
            let with = |optim| trained(&run, placement, &[&[("optim", optim)], lr_ratio].concat());
            let (resident, paged) = (with(resident), with(paged));
            let is_paged =
                |trainer: &Trainer| trainer.decoder().placement().residence.optimizer == Side::Host;
            assert!(is_paged(&paged) && !is_paged(&resident));
            assert!(state(&paged) == state(&resident), "{lr_ratio:?}");
        }
    }
});

placement_test!(
    a_flat_tensor_of_several_pages_is_updated_whole,
    |placement| {
        // More trained values than a page has.
        let run = synthetic(&Shape {
            hidden_size: 512,
            intermediate_size: 1152,
            ..SHAPE
        });
        let keys = |optim| [("lora_r", "64"), ("optim", optim)];
        let resident = trained(&run, placement, &keys("adamw_torch"));
        let paged = trained(&run, placement, &keys("paged_adamw_32bit"));
        let values =
            |trainer: &Trainer| Parameters::values(trainer.decoder().parameters()).elem_count();
        assert!(values(&paged) > 1 << 21);
        assert!(state(&paged) == state(&resident));
    }
);

placement_test!(
    micro_batches_that_fit_train_as_if_they_had_been_asked_for,
    |placement| {
        let run = synthetic(&SHAPE);
        let recomputing = ("gradient_checkpointing", "true");
        let small = [recomputing, ("gradient_accumulation_steps", "2")];
        let by_hand = trained(&run, placement, &small);
        // The least with which one row at a time leaves the weights on the device.
        let is_resident = |limit: &u64| {
            let plan = Plan::within(by_hand.workload(), by_hand.config(), *limit);
            plan.is_ok_and(|plan| plan.residence.weights == Residency::Resident)
        };
        let limits = (0..).map(|kib| by_hand.plan().peak.total() - 1024 * kib);
        let limit = limits.take_while(is_resident).last().unwrap().to_string();
        let large = [
            recomputing,
            ("per_device_train_batch_size", "2"),
            ("auto_find_batch_size", "true"),
            ("vram_limit", &limit),
        ];
        let found = trained(&run, placement, &large);
        assert_eq!(found.config().per_device_train_batch_size, 1);
        assert_eq!(found.config().gradient_accumulation_steps, 2);
        assert!(state(&found) == state(&by_hand));
    }
);

placement_test!(
    a_pager_hands_parts_to_the_device_and_back_in_their_order,
    |placement| {
        const N: usize = 1000;
        const PAGE: usize = 96;
        let device: &Device = &placement.device;
        let tensor = PagedTensor::zeros(N, DType::F32, device).unwrap();
        let numbers: Vec<f32> = (0..N).map(|i| i as f32).collect();
        let bytes = bytemuck::cast_slice(&numbers);
        tensor
            .with_bytes(0..N, |to| to.copy_from_slice(bytes))
            .unwrap();
        let mut pager = Pager::new(&[(DType::F32, PAGE)], device).unwrap();
        for _ in 0..2 {
            let mut ahead = std::collections::VecDeque::new();
            let mut pages = (0..N).step_by(PAGE).map(|start| start..N.min(start + PAGE));
            loop {
                while ahead.len() < 2
                    && let Some(page) = pages.next()
                {
                    let visit = pager.fetch(&[(&tensor, page.clone())]).unwrap();
                    ahead.push_back((page, visit));
                }
                let Some((page, visit)) = ahead.pop_front() else {
                    break;
                };
                visit.begin().unwrap();
                let here = &visit.tensors[0];
                let doubled = (here + here).unwrap();
                here.slice_set(&doubled, 0, 0).unwrap();
                pager.give_back(visit, &[(&tensor, page)]).unwrap();
            }
        }
        let found: Vec<f32> = tensor
            .with_bytes(0..N, |bytes| bytemuck::cast_slice(bytes).to_vec())
            .unwrap();
        let expected: Vec<f32> = numbers.iter().map(|n| 4.0 * n).collect();
        assert!(found == expected);
    }
);

/// What the host waited for while `work` was done.
fn host_waits(work: impl FnOnce()) -> usize {
    let ((), requests) = requests_of(work);
    requests.get("wait of the host").copied().unwrap_or(0)
}

/// A pass that fails drops what it had parked. Nothing may be written to its memory before the copy there is through.
#[test]
fn memory_of_a_tensor_that_had_left_is_given_back_after_its_copy() {
    let device = emulated::placement().device;
    let tensor = || Tensor::ones(300, DType::BF16, &device).unwrap();
    let host = HostMemory::default();
    let parked = host.park(tensor()).unwrap();
    assert_eq!(host_waits(|| drop(parked)), 1);
    let mut parked = host.park(tensor()).unwrap();
    parked.release().unwrap();
    assert_eq!(host_waits(|| drop(parked)), 1);
    let brought = host.bring(8, DType::BF16, &device, |bytes| bytes.fill(0));
    assert!(brought.is_ok());
    // Its last copy may still read the memory that is freed now.
    assert_eq!(host_waits(|| drop(host)), 1);
}

#[test]
fn bytes_that_a_copy_still_reads_are_not_lent() {
    let device = emulated::placement().device;
    let tensor = PagedTensor::zeros(16, DType::F32, &device).unwrap();
    let mut pager = Pager::new(&[(DType::F32, 16)], &device).unwrap();
    let visit = pager.fetch(&[(&tensor, 0..16)]).unwrap();
    let waits = host_waits(|| tensor.with_bytes(0..16, |bytes| bytes.fill(1)).unwrap());
    assert_eq!(waits, 1);
    drop(visit);
}
