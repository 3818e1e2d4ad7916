//! `qlora export`: a trained adapter for other programs, merged into its model or in the files of llama.cpp.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use candle_core::DType;
use clap::ValueEnum;
use clap::builder::PossibleValue;
use indicatif::DecimalBytes;
use qlora::data::Tokenizer;
use qlora::export::{
    GgufBase, GgufType, Merged, MergedQuantizer, modelfile, write_gguf_adapter, write_gguf_model,
};
use qlora::quant::QuantType;
use qlora::store::{
    Adapter, AtomicDir, AtomicFile, Checkpoint, Existing, GENERATION_CONFIG_FILE, Initialization,
    Quantization, expect_replaceable, text_config,
};
use serde_json::{Value, json};

use super::model_args::{note_as_stored, note_missing_adapter, parse_quant_type, quantization};
use super::models;
use super::note;
use super::quantize::{parse_bytes, with_progress};

/// The model in the directory of `--to modelfile`.
pub const GGUF_FILE: &str = "model.gguf";
pub const MODELFILE: &str = "Modelfile";

/// Hand an adapter over to other programs: merged into its model, or for llama.cpp
#[derive(Debug, clap::Args)]
pub struct Args {
    /// PEFT adapter, its directory or its name on the Hugging Face hub; unset: the model alone, as with an adapter that changes
    /// nothing
    #[arg(long, value_name = "DIR", required_unless_present = "base")]
    adapter: Option<PathBuf>,

    /// What to write
    #[arg(long, value_name = "WHAT")]
    to: Target,

    /// Where to; it appears when it is complete
    #[arg(long, value_name = "PATH")]
    out: PathBuf,

    /// Model below the adapter, 4-bit or not, its directory or its name on the hub; unset: the one that the adapter's config
    /// names, if it is here
    #[arg(long, alias = "model", value_name = "DIR")]
    base: Option<PathBuf>,

    /// Type of the weights; unset: that of the model before it was quantized, and f32 for gguf-lora
    #[arg(long, value_name = "NAME")]
    dtype: Option<Dtype>,

    /// Merge into weights as training took them, where they are not in 4 bits yet: nf4 or fp4
    #[arg(long = "quant_type", alias = "quant-type", value_name = "TYPE", value_parser = parse_quant_type)]
    quant_type: Option<QuantType>,

    /// Largest file of weights of a model directory, such as 500MB, 4GB or 4GiB
    #[arg(long, alias = "max_shard_size", value_name = "SIZE", default_value = "4GB", value_parser = parse_bytes)]
    max_shard_size: u64,

    /// Replace what is at --out, if it is of the kind that is written
    #[arg(long)]
    overwrite: bool,

    /// Print what was done as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// A model directory as transformers reads it, with the adapter in its weights
    Merged,
    /// The same in 4 bits, as bitsandbytes has it: what the adapter changed is rounded to what 4 bits can say
    #[value(name = "merged-4bit")]
    Merged4bit,
    /// The adapter alone, for a GGUF file of its model in llama.cpp
    GgufLora,
    /// The merged model with its tokenizer in one file, for llama.cpp
    Gguf,
    /// A directory with that file and a Modelfile, for ollama create
    Modelfile,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    Bf16,
    F16,
    F32,
    /// 8.5 bits a weight; this and the next in GGUF files of models alone
    #[value(name = "q8_0")]
    Q8_0,
    /// 6.6 bits a weight
    #[value(name = "q6_k")]
    Q6K,
    /// 5.5 bits a weight, and 6.6 where they tell most
    #[value(name = "q5_k_m")]
    Q5KM,
    /// 4.5 bits a weight, and more where they tell most
    #[value(name = "q4_k_m")]
    Q4KM,
}

impl Dtype {
    /// The type in files that know no blocks.
    fn of_elements(self) -> anyhow::Result<DType> {
        match self {
            Self::Bf16 => Ok(DType::BF16),
            Self::F16 => Ok(DType::F16),
            Self::F32 => Ok(DType::F32),
            Self::Q8_0 | Self::Q6K | Self::Q5KM | Self::Q4KM => {
                let value = self.to_possible_value();
                let name = value.as_ref().map_or("", PossibleValue::get_name);
                bail!("--dtype {name} is for --to gguf and modelfile")
            }
        }
    }
}

/// What was written.
#[derive(Default, serde::Serialize)]
struct Report {
    written_bytes: u64,
    /// How far rounding moved the weights, as a share of what the adapter does.
    rounding_error: Option<f64>,
    /// Where another program will not do what the model does here.
    notes: Vec<String>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let source = Source::of(&args)?;
    if matches!(args.to, Target::GgufLora | Target::Gguf) {
        args.check_file()?;
    }
    let report = match args.to {
        Target::Merged | Target::Merged4bit => write_directory(&args, &source)?,
        Target::GgufLora => write_gguf_lora(&args, &source)?,
        Target::Gguf => write_gguf(&args, &source, &args.out)?,
        Target::Modelfile => write_modelfile(&args, &source)?,
    };
    if args.json {
        let mut json = serde_json::to_value(report)?;
        json["base"] = json!(source.base);
        outln!("{json}");
        return Ok(());
    }
    outln!(
        "{}: {source}, {}",
        args.out.display(),
        DecimalBytes(report.written_bytes),
    );
    if let Some(rounding) = report.rounding_error {
        outln!(
            "rounding moves its weights by {:.2} % of what the adapter does",
            100.0 * rounding
        );
    }
    report.notes.iter().for_each(|line| note(line));
    Ok(())
}

/// What is exported.
struct Source {
    base: PathBuf,
    adapter: Option<(PathBuf, Adapter)>,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let base = self.base.display();
        match &self.adapter {
            None => write!(f, "{base} without an adapter"),
            Some((dir, _)) => write!(f, "{base} with {}", dir.display()),
        }
    }
}

impl Source {
    fn of(args: &Args) -> anyhow::Result<Self> {
        let Some(dir) = &args.adapter else {
            let base = args.base.as_ref().context("give --adapter or --base")?;
            let base = models::model_dir(base)?;
            note_missing_adapter(&base);
            return Ok(Self {
                base,
                adapter: None,
            });
        };
        let dir = &models::adapter_dir(dir)?;
        let adapter = Adapter::read(dir)?;
        let base = match &args.base {
            Some(base) => models::model_dir(base)?,
            None => named_base(&adapter, dir)?,
        };
        Initialization::expect_base(dir, &base)?;
        Ok(Self {
            base,
            adapter: Some((dir.clone(), adapter)),
        })
    }

    /// The tokens that end a text, where training has taught one that the model does not name, that of its chat template; and
    /// a `generation_config.json` that names them. `config` is the model's.
    fn learned_ends(&self, config: &Value) -> anyhow::Result<Option<(Vec<u32>, Value)>> {
        if self.adapter.is_none() {
            return Ok(None);
        }
        let Some(tokenizer) = Tokenizer::find(&self.base)? else {
            return Ok(None);
        };
        let ends = tokenizer.answer_end_ids()?;
        let mut generation = generation_config(&self.base)?;
        // What transformers goes by: the first that is there.
        let key = "eos_token_id";
        let named = [&generation[key], &config[key], &text_config(config)[key]];
        let named = named.into_iter().find(|named| !named.is_null());
        let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
        let mut all: Vec<u32> = match named {
            Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
            named => named.and_then(id).into_iter().collect(),
        };
        let known = all.len();
        for end in ends {
            if !all.contains(&end) {
                all.push(end);
            }
        }
        if all.len() == known {
            return Ok(None);
        }
        generation[key] = json!(all);
        Ok(Some((all, generation)))
    }

    fn merge(&self, args: &Args, dtype: Option<DType>) -> anyhow::Result<Merged> {
        let checkpoint = Checkpoint::open(&self.base)?;
        if self.adapter.is_some() {
            note_as_stored(&checkpoint, args.quant_type);
        }
        let quantize = quantization(args.quant_type);
        let adapter = self.adapter.as_ref();
        let merged = Merged::new(checkpoint, adapter.map(|(_, a)| a), quantize, dtype);
        match adapter {
            None => Ok(merged?),
            Some((dir, _)) => {
                let base = self.base.display();
                merged.with_context(|| format!("{}: does not fit {base}", dir.display()))
            }
        }
    }
}

impl Args {
    fn existing(&self) -> Existing {
        match self.overwrite {
            true => Existing::Replace,
            false => Existing::Refuse,
        }
    }

    /// Refuses to write over something else than a file of the same kind, or anything where nothing is to be replaced.
    fn check_file(&self) -> anyhow::Result<()> {
        let out = self.out.display();
        match self.out.symlink_metadata().is_ok() {
            false => Ok(()),
            true if !self.overwrite => {
                bail!("{out}: already exists, choose another name or --overwrite")
            }
            true if is_gguf(&self.out) => Ok(()),
            true => bail!("{out}: is not a GGUF file and will not be replaced"),
        }
    }

    /// What llama.cpp shows the model as.
    fn name(&self) -> String {
        let name = match self.to {
            // A directory, whose name may have a dot in it.
            Target::Modelfile => self.out.file_name(),
            _ => self.out.file_stem(),
        };
        let name = name.unwrap_or(self.out.as_os_str());
        name.to_string_lossy().into_owned()
    }

    fn gguf_type(&self) -> Option<GgufType> {
        self.dtype.map(|dtype| match dtype {
            Dtype::Bf16 => GgufType::Bf16,
            Dtype::F16 => GgufType::F16,
            Dtype::F32 => GgufType::F32,
            Dtype::Q8_0 => GgufType::Q8_0,
            Dtype::Q6K => GgufType::Q6K,
            Dtype::Q5KM => GgufType::Q5KM,
            Dtype::Q4KM => GgufType::Q4KM,
        })
    }
}

fn is_gguf(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && &magic == b"GGUF"
}

/// The model that the adapter was trained on, by its config.
fn named_base(adapter: &Adapter, dir: &Path) -> anyhow::Result<PathBuf> {
    let Some(base) = &adapter.config.base_model_name_or_path else {
        bail!(
            "{}: does not name its model; give --base DIR",
            dir.display()
        );
    };
    let revision = adapter.config.revision.as_deref();
    match models::cached_model_dir(Path::new(base), revision)? {
        Some(base) => Ok(base),
        None => bail!(
            "{}: was trained on {base}, which is neither here nor in the cache of the Hugging Face hub; give --base DIR",
            dir.display()
        ),
    }
}

fn write_directory(args: &Args, source: &Source) -> anyhow::Result<Report> {
    let dtype = args.dtype.map(Dtype::of_elements).transpose()?;
    let merged = source.merge(args, dtype)?;
    let mut dir = merged.model_dir(&args.out, args.existing(), args.max_shard_size);
    let mut notes = Vec::new();
    if let Some((ends, config)) = source.learned_ends(&merged.config_json())? {
        notes.push(format!(
            "its generation ends with the tokens {ends:?}, as the chat template ends an answer"
        ));
        dir.generation_config = Some(config);
    }
    let mut quantizer = MergedQuantizer(&merged);
    let quantization = (args.to == Target::Merged4bit).then_some(Quantization {
        options: merged.quantize_options(),
        quantizer: &mut quantizer,
    });
    let written = with_progress(|show| dir.write(&merged, quantization, show))?;
    Ok(Report {
        written_bytes: written.written_bytes,
        rounding_error: merged.rounding_error(),
        notes,
    })
}

/// `generation_config.json` of a model; of one without, an empty object.
fn generation_config(dir: &Path) -> anyhow::Result<Value> {
    let path = dir.join(GENERATION_CONFIG_FILE);
    if !path.exists() {
        return Ok(json!({}));
    }
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

fn write_gguf_lora(args: &Args, source: &Source) -> anyhow::Result<Report> {
    let Some((dir, adapter)) = &source.adapter else {
        bail!("--to gguf-lora: give --adapter");
    };
    args.dtype.map(Dtype::of_elements).transpose()?;
    let checkpoint = Checkpoint::open(&source.base)?;
    let gguf_base = GgufBase {
        config: checkpoint.config(),
        dir: &source.base,
        name: &args.name(),
    };
    let file_type = args.gguf_type().unwrap_or(GgufType::F32);
    create_parent(&args.out)?;
    let written = write_gguf_adapter(adapter, gguf_base, file_type, &args.out)
        .with_context(|| dir.display().to_string())?;
    Ok(Report {
        written_bytes: written.written_bytes,
        notes: written.notes,
        ..Report::default()
    })
}

fn write_gguf(args: &Args, source: &Source, out: &Path) -> anyhow::Result<Report> {
    let merged = source.merge(args, None)?;
    let file_type = args.gguf_type().unwrap_or(match merged.dtype() {
        DType::F16 => GgufType::F16,
        DType::F32 => GgufType::F32,
        _ => GgufType::Bf16,
    });
    create_parent(out)?;
    let gguf_base = GgufBase {
        config: &merged.config_json(),
        dir: merged.origin(),
        name: &args.name(),
    };
    let written = with_progress(|show| write_gguf_model(&merged, gguf_base, file_type, out, show))?;
    Ok(Report {
        written_bytes: written.written_bytes,
        notes: written.notes,
        ..Report::default()
    })
}

/// Makes the directories above a file, as those above a model directory are made.
fn create_parent(path: &Path) -> qlora::Result<()> {
    match path.parent() {
        None => Ok(()),
        Some(parent) => std::fs::create_dir_all(parent).map_err(qlora::Error::io(parent)),
    }
}

fn write_modelfile(args: &Args, source: &Source) -> anyhow::Result<Report> {
    let adapter = source.adapter.iter().map(|(dir, _)| dir.as_path());
    let sources: Vec<&Path> = adapter.chain([source.base.as_path()]).collect();
    let kind = (MODELFILE, "a directory with a Modelfile");
    expect_replaceable(&args.out, args.existing(), &sources, kind)?;
    // First, as it may be refused.
    let modelfile = modelfile(
        &Tokenizer::from_dir(&source.base)?,
        &format!("./{GGUF_FILE}"),
    )?;
    let dir = AtomicDir::create(&args.out, args.existing())?;
    AtomicFile::write(dir.path().join(MODELFILE), modelfile)?;
    let report = write_gguf(args, source, &dir.path().join(GGUF_FILE))?;
    dir.commit()?;
    Ok(report)
}
