//! What fits where, for every shape that has a name: a change of the plan shows as a change of these tables.

use std::fmt::Write;

use qlora::quant::QuantizeOptions;
use qlora::store::TargetModules;
use qlora::train::Shape;
use qlora::train::plan::{Engine, Item, LongestBatch, Plan, Workload};

const GIGABYTES: [u64; 5] = [16, 24, 48, 80, 141];

fn workload(shape: Shape, r: usize, batch: LongestBatch) -> Workload {
    Workload::new(
        shape.decoder_config().unwrap(),
        QuantizeOptions::default().into(),
        Engine::Kernels,
        (r, &TargetModules::AllLinear),
        batch,
    )
}

/// Blocks that keep their activations, of how many; or the longest micro-batch that would fit.
fn verdict(workload: &Workload, limit: u64) -> String {
    match Plan::fitting(workload, limit) {
        Ok(plan) => format!("{}/{}", plan.kept_blocks(), plan.policies.len()),
        Err(_) => match workload.longest_that_fits(limit) {
            Some(tokens) => format!("<={tokens}"),
            None => "-".to_string(),
        },
    }
}

fn table(r: usize, batch: LongestBatch) -> String {
    let mut table = format!("r {r}, {} tokens\n{:<16}", batch.rows, "");
    for gigabytes in GIGABYTES {
        write!(table, "{:>12}", format!("{gigabytes} GB")).unwrap();
    }
    writeln!(table, "{:>12}{:>12}", "recompute", "keep").unwrap();
    for (name, shape) in Shape::NAMED {
        let workload = workload(shape, r, batch);
        write!(table, "{name:<16}").unwrap();
        for gigabytes in GIGABYTES {
            let verdict = verdict(&workload, gigabytes * 1_000_000_000);
            write!(table, "{verdict:>12}").unwrap();
        }
        for kept in [0, shape.num_hidden_layers] {
            let bytes = Plan::keeping(&workload, kept).peak.total();
            write!(table, "{:>12}", format!("{:.2} GB", bytes as f64 / 1e9)).unwrap();
        }
        table.push('\n');
    }
    table
}

#[test]
fn paper_settings_of_512_tokens() {
    insta::assert_snapshot!(table(64, LongestBatch::full(1, 512)));
}

#[test]
fn long_sequences() {
    insta::assert_snapshot!(table(32, LongestBatch::full(1, 65_536)));
}

/// 4 bits, 1/8 byte-scale a weight and 1/64 of 4/256 bytes: 4.127 bits (arXiv:2305.14314, section 3).
#[test]
fn a_65b_base_has_the_bits_of_the_paper() {
    let shape = Shape::named("llama-65b").unwrap();
    let plan = Plan::keeping(&workload(shape, 64, LongestBatch::full(1, 512)), 0);
    let block = 4 * 8192 * 8192 + 3 * 8192 * 22_016_u64;
    let bits = 8 * (plan.peak.bytes(Item::Codes) + plan.peak.bytes(Item::Scales));
    let bits_per_weight = bits as f64 / (80 * block) as f64;
    assert!((bits_per_weight - 4.127).abs() < 5e-4, "{bits_per_weight}");
}

#[test]
fn more_kept_blocks_never_take_less() {
    let shape = Shape::named("llama3-8b").unwrap();
    let workload = workload(shape, 32, LongestBatch::full(1, 8192));
    let totals: Vec<u64> = (0..=shape.num_hidden_layers)
        .map(|kept| Plan::keeping(&workload, kept).peak.total())
        .collect();
    assert!(totals.is_sorted(), "{totals:?}");
}
