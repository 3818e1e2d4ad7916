//! A Hugging Face model directory, memory-mapped: `config.json` and `model.safetensors` or an index with shards.
//!
//! Source: the layout `transformers` writes with `save_pretrained`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::bitsandbytes;
use super::file_watch::FileWatch;
use super::mapped_file::MappedFile;
use super::tensor_names::name_in_files;
use crate::quant::{DenseTensor, FrozenWeight};
use crate::{Error, Result};

/// The weights of a model that are in one file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// In which shards the tensors of a model are.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The config of the language model in that of a model which also sees images.
pub const TEXT_CONFIG: &str = "text_config";
const TIE: &str = "tie_word_embeddings";
/// In transformers; the first is that of a model which also sees images.
const EMBEDDINGS: [&str; 2] = [
    "model.language_model.embed_tokens.weight",
    "model.embed_tokens.weight",
];
const HEAD: &str = "lm_head.weight";

/// The config of the language model in that of a model: a part of it where the model also sees images.
pub fn text_config(config: &Value) -> &Value {
    let text = config.get(TEXT_CONFIG).filter(|text| text.is_object());
    text.unwrap_or(config)
}

/// Has the config of a model, and that of the language model in it, say that the head is not the embedding.
pub fn untie(config: &mut Value) {
    if let Some(text) = config.get_mut(TEXT_CONFIG) {
        untie(text);
    }
    if let Some(fields) = config.as_object_mut() {
        fields.insert(TIE.into(), false.into());
    }
}

/// A model directory: its weights mapped, nothing copied.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Value,
    files: Vec<MappedFile>,
    /// Tensor name to its place in `files`.
    places: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// Opens the model directory `dir` and maps each of its weight files once.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Malformed`] naming the file, and the tensor where one is at fault: no safetensors files,
    /// a shard that is missing, truncated or outside `dir`, a tensor in two shards, or an index that disagrees with them.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        refuse_file(dir)?;
        if !dir.exists() {
            let reason = "there is no such directory; organization/name is a model on the Hugging Face hub where no directory is called so";
            return Err(Error::malformed(dir, reason));
        }
        let config = read_json(&dir.join("config.json"))?;
        let single = dir.join(SINGLE_FILE);
        let index = dir.join(INDEX_FILE);
        let (files, places) = if single.is_file() {
            open_single(&single)?
        } else if index.is_file() {
            open_shards(dir, &index)?
        } else {
            return Err(Error::malformed(dir, no_weights_reason(dir)));
        };
        let mut checkpoint = Self {
            dir: dir.to_path_buf(),
            config,
            files,
            places,
        };
        // transformers 5 goes by the weights as well.
        if checkpoint.config[TIE] != false && checkpoint.has_head_of_its_own()? {
            untie(&mut checkpoint.config);
        }
        Ok(checkpoint)
    }

    /// Whether there is a head with other values than the embedding has.
    fn has_head_of_its_own(&self) -> Result<bool> {
        let bytes = |name: &str| {
            let name = self.stored_name(name);
            let file = self.contains(&name).then(|| self.file(&name)?.bytes(&name));
            file.transpose()
        };
        let Some(head) = bytes(HEAD)? else {
            return Ok(false);
        };
        let mut embeddings = EMBEDDINGS
            .into_iter()
            .filter_map(|name| bytes(name).transpose());
        let embedding = embeddings.next().transpose()?;
        Ok(embedding.is_some_and(|embedding| embedding != head))
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The parsed `config.json`; a head that is not the embedding is untied in it.
    pub fn config(&self) -> &Value {
        &self.config
    }

    pub fn config_path(&self) -> PathBuf {
        self.dir.join("config.json")
    }

    /// The weight files as they are now, to be held against later.
    pub fn watch(&self) -> FileWatch {
        FileWatch(self.files.iter().map(|f| f.watched().clone()).collect())
    }

    pub(super) fn files(&self) -> &[MappedFile] {
        &self.files
    }

    /// All tensor names, sorted; those of a quantized weight's state included.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// The name that the files have for a tensor which is called `name` in transformers.
    pub fn stored_name<'a>(&self, name: &'a str) -> Cow<'a, str> {
        let renamed = name_in_files(name).filter(|renamed| self.contains(renamed));
        renamed.map_or(Cow::Borrowed(name), Cow::Owned)
    }

    /// The names of tensors, without what stands beside a quantized weight.
    pub fn weight_names(&self) -> impl Iterator<Item = &str> {
        self.names().filter(|name| {
            let mut parents = name.match_indices('.').map(|(dot, _)| &name[..dot]);
            !parents.any(|parent| self.contains(parent))
        })
    }

    /// Whether any weight is stored in bitsandbytes' 4-bit layout.
    pub fn is_quantized(&self) -> bool {
        self.names().any(bitsandbytes::is_state)
    }

    /// The file that holds the tensor.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn file(&self, name: &str) -> Result<&MappedFile> {
        let place = self.places.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.dir.clone(),
            tensor: name.to_string(),
        })?;
        Ok(&self.files[*place])
    }

    /// A tensor of real numbers, aligned for its type, by its name in the files or in transformers.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::TensorMismatch`] if it is not bf16, f16 or f32.
    pub fn tensor(&self, name: &str) -> Result<DenseTensor> {
        let name = self.stored_name(name);
        self.file(&name)?.tensor(&name)
    }

    /// The weight `name`, as in [`tensor`](Self::tensor): 4-bit where bitsandbytes' state stands beside it, else as stored.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorMismatch`] for a tensor of the wrong type or size, [`Error::Malformed`]
    /// for a state that cannot be read.
    pub fn weight(&self, name: &str) -> Result<FrozenWeight> {
        let name = self.stored_name(name);
        match bitsandbytes::read(self, &name)? {
            Some(params) => Ok(FrozenWeight::Quantized(params)),
            None => self.tensor(&name).map(FrozenWeight::Dense),
        }
    }
}

type Mapped = (Vec<MappedFile>, BTreeMap<String, usize>);

fn open_single(path: &Path) -> Result<Mapped> {
    let file = MappedFile::open(path)?;
    let places = file.names().into_iter().map(|name| (name, 0)).collect();
    Ok((vec![file], places))
}

fn open_shards(dir: &Path, index: &Path) -> Result<Mapped> {
    let weight_map = read_weight_map(index)?;
    let shard_names: BTreeSet<&String> = weight_map.values().collect();
    let mut files = Vec::with_capacity(shard_names.len());
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for (place, shard) in shard_names.into_iter().enumerate() {
        let path = shard_path(dir, index, shard)?;
        let file = MappedFile::open(&path)?;
        for name in file.names() {
            if let Some(first) = places.insert(name.clone(), place) {
                let first: &MappedFile = &files[first];
                let reason = format!("tensor `{name}` is also in {}", first.path().display());
                return Err(Error::malformed(path, reason));
            }
            match weight_map.get(&name) {
                Some(promised) if promised == shard => {}
                Some(promised) => {
                    let reason =
                        format!("has tensor `{name}`, which the index places in {promised}");
                    return Err(Error::malformed(path, reason));
                }
                None => {
                    let reason = format!("has tensor `{name}`, which the index does not name");
                    return Err(Error::malformed(path, reason));
                }
            }
        }
        files.push(file);
    }
    if let Some((name, shard)) = weight_map
        .iter()
        .find(|(name, _)| !places.contains_key(*name))
    {
        let reason = format!("places tensor `{name}` in {shard}, which does not have it");
        return Err(Error::malformed(index, reason));
    }
    Ok((files, places))
}

/// The names of the shards that the index file `index` names.
///
/// # Errors
/// [`Error::Io`], or [`Error::Malformed`] if it is no index.
pub fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    Ok(read_weight_map(index)?.into_values().collect())
}

fn read_weight_map(index: &Path) -> Result<BTreeMap<String, String>> {
    let json = read_json(index)?;
    let weight_map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| Error::malformed(index, "has no object `weight_map`"))?;
    weight_map
        .iter()
        .map(|(name, shard)| match shard.as_str() {
            Some(shard) => Ok((name.clone(), shard.to_string())),
            None => Err(Error::malformed(
                index,
                format!("the shard of tensor `{name}` is {shard}, not a file name"),
            )),
        })
        .collect()
}

/// The path of a shard, which must be a plain file name: an index may come from anywhere.
fn shard_path(dir: &Path, index: &Path, shard: &str) -> Result<PathBuf> {
    let mut parts = Path::new(shard).components();
    let is_plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == shard);
    if !is_plain {
        let reason = format!("the shard `{shard}` is not a file name in this directory");
        return Err(Error::malformed(index, reason));
    }
    let path = dir.join(shard);
    match path.exists() {
        true => Ok(path),
        false => Err(Error::malformed(
            index,
            format!("the shard `{shard}` is missing, download it again"),
        )),
    }
}

fn no_weights_reason(dir: &Path) -> String {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let pickled = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| {
            [".bin", ".pt", ".pth"]
                .iter()
                .any(|suffix| name.ends_with(suffix))
        });
    match pickled {
        Some(name) => format!(
            "has {name} but no safetensors file; pickled weights are not read, convert them with \
             transformers' save_pretrained"
        ),
        None => format!("has neither {SINGLE_FILE} nor {INDEX_FILE}"),
    }
}

/// Says what to give instead of a file, before the name of a file within it would.
pub(super) fn refuse_file(dir: &Path) -> Result<()> {
    match dir.is_file() {
        true => Err(Error::malformed(
            dir,
            "is a file, give the directory it lies in",
        )),
        false => Ok(()),
    }
}

/// What is in a file of JSON.
///
/// # Errors
/// [`Error::Io`], or [`Error::Malformed`] if it is none.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::malformed(path, format!("is not valid JSON: {error}")))
}
