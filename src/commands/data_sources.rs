//! What stands behind the names of data sets: local paths, the names of qlora.py, and repositories on the Hugging Face hub;
//! and where tokenized rows are kept.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use qlora::data::{data_files, training_files};
use qlora::train::TrainConfig;

use super::hub::{self, Name, Online, Repository};

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
        config.dataset_cache_dir =
            hub::user_cache_dir().and_then(|dir| writable(dir.join("qlora")));
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
    match Location::parse(named.map_or(&text, |(_, location)| location)) {
        Some(location) if named.is_some() || !hub::begins_here(name) => {
            location.fetch().with_context(|| text.into_owned())
        }
        _ => Ok(name.to_path_buf()),
    }
}

/// A data set on the hub, or a file or directory of it.
#[derive(Debug, PartialEq, Eq)]
struct Location {
    repository: Name,
    part: String,
}

impl Location {
    /// Reads `organization/name` or `organization/name/part/of/it`, with `@revision` behind the name or without; `None` for what
    /// cannot be one.
    fn parse(text: &str) -> Option<Self> {
        let (repository, part) = hub::split_name(text)?;
        let is_file = part.is_empty() && qlora::data::is_data_file(Path::new(text));
        (!is_file).then(|| Self {
            repository,
            part: part.to_string(),
        })
    }

    /// The files of the data set, downloaded where they have to be, by the path of their directory in the hub's cache.
    fn fetch(&self) -> anyhow::Result<PathBuf> {
        let repository = Repository::dataset(self.repository.clone())?;
        let download = |online: &Online| self.download(online, &repository.directory());
        repository.fetch("file", download, || self.cached(&repository))
    }

    fn download(&self, online: &Online, directory: &Path) -> anyhow::Result<PathBuf> {
        let names = online.files.keys().cloned();
        let names: Vec<PathBuf> = names.filter(|name| name.starts_with(&self.part)).collect();
        let files = training_files(&names);
        if files.is_empty() {
            bail!("{} has no data files that can be read", self.repository.id);
        }
        self.record(directory, &online.revision, &files);
        let mut snapshot = PathBuf::new();
        for file in files {
            snapshot = online.fetch(&file)?;
        }
        Ok(snapshot.join(&self.part))
    }

    /// Writes down which files the part is made of, so that half a download is not taken for all of it. Not in a cache that
    /// cannot be written to, to which nothing will come.
    fn record(&self, directory: &Path, revision: &str, files: &[PathBuf]) {
        let mut revisions = recorded_parts(directory);
        let parts = revisions.entry(revision.to_string()).or_default();
        parts.insert(self.part.clone(), files.to_vec());
        let _ = std::fs::create_dir_all(directory)
            .and_then(|()| Ok(serde_json::to_vec(&revisions)?))
            .and_then(|json| std::fs::write(directory.join(PARTS_FILE), json));
    }

    /// What an earlier download has left, if it came to its end.
    fn cached(&self, repository: &Repository) -> Option<PathBuf> {
        let repository = repository.pinned();
        let snapshot = repository.snapshot();
        let revisions = recorded_parts(&repository.directory());
        let parts = revisions.get(&repository.commit());
        let parts = parts.cloned().unwrap_or_default();
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
type Parts = BTreeMap<String, Vec<PathBuf>>;

/// Those of each revision.
fn recorded_parts(directory: &Path) -> BTreeMap<String, Parts> {
    let json = std::fs::read(directory.join(PARTS_FILE)).ok();
    json.and_then(|json| serde_json::from_slice(&json).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_hub_are_told_from_paths() {
        for (text, id, revision, part) in [
            ("tatsu-lab/alpaca", "tatsu-lab/alpaca", "main", ""),
            (
                "laion/OIG/unified_chip2.jsonl",
                "laion/OIG",
                "main",
                "unified_chip2.jsonl",
            ),
            ("a/b@v1.0", "a/b", "v1.0", ""),
            ("a/b@v1.0/data/train", "a/b", "v1.0", "data/train"),
            ("a/b@refs/pr/3", "a/b", "refs/pr/3", ""),
            (
                "a/b@refs/convert/parquet/default/train",
                "a/b",
                "refs/convert/parquet",
                "default/train",
            ),
            ("a/b@my%2Fbranch/x", "a/b", "my/branch", "x"),
        ] {
            let repository = Name {
                id: id.into(),
                revision: revision.into(),
            };
            let part = part.into();
            let expected = Location { repository, part };
            assert_eq!(Location::parse(text), Some(expected), "{text}");
        }
        for path in [
            "rows.jsonl",
            "data/rows.jsonl",
            "data/rows.csv.gz",
            "/data/rows",
            "./a",
            "../a/b",
            "a//b",
            "a b/c",
            "a/b@2x.jsonl",
        ] {
            assert_eq!(Location::parse(path), None, "{path}");
        }
    }

    #[test]
    fn revisions_stay_in_the_cache() {
        for (revision, is_one) in [
            ("main", true),
            ("0123abc", true),
            ("v1.0+cu", true),
            ("my/branch", true),
            ("refs/pr/3", true),
            ("", false),
            ("..", false),
            ("/etc", false),
            ("refs/../../x", false),
            ("a b", false),
        ] {
            let name = Name {
                id: "a/b".into(),
                revision: revision.into(),
            };
            assert_eq!(Repository::dataset(name).is_ok(), is_one, "{revision}");
        }
    }

    #[test]
    fn every_name_of_qlora_py_is_a_place_on_the_hub() {
        for (name, location) in NAMED {
            assert!(Location::parse(location).is_some(), "{name}");
        }
    }
}
