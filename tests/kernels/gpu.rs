//! A GPU as the machine that kernel tests run on.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use qlora::device::{self, Argument, DeviceKind, Launch, Placement, Runtime};

use crate::device_under_test::{Device, DeviceUnderTest, Memory};

pub struct Gpu {
    placement: Placement,
    runtime: Arc<dyn Runtime>,
}

impl Gpu {
    fn open() -> Self {
        let placement = Placement::open(DeviceKind::Cuda, None).unwrap();
        let runtime = device::runtime(&placement.device).unwrap();
        Self { placement, runtime }
    }
}

/// Runs `body` on the GPU.
pub fn on_the_gpu(body: impl Fn(&DeviceUnderTest)) {
    body(&DeviceUnderTest::new(Gpu::open()));
}

impl Device for Gpu {
    fn allocate(&self, contents: &[u8]) -> Box<dyn Memory> {
        let bytes = Tensor::from_slice(contents, contents.len(), &self.placement.device);
        Box::new(GpuMemory(bytes.unwrap()))
    }

    fn launch(
        &self,
        kernel: &str,
        [x, y, z]: [u32; 3],
        shared_bytes: usize,
        arguments: &[Vec<u8>],
        _: &[Range<usize>],
    ) -> Result<(), String> {
        assert_eq!(z, 1, "grids have two dimensions");
        let known = qlora_emulator::find(kernel).expect("the emulator knows every kernel");
        // The driver copies the bytes of an argument, whatever their type.
        let arguments: Vec<Argument> = arguments
            .iter()
            .map(|bytes| match bytes.len() {
                4 => Argument::U32(u32::from_ne_bytes(bytes[..].try_into().unwrap())),
                _ => Argument::U64(u64::from_ne_bytes(bytes[..].try_into().unwrap())),
            })
            .collect();
        let launch = Launch {
            kernel,
            grid: [x, y],
            threads: known.threads,
            shared_bytes: shared_bytes as u32,
            arguments: &arguments,
        };
        // SAFETY: tests give kernels buffers of the sizes that their other arguments say.
        let launched = unsafe { self.runtime.launch(&launch) };
        launched
            .and_then(|()| self.runtime.synchronize())
            .map_err(|error| error.to_string())
    }

    fn has_warpgroup_products(&self) -> bool {
        self.runtime.has_warpgroup_products()
    }
}

struct GpuMemory(Tensor);

impl Memory for GpuMemory {
    fn address(&self) -> u64 {
        device::address_mut(&self.0).unwrap()
    }

    fn read(&self, range: Range<usize>) -> Vec<u8> {
        let part = self.0.narrow(0, range.start, range.len()).unwrap();
        part.to_vec1().unwrap()
    }
}
