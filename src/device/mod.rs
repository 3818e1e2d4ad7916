//! Where tensors live: the choice of device, and what the system says about memory.

mod memory;

use candle_core::Device;

pub use memory::{
    anonymous_memory_bytes, available_memory_bytes, peak_memory_bytes, reset_peak_memory,
};

use crate::{Error, Result};

/// A device that a user can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    Cpu,
    Cuda,
}

/// Opens the device.
///
/// # Errors
/// [`Error::Config`] for a device that this build does not have.
pub fn open(kind: DeviceKind) -> Result<Device> {
    match kind {
        DeviceKind::Cpu => Ok(Device::Cpu),
        DeviceKind::Cuda => Err(Error::config(
            "device",
            "this build has no CUDA back end; use --device cpu",
        )),
    }
}
