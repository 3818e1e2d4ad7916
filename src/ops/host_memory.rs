//! Tensors that wait in pinned memory of the host, so that what they took of the device is free meanwhile.
//!
//! Copies go beside the kernels. A tensor is freed on the device once its copy is through, and the kernels that are queued
//! after that wait for it; it is back when [`Parked::take`] gives it, sooner if [`Parked::fetch`] was called before.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};

use super::launcher::Launcher;
use crate::Result;
use crate::device::{self, Marker, PinnedMemory};

const OP: &str = "host_memory";

/// Pinned memory of the host, which is kept for the next tensor: it takes long to get.
#[derive(Clone, Default)]
pub struct HostMemory {
    free: Arc<Mutex<Vec<Piece>>>,
}

struct Piece {
    memory: Box<dyn PinnedMemory>,
    device: Device,
    /// The last copy out of it.
    read: Option<Marker>,
}

impl Piece {
    fn new(bytes: usize, device: &Device) -> Result<Self> {
        Ok(Self {
            memory: Launcher::on(OP, device)?.runtime().pinned(bytes)?,
            device: device.clone(),
            read: None,
        })
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let (Some(read), Ok(launcher)) = (&self.read, Launcher::on(OP, &self.device)) {
            // A device that fails here has lost the copy with everything else.
            let _ = launcher.runtime().wait_on_host(read);
        }
    }
}

impl std::fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HostMemory")
    }
}

impl HostMemory {
    /// Takes memory for so many tensors of so many bytes now.
    ///
    /// # Errors
    /// What the device's driver reports.
    pub fn reserve(&self, tensors: usize, bytes: usize, device: &Device) -> Result<()> {
        for _ in 0..tensors {
            self.give_back(Piece::new(bytes, device)?);
        }
        Ok(())
    }

    /// Begins to copy `t` to the host.
    ///
    /// # Errors
    /// What the device's driver reports.
    pub fn park(&self, t: Tensor) -> Result<Parked> {
        let launcher = Launcher::on(OP, t.device())?;
        let bytes = t.elem_count() * t.dtype().size_in_bytes();
        let mut piece = self.take(bytes, t.device())?;
        let from = device::address(&t)?;
        // Also after the last copy out of the piece, which kernels have been made to wait for.
        let written = launcher.runtime().mark()?;
        let to = &mut piece.memory.bytes_mut()[..bytes];
        // SAFETY: both are this one's until the copy is through: `t` is held, and nothing else has the memory.
        let copied = unsafe { launcher.runtime().copy_back(from, to, Some(&written))? };
        Ok(Parked {
            shape: t.shape().clone(),
            dtype: t.dtype(),
            device: t.device().clone(),
            leaving: Some(t),
            left: Some(copied),
            arriving: None,
            piece: Some(piece),
            pool: self.clone(),
        })
    }

    /// A tensor on `device` whose bytes `fill` writes on the host.
    ///
    /// # Errors
    /// What the device's driver reports.
    pub fn bring(
        &self,
        shape: impl Into<Shape>,
        dtype: DType,
        device: &Device,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Tensor> {
        let shape = shape.into();
        let bytes = shape.elem_count() * dtype.size_in_bytes();
        let mut piece = self.take(bytes, device)?;
        if let Some(read) = piece.read.take() {
            Launcher::on(OP, device)?.runtime().wait_on_host(&read)?;
        }
        fill(&mut piece.memory.bytes_mut()[..bytes]);
        let parked = Parked {
            shape,
            dtype,
            device: device.clone(),
            leaving: None,
            left: None,
            arriving: None,
            piece: Some(piece),
            pool: self.clone(),
        };
        parked.take()
    }

    /// The smallest free piece that is large enough, or a new one.
    fn take(&self, bytes: usize, device: &Device) -> Result<Piece> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let sizes = free.iter_mut().map(|piece| piece.memory.bytes_mut().len());
        let fitting = sizes.enumerate().filter(|(_, size)| *size >= bytes);
        if let Some((at, _)) = fitting.min_by_key(|(_, size)| *size) {
            return Ok(free.swap_remove(at));
        }
        drop(free);
        Piece::new(bytes, device)
    }

    fn give_back(&self, piece: Piece) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(piece);
    }
}

/// A tensor on the host, or on its way there or back.
pub struct Parked {
    shape: Shape,
    dtype: DType,
    device: Device,
    /// Where it was.
    leaving: Option<Tensor>,
    /// When the copy from there is through.
    left: Option<Marker>,
    /// Where it will be, and when.
    arriving: Option<(Tensor, Marker)>,
    piece: Option<Piece>,
    pool: HostMemory,
}

impl std::fmt::Debug for Parked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Parked({:?} {:?})", self.dtype, self.shape)
    }
}

impl Parked {
    /// Frees what the tensor takes of the device. What is queued from now on waits until it has left.
    ///
    /// # Errors
    /// What the device's driver reports.
    pub fn release(&mut self) -> Result<()> {
        if let (Some(tensor), Some(left)) = (self.leaving.take(), &self.left) {
            Launcher::on(OP, &self.device)?.runtime().wait(left)?;
            drop(tensor);
        }
        Ok(())
    }

    /// Begins to bring the tensor back.
    ///
    /// # Errors
    /// [`Error::OutOfDeviceMemory`](crate::Error::OutOfDeviceMemory), and what the device's driver reports.
    pub fn fetch(&mut self) -> Result<()> {
        self.release()?;
        let (None, Some(piece)) = (&self.arriving, &mut self.piece) else {
            return Ok(());
        };
        let launcher = Launcher::on(OP, &self.device)?;
        let tensor = launcher.empty(self.shape.clone(), self.dtype)?;
        let bytes = tensor.elem_count() * self.dtype.size_in_bytes();
        let to = device::address_mut(&tensor)?;
        // Kernels that were queued before may still use the memory that the tensor was made of.
        let made = launcher.runtime().mark()?;
        let from = &piece.memory.bytes_mut()[..bytes];
        // SAFETY: both are this one's until the copy is through: `tensor` is held, and nothing else has the memory.
        let copied = unsafe { launcher.runtime().copy(from, to, Some(&made))? };
        self.arriving = Some((tensor, copied));
        Ok(())
    }

    /// The tensor, for what is queued from now on.
    ///
    /// # Errors
    /// Those of [`fetch`](Self::fetch).
    pub fn take(mut self) -> Result<Tensor> {
        self.fetch()?;
        let (tensor, copied) = self.arriving.take().expect("just fetched");
        Launcher::on(OP, &self.device)?.runtime().wait(&copied)?;
        if let Some(mut piece) = self.piece.take() {
            piece.read = Some(copied);
            self.pool.give_back(piece);
        }
        Ok(tensor)
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        let Some(piece) = self.piece.take() else {
            return;
        };
        // A pass that failed half way: neither side may be freed under a copy, nor the piece be written for the next tensor.
        let arrived = self.arriving.as_ref().map(|(_, arrived)| arrived);
        let waited = Launcher::on(OP, &self.device).and_then(|launcher| {
            let mut copies = self.left.iter().chain(arrived);
            copies.try_for_each(|copied| launcher.runtime().wait_on_host(copied))
        });
        match waited {
            Ok(()) => self.pool.give_back(piece),
            // The device is lost, and with it the copy: better a leak than memory that is freed while it is written.
            Err(_) => std::mem::forget(piece),
        }
    }
}
