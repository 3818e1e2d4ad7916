//! What stands behind the names of data sets: local paths, the names of qlora.py, and repositories on the Hugging Face hub;
//! and where tokenized rows are kept.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo};
use qlora::data::{data_files, training_files};
use qlora::train::TrainConfig;

/// Tokenizing less than this takes a moment, and is not kept unless that is asked for.
const SMALLEST_KEPT_BYTES: u64 = 16 << 20;

/// Beside the snapshots of a repository in the hub's cache.
const PARTS_FILE: &str = "qlora-parts.json";

/// Data sets by the names of qlora.py: where they are on the hub, and which part of it.
const NAMED: [(&str, &str); 7] = [
    ("alpaca", "tatsu-lab/alpaca"),
    ("alpaca-clean", "yahma/alpaca-cleaned"),
    ("chip2", "laion/OIG/unified_chip2.jsonl"),
    ("self-instruct", "yizhongw/self_instruct/self_instruct"),
    ("hh-rlhf", "Anthropic/hh-rlhf"),
    ("longform", "akoksal/LongForm"),
    ("oasst1", "timdettmers/openassistant-guanaco"),
];

/// Replaces names by paths, and says where tokenized rows are kept if the config does not.
pub fn prepare(config: &mut TrainConfig) -> anyhow::Result<()> {
    for path in config.dataset.0.iter_mut().chain(&mut config.eval_dataset) {
        *path = resolve(path)?;
    }
    if config.dataset_cache_dir.is_none() && is_large(config)? {
        config.dataset_cache_dir = user_cache_dir().and_then(|dir| writable(dir.join("qlora")));
    }
    Ok(())
}

/// A directory for what was not asked to be kept: where it cannot be written to, the run does without.
fn writable(dir: PathBuf) -> Option<PathBuf> {
    let tried = std::fs::create_dir_all(&dir).and_then(|()| tempfile::tempfile_in(&dir));
    match tried {
        Ok(_) => Some(dir),
        Err(error) => {
            let dir = dir.display();
            super::note(&format!(
                "{dir}: tokenized rows are not kept there ({error})"
            ));
            None
        }
    }
}

fn is_large(config: &TrainConfig) -> anyhow::Result<bool> {
    let mut bytes = 0;
    for path in config.dataset.0.iter().chain(&config.eval_dataset) {
        for file in data_files(path)? {
            // A file that is missing is named by who reads it.
            bytes += std::fs::metadata(file).map_or(0, |metadata| metadata.len());
        }
    }
    Ok(bytes >= SMALLEST_KEPT_BYTES)
}

/// The path that `name` stands for: itself if it exists, else a data set on the hub.
pub fn resolve(name: &Path) -> anyhow::Result<PathBuf> {
    let text = name.to_string_lossy();
    if name.exists() {
        return Ok(name.to_path_buf());
    }
    if text == "vicuna" {
        bail!("vicuna: the data of Vicuna were never released");
    }
    let named = NAMED.iter().find(|(known, _)| *known == text);
    // `rows/train` beside a directory `rows` is a file that is missing.
    let is_local = name
        .components()
        .next()
        .is_some_and(|first| Path::new(first.as_os_str()).exists());
    match Location::parse(named.map_or(&text, |(_, location)| location)) {
        Some(location) if named.is_some() || !is_local => {
            location.fetch().with_context(|| text.into_owned())
        }
        _ => Ok(name.to_path_buf()),
    }
}

/// A data set on the hub, or a file or directory of it.
#[derive(Debug, PartialEq, Eq)]
struct Location {
    repository: String,
    part: String,
}

impl Location {
    /// Reads `organization/name` or `organization/name/part/of/it`; `None` for what cannot be one.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '/');
        let (organization, name) = (parts.next()?, parts.next()?);
        let part = parts.next().unwrap_or_default().to_string();
        let is_word = |word: &str| {
            !word.is_empty()
                && !word.starts_with('.')
                && word
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let is_file = part.is_empty() && qlora::data::is_data_file(Path::new(name));
        (is_word(organization) && is_word(name) && !is_file).then(|| Self {
            repository: format!("{organization}/{name}"),
            part,
        })
    }

    /// The files of the data set, downloaded where they have to be, by the path of their directory in the hub's cache.
    fn fetch(&self) -> anyhow::Result<PathBuf> {
        let cache = Cache::new(hub_cache_dir()?);
        if is_set("HF_HUB_OFFLINE") {
            return self.cached(&cache).ok_or_else(|| {
                anyhow!(
                    "not a file here, and HF_HUB_OFFLINE is set while {} is not in {}, or not whole",
                    self.repository,
                    cache.path().display()
                )
            });
        }
        match (self.download(&cache), self.cached(&cache)) {
            (Ok(path), _) => Ok(path),
            (Err(error), Some(path)) => {
                super::note(&format!(
                    "{}: cannot be asked for ({error:#}), the copy in {} is used",
                    self.repository,
                    path.display()
                ));
                Ok(path)
            }
            (Err(error), None) => Err(error.context(format!(
                "not a file here, and {} cannot be fetched from the Hugging Face hub; without a network, give a local file",
                self.repository
            ))),
        }
    }

    fn download(&self, cache: &Cache) -> anyhow::Result<PathBuf> {
        let mut api = ApiBuilder::from_cache(cache.clone()).with_progress(false);
        if let Some(endpoint) = variable("HF_ENDPOINT") {
            api = api.with_endpoint(endpoint.to_string_lossy().into_owned());
        }
        if let Some(token) = variable("HF_TOKEN") {
            api = api.with_token(Some(token.to_string_lossy().into_owned()));
        }
        let api = api.build()?.repo(Repo::dataset(self.repository.clone()));
        let info = api.info()?;
        let names = info
            .siblings
            .into_iter()
            .map(|file| PathBuf::from(file.rfilename));
        let names: Vec<PathBuf> = names.filter(|name| name.starts_with(&self.part)).collect();
        let files = training_files(&names);
        if files.is_empty() {
            bail!("{} has no data files that can be read", self.repository);
        }
        self.record(cache, &files);
        let mut snapshot = PathBuf::new();
        for file in files {
            super::note(&format!("{}: {}", self.repository, file.display()));
            let path = api.get(&file.to_string_lossy())?;
            let depth = file.components().count();
            snapshot = path
                .ancestors()
                .nth(depth)
                .context("a path in the cache")?
                .to_path_buf();
        }
        Ok(snapshot.join(&self.part))
    }

    /// Where the cache has the repository.
    fn directory(&self, cache: &Cache) -> PathBuf {
        let name = Repo::dataset(self.repository.clone()).folder_name();
        cache.path().join(name)
    }

    /// Writes down which files the part is made of, so that half a download is not taken for all of it. Not in a cache that
    /// cannot be written to, to which nothing will come.
    fn record(&self, cache: &Cache, files: &[PathBuf]) {
        let directory = self.directory(cache);
        let mut parts = recorded_parts(&directory);
        parts.insert(self.part.clone(), files.to_vec());
        let _ = std::fs::create_dir_all(&directory)
            .and_then(|()| Ok(serde_json::to_vec(&parts)?))
            .and_then(|json| std::fs::write(directory.join(PARTS_FILE), json));
    }

    /// What an earlier download has left, if it came to its end.
    fn cached(&self, cache: &Cache) -> Option<PathBuf> {
        let directory = self.directory(cache);
        let revision = std::fs::read_to_string(directory.join("refs/main")).ok()?;
        let snapshot = directory.join("snapshots").join(revision.trim());
        let parts = recorded_parts(&directory);
        let is_in = |path: &Path| path.starts_with(&self.part);
        let covering = parts
            .iter()
            .find(|(part, _)| Path::new(&self.part).starts_with(part));
        let is_whole = match covering {
            Some((_, files)) => {
                let mut wanted = files.iter().filter(|file| is_in(file));
                wanted.all(|file| snapshot.join(file).exists())
            }
            // What others have downloaded is not recorded.
            None => parts.is_empty(),
        };
        let path = snapshot.join(&self.part);
        (is_whole && path.exists() && data_files(&path).is_ok()).then_some(path)
    }
}

/// The files of each part of a repository that was asked for, by the part.
fn recorded_parts(directory: &Path) -> BTreeMap<String, Vec<PathBuf>> {
    let json = std::fs::read(directory.join(PARTS_FILE)).ok();
    json.and_then(|json| serde_json::from_slice(&json).ok())
        .unwrap_or_default()
}

/// Where huggingface_hub keeps its downloads.
fn hub_cache_dir() -> anyhow::Result<PathBuf> {
    if let Some(dir) = variable("HF_HUB_CACHE") {
        return Ok(dir.into());
    }
    if let Some(home) = variable("HF_HOME") {
        return Ok(Path::new(&home).join("hub"));
    }
    let dir = user_cache_dir().context("neither HF_HOME nor HOME is set")?;
    Ok(dir.join("huggingface/hub"))
}

fn user_cache_dir() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(variable("HOME")?).join(".cache"));
    variable("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)
}

fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Whether a variable says yes, as huggingface_hub reads it.
fn is_set(name: &str) -> bool {
    let value = variable(name)
        .unwrap_or_default()
        .to_string_lossy()
        .to_ascii_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_hub_are_told_from_paths() {
        let location = |repository: &str, part: &str| {
            Some(Location {
                repository: repository.into(),
                part: part.into(),
            })
        };
        assert_eq!(
            Location::parse("tatsu-lab/alpaca"),
            location("tatsu-lab/alpaca", "")
        );
        assert_eq!(
            Location::parse("laion/OIG/unified_chip2.jsonl"),
            location("laion/OIG", "unified_chip2.jsonl")
        );
        for path in [
            "rows.jsonl",
            "data/rows.jsonl",
            "data/rows.csv.gz",
            "/data/rows",
            "./a",
            "../a/b",
            "a//b",
            "a b/c",
        ] {
            assert_eq!(Location::parse(path), None, "{path}");
        }
    }

    #[test]
    fn every_name_of_qlora_py_is_a_place_on_the_hub() {
        for (name, location) in NAMED {
            assert!(Location::parse(location).is_some(), "{name}");
        }
    }
}
