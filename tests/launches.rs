//! What a training step asks a device for, and a token that is written: a kernel, a product, an allocation or a copy that is
//! new shows as a change of these tables.
//!
//! Small batches are bound by the number of launches; all are slowed down by a host that waits for its device.

mod emulated;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use emulated::Requests;
use qlora::model::{Decoder, InitLoraWeights, KvCache};
use qlora::quant::QuantizeOptions;
use qlora::store::{AdapterConfig, Checkpoint};
use qlora::train::{Shape, SyntheticRun, TrainConfig, Trainer};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::{Layer, Registry};

/// A small llama of so many blocks, with sums long enough to be taken in parts as those of small batches are.
fn shape(num_hidden_layers: usize, tie_word_embeddings: bool) -> Shape {
    Shape {
        hidden_size: 136,
        intermediate_size: 144,
        num_hidden_layers,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        vocab_size: 64,
        tie_word_embeddings,
    }
}

/// The second step of a run, of one micro-batch of two sequences; the first makes what stays.
fn step(shape: &Shape, keys: &[(&str, &str)]) -> Requests {
    let run = SyntheticRun::create(shape, 4, 17, QuantizeOptions::default()).unwrap();
    let keys: Vec<_> = [
        ("per_device_train_batch_size", "2"),
        ("gradient_accumulation_steps", "1"),
        ("lora_r", "32"),
    ]
    .iter()
    .chain(keys)
    .map(|(key, value)| (key.to_string(), value.to_string()))
    .collect();
    let mut config = TrainConfig::load_partial(None, &keys).unwrap();
    config.model_name_or_path = run.model();
    config.dataset = run.dataset().into();
    config.output_dir = run.output_dir();
    let mut trainer = Trainer::new(config, &emulated::placement()).unwrap();
    trainer.step().unwrap();
    let events = Events::default();
    let (_, mut requests) = emulated::requests_of(|| {
        let subscriber = Registry::default().with(events.clone());
        tracing::subscriber::with_default(subscriber, || trainer.step().unwrap())
    });
    requests.extend(std::mem::take(&mut *events.0.lock().unwrap()));
    requests
}

/// Counts what operations ask a device for beside the runtime: the fields of events, by name.
#[derive(Default, Clone)]
struct Events(Arc<Mutex<Requests>>);

impl<S: tracing::Subscriber> Layer<S> for Events {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == "qlora::device" {
            for field in event.fields() {
                let mut counts = self.0.lock().unwrap();
                *counts.entry(field.name().to_string()).or_default() += 1;
            }
        }
    }
}

/// What one more block takes, and what a step takes beside its blocks. Less than nothing where the highest block or the lowest
/// does without what the others need.
struct Split {
    block: BTreeMap<String, isize>,
    beside: BTreeMap<String, isize>,
}

fn split(tied: bool, keys: &[(&str, &str)]) -> Split {
    let [two, three, four] = [2, 3, 4].map(|layers| step(&shape(layers, tied), keys));
    let difference = |more: &Requests, fewer: &Requests| -> BTreeMap<String, isize> {
        let count = |of: &Requests, name: &str| of.get(name).map_or(0, |&n| n as isize);
        let names = more.keys().chain(fewer.keys());
        names
            .map(|name| (name.clone(), count(more, name) - count(fewer, name)))
            .collect()
    };
    let block = difference(&three, &two);
    assert_eq!(difference(&four, &three), block, "{keys:?}");
    let beside = two.iter().map(|(name, &count)| {
        let in_blocks = 2 * block.get(name).copied().unwrap_or_default();
        (name.clone(), count as isize - in_blocks)
    });
    Split {
        beside: beside.collect(),
        block,
    }
}

const CASES: [(&str, &[(&str, &str)]); 4] = [
    ("keep", &[("gradient_checkpointing", "false")]),
    (
        "keep, dropout",
        &[("gradient_checkpointing", "false"), ("lora_dropout", "0.1")],
    ),
    ("recompute", &[("gradient_checkpointing", "true")]),
    (
        "recompute, dropout",
        &[("gradient_checkpointing", "true"), ("lora_dropout", "0.1")],
    ),
];

/// A row for each name, a column for each case, and the sum of what is queued.
fn table(title: &str, columns: &[&BTreeMap<String, isize>]) -> String {
    const BESIDE_KERNELS: [&str; 4] = ["allocation", "upload", "read", "wait for a launch aside"];
    let mut table = format!("{title:<40}");
    for (case, _) in CASES {
        write!(table, "{case:>20}").unwrap();
    }
    let is_queued = |name: &str| !BESIDE_KERNELS.contains(&name);
    let mut rows: Vec<&String> = columns.iter().flat_map(|counts| counts.keys()).collect();
    rows.sort_by_key(|name| (!is_queued(name), *name));
    rows.dedup();
    let mut row = |name: &str, count: &dyn Fn(&BTreeMap<String, isize>) -> isize| {
        let counts: Vec<isize> = columns.iter().map(|counts| count(counts)).collect();
        if counts.iter().any(|&count| count != 0) {
            write!(table, "\n{name:<40}").unwrap();
            let count = |count: &isize| write!(table, "{count:>20}").unwrap();
            counts.iter().for_each(count);
        }
    };
    for name in rows {
        row(name, &|counts| {
            counts.get(name).copied().unwrap_or_default()
        });
    }
    row("kernels and products together", &|counts| {
        let queued = counts.iter().filter(|(name, _)| is_queued(name));
        queued.map(|(_, count)| count).sum()
    });
    table
}

#[test]
fn what_a_step_launches_is_known() {
    let splits = CASES.map(|(_, keys)| split(false, keys));
    let blocks = splits.each_ref().map(|split| &split.block);
    let beside = splits.each_ref().map(|split| &split.beside);
    let tables = [
        table("in a block", &blocks),
        table("beside the blocks", &beside),
    ];
    insta::assert_snapshot!(tables.join("\n\n"));
}

#[test]
fn a_head_that_is_the_embedding_changes_no_launch() {
    let [tied, untied] = [true, false].map(|tied| step(&shape(2, tied), &[]));
    assert_eq!(tied, untied);
}

#[test]
fn a_step_makes_the_host_wait_for_nothing_but_loss_and_norm() {
    for (case, keys) in CASES {
        let requests = step(&shape(3, false), keys);
        for wait in ["synchronization", "wait of the host", "pinned memory"] {
            assert_eq!(requests.get(wait), None, "{case}: {wait}");
        }
        let (losses, norm) = (1, 1);
        assert_eq!(requests.get("read"), Some(&(losses + norm)), "{case}");
    }
}

#[test]
fn a_written_token_asks_for_no_norm_of_doras_once_there_is_one() {
    const LAYERS: usize = 2;
    let run = SyntheticRun::create(&shape(LAYERS, false), 1, 4, QuantizeOptions::default());
    let run = run.unwrap();
    let decoded = |use_dora: bool| {
        let checkpoint = Checkpoint::open(run.model()).unwrap();
        let mut decoder = Decoder::load(&checkpoint, None, &emulated::placement()).unwrap();
        let config = AdapterConfig {
            r: 8,
            use_dora,
            ..AdapterConfig::default()
        };
        decoder
            .add_lora(&config, InitLoraWeights::Default, 7)
            .unwrap();
        let mut cache = KvCache::new(&decoder, 4).unwrap();
        [1, 2].map(|id| emulated::requests_of(|| decoder.decode(&[id], &mut cache).unwrap()).1)
    };
    let adapters = LAYERS * 7;
    let ([first, second], [_, mut expected]) = (decoded(true), decoded(false));
    assert_eq!(first.get("dora_scales_f32"), Some(&adapters));
    expected.insert("dora_scale_bf16".to_string(), adapters);
    assert_eq!(second, expected);
}

/// What candle waits for by itself cannot be counted where the device is the host: a place that asks for it is found by name.
#[test]
fn the_places_where_the_host_waits_are_known() {
    const WAITS: [&str; 5] = [
        ".to_vec",
        ".to_scalar",
        ".to_device(",
        ".synchronize(",
        ".wait_on_host(",
    ];
    let mut lines = Vec::new();
    for file in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops")) {
        let source = std::fs::read_to_string(&file).unwrap();
        let code = source.split("#[cfg(test)]").next().unwrap();
        let waits = |line: &&str| WAITS.iter().any(|wait| line.contains(wait));
        let count = code.lines().filter(waits).count();
        if count > 0 {
            let name = file.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
            lines.push(format!("{}: {count}", name.display()));
        }
    }
    insta::assert_snapshot!(lines.join("\n"));
}

fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let inside = |path: PathBuf| match path.is_dir() {
        true => sources(&path),
        false => vec![path],
    };
    paths.into_iter().flat_map(inside).collect()
}
