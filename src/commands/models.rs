//! What stands behind the names of models and adapters: directories, and repositories on the Hugging Face hub.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use qlora::model::DecoderConfig;
use qlora::train::TrainConfig;
use serde_json::Value;

use super::hub::{self, Online, Repository};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";
const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// How the names of files begin that a model has beside its config and its weights, and that are worth having.
const BESIDE: [&str; 10] = [
    "tokenizer",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
];

/// Replaces the names of the model and of the adapter by their directories.
pub fn prepare(config: &mut TrainConfig) -> anyhow::Result<()> {
    config.model_name_or_path = model_dir(&config.model_name_or_path)?;
    if let Some(adapter) = &mut config.adapter {
        *adapter = adapter_dir(adapter)?;
    }
    Ok(())
}

/// The directory of a model: `name` itself, or where the hub's cache has the model of that name, which is downloaded if it
/// is not there.
pub fn model_dir(name: &Path) -> anyhow::Result<PathBuf> {
    let Some(repository) = on_the_hub(name)? else {
        return Ok(name.to_path_buf());
    };
    let cached = || repository.snapshot().filter(|dir| has_model(dir));
    if let Some(dir) = cached().filter(|dir| dir.join(TOKENIZER).exists()) {
        return Ok(dir);
    }
    // What cannot be computed need not be downloaded.
    decoder_config(&config_dir(name)?)?;
    repository
        .fetch("directory", download_model, cached)
        .with_context(|| name.display().to_string())
}

/// The same, if it is here or in the cache.
pub fn cached_model_dir(name: &Path) -> anyhow::Result<Option<PathBuf>> {
    let dir = match on_the_hub(name)? {
        None => Some(name.to_path_buf()).filter(|dir| dir.is_dir()),
        Some(repository) => repository.snapshot().filter(|dir| has_model(dir)),
    };
    Ok(dir)
}

/// The directory of an adapter.
pub fn adapter_dir(name: &Path) -> anyhow::Result<PathBuf> {
    part_dir(name, &[ADAPTER_CONFIG, ADAPTER_WEIGHTS], download_adapter)
}

/// The directory of a model of which `config.json` is enough.
pub fn config_dir(name: &Path) -> anyhow::Result<PathBuf> {
    let download = |online: &Online| online.fetch(Path::new(CONFIG));
    part_dir(name, &[CONFIG], download)
}

/// The directory of a model of which the config and the tokenizer are enough.
pub fn tokenizer_dir(name: &Path) -> anyhow::Result<PathBuf> {
    part_dir(name, &[CONFIG, TOKENIZER], download_beside)
}

/// The directory of a model of which `files` are enough.
fn part_dir(
    name: &Path,
    files: &[&str],
    download: impl FnOnce(&Online) -> anyhow::Result<PathBuf>,
) -> anyhow::Result<PathBuf> {
    let Some(repository) = on_the_hub(name)? else {
        return Ok(name.to_path_buf());
    };
    let cached = || repository.snapshot().filter(|dir| has_all(dir, files));
    match cached() {
        Some(dir) => Ok(dir),
        None => repository
            .fetch("directory", download, cached)
            .with_context(|| name.display().to_string()),
    }
}

/// What the `config.json` in a directory says.
pub fn decoder_config(dir: &Path) -> anyhow::Result<DecoderConfig> {
    let path = dir.join(CONFIG);
    Ok(DecoderConfig::from_json(&read_json(&path)?, &path)?)
}

/// Whether a directory has the weights of a model, all of them.
pub fn has_model(dir: &Path) -> bool {
    let has_shards = || {
        let shards = read_json(&dir.join(INDEX)).and_then(|index| shards(&index));
        shards.is_ok_and(|shards| shards.iter().all(|shard| dir.join(shard).exists()))
    };
    has_all(dir, &[CONFIG]) && (dir.join(WEIGHTS).exists() || has_shards())
}

/// Whether a name is one of the hub, and nothing that is here.
pub fn is_on_the_hub(name: &Path) -> bool {
    matches!(on_the_hub(name), Ok(Some(_)))
}

/// The repository that `name` is one of, if it is nothing that is here.
fn on_the_hub(name: &Path) -> anyhow::Result<Option<Repository>> {
    if name.exists() || hub::begins_here(name) {
        return Ok(None);
    }
    match hub::split_name(&name.to_string_lossy()) {
        Some((repository, "")) => Repository::model(repository).map(Some),
        _ => Ok(None),
    }
}

fn has_all(dir: &Path, files: &[&str]) -> bool {
    files.iter().all(|file| dir.join(file).exists())
}

fn download_model(online: &Online) -> anyhow::Result<PathBuf> {
    let dir = download_beside(online)?;
    let has = |name: &str| online.files.iter().any(|file| file == Path::new(name));
    if has(WEIGHTS) {
        return online.fetch(Path::new(WEIGHTS));
    }
    if !has(INDEX) {
        bail!("{} has no weights in safetensors", online.name);
    }
    let index = online.fetch(Path::new(INDEX))?.join(INDEX);
    for shard in shards(&read_json(&index)?)? {
        online.fetch(Path::new(&shard))?;
    }
    Ok(dir)
}

/// The config, the tokenizer and what else is worth having beside the weights.
fn download_beside(online: &Online) -> anyhow::Result<PathBuf> {
    for file in &online.files {
        let name = file.to_string_lossy();
        if BESIDE.iter().any(|beside| name.starts_with(beside)) && !name.contains('/') {
            online.fetch(file)?;
        }
    }
    online.fetch(Path::new(CONFIG))
}

fn download_adapter(online: &Online) -> anyhow::Result<PathBuf> {
    for file in [ADAPTER_CONFIG, ADAPTER_WEIGHTS] {
        if !online.files.iter().any(|name| name == Path::new(file)) {
            bail!("{} has no {file}", online.name);
        }
    }
    online.fetch(Path::new(ADAPTER_CONFIG))?;
    online.fetch(Path::new(ADAPTER_WEIGHTS))
}

/// The files that an index names.
fn shards(index: &Value) -> anyhow::Result<BTreeSet<String>> {
    let map = index["weight_map"].as_object();
    let shards = map.context("the index has no `weight_map`")?.values();
    let name = |shard: &Value| Some(shard.as_str()?.to_string());
    shards
        .map(name)
        .collect::<Option<_>>()
        .context("`weight_map` has a value that is no name")
}

fn read_json(path: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}
