//! Repositories on the Hugging Face hub, in the layout of the cache that huggingface_hub keeps of them.
//!
//! A file is `blobs/ETAG`, and `snapshots/REVISION/NAME` is a link to it. The hub tells all names, sizes and hashes of a
//! revision at once, so that nothing is asked for twice, and what comes is held against them. Downloads are not compressed:
//! the hub's servers ignore ranges for those that are, and a broken one could not be taken up again.
//!
//! Source: `file_download.py` of huggingface_hub 2.4, `/api/{models,datasets}/NAME/revision/REVISION?blobs=true`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, Write};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use indicatif::ProgressBar;
use qlora::store::AtomicFile;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;

/// How often a download is taken up again where it broke off.
const ATTEMPTS: u32 = 6;
const TIMEOUT: Duration = Duration::from_secs(60);
const MAIN: &str = "main";
/// Of files that are not whole yet.
const PART: &str = "qlora-part";

#[derive(Clone, Copy)]
enum Kind {
    Model,
    Dataset,
}

impl Kind {
    fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// What a repository is called, `organization/name`, and which of its revisions is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    pub id: String,
    /// A commit, or a name for one.
    pub revision: String,
}

/// A repository, which may be in the cache.
#[derive(Clone)]
pub struct Repository {
    kind: Kind,
    name: String,
    /// A commit, or a name for one.
    revision: String,
    cache: PathBuf,
}

impl Repository {
    pub fn model(name: Name) -> anyhow::Result<Self> {
        Self::new(Kind::Model, name)
    }

    pub fn dataset(name: Name) -> anyhow::Result<Self> {
        Self::new(Kind::Dataset, name)
    }

    fn new(kind: Kind, Name { id, revision }: Name) -> anyhow::Result<Self> {
        let repository = Self {
            kind,
            name: id,
            revision,
            cache: cache_dir()?,
        };
        repository.checked()
    }

    /// The same at the commit that the revision was when it was last asked for, whatever it will be next.
    pub fn pinned(&self) -> Self {
        Self {
            revision: self.commit(),
            ..self.clone()
        }
    }

    /// The same at a revision.
    pub fn at(&self, revision: &str) -> anyhow::Result<Self> {
        Self {
            revision: revision.into(),
            ..self.clone()
        }
        .checked()
    }

    /// Refuses a revision, which becomes part of paths, that Git does not take for the name of one.
    fn checked(self) -> anyhow::Result<Self> {
        let is_part = |part: &str| {
            let is_letter = |c: char| !c.is_control() && !" ~^:?*[\\".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(is_letter)
        };
        match self.revision.split('/').all(is_part) {
            true => Ok(self),
            false => bail!("{}: {:?} is no revision", self.name, self.revision),
        }
    }

    /// Where the cache has the repository.
    pub fn directory(&self) -> PathBuf {
        let name = self.name.replace('/', "--");
        self.cache.join(format!("{}--{name}", self.kind.plural()))
    }

    /// The revision; where it is a name, the commit that it last was.
    pub fn commit(&self) -> String {
        let named = fs::read_to_string(self.directory().join("refs").join(&self.revision));
        let commit = named.as_ref().unwrap_or(&self.revision);
        commit.trim().into()
    }

    /// Where the cache has the revision, if it has.
    pub fn snapshot(&self) -> PathBuf {
        self.directory().join("snapshots").join(self.commit())
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
                    "not a {kind} here, and HF_HUB_OFFLINE is set while {self} is not in {}, or not whole",
                    self.cache.display()
                )
            });
        }
        match (self.download(download), cached()) {
            (Ok(path), _) => Ok(path),
            (Err(error), Some(path)) => {
                super::note(&format!(
                    "{self}: cannot be asked for ({error:#}), the copy in {} is used",
                    path.display()
                ));
                Ok(path)
            }
            (Err(error), None) => {
                let hint = hint(&error, kind);
                Err(error.context(format!(
                    "not a {kind} here, and {self} cannot be fetched from the Hugging Face hub{hint}",
                )))
            }
        }
    }

    fn download(
        &self,
        download: impl FnOnce(&Online) -> anyhow::Result<PathBuf>,
    ) -> anyhow::Result<PathBuf> {
        let online = Online::of(self)?;
        let path = download(&online)?;
        // All is there. A cache that cannot be written to has had it before.
        let _ = self.refer_to(&online.revision);
        Ok(path)
    }

    /// Makes a commit the one that the revision, if it is a name, was when it was last asked for.
    fn refer_to(&self, commit: &str) -> anyhow::Result<()> {
        if self.commit() == commit {
            return Ok(());
        }
        let name = self.directory().join("refs").join(&self.revision);
        fs::create_dir_all(name.parent().expect("it has been joined"))?;
        Ok(AtomicFile::write(name, commit)?)
    }
}

impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.revision.as_str() {
            MAIN => f.write_str(&self.name),
            revision => write!(f, "{}@{revision}", self.name),
        }
    }
}

/// What helps where a repository cannot be had.
fn hint(error: &anyhow::Error, kind: &str) -> String {
    let mut causes = error.chain();
    match causes.find_map(|cause| cause.downcast_ref::<ureq::Error>()) {
        Some(ureq::Error::StatusCode(401 | 403 | 404)) => {
            "; there is none of that name or revision, or it is private, or its terms have to be accepted on its page: \
             HF_TOKEN is the token of who may have it"
                .into()
        }
        Some(_) => format!("; without a network, give a local {kind}"),
        None => String::new(),
    }
}

/// One revision of a repository, as the hub tells of it.
pub struct Online {
    pub name: String,
    /// Its files.
    pub files: BTreeMap<PathBuf, Sibling>,
    pub revision: String,
    directory: PathBuf,
    /// Where they are.
    url: String,
    agent: Agent,
    token: Option<String>,
}

#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

/// A file of a repository.
#[derive(Deserialize)]
pub struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    /// Of a large one.
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Online {
    fn of(repository: &Repository) -> anyhow::Result<Self> {
        let endpoint = variable("HF_ENDPOINT");
        let endpoint = endpoint.map(|endpoint| endpoint.to_string_lossy().into_owned());
        let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".into());
        let endpoint = endpoint.trim_end_matches('/');
        let agent = Agent::config_builder()
            .timeout_connect(Some(TIMEOUT))
            .timeout_recv_response(Some(TIMEOUT))
            .timeout_per_read(Some(TIMEOUT))
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("qlora/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let token = token();
        let (plural, name) = (repository.kind.plural(), &repository.name);
        // `refs/pr/1` is one part of the path.
        let revision = encoded(&repository.revision).replace('/', "%2F");
        let url = format!("{endpoint}/api/{plural}/{name}/revision/{revision}?blobs=true");
        let mut attempt = 1;
        let answer = loop {
            match request(&agent, &url, token.as_deref()).call() {
                // Busy.
                Err(ureq::Error::StatusCode(429 | 500..)) if attempt < ATTEMPTS => {
                    pause(attempt);
                    attempt += 1;
                }
                answer => break answer?,
            }
        };
        let info: Info = serde_json::from_reader(answer.into_body().into_reader())
            .with_context(|| format!("what {endpoint} says of {name}"))?;
        if info.sha.is_empty() || !info.sha.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            bail!("{endpoint} says that {:?} is a commit of {name}", info.sha);
        }
        let page = match repository.kind {
            Kind::Model => String::new(),
            Kind::Dataset => format!("{plural}/"),
        };
        let files = info.siblings.into_iter();
        Ok(Self {
            name: name.clone(),
            files: files
                .map(|file| (PathBuf::from(&file.rfilename), file))
                .collect(),
            url: format!("{endpoint}/{page}{name}/resolve/{}", info.sha),
            revision: info.sha,
            directory: repository.directory(),
            agent,
            token,
        })
    }

    /// Has a file in the cache; gives the directory of its snapshot.
    pub fn fetch(&self, file: &Path) -> anyhow::Result<PathBuf> {
        let is_plain = |part| matches!(part, Component::Normal(_));
        if !file.components().all(is_plain) {
            bail!("{}: {file:?} is no name of a file", self.name);
        }
        let snapshot = self.directory.join("snapshots").join(&self.revision);
        let path = snapshot.join(file);
        if path.exists() {
            return Ok(snapshot);
        }
        let Some(told) = self.files.get(file) else {
            bail!("{} has no {}", self.name, file.display());
        };
        let etag = match &told.lfs {
            Some(lfs) => Some(&lfs.sha256),
            None => told.blob_id.as_ref(),
        };
        let is_hash = |etag: &&String| etag.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let etag = etag.filter(is_hash);
        let etag = etag.with_context(|| format!("the hub does not say what {told} is"))?;
        let blob = self.directory.join("blobs").join(etag);
        if !blob.exists() {
            self.download(told, &blob)
                .with_context(|| told.rfilename.clone())?;
        }
        link(&blob, &path, file).with_context(|| path.display().to_string())?;
        Ok(snapshot)
    }

    /// Goes on with what an earlier download has left; waits for one that is under way.
    fn download(&self, told: &Sibling, blob: &Path) -> anyhow::Result<()> {
        let part = blob.with_extension(PART);
        fs::create_dir_all(blob.parent().expect("it has been joined"))
            .with_context(|| blob.display().to_string())?;
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).open(&part);
        let mut file = file.with_context(|| part.display().to_string())?;
        self.lock(&file, told)
            .with_context(|| part.display().to_string())?;
        if blob.exists() {
            // Another program has brought it meanwhile.
            let _ = fs::remove_file(part);
            return Ok(());
        }
        super::note(&format!("{}: {told}", self.name));
        let size = told.lfs.as_ref().map(|lfs| lfs.size).or(told.size);
        let bar = super::byte_progress_bar()?;
        bar.set_length(size.unwrap_or(0));
        let mut attempt = 1;
        loop {
            let start = file.metadata()?.len();
            match self.append(told, size, &mut file, &bar) {
                Ok(()) => break,
                Err(error) if attempt == ATTEMPTS || !is_passing(&error) => {
                    bar.finish_and_clear();
                    return Err(error);
                }
                // It came further.
                Err(_) if file.metadata()?.len() > start => attempt = 1,
                Err(_) => attempt += 1,
            }
            pause(attempt);
        }
        bar.finish_and_clear();
        if let Some(lfs) = &told.lfs
            && hash(&mut file).with_context(|| part.display().to_string())? != lfs.sha256
        {
            file.set_len(0)?;
            bail!("came otherwise than the hub says it is; it has been thrown away, try again");
        }
        fs::rename(&part, blob).with_context(|| blob.display().to_string())
    }

    /// Waits for a download of the same file by another program.
    fn lock(&self, file: &File, told: &Sibling) -> io::Result<()> {
        match file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => {
                super::note(&format!(
                    "{}: {told}, which another program is downloading",
                    self.name
                ));
                file.lock()
            }
            // Some file systems know no locks.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// The rest of a file, if `file` has the beginning.
    fn append(
        &self,
        told: &Sibling,
        size: Option<u64>,
        file: &mut File,
        bar: &ProgressBar,
    ) -> anyhow::Result<()> {
        let mut start = file.metadata()?.len();
        if size.is_some_and(|size| start > size) {
            start = 0;
        }
        if start > 0 && size == Some(start) {
            return Ok(());
        }
        let url = format!("{}/{}", self.url, encoded(&told.rfilename));
        let mut request = request(&self.agent, &url, self.token.as_deref());
        if start > 0 {
            request = request.header("Range", format!("bytes={start}-"));
        }
        let answer = request.call();
        if let Err(ureq::Error::StatusCode(416)) = answer {
            // There is no more than that.
            file.set_len(0)?;
        }
        let answer = answer?;
        if answer.status() != 206 {
            start = 0;
        }
        if start == 0 {
            file.set_len(0)?;
        }
        bar.set_position(start);
        let mut body = bar.wrap_read(answer.into_body().into_reader());
        let came = io::copy(&mut body, file)?;
        file.flush()?;
        match size {
            Some(size) if start + came != size => {
                Err(io::Error::new(io::ErrorKind::UnexpectedEof, "broke off").into())
            }
            _ => Ok(()),
        }
    }
}

impl std::fmt::Display for Sibling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.rfilename)
    }
}

fn request(
    agent: &Agent,
    url: &str,
    token: Option<&str>,
) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
    let request = agent.get(url).header("Accept-Encoding", "identity");
    match token {
        Some(token) => request.header("Authorization", format!("Bearer {token}")),
        None => request,
    }
}

/// A name as it stands in a URL.
fn encoded(name: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte);
    let bytes = name.bytes();
    bytes
        .map(|byte| match is_plain(byte) {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        })
        .collect()
}

/// Waits before another attempt, longer each time.
fn pause(attempt: u32) {
    std::thread::sleep(Duration::from_millis(300 << attempt));
}

/// Whether another attempt may go better.
fn is_passing(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<ureq::Error>() {
        Some(ureq::Error::StatusCode(status)) => [416, 429].contains(status) || *status >= 500,
        Some(_) => true,
        None => error.downcast_ref::<io::Error>().is_some_and(|error| {
            // The others are of the disk.
            use io::ErrorKind;
            [
                ErrorKind::ConnectionAborted,
                ErrorKind::ConnectionReset,
                ErrorKind::HostUnreachable,
                ErrorKind::NetworkDown,
                ErrorKind::NetworkUnreachable,
                ErrorKind::Other,
                ErrorKind::TimedOut,
                ErrorKind::UnexpectedEof,
            ]
            .contains(&error.kind())
        }),
    }
}

fn hash(file: &mut File) -> io::Result<String> {
    let mut hash = Sha256::new();
    file.rewind()?;
    io::copy(file, &mut hash)?;
    Ok(format!("{:x}", hash.finalize()))
}

/// Makes `path`, which is `file` in a snapshot, a link to a blob.
fn link(blob: &Path, path: &Path, file: &Path) -> io::Result<()> {
    let parent = path.parent().expect("it has been joined");
    fs::create_dir_all(parent)?;
    // Out of the snapshot and of `snapshots`, and of each directory within.
    let ups = 1 + file.components().count();
    let mut target: PathBuf = std::iter::repeat_n("..", ups).collect();
    target.push("blobs");
    target.push(blob.file_name().expect("it has been joined"));
    match std::os::unix::fs::symlink(target, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.exists() => Ok(()),
        made => made,
    }
}

/// Splits `organization/name` or `organization/name@revision`, and what follows; `None` for what cannot be one.
///
/// Source of the form: `hf_file_system.py` of huggingface_hub, where a `/` of a revision is `%2F`, but for those of `refs/`.
pub fn split_name(text: &str) -> Option<(Name, &str)> {
    let mut parts = text.splitn(3, '/');
    let (organization, name) = (parts.next()?, parts.next()?);
    let mut rest = parts.next().unwrap_or_default();
    let (name, revision) = match name.split_once('@') {
        // `refs/pr/1` and the like.
        Some((name, "refs")) => {
            let end = rest.match_indices('/').map(|(at, _)| at).nth(1);
            let (revision, part) = rest.split_at(end.unwrap_or(rest.len()));
            rest = part.trim_start_matches('/');
            (name, format!("refs/{revision}"))
        }
        Some((name, revision)) => (name, revision.replace("%2F", "/").replace("%2f", "/")),
        None => (name, MAIN.into()),
    };
    let is_word = |word: &str| {
        let is_letter = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !word.is_empty() && !word.starts_with('.') && word.chars().all(is_letter)
    };
    let id = format!("{organization}/{name}");
    (is_word(organization) && is_word(name)).then_some((Name { id, revision }, rest))
}

/// Whether the first part of a path is here: `rows/train` beside a directory `rows` is a file that is missing, no name.
pub fn begins_here(path: &Path) -> bool {
    let mut parts = path.components();
    let first = parts.next();
    first.is_some_and(|first| Path::new(first.as_os_str()).exists())
}

/// Where huggingface_hub keeps its downloads.
fn cache_dir() -> anyhow::Result<PathBuf> {
    match variable("HF_HUB_CACHE") {
        Some(dir) => Ok(dir.into()),
        None => Ok(hub_home()
            .context("neither HF_HOME nor HOME is set")?
            .join("hub")),
    }
}

/// Where huggingface_hub keeps all that it keeps.
fn hub_home() -> Option<PathBuf> {
    let default = || Some(user_cache_dir()?.join("huggingface"));
    variable("HF_HOME").map(PathBuf::from).or_else(default)
}

/// `HF_TOKEN`, or what `hf auth login` has left.
fn token() -> Option<String> {
    let stored = || {
        let path = variable("HF_TOKEN_PATH").map(PathBuf::from);
        let path = path.or_else(|| Some(hub_home()?.join("token")))?;
        fs::read_to_string(path).ok()
    };
    let given = variable("HF_TOKEN").map(|token| token.to_string_lossy().into_owned());
    let token = given.or_else(stored)?.trim().to_string();
    (!token.is_empty()).then_some(token)
}

pub fn user_cache_dir() -> Option<PathBuf> {
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
