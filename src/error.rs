//! The one error type of the library: a variant for each thing a caller can do something about.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },

    /// A file is not what its name or its place promises.
    #[error("{}: {reason}", path.display())]
    Malformed { path: PathBuf, reason: String },

    /// A row of a data file cannot be used.
    #[error("{}:{line}: {reason}", path.display())]
    Row {
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        reason: String,
    },

    /// A tensor that the model needs is not in the checkpoint.
    #[error("{}: tensor `{tensor}` is missing", path.display())]
    MissingTensor { path: PathBuf, tensor: String },

    /// A tensor has another shape or type than the model's config says.
    #[error("tensor `{tensor}`: expected {expected}, found {found}")]
    TensorMismatch {
        tensor: String,
        expected: String,
        found: String,
    },

    /// A weight that is to be quantized has a NaN or an infinity.
    #[error(
        "tensor `{tensor}`: element {index} is {value}, a non-finite weight cannot be quantized"
    )]
    NonFinite {
        tensor: String,
        index: usize,
        value: f32,
    },

    /// A model type, or a config field that changes the mathematics, is not understood.
    #[error("{}: `{field}` = {value} is not supported; {hint}", path.display())]
    UnsupportedModel {
        path: PathBuf,
        field: String,
        value: String,
        hint: String,
    },

    /// A config key nobody knows.
    #[error("unknown config key `{key}`{}", nearest.as_ref().map(|n| format!(", did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        key: String,
        nearest: Option<String>,
    },

    /// A config value that cannot be used.
    #[error("config key `{key}`: {reason}")]
    Config { key: String, reason: String },

    /// Arguments of an operation do not fit together: a defect of the caller.
    #[error("{op}: expected {expected}, found {found}")]
    Shape {
        op: &'static str,
        expected: String,
        found: String,
    },

    /// Training cannot go on.
    #[error("{0}")]
    Train(String),

    /// The device has no memory left for a tensor.
    #[error(
        "out of device memory; lower per_device_train_batch_size or max_seq_len, or set gradient_checkpointing ({detail})"
    )]
    OutOfDeviceMemory { detail: String },

    #[error("the run needs {}, and {} are there: {advice}", gigabytes(*.needed), gigabytes(*.limit))]
    DoesNotFit {
        /// Bytes, with every block computing its activations again.
        needed: u64,
        /// Bytes.
        limit: u64,
        /// The smallest change that would fit.
        advice: String,
    },

    #[error(transparent)]
    Candle(candle_core::Error),
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        let detail = error.to_string();
        // The driver's code for it, which candle carries as text alone.
        if detail.contains("CUDA_ERROR_OUT_OF_MEMORY") {
            return Self::OutOfDeviceMemory { detail };
        }
        Self::Candle(error)
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

impl Error {
    /// Wraps an I/O error with the file it concerns: `.map_err(Error::io(path))`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// A file that is not what it should be.
    pub fn malformed(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Malformed {
            path: path.as_ref().to_path_buf(),
            reason: reason.into(),
        }
    }

    /// A config value that cannot be used.
    pub fn config(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config {
            key: key.into(),
            reason: reason.into(),
        }
    }
}
