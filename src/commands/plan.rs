//! `qlora plan`: what a training run takes of memory, item by item, and what it can keep.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::error::ErrorKind;
use qlora::device::DeviceKind;
use qlora::model::{DecoderConfig, Module, block_sizes, dense_linears};
use qlora::quant::BlockSizes;
use qlora::store::{Adapter, Checkpoint};
use qlora::train::config::{ByteCount, KEYS, MAX_COUNT};
use qlora::train::plan::{Engine, Item, LongestBatch, Plan, Rates, Workload};
use qlora::train::{Shape, TrainConfig};
use serde_json::json;

use super::{ConfigFlags, ShapeArgs, models};

/// Keys of `qlora train` that decide how much memory a run takes.
const WITH_EFFECT: [&str; 24] = [
    "adapter",
    "auto_find_batch_size",
    "preset",
    "source_max_len",
    "target_max_len",
    "max_seq_len",
    "per_device_train_batch_size",
    "per_device_train_batch_tokens",
    "gradient_accumulation_steps",
    "double_quant",
    "lora_r",
    "lora_target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "modules_to_save",
    "use_dora",
    "lora_dropout",
    "lora_matrix_dropout",
    "lora_matrix_dropout_instances",
    "optim",
    "gradient_checkpointing",
    "device",
    "compute_dtype",
];

#[derive(Debug, clap::Args)]
#[command(mut_args = training_flag)]
pub struct Args {
    /// Hugging Face model, its directory or its name on the hub, of which the config is enough
    #[arg(
        id = "model_directory",
        long = "model",
        value_name = "DIR",
        conflicts_with = "shape"
    )]
    model: Option<PathBuf>,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Memory of the device, such as 24GiB or 80GB; unset: what the run takes with and without recomputing
    #[arg(long, value_name = "SIZE")]
    vram: Option<ByteCount>,
    /// Products that the device does, in TFLOP/s (`qlora bench kernels` measures it): says the tokens per second that it can reach at
    /// most, and those to be expected
    #[arg(long, value_name = "X")]
    tflops: Option<f64>,
    /// What weights can be streamed at, in GB/s: measured with an H200
    #[arg(long, value_name = "X", default_value_t = 20.0, requires = "tflops")]
    bus: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    flags: ConfigFlags,
}

/// What a model is, the blocks of its 4-bit weights as it is loaded, and its linear layers that are in 16 bits then.
type Sizes = (DecoderConfig, BlockSizes, Vec<(usize, Module)>);

fn stored_sizes(dir: &Path, config: &TrainConfig) -> anyhow::Result<Sizes> {
    let checkpoint = Checkpoint::open(dir)?;
    let model = DecoderConfig::from_json(checkpoint.config(), &checkpoint.config_path())?;
    let blocks = block_sizes(&checkpoint, &model, config.quantize_options())?;
    let quantize = config.quantization_of(&checkpoint);
    let dense = dense_linears(&checkpoint, &model, quantize)?;
    Ok((model, blocks, dense))
}

fn training_flag(flag: clap::Arg) -> clap::Arg {
    let id = flag.get_id().to_string();
    let is_key = KEYS.iter().any(|key| key.name == id);
    match &*id {
        "device" => flag.help("cpu or cuda [default: cuda]"),
        _ if is_key && !WITH_EFFECT.contains(&&*id) => flag.hide(true),
        _ => flag,
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let mut overrides = args.flags.overrides.clone();
    if !overrides.iter().any(|(key, _)| key == "device") {
        overrides.push(("device".into(), DeviceKind::Cuda.name().into()));
    }
    let config = TrainConfig::load_partial(None, &overrides)?;
    // A command line of `train` may name one; a preset knows the sizes of its own.
    let named = Some(&config.model_name_or_path).filter(|name| {
        let may_be_fetched = config.preset.is_none() && models::is_on_the_hub(name);
        !args.shape.is_given() && (name.is_dir() || may_be_fetched)
    });
    let (model, blocks, dense) = match args.model.as_ref().or(named) {
        Some(name) => {
            let dir = models::config_dir(name)?;
            match models::has_model(&dir) {
                true => stored_sizes(&dir, &config)?,
                false => {
                    let model = models::decoder_config(&dir)?;
                    let dense = models::skipped_linears(&dir, &model)?;
                    (model, config.quantize_options().into(), dense)
                }
            }
        }
        None => {
            let of_preset = config
                .preset
                .and_then(|preset| Shape::named(preset.shape()));
            let sizes = args.shape.is_given().then_some(Shape::LLAMA_110M);
            let Some(otherwise) = of_preset.or(sizes) else {
                let missing = "give a model as --model, or a size such as --shape llama-7b\n";
                clap::Error::raw(ErrorKind::MissingRequiredArgument, missing).exit();
            };
            let shape = args.shape.shape(otherwise);
            let blocks = config.quantize_options().into();
            (shape.decoder_config()?, blocks, Vec::new())
        }
    };
    let engine = match config.device {
        DeviceKind::Cpu => Engine::Cpu(config.device.compute_dtype(config.compute_dtype)?),
        DeviceKind::Cuda => Engine::Kernels,
    };
    let lora = match &config.adapter {
        Some(name) => {
            let dir = models::adapter_dir(name)?;
            config.adapter_config_of(&Adapter::read(&dir)?.config, &dir, &model)?
        }
        None => config.new_adapter_config(),
    };
    let matrix_dropout = config.matrix_dropout()?;
    let budget = config.per_device_train_batch_tokens.unwrap_or(0);
    let longest = config.longest_sequence().max(budget);
    if longest.saturating_mul(config.per_device_train_batch_size) > MAX_COUNT {
        bail!("more than {MAX_COUNT} tokens in a micro-batch are not planned for");
    }
    let workload = |config: &TrainConfig| {
        let batch = LongestBatch::full(config.per_device_train_batch_size, longest);
        let workload = Workload {
            dense: dense.clone(),
            ..Workload::new(model.clone(), blocks, engine, &lora, batch)
        };
        workload.with_settings(config, lora.lora_dropout, matrix_dropout.as_ref())
    };
    // Where nothing fits, the report of all that was asked for says so.
    let fitting = args.vram.map(|limit| {
        let plan = |config: &TrainConfig| Plan::within(&workload(config), config, limit.0);
        config.clone().with_micro_batches_that_fit(plan)
    });
    let config = match fitting {
        Some(Ok((config, _))) => config,
        _ => config,
    };
    let workload = workload(&config);
    workload.model.expect_targets(&lora)?;
    workload.model.expect_modules_to_save(&lora)?;
    if config.adapter.is_none() {
        // One that was trained elsewhere may have patterns that nothing fits.
        workload.model.expect_patterns(&lora)?;
    }
    workload.expect_possible(&lora)?;
    let report = Report::new(&workload, &config, args.vram);
    let rates = args.tflops.map(|tflops| Rates {
        product: tflops * 1e12,
        bus: args.bus * 1e9,
    });
    match args.json {
        true => outln!("{}", report.json(rates)),
        false => out!("{}", report.text(rates)),
    }
    report.refusal.map_or(Ok(()), |error| Err(error.into()))
}

/// What is said of a workload.
struct Report<'a> {
    workload: &'a Workload,
    limit: Option<u64>,
    /// The plan that fits; without a limit, all that is kept and then all that is computed again.
    plans: Vec<Plan>,
    refusal: Option<qlora::Error>,
    /// Tokens of the longest one that would fit alone.
    longest_sequence: Option<usize>,
}

impl<'a> Report<'a> {
    fn new(workload: &'a Workload, config: &TrainConfig, vram: Option<ByteCount>) -> Self {
        let layers = workload.model.num_layers;
        let kept = match config.gradient_checkpointing {
            Some(true) => &[0][..],
            Some(false) => &[layers],
            None => &[layers, 0],
        };
        let limit = vram.map(|vram| vram.0);
        let (plans, refusal) = match limit.map(|limit| Plan::within(workload, config, limit)) {
            Some(Ok(plan)) => (vec![plan], None),
            Some(Err(error)) => (vec![Plan::keeping(workload, 0)], Some(error)),
            None => {
                let plans = kept.iter().map(|&kept| Plan::keeping(workload, kept));
                (plans.collect(), None)
            }
        };
        Self {
            workload,
            limit,
            plans,
            refusal,
            longest_sequence: limit.and_then(|limit| workload.longest_sequence(limit)),
        }
    }

    fn text(&self, rates: Option<Rates>) -> String {
        let cells = |cell: &dyn Fn(&Plan) -> String| self.plans.iter().map(cell).collect();
        let mut rows: Vec<(&str, Vec<String>)> = vec![("activations", cells(&super::activations))];
        for item in Item::ALL {
            if self.plans.iter().any(|plan| plan.peak.bytes(item) > 0) {
                let cell = |plan: &Plan| gigabytes(plan.peak.bytes(item));
                rows.push((item.name(), cells(&cell)));
            }
        }
        rows.push(("in all", cells(&|plan| gigabytes(plan.peak.total()))));
        if let Some(rates) = rates {
            let at_most = |plan: &Plan| self.workload.tokens_per_second_at_most(plan, rates);
            let at_most = |plan: &Plan| format!("{:.0}", at_most(plan));
            rows.push(("tokens/s at most", cells(&at_most)));
            let expected = |plan: &Plan| self.workload.tokens_per_second_expected(plan, rates);
            let expected = |plan: &Plan| {
                expected(plan).map_or("unknown".into(), |speed| format!("{speed:.0}"))
            };
            rows.push(("tokens/s expected", cells(&expected)));
        }
        if self.plans.iter().any(|plan| plan.host.total() > 0) {
            let cell = |plan: &Plan| gigabytes(plan.host.total());
            rows.push(("in pinned host memory", cells(&cell)));
        }
        let width = rows.iter().flat_map(|(_, cells)| cells).map(String::len);
        let width = width.max().unwrap_or_default() + 2;
        let mut lines = vec![
            format!(
                "{} blocks of hidden_size {}, vocab_size {}: {} x micro-batch of {} tokens, {} trained values",
                self.workload.model.num_layers,
                self.workload.model.hidden_size,
                self.workload.model.vocab_size,
                self.workload.micro_batches,
                self.workload.rows,
                self.workload.trained_values()
            ),
            String::new(),
        ];
        lines.extend(rows.iter().map(|(name, cells)| {
            let cells: String = cells.iter().map(|cell| format!("{cell:>width$}")).collect();
            format!("{name:<28}{cells}")
        }));
        if let (Some(limit), None, [plan]) = (self.limit, &self.refusal, &self.plans[..]) {
            lines.push(String::new());
            let elsewhere = super::on_the_host(plan);
            let how = match elsewhere.is_empty() {
                true => "with all of it on the device".to_string(),
                false => format!("because {}", elsewhere.join(", ")),
            };
            lines.push(format!("fits into {} {how}", gigabytes(limit)));
        }
        if let Some(tokens) = self.longest_sequence {
            lines.push(format!("one sequence of up to {tokens} tokens would fit"));
        }
        lines.join("\n") + "\n"
    }

    fn json(&self, rates: Option<Rates>) -> serde_json::Value {
        let plan = |plan: &Plan| {
            let items =
                Item::ALL.map(|item| (item.name().to_string(), plan.peak.bytes(item).into()));
            json!({
                "items": serde_json::Map::from_iter(items),
                "total_bytes": plan.peak.total(),
                "kept_blocks": plan.kept_blocks(),
                "offloaded_blocks": plan.offloaded_blocks(),
                "blocks": plan.policies.len(),
                "host_bytes": {
                    "activations": plan.host.activations,
                    "optimizer": plan.host.optimizer,
                    "head": plan.host.head,
                },
                "not_on_the_device": super::on_the_host(plan),
                "tokens_per_second_at_most": rates.map(|rates| self.workload.tokens_per_second_at_most(plan, rates)),
                "tokens_per_second_expected": rates.and_then(|rates| self.workload.tokens_per_second_expected(plan, rates)),
            })
        };
        json!({
            "model": {
                "num_hidden_layers": self.workload.model.num_layers,
                "hidden_size": self.workload.model.hidden_size,
                "vocab_size": self.workload.model.vocab_size,
            },
            "tokens": self.workload.rows,
            "trained_values": self.workload.trained_values(),
            "limit_bytes": self.limit,
            "fits": self.limit.map(|_| self.refusal.is_none()),
            "longest_sequence": self.longest_sequence,
            "plans": self.plans.iter().map(plan).collect::<Vec<_>>(),
        })
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}
