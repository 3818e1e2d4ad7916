//! Where tensors live: the choice of device, the launching of kernels there, and what the system says about memory.

mod address;
#[cfg(feature = "cuda")]
mod cuda;
mod memory;
mod profile;
mod runtime;

use candle_core::{DType, Device};

pub use address::{address, address_mut, matrix_address, matrix_address_mut};
pub use memory::{
    anonymous_memory_bytes, available_memory_bytes, bring_in, peak_memory_bytes, reset_peak_memory,
    will_need,
};
pub use profile::{COPIES, PRODUCTS, Profiler};
pub use runtime::{
    Argument, DeviceMemory, Gemm, Launch, Marker, Matrix, PinnedMemory, Runtime, install, replace,
    runtime,
};

use crate::{Error, Result};

/// A device that a user can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    Cpu,
    Cuda,
}

impl DeviceKind {
    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

    /// The type of its products where `asked` is asked for; unset: f32 on the CPU, bf16 by kernels.
    ///
    /// # Errors
    /// [`Error::Config`] for a type that it has no products in.
    pub fn compute_dtype(self, asked: Option<ComputeDtype>) -> Result<ComputeDtype> {
        match (self, asked) {
            (Self::Cpu, asked) => Ok(asked.unwrap_or(ComputeDtype::F32)),
            (Self::Cuda, None | Some(ComputeDtype::Bf16)) => Ok(ComputeDtype::Bf16),
            (Self::Cuda, Some(ComputeDtype::F32)) => {
                let reason = "only bf16 is supported on CUDA; use --compute_dtype bf16";
                Err(Error::config("compute_dtype", reason))
            }
        }
    }

    /// The device called `name`.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Cpu, Self::Cuda]
            .into_iter()
            .find(|kind| kind.name() == name)
    }
}

/// The type that matrix products take their factors in; they sum in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum ComputeDtype {
    #[serde(rename = "f32", alias = "float32", alias = "fp32")]
    F32,
    #[serde(rename = "bf16", alias = "bfloat16")]
    Bf16,
}

/// Where the weights of the blocks lie that kernels compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residency {
    /// On the device.
    Resident,
    /// On the host; the weights of so many blocks are on the device or on their way there.
    Streamed { slots: usize },
}

/// The memory that something lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Device,
    Host,
}

/// How many weights lie dequantized on the device at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dequantized {
    /// Those of a block: each is dequantized once for recompute and backward together.
    Block,
    /// The one that is needed, which is dequantized for each of its products.
    Weight,
}

/// Where those things lie that kernels compute with and that take much memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Residence {
    pub weights: Residency,
    pub dequantized: Dequantized,
    /// Of the base's token embedding, if it is not there as the head; `None` for one that a trained one replaces.
    pub embedding: Option<Side>,
    /// Of the base's head, likewise.
    pub head: Option<Side>,
    /// Of the optimizer's moments and the lower halves of the masters.
    pub optimizer: Side,
}

impl Residence {
    /// All of it on the device.
    pub const DEVICE: Self = Self {
        weights: Residency::Resident,
        dequantized: Dequantized::Block,
        embedding: Some(Side::Device),
        head: Some(Side::Device),
        optimizer: Side::Device,
    };
}

/// Where a model computes, and in which types.
#[derive(Debug, Clone)]
pub struct Placement {
    pub device: Device,
    /// Of activations: f32 by the CPU's own code, bf16 by kernels.
    pub dtype: DType,
    /// Always bf16 by kernels.
    pub compute_dtype: ComputeDtype,
    pub residence: Residence,
}

impl Placement {
    /// On the CPU, all in f32.
    pub fn cpu() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            compute_dtype: ComputeDtype::F32,
            residence: Residence::DEVICE,
        }
    }

    /// In bf16 by the kernels of `device`.
    pub fn kernels(device: Device) -> Self {
        Self {
            device,
            dtype: DType::BF16,
            compute_dtype: ComputeDtype::Bf16,
            residence: Residence::DEVICE,
        }
    }

    /// Whether operations launch kernels there.
    pub fn uses_kernels(&self) -> bool {
        self.dtype != DType::F32
    }

    /// Opens the device and loads its kernels, for products in what its [`compute_dtype`](DeviceKind::compute_dtype) makes of
    /// what is asked for.
    ///
    /// # Errors
    /// [`Error::Config`] for a device that this build or this machine does not have, or one that has no such products.
    pub fn open(kind: DeviceKind, compute_dtype: Option<ComputeDtype>) -> Result<Self> {
        let compute_dtype = kind.compute_dtype(compute_dtype)?;
        let placement = match kind {
            DeviceKind::Cpu => Self::cpu(),
            DeviceKind::Cuda => Self::kernels(open_cuda()?),
        };
        Ok(Self {
            compute_dtype,
            ..placement
        })
    }

    /// Bytes that new tensors can take.
    pub fn free_memory_bytes(&self) -> Option<u64> {
        match self.runtime_memory() {
            Some(memory) => Some(memory.free_bytes),
            None => available_memory_bytes(),
        }
    }

    /// Memory in use in tensors: of the device, or that no file stands behind where that is the CPU.
    pub fn used_memory_bytes(&self) -> Option<u64> {
        match self.runtime_memory() {
            Some(memory) => Some(memory.used_bytes),
            None => anonymous_memory_bytes(),
        }
    }

    /// The most memory in use so far: of the device, or of this process where that is the CPU.
    pub fn peak_memory_bytes(&self) -> Option<u64> {
        match self.runtime_memory() {
            Some(memory) => Some(memory.peak_bytes),
            None => peak_memory_bytes(),
        }
    }

    /// Starts [`peak_memory_bytes`](Self::peak_memory_bytes) anew.
    ///
    /// # Errors
    /// What the device's driver reports.
    pub fn reset_peak_memory(&self) -> Result<()> {
        reset_peak_memory();
        match runtime(&self.device).filter(|_| !self.device.is_cpu()) {
            Some(runtime) => runtime.reset_peak_memory(),
            None => Ok(()),
        }
    }

    /// Memory of the device; `None` for the CPU.
    pub fn runtime_memory(&self) -> Option<DeviceMemory> {
        if self.device.is_cpu() {
            return None;
        }
        runtime(&self.device)?.memory().ok()
    }
}

#[cfg(feature = "cuda")]
fn open_cuda() -> Result<Device> {
    cuda::open()
}

#[cfg(not(feature = "cuda"))]
fn open_cuda() -> Result<Device> {
    Err(no_cuda("this program was built without the feature `cuda`"))
}

/// Why there is no GPU to be used, with what can be done instead.
fn no_cuda(reason: &str) -> Error {
    Error::config("device", format!("{reason}; use --device cpu"))
}
