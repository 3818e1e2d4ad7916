//! The files of `examples/demo`, in the program and in the demo's directory.

use std::path::{Path, PathBuf};

use qlora::store::AtomicFile;

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        [$( ($name, include_bytes!(concat!("../../../examples/demo/", $name)).as_slice()) ),*]
    };
}

/// Paths under `examples/demo`, with their contents.
const EMBEDDED: [(&str, &[u8]); 8] = embedded![
    "base/config.json",
    "base/generation_config.json",
    "base/model.safetensors",
    "base/tokenizer.json",
    "base/tokenizer_config.json",
    "config.toml",
    "train.jsonl",
    "heldout.jsonl",
];

/// Where the demo's input lies, and where its results go.
#[derive(Debug)]
pub struct DemoFiles {
    pub base: PathBuf,
    pub config: PathBuf,
    pub train: PathBuf,
    pub heldout: PathBuf,
    pub quantized: PathBuf,
    pub adapter: PathBuf,
}

impl DemoFiles {
    /// Writes the input below `out`, over what an earlier demo left there.
    pub fn write(out: &Path) -> anyhow::Result<Self> {
        for (name, contents) in EMBEDDED {
            let path = out.join(name);
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir).map_err(qlora::Error::io(dir))?;
            }
            AtomicFile::write(&path, contents)?;
        }
        Ok(Self {
            base: out.join("base"),
            config: out.join("config.toml"),
            train: out.join("train.jsonl"),
            heldout: out.join("heldout.jsonl"),
            quantized: out.join("base-nf4"),
            adapter: out.join("adapter"),
        })
    }
}
