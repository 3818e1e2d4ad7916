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

    /// A weight that is to be quantized, or what a model predicts, has a NaN or an infinity.
    #[error("tensor `{tensor}`: element {index} is {value}, a non-finite number")]
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

    /// The loss or the gradient of a step is not finite. The adapter is as before the step.
    #[error(
        "step {step}: loss {loss}, gradient norm {grad_norm}: not finite, with {} of {}; {hint}",
        rows_text(rows),
        dataset
    )]
    NonFiniteStep {
        /// Counted from 1.
        step: usize,
        loss: f64,
        grad_norm: f64,
        dataset: String,
        /// The rows of the micro-batches it came up in: lines counted from 1, with their file where there are several.
        rows: Vec<String>,
        hint: &'static str,
    },

    /// Another run writes to a run directory.
    #[error(
        "output_dir {}: {owner} is running in it; wait for its end or choose another directory, or remove {} if it is gone",
        dir.display(), lock.display()
    )]
    Locked {
        dir: PathBuf,
        owner: String,
        lock: PathBuf,
    },

    /// The device failed, or is gone.
    #[error(
        "the device failed; when it works again (nvidia-smi tells), continue with resume_from_checkpoint = true ({detail})"
    )]
    DeviceLost { detail: String },

    /// The device has no memory left for a tensor.
    #[error(
        "out of device memory; lower per_device_train_batch_size or max_seq_len, or set gradient_checkpointing ({detail})"
    )]
    OutOfDeviceMemory { detail: String },

    #[error("the run needs at least {}, and it may take {}: {advice}", in_units(*.needed), in_units(*.limit))]
    DoesNotFit {
        /// Bytes, with as little kept of the blocks' activations as the config allows.
        needed: u64,
        /// Bytes.
        limit: u64,
        /// The smallest change that would fit.
        advice: String,
    },

    #[error(transparent)]
    Candle(candle_core::Error),
}

/// The driver's codes after which a CUDA context is of no more use.
const DEVICE_FAILURES: [&str; 12] = [
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_SYSTEM_NOT_READY",
    "CUDA_ERROR_UNKNOWN",
];

/// `row 3`, `rows 3, 9, 12`, with an end after so many.
fn rows_text(rows: &[String]) -> String {
    const SHOWN: usize = 16;
    let shown = &rows[..rows.len().min(SHOWN)];
    let plural = if rows.len() == 1 { "" } else { "s" };
    let more = match rows.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("row{plural} {}{more}", shown.join(", "))
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        // The driver's code, which candle carries as text alone.
        let detail = error.to_string();
        match Self::from_driver(&detail, detail.clone()) {
            Self::Train(_) => Self::Candle(error),
            of_device => of_device,
        }
    }
}

/// `41.3 GB`, `700.0 MB`.
fn in_units(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().si().to_string()
}

impl Error {
    /// Wraps an I/O error with the file it concerns: `.map_err(Error::io(path))`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// An error of the CUDA driver, told by its code: `text` has it somewhere.
    pub(crate) fn from_driver(text: &str, detail: String) -> Self {
        if text.contains("CUDA_ERROR_OUT_OF_MEMORY") {
            return Self::OutOfDeviceMemory { detail };
        }
        match DEVICE_FAILURES.iter().any(|code| text.contains(code)) {
            true => Self::DeviceLost { detail },
            false => Self::Train(detail),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn from_driver(code: &str) -> Error {
        candle_core::Error::Msg(format!("DriverError({code}, \"...\")")).into()
    }

    #[test]
    fn failures_of_the_device_are_told_by_what_can_be_done() {
        let memory = from_driver("CUDA_ERROR_OUT_OF_MEMORY");
        assert!(matches!(memory, Error::OutOfDeviceMemory { .. }));
        assert!(memory.to_string().contains("gradient_checkpointing"));
        for code in DEVICE_FAILURES {
            let lost = from_driver(code);
            assert!(matches!(lost, Error::DeviceLost { .. }), "{code}");
            let text = lost.to_string();
            assert!(text.contains(code) && text.contains("resume_from_checkpoint"));
        }
        assert!(matches!(
            from_driver("CUDA_ERROR_INVALID_VALUE"),
            Error::Candle(_)
        ));
    }

    #[test]
    fn rows_are_listed_up_to_a_number() {
        assert_eq!(rows_text(&["3".to_string()]), "row 3");
        let rows: Vec<String> = (1..=20).map(|row| row.to_string()).collect();
        let text = rows_text(&rows);
        assert!(text.starts_with("rows 1, 2, ") && text.ends_with("15, 16 and 4 more"));
    }
}
