//! How the device side of an operation allocates tensors and reaches its kernels, as `cpu` serves the CPU side.

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor, WithDType};

use crate::device::{self, Argument, Gemm, Launch, Marker, Matrix, Runtime};
use crate::{Error, Result};

/// Threads of a block, in kernels that do not say otherwise.
const THREADS: u32 = 256;

/// The target of the events that tell what a device is asked for besides kernels, in bytes: the field names what it is.
const REQUESTS: &str = "qlora::device";

/// The runtime of the device that a tensor is on.
pub(crate) struct Launcher {
    runtime: Arc<dyn Runtime>,
    device: Device,
}

/// An argument of a kernel: a tensor it reads or writes, or a number.
pub(super) enum Operand<'a> {
    Read(&'a Tensor),
    Write(&'a Tensor),
    /// A tensor that is not there.
    Null,
    U32(usize),
    U64(usize),
    F32(f32),
}

/// The blocks of a launch.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub blocks: [usize; 2],
    pub threads: u32,
    pub shared_bytes: usize,
}

impl Grid {
    /// `x` by `y` blocks of 256 threads.
    pub(super) fn blocks(x: usize, y: usize) -> Self {
        Self {
            blocks: [x, y],
            threads: THREADS,
            shared_bytes: 0,
        }
    }

    pub(super) fn with_threads(self, threads: u32) -> Self {
        Self { threads, ..self }
    }

    pub(super) fn with_shared_bytes(self, shared_bytes: usize) -> Self {
        Self {
            shared_bytes,
            ..self
        }
    }

    fn is_empty(&self) -> bool {
        self.blocks.contains(&0)
    }
}

/// A matrix of a product: a tensor whose rows are contiguous, or its transpose.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    tensor: &'a Tensor,
    is_transposed: bool,
}

impl<'a> Factor<'a> {
    pub(super) fn new(tensor: &'a Tensor) -> Self {
        Self {
            tensor,
            is_transposed: false,
        }
    }

    pub(super) fn transposed(tensor: &'a Tensor) -> Self {
        Self {
            tensor,
            is_transposed: true,
        }
    }

    /// Rows and columns of the operand.
    fn dims(&self) -> Result<(usize, usize)> {
        let (rows, cols) = self.tensor.dims2()?;
        Ok(if self.is_transposed {
            (cols, rows)
        } else {
            (rows, cols)
        })
    }

    fn matrix(&self, op: &'static str) -> Result<Matrix> {
        expect_dtype(op, self.tensor, DType::BF16)?;
        let (address, row_stride) = device::matrix_address(self.tensor)?;
        Ok(Matrix {
            address,
            row_stride,
            is_transposed: self.is_transposed,
        })
    }
}

impl Launcher {
    /// What runs kernels for `t`; `None` for f32 on the CPU, which operations compute by themselves.
    ///
    /// # Errors
    /// [`Error::Shape`] for a tensor that neither serves.
    pub(crate) fn of(op: &'static str, t: &Tensor) -> Result<Option<Self>> {
        if t.dtype() == DType::F32 && t.device().is_cpu() {
            return Ok(None);
        }
        expect_dtype(op, t, DType::BF16)?;
        Self::on(op, t.device()).map(Some)
    }

    /// What runs kernels on `device`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a device without kernels.
    pub(crate) fn on(op: &'static str, device: &Device) -> Result<Self> {
        let runtime = device::runtime(device).ok_or_else(|| Error::Shape {
            op,
            expected: "f32 on the CPU, or a device with kernels".into(),
            found: format!("{:?}", device.location()),
        })?;
        Ok(Self {
            runtime,
            device: device.clone(),
        })
    }

    /// For copies, which operations queue themselves, and what the device has.
    pub(super) fn runtime(&self) -> &dyn Runtime {
        &*self.runtime
    }

    /// A new tensor whose every element a kernel will write.
    pub(super) fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        tracing::trace!(target: REQUESTS, allocation = shape.elem_count() * dtype.size_in_bytes());
        if self.device.is_cpu() {
            // Under the emulator an element that no kernel writes must not look like a number.
            return Ok(match dtype {
                DType::BF16 => Tensor::full(half::bf16::NAN, shape, &self.device)?,
                _ => Tensor::full(f32::NAN, shape, &self.device)?.to_dtype(dtype)?,
            });
        }
        // SAFETY: the caller writes every element before any is read.
        let allocate = || -> Result<Tensor> {
            Ok(unsafe { Tensor::empty(shape.clone(), dtype, &self.device)? })
        };
        match allocate() {
            // There may be enough, but in pieces.
            Err(Error::OutOfDeviceMemory { .. }) => {
                self.runtime.trim()?;
                allocate().map_err(|error| self.with_memory(error, &shape, dtype))
            }
            outcome => outcome,
        }
    }

    /// What was asked for and what there was, where memory has run out.
    fn with_memory(&self, error: Error, shape: &Shape, dtype: DType) -> Error {
        let (Error::OutOfDeviceMemory { .. }, Ok(memory)) = (&error, self.runtime.memory()) else {
            return error;
        };
        Error::OutOfDeviceMemory {
            detail: format!(
                "{} bytes asked for; {} in tensors, {} free, {} beside them",
                shape.elem_count() * dtype.size_in_bytes(),
                memory.used_bytes,
                memory.free_bytes,
                memory.beside_tensors_bytes()
            ),
        }
    }

    /// A new tensor with these values, from memory of the host that is not pinned.
    pub(super) fn upload<T: WithDType>(
        &self,
        values: &[T],
        shape: impl Into<Shape>,
    ) -> Result<Tensor> {
        tracing::trace!(target: REQUESTS, upload = size_of_val(values));
        Ok(Tensor::from_slice(values, shape, &self.device)?)
    }

    /// The values of a flat tensor. Waits for all that is queued.
    pub(super) fn read<T: WithDType>(&self, t: &Tensor) -> Result<Vec<T>> {
        tracing::trace!(target: REQUESTS, read = t.elem_count() * t.dtype().size_in_bytes());
        Ok(t.to_vec1()?)
    }

    /// Blocks of 256 threads for a kernel that strides over `elements`, each thread taking `per_thread` at a time.
    pub(super) fn grid_stride(&self, elements: usize, per_thread: usize) -> Grid {
        const BLOCKS_PER_PROCESSOR: usize = 8;
        let most = self.runtime.multiprocessors() as usize * BLOCKS_PER_PROCESSOR;
        let wanted = elements.div_ceil(THREADS as usize * per_thread);
        Grid::blocks(wanted.clamp(1, most), 1)
    }

    /// Queues a kernel; nothing where the grid is empty.
    ///
    /// # Safety
    /// `operands` are the arguments of the kernel, and its tensors have the sizes that the others say.
    pub(super) unsafe fn launch(
        &self,
        kernel: &str,
        grid: Grid,
        operands: &[Operand<'_>],
    ) -> Result<()> {
        if grid.is_empty() {
            return Ok(());
        }
        with_launch(kernel, grid, operands, |launch| {
            // SAFETY: as the caller promises.
            unsafe { self.runtime.launch(launch) }
        })
    }

    /// Queues a kernel beside the others, once `after` is reached.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch); its tensors live, what it reads stays as it is, and nothing else uses what it writes,
    /// until the kernels have been made to wait for the marker.
    pub(super) unsafe fn launch_aside(
        &self,
        kernel: &str,
        grid: Grid,
        operands: &[Operand<'_>],
        after: &Marker,
    ) -> Result<Marker> {
        if grid.is_empty() {
            return Ok(after.clone());
        }
        with_launch(kernel, grid, operands, |launch| {
            // SAFETY: as the caller promises.
            unsafe { self.runtime.launch_aside(launch, after) }
        })
    }

    /// `c = alpha a b`, or with `beta` 1 the same added to `c`; sums in f32.
    ///
    /// # Shapes
    /// `a: [m, k]`, `b: [k, n]` in bf16, `c: [m, n]` in bf16 or f32, with contiguous rows.
    pub(super) fn gemm(
        &self,
        op: &'static str,
        (a, b): (Factor<'_>, Factor<'_>),
        c: &Tensor,
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        let (m, k) = a.dims()?;
        let (k_of_b, n) = b.dims()?;
        if k_of_b != k || c.dims() != [m, n] {
            return Err(Error::Shape {
                op,
                expected: format!("[{m}, {k}] x [{k}, {n}] = [{m}, {n}]"),
                found: format!("[{m}, {k}] x [{k_of_b}, {n}] = {:?}", c.dims()),
            });
        }
        if m * n == 0 {
            return Ok(());
        }
        let (a, b) = (a.matrix(op)?, b.matrix(op)?);
        let (c_address, c_row_stride) = device::matrix_address_mut(c)?;
        let gemm = Gemm {
            m,
            n,
            k,
            a,
            b,
            c_address,
            c_row_stride,
            c_dtype: c.dtype(),
            alpha,
            beta,
        };
        // SAFETY: the tensors have just been found to have these shapes and strides.
        unsafe { self.runtime.gemm(&gemm) }
    }

    /// A product whose matrices are not whole tensors.
    ///
    /// # Safety
    /// The addresses cover the matrices.
    pub(super) unsafe fn raw_gemm(&self, gemm: &Gemm) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.runtime.gemm(gemm) }
    }
}

/// Gives `queue` the launch of a kernel with these arguments.
fn with_launch<R>(
    kernel: &str,
    grid: Grid,
    operands: &[Operand<'_>],
    queue: impl FnOnce(&Launch<'_>) -> Result<R>,
) -> Result<R> {
    let arguments: Vec<Argument> = operands
        .iter()
        .map(|operand| {
            Ok(match *operand {
                Operand::Read(t) => Argument::Address(device::address(t)?),
                Operand::Write(t) => Argument::Address(device::address_mut(t)?),
                Operand::Null => Argument::Address(0),
                Operand::U32(value) => Argument::U32(as_u32(kernel, value)?),
                Operand::U64(value) => Argument::U64(value as u64),
                Operand::F32(value) => Argument::F32(value),
            })
        })
        .collect::<Result<_>>()?;
    let [x, y] = grid.blocks;
    queue(&Launch {
        kernel,
        grid: [as_u32(kernel, x)?, as_u32(kernel, y)?],
        threads: grid.threads,
        shared_bytes: as_u32(kernel, grid.shared_bytes)?,
        arguments: &arguments,
    })
}

fn as_u32(kernel: &str, value: usize) -> Result<u32> {
    u32::try_from(value).map_err(|_| {
        Error::Train(format!(
            "{kernel}: a size of {value} is more than a kernel can take; use shorter or fewer sequences in a micro-batch"
        ))
    })
}

/// Checks the type of `t`.
pub(super) fn expect_dtype(op: &'static str, t: &Tensor, dtype: DType) -> Result<()> {
    if t.dtype() == dtype {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        expected: format!("{dtype:?}"),
        found: format!("{:?}", t.dtype()),
    })
}
