//! Repositories on the Hugging Face hub, and the cache that huggingface_hub keeps of them.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo};
use indicatif::ProgressBar;

/// How often a download is taken up again where it broke off.
const RETRIES: usize = 5;

/// A repository, which may be in the cache.
pub struct Repository {
    name: String,
    repo: Repo,
    cache: Cache,
}

impl Repository {
    pub fn model(name: String) -> anyhow::Result<Self> {
        Self::new(Repo::model(name.clone()), name)
    }

    pub fn dataset(name: String) -> anyhow::Result<Self> {
        Self::new(Repo::dataset(name.clone()), name)
    }

    fn new(repo: Repo, name: String) -> anyhow::Result<Self> {
        let cache = Cache::new(cache_dir()?);
        Ok(Self { name, repo, cache })
    }

    /// Where the cache has the repository.
    pub fn directory(&self) -> PathBuf {
        self.cache.path().join(self.repo.folder_name())
    }

    /// Where the cache has the revision that was last asked for.
    pub fn snapshot(&self) -> Option<PathBuf> {
        let directory = self.directory();
        let revision = std::fs::read_to_string(directory.join("refs/main")).ok()?;
        Some(directory.join("snapshots").join(revision.trim()))
    }

    /// What `download` gives where there is a network, or else what `cached` has left of an earlier download. `kind` is what
    /// was expected at the name: `file` or `directory`.
    pub fn fetch(
        &self,
        kind: &str,
        download: impl FnOnce(&Online) -> anyhow::Result<PathBuf>,
        cached: impl FnOnce() -> Option<PathBuf>,
    ) -> anyhow::Result<PathBuf> {
        if is_set("HF_HUB_OFFLINE") {
            return cached().ok_or_else(|| {
                anyhow!(
                    "not a {kind} here, and HF_HUB_OFFLINE is set while {} is not in {}, or not whole",
                    self.name,
                    self.cache.path().display()
                )
            });
        }
        let downloaded = self.online().and_then(|online| download(&online));
        match (downloaded, cached()) {
            (Ok(path), _) => Ok(path),
            (Err(error), Some(path)) => {
                super::note(&format!(
                    "{}: cannot be asked for ({error:#}), the copy in {} is used",
                    self.name,
                    path.display()
                ));
                Ok(path)
            }
            (Err(error), None) => {
                let text = format!("{error:#}");
                let hint = match ["401", "403"].iter().any(|status| text.contains(status)) {
                    true => {
                        "where its terms have to be accepted, do that on its page and set HF_TOKEN"
                            .into()
                    }
                    false => format!("without a network, give a local {kind}"),
                };
                Err(error.context(format!(
                    "not a {kind} here, and {} cannot be fetched from the Hugging Face hub; {hint}",
                    self.name
                )))
            }
        }
    }

    fn online(&self) -> anyhow::Result<Online> {
        let mut api = ApiBuilder::from_cache(self.cache.clone())
            .with_progress(false)
            .with_retries(RETRIES);
        if let Some(endpoint) = variable("HF_ENDPOINT") {
            api = api.with_endpoint(endpoint.to_string_lossy().into_owned());
        }
        if let Some(token) = variable("HF_TOKEN") {
            api = api.with_token(Some(token.to_string_lossy().into_owned()));
        }
        let api = api.build()?.repo(self.repo.clone());
        let info = api.info()?;
        let files = info.siblings.into_iter();
        Ok(Online {
            name: self.name.clone(),
            files: files.map(|file| PathBuf::from(file.rfilename)).collect(),
            cached: self.cache.repo(self.repo.clone()),
            api,
        })
    }
}

/// A repository that the hub has told of.
pub struct Online {
    pub name: String,
    /// Those that it has.
    pub files: Vec<PathBuf>,
    cached: hf_hub::CacheRepo,
    api: ApiRepo,
}

impl Online {
    /// Has a file in the cache; gives the directory of its snapshot.
    pub fn fetch(&self, file: &Path) -> anyhow::Result<PathBuf> {
        let name = file.to_string_lossy();
        let mut parts = file.components();
        if !parts.all(|part| matches!(part, Component::Normal(_))) {
            bail!("{}: {name:?} is no name of a file", self.name);
        }
        let path = match self.cached.get(&name) {
            Some(path) => path,
            None => {
                super::note(&format!("{}: {name}", self.name));
                self.api.download_with_progress(&name, Bar::new()?)?
            }
        };
        let snapshot = path.ancestors().nth(file.components().count());
        Ok(snapshot.context("a path in the cache")?.to_path_buf())
    }
}

/// How far a download has come.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> anyhow::Result<Self> {
        Ok(Self(super::byte_progress_bar()?))
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, _: &str) {
        self.0.set_length(size as u64);
        self.0.set_position(0);
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Splits `organization/name` and what follows; `None` for what cannot be one.
pub fn split_name(text: &str) -> Option<(String, &str)> {
    let mut parts = text.splitn(3, '/');
    let (organization, name) = (parts.next()?, parts.next()?);
    let is_word = |word: &str| {
        let is_letter = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !word.is_empty() && !word.starts_with('.') && word.chars().all(is_letter)
    };
    let rest = parts.next().unwrap_or_default();
    (is_word(organization) && is_word(name)).then(|| (format!("{organization}/{name}"), rest))
}

/// Whether the first part of a path is here: `rows/train` beside a directory `rows` is a file that is missing, no name.
pub fn begins_here(path: &Path) -> bool {
    let mut parts = path.components();
    let first = parts.next();
    first.is_some_and(|first| Path::new(first.as_os_str()).exists())
}

/// Where huggingface_hub keeps its downloads.
fn cache_dir() -> anyhow::Result<PathBuf> {
    if let Some(dir) = variable("HF_HUB_CACHE") {
        return Ok(dir.into());
    }
    if let Some(home) = variable("HF_HOME") {
        return Ok(Path::new(&home).join("hub"));
    }
    let dir = user_cache_dir().context("neither HF_HOME nor HOME is set")?;
    Ok(dir.join("huggingface/hub"))
}

pub fn user_cache_dir() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(variable("HOME")?).join(".cache"));
    variable("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)
}

fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Whether a variable says yes, as huggingface_hub reads it.
pub fn is_set(name: &str) -> bool {
    let value = variable(name)
        .unwrap_or_default()
        .to_string_lossy()
        .to_ascii_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
}
