//! The memory plan tells what a run allocates: held against an allocator that counts.
//!
//! On the emulator every tensor of the engine that a GPU would hold is allocated on the host, in the same sizes.

mod emulated;
#[allow(dead_code)]
mod weight_files;

use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};

use candle_core::Device;
use emulated::EmulatedRuntime;
use qlora::Result;
use qlora::device::{
    self, DeviceMemory, Gemm, Launch, Marker, PinnedMemory, Placement, Residency, Runtime, Side,
};
use qlora::model::{DecoderConfig, ModelTensor};
use qlora::quant::QuantizeOptions;
use qlora::store::{Existing, QuantizeJob, quantize};
use qlora::train::plan::{Item, Plan};
use qlora::train::{Shape, SyntheticRun, TrainConfig, Trainer};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

/// Counts the bytes that are allocated, and the most there ever were.
struct Counting;

static NOW: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

/// Smaller ones are names and lists of the host.
const SMALLEST_TENSOR: isize = 512;

fn change(bytes: isize) {
    if bytes.abs() >= SMALLEST_TENSOR && !IN_KERNEL.load(Ordering::Relaxed) {
        let now = NOW.fetch_add(bytes, Ordering::Relaxed) + bytes;
        PEAK.fetch_max(now, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        change(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        change(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a run allocates: from the start, and at the worst moment of its second step.
struct Measured {
    lasting: isize,
    peak: isize,
}

/// The emulator; what it allocates to run a kernel is no memory of the run.
#[derive(Debug)]
struct Uncounted;

static IN_KERNEL: AtomicBool = AtomicBool::new(false);

fn uncounted<R>(work: impl FnOnce() -> R) -> R {
    IN_KERNEL.store(true, Ordering::SeqCst);
    let result = work();
    IN_KERNEL.store(false, Ordering::SeqCst);
    result
}

impl Runtime for Uncounted {
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        // SAFETY: as the caller promises.
        uncounted(|| unsafe { EmulatedRuntime.launch(launch) })
    }

    unsafe fn launch_aside(&self, launch: &Launch<'_>, after: &Marker) -> Result<Marker> {
        // SAFETY: as the caller promises.
        uncounted(|| unsafe { EmulatedRuntime.launch_aside(launch, after) })
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        // SAFETY: as the caller promises.
        uncounted(|| unsafe { EmulatedRuntime.gemm(gemm) })
    }

    fn synchronize(&self) -> Result<()> {
        EmulatedRuntime.synchronize()
    }

    fn pinned(&self, bytes: usize) -> Result<Box<dyn PinnedMemory>> {
        uncounted(|| EmulatedRuntime.pinned(bytes))
    }

    fn mark(&self) -> Result<Marker> {
        EmulatedRuntime.mark()
    }

    unsafe fn copy(&self, from: &[u8], to: u64, after: Option<&Marker>) -> Result<Marker> {
        // SAFETY: as the caller promises.
        unsafe { EmulatedRuntime.copy(from, to, after) }
    }

    unsafe fn copy_back(&self, from: u64, to: &mut [u8], after: Option<&Marker>) -> Result<Marker> {
        // SAFETY: as the caller promises.
        unsafe { EmulatedRuntime.copy_back(from, to, after) }
    }

    fn wait(&self, marker: &Marker) -> Result<()> {
        // A launch aside runs when it is waited for.
        uncounted(|| EmulatedRuntime.wait(marker))
    }

    fn wait_on_host(&self, marker: &Marker) -> Result<()> {
        EmulatedRuntime.wait_on_host(marker)
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        EmulatedRuntime.time(work)
    }

    fn multiprocessors(&self) -> u32 {
        EmulatedRuntime.multiprocessors()
    }

    fn memory(&self) -> Result<DeviceMemory> {
        EmulatedRuntime.memory()
    }

    fn withhold(&self, bytes: u64) -> Result<Box<dyn Any + Send>> {
        EmulatedRuntime.withhold(bytes)
    }

    fn has_warpgroup_products(&self) -> bool {
        EmulatedRuntime.has_warpgroup_products()
    }

    fn reset_peak_memory(&self) -> Result<()> {
        EmulatedRuntime.reset_peak_memory()
    }

    fn trim(&self) -> Result<()> {
        EmulatedRuntime.trim()
    }

    fn describe(&self) -> String {
        EmulatedRuntime.describe()
    }
}

const SHAPE: Shape = Shape {
    hidden_size: 128,
    intermediate_size: 352,
    num_hidden_layers: 4,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    vocab_size: 1024,
    tie_word_embeddings: false,
};

/// A model as large as [`SHAPE`] of another family. The weights `in_16_bits` are not quantized.
fn write_model(destination: &Path, model_type: &str, in_16_bits: &[&str]) {
    let mut config = json!({
        "architectures": ["SomeForCausalLM"],
        "model_type": model_type,
        "hidden_size": SHAPE.hidden_size,
        "intermediate_size": SHAPE.intermediate_size,
        "num_hidden_layers": SHAPE.num_hidden_layers,
        "num_attention_heads": SHAPE.num_attention_heads,
        "num_key_value_heads": SHAPE.num_key_value_heads,
        "head_dim": 32,
        "vocab_size": SHAPE.vocab_size,
        "tie_word_embeddings": false,
        "sliding_window": 64,
    });
    if model_type != "phi3" {
        config["layer_types"] = json!(["sliding_attention", "full_attention"].repeat(2));
    }
    let decoder = DecoderConfig::from_json(&config, Path::new("config.json")).unwrap();
    let source = weight_files::model_dir();
    std::fs::write(source.path().join("config.json"), config.to_string()).unwrap();
    let tensors: Vec<_> = ModelTensor::all(&decoder)
        .into_iter()
        .map(|tensor| (tensor.name(&decoder), tensor.shape(&decoder)))
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, shape)| {
            let numbers = 0..shape.iter().product::<usize>();
            let values: Vec<f32> = numbers.map(|i| (i % 17) as f32 / 64.0 - 0.1).collect();
            (
                name.as_str(),
                Dtype::F32,
                shape.clone(),
                weight_files::f32s(&values),
            )
        })
        .collect();
    weight_files::write_file(&source.path().join("model.safetensors"), &tensors);
    let job = QuantizeJob {
        source: source.path().into(),
        destination: destination.into(),
        existing: Existing::Refuse,
        options: QuantizeOptions::default(),
        max_shard_bytes: 1 << 30,
    };
    quantize(&job, |_| ()).unwrap();
    let path = destination.join("model.safetensors");
    let stored = std::fs::read(&path).unwrap();
    let stored = SafeTensors::deserialize(&stored).unwrap();
    let is_dense = |name: &str| in_16_bits.iter().any(|dense| name.starts_with(dense));
    let mut mixed: Vec<_> = stored
        .iter()
        .filter(|(name, _)| !is_dense(name))
        .map(|(name, t)| (name, t.dtype(), t.shape().to_vec(), t.data().to_vec()))
        .collect();
    mixed.extend(tensors.into_iter().filter(|(name, ..)| is_dense(name)));
    // As safetensors writes them: those that need an alignment are first.
    mixed.sort_by_key(|(_, dtype, ..)| std::cmp::Reverse(dtype.bitsize()));
    weight_files::write_file(&path, &mixed);
}

/// A run of `sequences` rows of 112 tokens in a micro-batch, with the config keys given.
fn config(synthetic: &SyntheticRun, keys: &[(&str, &str)]) -> TrainConfig {
    let keys: Vec<_> = [
        ("per_device_train_batch_size", "2"),
        ("gradient_accumulation_steps", "1"),
        ("max_seq_len", "112"),
        ("lora_r", "8"),
    ]
    .iter()
    .chain(keys)
    .map(|(key, value)| (key.to_string(), value.to_string()))
    .collect();
    let mut config = TrainConfig::load_partial(None, &keys).unwrap();
    config.model_name_or_path = synthetic.model();
    config.dataset = synthetic.dataset().into();
    config.output_dir = synthetic.output_dir();
    config
}

fn measure(config: TrainConfig, placement: &Placement) -> (Trainer, Measured) {
    let before = NOW.load(Ordering::SeqCst);
    let mut trainer = Trainer::new(config, placement).unwrap();
    let lasting = NOW.load(Ordering::SeqCst) - before;
    trainer.step().unwrap();
    PEAK.store(NOW.load(Ordering::SeqCst), Ordering::SeqCst);
    trainer.step().unwrap();
    let peak = PEAK.load(Ordering::SeqCst) - before;
    (trainer, Measured { lasting, peak })
}

fn assert_within_3_percent(what: &str, measured: isize, planned: u64) {
    let error = (measured as f64 - planned as f64) / planned as f64;
    assert!(
        error.abs() < 0.03,
        "{what}: {measured} bytes, but {planned} were planned ({:+.1} %)",
        100.0 * error
    );
}

/// What a plan says that tensors take; the emulator has no libraries, and threads have their scratch from the first run on.
fn tensors(plan: &Plan) -> u64 {
    let of_tensors = Item::ALL
        .into_iter()
        .filter(|item| ![Item::Libraries, Item::Pieces, Item::Threads].contains(item));
    of_tensors.map(|item| plan.peak.bytes(item)).sum()
}

/// One test: the counters are the whole process's.
#[test]
fn a_step_allocates_what_was_planned() {
    on_the_cpu();
    through_kernels();
}

/// Where the weights stay in the memory map.
fn on_the_cpu() {
    const SHAPE: Shape = Shape {
        hidden_size: 256,
        intermediate_size: 704,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        vocab_size: 4096,
        tie_word_embeddings: false,
    };
    let synthetic = SyntheticRun::create(&SHAPE, 16, 256, QuantizeOptions::default()).unwrap();
    for (run, keys) in [
        &[("gradient_checkpointing", "true")][..],
        &[("gradient_checkpointing", "false")],
        &[("gradient_checkpointing", "true")],
        &[("gradient_checkpointing", "true"), ("optim", "adamw_8bit")],
        &[
            ("gradient_checkpointing", "true"),
            ("modules_to_save", "embed_tokens,lm_head"),
        ],
        &[
            ("gradient_checkpointing", "true"),
            ("compute_dtype", "bf16"),
        ],
        &[
            ("gradient_checkpointing", "false"),
            ("compute_dtype", "bf16"),
        ],
    ]
    .into_iter()
    .enumerate()
    {
        let batch = [
            ("per_device_train_batch_size", "16"),
            ("max_seq_len", "256"),
            ("lora_r", "32"),
        ];
        let config = config(&synthetic, &[keys, &batch].concat());
        // A thread keeps its chunk of logits: a new one has to make it.
        std::thread::scope(|scope| {
            let run = scope.spawn(|| {
                let placement = Placement::open(config.device, config.compute_dtype).unwrap();
                let (trainer, measured) = measure(config, &placement);
                let planned = tensors(trainer.plan());
                if run == 0 {
                    return;
                }
                assert_within_3_percent(&format!("{keys:?} on the CPU"), measured.peak, planned);
            });
            run.join().unwrap();
        });
    }
}

fn through_kernels() {
    device::install(&Device::Cpu, Arc::new(Uncounted));
    let placement = emulated::placement();
    let synthetic = SyntheticRun::create(&SHAPE, 2, 112, QuantizeOptions::default()).unwrap();
    let mut peaks = Vec::new();
    for keys in [
        &[("gradient_checkpointing", "false")][..],
        &[("gradient_checkpointing", "true")],
        &[
            ("gradient_checkpointing", "true"),
            ("lora_target_modules", "q_proj,v_proj"),
        ],
        &[
            ("gradient_checkpointing", "true"),
            ("lora_dropout", "0.1"),
            ("optim", "adamw_8bit"),
        ],
        &[
            ("gradient_checkpointing", "true"),
            ("use_dora", "true"),
            ("lora_dropout", "0.1"),
        ],
        &[
            ("gradient_checkpointing", "true"),
            ("optim", "paged_adamw_8bit"),
        ],
        &[
            ("gradient_checkpointing", "true"),
            ("lora_target_modules", "q_proj"),
            ("layers_to_transform", "2,3"),
            ("modules_to_save", "embed_tokens,lm_head"),
        ],
        &[
            ("gradient_checkpointing", "false"),
            ("modules_to_save", "embed_tokens"),
            ("optim", "paged_adamw_8bit"),
        ],
        &[
            ("gradient_checkpointing", "true"),
            ("modules_to_save", "lm_head"),
        ],
        &[
            ("gradient_checkpointing", "true"),
            ("lora_matrix_dropout", "0.5"),
        ],
        &[
            ("gradient_checkpointing", "true"),
            ("lora_matrix_dropout", "0.5"),
            ("lora_matrix_dropout_instances", "2"),
            ("per_device_train_batch_size", "1"),
        ],
    ] {
        let (trainer, measured) = measure(config(&synthetic, keys), &placement);
        let plan = trainer.plan();
        let step =
            [Item::Activations, Item::Working, Item::LossChunk].map(|item| plan.peak.bytes(item));
        let lasting = tensors(plan) - step.iter().sum::<u64>();
        assert_within_3_percent(&format!("{keys:?}, lasting"), measured.lasting, lasting);
        assert_within_3_percent(&format!("{keys:?}, peak"), measured.peak, tensors(plan));
        peaks.push(plan.peak.total());
    }
    let dense = [
        "model.layers.0.mlp.down_proj",
        "model.layers.2.self_attn.q_proj",
    ];
    // Gemma has norms after the attention and the MLP beside those before, and on queries and keys, and two rotary embeddings;
    // OLMo has no norms before, and larger ones on queries and keys. Phi's layers give what others' give apart.
    for (family, checkpointing, in_16_bits) in [
        ("gemma3_text", "false", &[][..]),
        ("gemma3_text", "true", &dense),
        ("olmo3", "true", &[]),
        ("phi3", "false", &[]),
        ("phi3", "true", &[]),
    ] {
        let model = tempfile::tempdir().unwrap();
        let model = model.path().join("model");
        write_model(&model, family, in_16_bits);
        let keys = [("gradient_checkpointing", checkpointing)];
        let config = TrainConfig {
            model_name_or_path: model,
            ..config(&synthetic, &keys)
        };
        let (trainer, measured) = measure(config, &placement);
        let plan = trainer.plan();
        let what = format!("{keys:?} of {family} with {in_16_bits:?}");
        assert_within_3_percent(&what, measured.peak, tensors(plan));
        // Of 352 * 128 and 128 * 128 values.
        let in_bf16 = if in_16_bits.is_empty() {
            0
        } else {
            2 * (352 + 128) * 128
        };
        assert_eq!(plan.peak.bytes(Item::Dense), in_bf16, "{what}");
    }
    // A limit between the two: some blocks keep their activations, and the limit holds.
    let limit = peaks[0].midpoint(peaks[1]);
    let keys = [("vram_limit", &*limit.to_string())];
    let (trainer, measured) = measure(config(&synthetic, &keys), &placement);
    let plan = trainer.plan();
    assert!((1..4).contains(&plan.kept_blocks()), "{:?}", plan.policies);
    assert!(plan.peak.total() <= limit);
    assert_within_3_percent("mixed policies, peak", measured.peak, tensors(plan));
    // Limits below: first the inputs of blocks wait in host memory, with the embedding; then weights are streamed too, through
    // fewer slots than there are blocks.
    let below = |is_so: &dyn Fn(&Plan) -> bool| assert_planned(&synthetic, &[], &placement, is_so);
    below(&|plan| plan.offloaded_blocks() > 1 && plan.residence.embedding == Some(Side::Host));
    below(&|plan| plan.residence.weights != Residency::Resident);
    // A head that takes more than the parts of it that visit the device.
    let large_head = Shape {
        hidden_size: 512,
        vocab_size: 32_000,
        ..SHAPE
    };
    let synthetic = SyntheticRun::create(&large_head, 2, 8, QuantizeOptions::default()).unwrap();
    let keys = [("max_seq_len", "8"), ("lora_target_modules", "q_proj")];
    assert_planned(&synthetic, &keys, &placement, &|plan| {
        plan.residence.head == Some(Side::Host) && plan.residence.weights == Residency::Resident
    });
}

/// Holds the plan against what is allocated under the highest limit below that of a run with everything on the device for
/// which the plan is so.
fn assert_planned(
    synthetic: &SyntheticRun,
    keys: &[(&str, &str)],
    placement: &Placement,
    is_so: &dyn Fn(&Plan) -> bool,
) {
    let with = |key, value: &str| config(synthetic, &[keys, &[(key, value)]].concat());
    let trainer = Trainer::new(with("gradient_checkpointing", "true"), placement).unwrap();
    let (resident, of_tensors) = (trainer.plan().peak.total(), tensors(trainer.plan()));
    let mut limits = (1..2000).map(|n| resident - n * (of_tensors / 2000));
    let limit = limits.find(|&limit| {
        let config = with("vram_limit", &limit.to_string());
        Plan::within(trainer.workload(), &config, limit).is_ok_and(|plan| is_so(&plan))
    });
    drop(trainer);
    let limit = limit.expect("the limits end").to_string();
    let (trainer, measured) = measure(with("vram_limit", &limit), placement);
    assert!(is_so(trainer.plan()));
    let what = format!("{:?}", trainer.plan().residence);
    assert_within_3_percent(&what, measured.peak, tensors(trainer.plan()));
}
