//! What is in a model directory, an adapter directory or a GGUF file: tensors, types, sizes, quantization, settings.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::bail;
use qlora::quant::{Absmax, FrozenWeight};
use qlora::store::{
    ADAPTER_CONFIG_FILE, Adapter, AdapterConfig, Checkpoint, GgufFile, MatrixDropoutSettings,
    TargetModules, text_config,
};
use serde_json::{Value, json};

/// The shape of a model, in the words of its `config.json`.
const SHAPE_KEYS: [&str; 8] = [
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
];

/// The weights of a directory or of a file, counted by how they are stored.
pub struct Contents {
    path: PathBuf,
    kind: Kind,
    groups: BTreeMap<String, Group>,
}

enum Kind {
    Model(Value),
    Adapter(Box<AdapterConfig>, Option<MatrixDropoutSettings>),
    /// With the metadata, of lists their length.
    Gguf(serde_json::Map<String, Value>),
}

#[derive(Default, Clone, Copy)]
struct Group {
    tensors: usize,
    parameters: usize,
    bytes: usize,
}

impl Group {
    fn add(&mut self, parameters: usize, bytes: usize) {
        self.tensors += 1;
        self.parameters += parameters;
        self.bytes += bytes;
    }

    fn json(self) -> Value {
        json!({"tensors": self.tensors, "parameters": self.parameters, "bytes": self.bytes})
    }
}

impl Contents {
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let (kind, groups) = if is_gguf(path) {
            let file = GgufFile::open(path)?;
            (Kind::Gguf(metadata(&file)), gguf_groups(&file))
        } else if path.join(ADAPTER_CONFIG_FILE).exists() {
            let adapter = Adapter::read(path)?;
            let groups = adapter_groups(&adapter);
            let matrix_dropout = MatrixDropoutSettings::read(path)?;
            let kind = Kind::Adapter(Box::new(adapter.config), matrix_dropout);
            (kind, groups)
        } else if path.join("config.json").exists() {
            let checkpoint = Checkpoint::open(path)?;
            let groups = model_groups(&checkpoint)?;
            (Kind::Model(checkpoint.config().clone()), groups)
        } else {
            bail!(
                "{}: has neither config.json (a model) nor adapter_config.json (an adapter)",
                path.display()
            );
        };
        Ok(Self {
            path: path.to_path_buf(),
            kind,
            groups,
        })
    }

    fn total(&self) -> Group {
        let mut total = Group::default();
        for group in self.groups.values() {
            total.tensors += group.tensors;
            total.parameters += group.parameters;
            total.bytes += group.bytes;
        }
        total
    }

    pub fn json(&self) -> Value {
        let types: serde_json::Map<String, Value> = self
            .groups
            .iter()
            .map(|(name, group)| (name.clone(), group.json()))
            .collect();
        let total = self.total();
        let mut json = match &self.kind {
            Kind::Model(config) => json!({
                "kind": "model",
                "model_type": config["model_type"],
                "config": shape(config),
                "quantization_config": config["quantization_config"],
            }),
            Kind::Adapter(config, matrix_dropout) => json!({
                "kind": "adapter",
                "r": config.r,
                "lora_alpha": config.lora_alpha,
                "scaling": config.scaling(),
                "rank_pattern": config.rank_pattern.to_json(),
                "alpha_pattern": config.alpha_pattern.to_json(),
                "lora_dropout": config.lora_dropout,
                "matrix_dropout": matrix_dropout,
                "use_rslora": config.use_rslora,
                "use_dora": config.use_dora,
                "target_modules": config.target_modules,
                "base_model_name_or_path": config.base_model_name_or_path,
            }),
            Kind::Gguf(metadata) => json!({ "kind": "gguf", "metadata": metadata }),
        };
        json["path"] = json!(self.path);
        json["tensors"] = json!(total.tensors);
        json["parameters"] = json!(total.parameters);
        json["bytes"] = json!(total.bytes);
        json["types"] = Value::Object(types);
        json
    }

    pub fn text(&self) -> String {
        let mut text = format!("{}: {}\n", self.path.display(), self.headline());
        let rows = self
            .groups
            .iter()
            .map(|(name, group)| (name.as_str(), *group));
        for (name, group) in rows.chain([("in all", self.total())]) {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "  {name:<28} {:>6} tensors {:>15} parameters {:>10}",
                group.tensors,
                group.parameters,
                size(group.bytes)
            );
        }
        text
    }

    fn headline(&self) -> String {
        match &self.kind {
            Kind::Model(config) => {
                let shape: Vec<String> = shape(config)
                    .iter()
                    .map(|(key, value)| format!("{key} {value}"))
                    .collect();
                let model_type = config["model_type"].as_str().unwrap_or("unnamed");
                format!("{model_type} model, {}", shape.join(", "))
            }
            Kind::Adapter(config, matrix_dropout) => format!(
                "{} adapter, r {}, lora_alpha {} (scaling {:.4}{}){}, lora_dropout {}{}, target_modules {}, base model {}",
                if config.use_dora { "DoRA" } else { "LoRA" },
                config.r,
                config.lora_alpha,
                config.scaling(),
                if config.use_rslora { ", rsLoRA" } else { "" },
                patterns(config),
                config.lora_dropout,
                matrix_dropout.as_ref().map(masks).unwrap_or_default(),
                targets(&config.target_modules),
                config
                    .base_model_name_or_path
                    .as_deref()
                    .unwrap_or("not named"),
            ),
            Kind::Gguf(metadata) => gguf_headline(metadata),
        }
    }
}

/// The modules with an adapter; of many, such as paths of layers, how many and how they end.
fn targets(modules: &TargetModules) -> String {
    const MANY: usize = 12;
    match modules {
        TargetModules::Names(names) if names.len() > MANY => {
            let last = names.iter().filter_map(|name| name.rsplit('.').next());
            let last: BTreeSet<&str> = last.collect();
            let last: Vec<&str> = last.into_iter().take(MANY).collect();
            format!("{} that end in {}", names.len(), last.join(", "))
        }
        modules => json!(modules).to_string(),
    }
}

/// By its name, so that one that is missing is told as such.
pub fn is_gguf(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "gguf")
}

/// What it is, the numbers of its architecture, and its tokenizer.
fn gguf_headline(metadata: &serde_json::Map<String, Value>) -> String {
    let text = |key: &str| metadata.get(key).and_then(Value::as_str);
    let architecture = text("general.architecture").unwrap_or("unnamed");
    let kind = text("general.type").unwrap_or("model");
    let mut parts = vec![format!("GGUF {kind} for the {architecture} architecture")];
    let prefixes = [format!("{architecture}."), "adapter.".to_string()];
    for (key, value) in metadata {
        let name = prefixes.iter().find_map(|prefix| key.strip_prefix(prefix));
        parts.extend(name.map(|name| format!("{name} {}", shown(value))));
    }
    if let (Some(model), Some(tokens)) = (
        text("tokenizer.ggml.model"),
        metadata.get("tokenizer.ggml.tokens"),
    ) {
        let pre = text("tokenizer.ggml.pre").unwrap_or("default");
        parts.push(format!("tokenizer {model} ({pre}) of {tokens} tokens"));
        let template = metadata.contains_key("tokenizer.chat_template");
        parts.push(format!(
            "{} chat template",
            if template { "a" } else { "no" }
        ));
    }
    parts.join(", ")
}

fn shown(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), String::from)
}

fn metadata(file: &GgufFile) -> serde_json::Map<String, Value> {
    let keys = file.keys().into_iter();
    keys.filter_map(|key| {
        let value = match file.json(key)? {
            Value::Array(values) => json!(values.len()),
            value => value,
        };
        Some((key.to_string(), value))
    })
    .collect()
}

fn gguf_groups(file: &GgufFile) -> BTreeMap<String, Group> {
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for stored in file
        .names()
        .into_iter()
        .filter_map(|name| file.stored(name))
    {
        let group = groups.entry(stored.type_name).or_default();
        group.add(stored.parameters, stored.nbytes);
    }
    groups
}

/// The modules that have another rank or alpha than the rest, and those that are trained whole.
fn patterns(config: &AdapterConfig) -> String {
    let mut text = String::new();
    if !config.rank_pattern.is_empty() {
        let _ = write!(text, ", rank_pattern {}", config.rank_pattern);
    }
    if !config.alpha_pattern.is_empty() {
        let _ = write!(text, ", alpha_pattern {}", config.alpha_pattern);
    }
    if !config.modules_to_save.is_empty() {
        let _ = write!(text, ", modules_to_save {}", json!(config.modules_to_save));
    }
    text
}

/// How the matrices were masked in training.
fn masks(settings: &MatrixDropoutSettings) -> String {
    let MatrixDropoutSettings { p, scale, seed } = settings;
    let scale = json!(scale);
    let scale = scale.as_str().unwrap_or_default();
    format!(", lora_matrix_dropout {p} (scale {scale}, seed {seed})")
}

fn shape(config: &Value) -> serde_json::Map<String, Value> {
    let config = text_config(config);
    SHAPE_KEYS
        .iter()
        .filter_map(|key| Some((key.to_string(), config.get(key)?.clone())))
        .collect()
}

fn adapter_groups(adapter: &Adapter) -> BTreeMap<String, Group> {
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for tensor in adapter.tensors.values() {
        groups
            .entry(tensor.dtype.as_str().into())
            .or_default()
            .add(tensor.shape.iter().product(), tensor.data.len());
    }
    groups
}

/// A 4-bit weight counts as one tensor: its scales, `NAME.absmax` and so on, belong to it.
fn model_groups(checkpoint: &Checkpoint) -> qlora::Result<BTreeMap<String, Group>> {
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for name in checkpoint.weight_names() {
        let file = checkpoint.file(name)?;
        let info = file.info(name)?;
        let stored = format!("{:?}", info.dtype).to_lowercase();
        let (group, parameters, bytes) = match stored.as_str() {
            "bf16" | "f16" | "f32" | "u8" => match checkpoint.weight(name)? {
                FrozenWeight::Quantized(weight) => {
                    let double = match weight.absmax {
                        Absmax::Double { .. } => ", double quant",
                        Absmax::Single(_) => "",
                    };
                    let quant_type = json!(weight.quant_type);
                    let quant_type = quant_type.as_str().unwrap_or_default();
                    let group = format!("{quant_type}, block {}{double}", weight.block_size);
                    (group, weight.numel(), weight.nbytes())
                }
                FrozenWeight::Dense(weight) => {
                    (stored, weight.shape.iter().product(), weight.data.len())
                }
            },
            _ => {
                let (start, end) = info.data_offsets;
                (stored, info.shape.iter().product(), end - start)
            }
        };
        groups.entry(group).or_default().add(parameters, bytes);
    }
    Ok(groups)
}

/// Bytes in the largest binary unit that leaves at least one.
fn size(bytes: usize) -> String {
    let mut value = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB"].into_iter();
    let mut unit = units.next().unwrap_or("B");
    for larger in units {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    format!("{value:.1} {unit}")
}
