//! Batches: grouped as transformers groups them, packed without changing what is computed, and given by their position.

mod data_files;
mod reference_case;

use data_files::{fixture, integers, jsonl};
use proptest::prelude::*;
use qlora::data::{Arrangement, Batch, Example, SequenceOrder, Share, Shuffle, SplitMix64};
use qlora::device::Placement;
use qlora::model::ActivationPolicy;
use qlora::ops::linear_cross_entropy;
use qlora::train::{BatchPlan, RunData, TrainConfig, Trainer};
use reference_case::{ReferenceCase, largest_difference, micro_batch, relative_error, values};
use serde_json::json;

#[test]
fn groups_by_length_are_those_of_transformers() {
    for case in fixture("grouped_by_length.json").as_array().unwrap() {
        let lengths: Vec<u32> = integers(&case["lengths"]);
        let batch = case["batch"].as_u64().unwrap() as usize;
        let expected: Vec<usize> = integers(&case["order"]);
        let data_seed = case["data_seed"].as_u64().unwrap();
        let mut order = SequenceOrder::of_rows(
            lengths.clone(),
            data_seed,
            Arrangement::GroupedByLength { batch },
        );
        assert_eq!(epoch(&mut order, 0), expected);
        let longest = lengths.iter().max();
        for start in [0, lengths.len() as u64] {
            let first = order.rows(start)[0];
            assert_eq!(
                Some(&lengths[first]),
                longest,
                "the longest row comes first in every epoch"
            );
        }
    }
}

/// The rows of an epoch in their order.
fn epoch(order: &mut SequenceOrder, epoch: u32) -> Vec<usize> {
    let (start, end) = (
        order.sequences(f64::from(epoch)),
        order.sequences(f64::from(epoch + 1)),
    );
    (start as u64..end as u64)
        .flat_map(|position| order.rows(position).to_vec())
        .collect()
}

/// Lengths as those of Alpaca's rows in Llama's tokens: logarithms with the mean 4.55 and the deviation 0.45, from 37 to 1,024.
fn alpaca_like(rows: usize) -> Vec<u32> {
    let mut generator = SplitMix64::new(1);
    let mut normal = || {
        let (u, v) = (1.0 - generator.uniform(), generator.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    };
    (0..rows)
        .map(|_| (4.55 + 0.45 * normal()).exp().round().clamp(37.0, 1024.0) as u32)
        .collect()
}

#[test]
fn packing_fills_98_percent_on_lengths_like_those_of_alpaca() {
    let lengths = alpaca_like(52_002);
    let tokens: u64 = lengths.iter().map(|&len| u64::from(len)).sum();
    for capacity in [1024, 2048, 4096] {
        let arrangement = Arrangement::Packed {
            capacity,
            shuffle: Shuffle::Yes,
        };
        let sequences = SequenceOrder::of_rows(lengths.clone(), 42, arrangement).sequences(1.0);
        let fill = tokens as f64 / (sequences * capacity as f64);
        assert!(fill >= 0.98, "{fill:.4} of {capacity}");
    }
}

fn packed(capacity: usize) -> Arrangement {
    Arrangement::Packed {
        capacity,
        shuffle: Shuffle::Yes,
    }
}

#[test]
fn packed_rows_have_the_loss_and_the_gradients_of_single_rows() {
    for name in ["llama_gqa", "mistral_sw", "qwen3"] {
        let case = ReferenceCase::read(name);
        let targets: usize = case.examples.iter().map(Example::target_count).sum();
        let lengths = case
            .examples
            .iter()
            .map(|example| example.input_ids.len() as u32);
        let lengths: Vec<u32> = lengths.collect();
        let capacity = lengths.iter().sum::<u32>() as usize;
        let run = |arrangement: Arrangement| {
            let decoder = case.decoder();
            let mut order = SequenceOrder::of_rows(lengths.clone(), 3, arrangement);
            let mut loss = 0.0;
            for position in 0..order.sequences(1.0) as u64 {
                let rows = order.rows(position).iter().map(|&row| &case.examples[row]);
                let batch = Batch::from_examples(&rows.collect::<Vec<_>>());
                let d_loss = 1.0 / targets as f32;
                let policies = [ActivationPolicy::Keep; 2];
                let losses = decoder.backward(&[micro_batch(&batch, None)], d_loss, &policies);
                for losses in losses.unwrap() {
                    loss += linear_cross_entropy::total(&losses.read().unwrap());
                }
            }
            let grads = decoder
                .trainables()
                .map(|(name, trainable)| (name.to_string(), values(&trainable.grad)));
            (order.sequences(1.0), loss, grads.collect::<Vec<_>>())
        };
        let (single_sequences, single_loss, single) = run(Arrangement::InTurn(Shuffle::Yes));
        let (packed_sequences, packed_loss, together) = run(packed(capacity));
        assert_eq!(
            (single_sequences, packed_sequences),
            (lengths.len() as f64, 1.0)
        );
        assert!(
            (packed_loss / single_loss - 1.0).abs() < 1e-6,
            "{name}: {packed_loss} instead of {single_loss}"
        );
        let all = |grads: &[(String, Vec<f32>)]| -> Vec<f32> {
            grads.iter().flat_map(|(_, grad)| grad.clone()).collect()
        };
        let (together, single) = (all(&together), all(&single));
        let error = relative_error(&together, &single);
        assert!(error < 1e-6, "{name}: {error}");
        let largest = largest_difference(&together, &single);
        assert!(largest < 1e-6, "{name}: {largest}");
    }
}

/// Rows of token ids for a run on `case`, in a file of their own.
fn write_rows(dir: &std::path::Path, lengths: &[usize]) -> std::path::PathBuf {
    let row = |(i, &len): (usize, &usize)| json!({"input_ids": (0..len).map(|t| 1 + (7 * i + t) % 60).collect::<Vec<_>>()});
    let rows: Vec<_> = lengths.iter().enumerate().map(row).collect();
    let path = dir.join("rows.jsonl");
    std::fs::write(&path, jsonl(&rows)).unwrap();
    path
}

#[test]
fn a_packed_run_counts_sequences_and_takes_every_row() {
    let case = ReferenceCase::read("llama_gqa");
    let dir = tempfile::tempdir().unwrap();
    let lengths = [5, 9, 3, 12, 4, 7, 6, 2, 8, 4];
    let config = TrainConfig {
        model_name_or_path: case.dir.clone(),
        dataset: write_rows(dir.path(), &lengths).into(),
        output_dir: dir.path().join("run"),
        lora_r: Some(2),
        max_seq_len: Some(12),
        packing: true,
        gradient_accumulation_steps: 5,
        max_steps: -1,
        num_train_epochs: Some(2.0),
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(config.clone(), &Placement::cpu()).unwrap();
    // 60 tokens go into five sequences of twelve: an epoch is one step.
    assert_eq!(trainer.total_steps(), 2);
    for epoch in [1.0, 2.0] {
        let record = trainer.step().unwrap();
        assert_eq!((record.tokens, record.epoch), (60, epoch));
    }
    let plan = BatchPlan::of(trainer.data(), &config);
    assert_eq!(
        (plan.sequences, plan.steps, plan.fill, plan.padded_fill),
        (5, 1, Some(1.0), None)
    );
    assert_eq!(plan.largest_micro_batch_tokens, 12);

    let budget = TrainConfig {
        packing: false,
        max_seq_len: None,
        per_device_train_batch_tokens: Some(20),
        ..config
    };
    let plan = BatchPlan::of(trainer.data(), &budget);
    assert_eq!((plan.sequences, plan.largest_micro_batch_tokens), (3, 20));
}

#[test]
fn the_plan_of_padded_batches_is_told_for_comparison() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig {
        dataset: write_rows(dir.path(), &[2, 4, 6, 8]).into(),
        shuffle: false,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 1,
        ..TrainConfig::default()
    };
    let data = RunData::load(&config, None, None).unwrap();
    let plan = BatchPlan::of(&data, &config);
    assert_eq!(
        (plan.sequences, plan.steps, plan.mean_micro_batch_tokens),
        (4, 2, 10.0)
    );
    assert_eq!(plan.padded_fill, Some(20.0 / 24.0));
}

#[test]
fn weights_say_how_often_rows_are_used() {
    let shares =
        [(0..4, 1.0), (4..10, 0.5), (10..12, 2.0)].map(|(rows, weight)| Share { rows, weight });
    for arrangement in [
        Arrangement::InTurn(Shuffle::Yes),
        Arrangement::InTurn(Shuffle::No),
        packed(40),
    ] {
        let mut order = SequenceOrder::new((1..=12).collect(), shares.to_vec(), 42, arrangement);
        let mut uses = [0; 12];
        for pass in 0..2 {
            let rows = epoch(&mut order, pass);
            assert_eq!(rows.len(), 4 + 3 + 4);
            rows.iter().for_each(|&row| uses[row] += 1);
        }
        assert_eq!(
            uses,
            [2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 4, 4],
            "{arrangement:?}"
        );
    }
}

#[test]
fn one_data_set_with_the_weight_1_is_used_in_the_order_of_a_single_one() {
    let mut order = SequenceOrder::of_rows(vec![1; 9], 42, Arrangement::InTurn(Shuffle::Yes));
    let expected: Vec<usize> = integers(&fixture("row_order.json")[0]["order"]);
    let found: Vec<usize> = (0..27).map(|position| order.rows(position)[0]).collect();
    assert_eq!(found, expected);
    assert_eq!(order.epochs(12), 12.0 / 9.0);
}

#[test]
fn packing_in_file_order_needs_no_seed() {
    let order = |data_seed| {
        let arrangement = Arrangement::Packed {
            capacity: 10,
            shuffle: Shuffle::No,
        };
        let mut order = SequenceOrder::of_rows(vec![7, 2, 9, 3, 1, 4, 11], data_seed, arrangement);
        (0..4)
            .map(|position| order.rows(position).to_vec())
            .collect::<Vec<_>>()
    };
    assert_eq!(order(1), order(2));
    // 11 does not fit and stands alone; 9 takes 1, and 7 takes 3, which leave nothing; 4 and 2 are left.
    assert_eq!(order(1), [vec![0, 3], vec![5, 1], vec![2, 4], vec![6]]);
}

fn arrangements() -> impl Strategy<Value = Arrangement> {
    let shuffle = any::<bool>().prop_map(Shuffle::from);
    prop_oneof![
        shuffle.clone().prop_map(Arrangement::InTurn),
        (1usize..9).prop_map(|batch| Arrangement::GroupedByLength { batch }),
        (1usize..60, shuffle)
            .prop_map(|(capacity, shuffle)| Arrangement::Packed { capacity, shuffle }),
    ]
}

proptest! {
    #[test]
    fn every_epoch_holds_each_row_once_however_it_is_arranged(
        lengths in prop::collection::vec(1u32..50, 1..80),
        arrangement in arrangements(),
        data_seed: u64,
        pass in 0u32..5,
    ) {
        let mut order = SequenceOrder::of_rows(lengths.clone(), data_seed, arrangement);
        let mut rows = epoch(&mut order, pass);
        rows.sort_unstable();
        prop_assert_eq!(rows, (0..lengths.len()).collect::<Vec<_>>());
    }

    #[test]
    fn what_stands_at_a_position_needs_only_the_position(
        lengths in prop::collection::vec(1u32..50, 2..40),
        weight in 0.1f64..3.0,
        arrangement in arrangements(),
        data_seed: u64,
        position in 0u64..300,
    ) {
        let half = lengths.len() / 2;
        let shares = vec![Share { rows: 0..half, weight: 1.0 }, Share { rows: half..lengths.len(), weight }];
        let new = || SequenceOrder::new(lengths.clone(), shares.clone(), data_seed, arrangement);
        let (mut resumed, mut uninterrupted) = (new(), new());
        let mut last = Vec::new();
        for p in 0..=position {
            last = uninterrupted.rows(p).to_vec();
        }
        prop_assert_eq!(resumed.rows(position), &last[..]);
        prop_assert_eq!(resumed.epochs(position), uninterrupted.epochs(position));
        let tokens: usize = last.iter().map(|&row| lengths[row] as usize).sum();
        prop_assert_eq!(resumed.tokens(position), tokens);
        prop_assert!(tokens <= resumed.longest_sequence());
    }

    #[test]
    fn a_packed_sequence_is_within_its_capacity_or_one_row(
        lengths in prop::collection::vec(1u32..50, 1..80),
        capacity in 1usize..120,
    ) {
        let mut order = SequenceOrder::of_rows(lengths.clone(), 7, packed(capacity));
        let sequences = order.sequences(1.0) as u64;
        let mut not_full = 0;
        for position in 0..sequences {
            let count = order.rows(position).len();
            let tokens = order.tokens(position);
            prop_assert!(tokens <= capacity || count == 1);
            not_full += u32::from(2 * tokens <= capacity);
        }
        prop_assert!(not_full <= 1, "two sequences at most half full would fit into one");
    }
}
