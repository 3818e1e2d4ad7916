//! The files of `examples/demo`, in the program and in the demo's directory.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context;
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

/// An empty file that says that a directory is a demo's.
const MARKER: &str = ".qlora-demo";

/// Where the demo's input lies, and where its results go.
#[derive(Debug)]
pub struct DemoFiles {
    pub base: PathBuf,
    pub config: PathBuf,
    pub train: PathBuf,
    pub heldout: PathBuf,
    pub quantized: PathBuf,
    pub adapter: PathBuf,
    /// The model with the adapter in it.
    pub merged: PathBuf,
}

impl DemoFiles {
    /// Writes the input below `out`, in place of an earlier demo.
    ///
    /// # Errors
    /// If `out` has files that no demo wrote.
    pub fn write(out: &Path) -> anyhow::Result<Self> {
        remove_earlier(out)?;
        std::fs::create_dir_all(out).map_err(qlora::Error::io(out))?;
        AtomicFile::write(out.join(MARKER), [])?;
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
            merged: out.join("merged"),
        })
    }
}

/// Removes the directories that an earlier demo left below `out`.
fn remove_earlier(out: &Path) -> anyhow::Result<()> {
    let entries = match std::fs::read_dir(out) {
        Ok(entries) => entries.count(),
        Err(error) if error.kind() == ErrorKind::NotFound => 0,
        Err(error) => return Err(error).with_context(|| out.display().to_string()),
    };
    if entries == 0 {
        return Ok(());
    }
    if !out.join(MARKER).is_file() {
        anyhow::bail!(
            "{}: has files that are not of a demo; choose another directory with --out",
            out.display()
        );
    }
    for name in ["base", "base-nf4", "adapter", "merged"] {
        match std::fs::remove_dir_all(out.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| out.join(name).display().to_string());
            }
            _ => (),
        }
    }
    Ok(())
}
