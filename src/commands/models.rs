//! What stands behind the names of models and adapters: directories, and repositories on the Hugging Face hub.
//!
//! What is in the hub's cache is taken as it is, so that a run goes on with the model that it began with. Other programs fetch
//! less of a repository than this one reads: a snapshot that they have made is completed once.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use qlora::model::{DecoderConfig, Module};
use qlora::store::{
    ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, INDEX_FILE, INITIAL_ADAPTER, INITIALIZATION_FILE,
    MATRIX_DROPOUT_FILE, SINGLE_FILE, hub_snapshot, read_json, shard_names,
};
use qlora::train::TrainConfig;
use serde_json::Value;

use super::hub::{self, Name, Online, Repository};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
/// Beside the snapshots of a repository in the hub's cache: the revisions of which all is there.
const WHOLE_FILE: &str = "qlora-whole.json";

/// How the names of files begin that a model has beside its config and its weights, and that are worth having.
const BESIDE_MODEL: [&str; 11] = [
    "tokenizer",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template",
    "additional_chat_templates/",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
];

/// The same of an adapter: what this program writes there.
const BESIDE_ADAPTER: [&str; 2] = [INITIALIZATION_FILE, MATRIX_DROPOUT_FILE];

/// Replaces the names of a model and of an adapter by their directories.
pub fn find(model: &mut PathBuf, adapter: &mut Option<PathBuf>) -> anyhow::Result<()> {
    *model = model_dir(model)?;
    if let Some(adapter) = adapter {
        *adapter = adapter_dir(adapter)?;
    }
    Ok(())
}

/// Fetches again what a run knows by its place in the hub's cache, where that has gone.
pub fn restore(config: &mut TrainConfig) -> anyhow::Result<()> {
    if hub_snapshot(&config.model_name_or_path).is_some() {
        config.model_name_or_path = model_dir(&config.model_name_or_path)?;
    }
    if let Some(adapter) = &mut config.adapter
        && hub_snapshot(adapter).is_some()
    {
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
    if !has_model(&repository.snapshot()) {
        // What cannot be computed need not be downloaded.
        decoder_config(&config_dir(name)?)?;
    }
    whole_dir(&repository, has_model, download_model).with_context(|| name.display().to_string())
}

/// The same of an adapter.
pub fn adapter_dir(name: &Path) -> anyhow::Result<PathBuf> {
    let Some(repository) = on_the_hub(name)? else {
        return Ok(name.to_path_buf());
    };
    let has_adapter = |dir: &Path| has_all(dir, &[ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE]);
    whole_dir(&repository, has_adapter, download_adapter)
        .with_context(|| name.display().to_string())
}

/// The directory of a model, if it is here or in the cache; at the revision, if one is given.
pub fn cached_model_dir(name: &Path, revision: Option<&str>) -> anyhow::Result<Option<PathBuf>> {
    let Some(repository) = on_the_hub(name)? else {
        return Ok(Some(name.to_path_buf()).filter(|dir| dir.is_dir()));
    };
    let repository = match revision {
        Some(revision) => repository.at(revision)?,
        None => repository,
    };
    Ok(Some(repository.snapshot()).filter(|dir| has_model(dir)))
}

/// The directory of a model of which `config.json` is enough.
pub fn config_dir(name: &Path) -> anyhow::Result<PathBuf> {
    part_dir(name, &[CONFIG], |online| online.fetch(Path::new(CONFIG)))
}

/// The directory of a model of which the config and the tokenizer are enough.
pub fn tokenizer_dir(name: &Path) -> anyhow::Result<PathBuf> {
    part_dir(name, &[CONFIG, TOKENIZER], download_beside_model)
}

/// What the `config.json` in a directory says.
pub fn decoder_config(dir: &Path) -> anyhow::Result<DecoderConfig> {
    let path = dir.join(CONFIG);
    Ok(DecoderConfig::from_json(&read_json(&path)?, &path)?)
}

/// The linear layers that a 4-bit model has in 16 bits, by its config in a directory.
pub fn skipped_linears(dir: &Path, config: &DecoderConfig) -> anyhow::Result<Vec<(usize, Module)>> {
    let json = read_json(&dir.join(CONFIG))?;
    let skipped = json["quantization_config"]["llm_int8_skip_modules"].as_array();
    let skipped = skipped.into_iter().flatten().filter_map(Value::as_str);
    let skipped: Vec<_> = skipped.collect();
    let is_skipped = |(layer, module): &(usize, Module)| {
        let path = config.linear_path(*layer, *module);
        let mut names = skipped.iter();
        names.any(|name| path.starts_with(name) || path.ends_with(name))
    };
    Ok(config.linears().filter(is_skipped).collect())
}

/// Whether a directory has the weights of a model, all of them.
pub fn has_model(dir: &Path) -> bool {
    let has_shards = || {
        let shards = shard_names(&dir.join(INDEX_FILE));
        shards.is_ok_and(|shards| shards.iter().all(|shard| dir.join(shard).exists()))
    };
    has_all(dir, &[CONFIG]) && (dir.join(SINGLE_FILE).exists() || has_shards())
}

/// Whether a name is one of the hub, and nothing that is here.
pub fn is_on_the_hub(name: &Path) -> bool {
    matches!(on_the_hub(name), Ok(Some(_)))
}

/// The repository that `name` is one of, if it is nothing that is here: by its name, or by the place of a snapshot in the
/// cache that has gone.
fn on_the_hub(name: &Path) -> anyhow::Result<Option<Repository>> {
    if name.exists() {
        return Ok(None);
    }
    if let Some((id, revision)) = hub_snapshot(name) {
        return Repository::model(Name { id, revision }).map(Some);
    }
    match hub::split_name(&name.to_string_lossy()) {
        Some((named, "")) if !hub::begins_here(name) => Repository::model(named).map(Some),
        _ => Ok(None),
    }
}

fn has_all(dir: &Path, files: &[&str]) -> bool {
    files.iter().all(|file| dir.join(file).exists())
}

/// Where all of a repository is that `download` fetches. `has_all` says whether a snapshot would do.
fn whole_dir(
    repository: &Repository,
    has_all: impl Fn(&Path) -> bool,
    download: impl Fn(&Online) -> anyhow::Result<PathBuf>,
) -> anyhow::Result<PathBuf> {
    let pinned = repository.pinned();
    let cached = Some(pinned.snapshot()).filter(|dir| has_all(dir));
    if let Some(dir) = &cached
        && recorded(&pinned).contains(&pinned.commit())
    {
        return Ok(dir.clone());
    }
    let repository = match &cached {
        Some(_) => &pinned,
        None => repository,
    };
    let download = |online: &Online| {
        let dir = download(online)?;
        if !has_all(&dir) {
            bail!("{} lacks files in {}", online.name, dir.display());
        }
        record(repository, &online.revision);
        Ok(dir)
    };
    repository.fetch("directory", download, || cached.clone())
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
    let pinned = repository.pinned();
    let cached = Some(pinned.snapshot()).filter(|dir| has_all(dir, &[CONFIG]));
    let repository = match &cached {
        Some(dir) if has_all(dir, files) => return Ok(dir.clone()),
        Some(_) => pinned,
        None => repository,
    };
    repository
        .fetch("directory", download, || cached.clone())
        .with_context(|| name.display().to_string())
}

fn recorded(repository: &Repository) -> BTreeSet<String> {
    let json = fs::read(repository.directory().join(WHOLE_FILE)).ok();
    json.and_then(|json| serde_json::from_slice(&json).ok())
        .unwrap_or_default()
}

/// Writes down that all of a revision is there. Not in a cache that cannot be written to.
fn record(repository: &Repository, revision: &str) {
    let mut revisions = recorded(repository);
    revisions.insert(revision.into());
    if let Ok(json) = serde_json::to_vec(&revisions) {
        let _ = fs::write(repository.directory().join(WHOLE_FILE), json);
    }
}

fn download_model(online: &Online) -> anyhow::Result<PathBuf> {
    let has = |name: &str| online.files.contains_key(Path::new(name));
    if !has(SINGLE_FILE) && !has(INDEX_FILE) {
        bail!("{} has no weights in safetensors", online.name);
    }
    download_beside(online, &[INITIAL_ADAPTER], &[])?;
    let dir = download_beside_model(online)?;
    if has(SINGLE_FILE) {
        return online.fetch(Path::new(SINGLE_FILE));
    }
    let index = online.fetch(Path::new(INDEX_FILE))?.join(INDEX_FILE);
    for shard in shard_names(&index)? {
        online.fetch(Path::new(&shard))?;
    }
    Ok(dir)
}

/// The config, and what else is worth having beside the weights. The tokenizer comes last: where it is, all is.
fn download_beside_model(online: &Online) -> anyhow::Result<PathBuf> {
    download_beside(online, &BESIDE_MODEL, &[TOKENIZER])?;
    let dir = online.fetch(Path::new(CONFIG))?;
    match online.files.contains_key(Path::new(TOKENIZER)) {
        true => online.fetch(Path::new(TOKENIZER)),
        false => Ok(dir),
    }
}

fn download_adapter(online: &Online) -> anyhow::Result<PathBuf> {
    if !online.files.contains_key(Path::new(ADAPTER_WEIGHTS_FILE)) {
        bail!(
            "{} has no {ADAPTER_WEIGHTS_FILE}; an adapter_model.bin is not read, save the adapter as safetensors with PEFT",
            online.name
        );
    }
    download_beside(online, &BESIDE_ADAPTER, &[])?;
    online.fetch(Path::new(ADAPTER_CONFIG_FILE))?;
    online.fetch(Path::new(ADAPTER_WEIGHTS_FILE))
}

fn download_beside(online: &Online, beside: &[&str], but: &[&str]) -> anyhow::Result<()> {
    for file in online.files.keys() {
        let name = file.to_string_lossy();
        let is_beside = beside.iter().any(|beside| name.starts_with(beside));
        if is_beside && !but.contains(&&*name) {
            online.fetch(file)?;
        }
    }
    Ok(())
}
