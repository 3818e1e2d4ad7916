//! Flat tensors that live in pinned memory of the host and visit the device a part at a time.
//!
//! A [`Pager`] has a few slots on the device. Parts are brought into one while kernels work on another, and what kernels made
//! of them goes back while they work on the next.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::launcher::Launcher;
use crate::Result;
use crate::device::{self, Marker, PinnedMemory};

const OP: &str = "paged";

/// Parts on the device at a time: one comes, one is worked on, one goes.
pub const SLOTS: usize = 3;

/// A flat tensor in pinned memory of the host.
pub struct PagedTensor {
    memory: Mutex<Memory>,
    dtype: DType,
    device: Device,
}

struct Memory {
    pinned: Box<dyn PinnedMemory>,
    /// Copies that write elements of it.
    written: Vec<(Range<usize>, Marker)>,
    /// The last copy that reads it.
    read: Option<Marker>,
}

impl std::fmt::Debug for PagedTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PagedTensor({:?} for {:?})", self.dtype, self.device)
    }
}

impl PagedTensor {
    /// `len` zeros.
    ///
    /// # Errors
    /// What the driver of `device` reports.
    pub fn zeros(len: usize, dtype: DType, device: &Device) -> Result<Self> {
        let launcher = Launcher::on(OP, device)?;
        let mut pinned = launcher.runtime().pinned(len * dtype.size_in_bytes())?;
        pinned.bytes_mut().fill(0);
        let memory = Mutex::new(Memory {
            pinned,
            written: Vec::new(),
            read: None,
        });
        Ok(Self {
            memory,
            dtype,
            device: device.clone(),
        })
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device that it visits.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Lends the bytes of some elements, once no copy writes or reads them any more.
    ///
    /// # Errors
    /// What the device's driver reports.
    pub fn with_bytes<R>(
        &self,
        elements: Range<usize>,
        work: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<R> {
        if let Some(read) = self.memory().read.take() {
            let launcher = Launcher::on(OP, &self.device)?;
            launcher.runtime().wait_on_host(&read)?;
        }
        self.for_copy(elements, work)
    }

    /// Lends the bytes of some elements to a copy, once none writes them any more.
    fn for_copy<R>(&self, elements: Range<usize>, work: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
        let mut memory = self.memory();
        let launcher = Launcher::on(OP, &self.device)?;
        let overlaps = |(range, _): &mut (Range<usize>, Marker)| {
            range.start < elements.end && elements.start < range.end
        };
        for (_, written) in memory.written.extract_if(.., overlaps) {
            launcher.runtime().wait_on_host(&written)?;
        }
        let size = self.dtype.size_in_bytes();
        let bytes = &mut memory.pinned.bytes_mut()[elements.start * size..elements.end * size];
        Ok(work(bytes))
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PagedTensor {
    fn drop(&mut self) {
        let memory = self
            .memory
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let Ok(launcher) = Launcher::on(OP, &self.device) else {
            return;
        };
        let written = memory.written.drain(..).map(|(_, written)| written);
        for copy in written.chain(memory.read.take()) {
            // A device that fails here has lost the copy with everything else.
            let _ = launcher.runtime().wait_on_host(&copy);
        }
    }
}

/// A part of a tensor.
pub type Part<'a> = (&'a PagedTensor, Range<usize>);

/// Slots on a device, each with a tensor for each part that visits it together with the others.
#[derive(Debug)]
pub struct Pager {
    slots: Vec<Slot>,
    next: usize,
}

#[derive(Debug)]
struct Slot {
    tensors: Vec<Tensor>,
    /// When what was in it last has left.
    left: Option<Marker>,
}

/// What parts are visited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Read,
    Write,
}

/// Parts on the device, or on their way there.
#[derive(Debug)]
pub struct Visit {
    slot: usize,
    /// In the order in which they were asked for.
    pub tensors: Vec<Tensor>,
    arrived: Option<Marker>,
}

impl Pager {
    /// Slots for parts of these types, and of at most these numbers of elements.
    ///
    /// # Errors
    /// [`Error::OutOfDeviceMemory`](crate::Error::OutOfDeviceMemory) where they do not fit.
    pub fn new(parts: &[(DType, usize)], device: &Device) -> Result<Self> {
        let tensor = |&(dtype, len): &(DType, usize)| Ok(Tensor::zeros(len, dtype, device)?);
        let slots = (0..SLOTS).map(|_| parts.iter().map(tensor).collect::<Result<Vec<_>>>());
        let slots = slots.collect::<Result<Vec<_>>>()?;
        let made = Launcher::on(OP, device)?.runtime().mark()?;
        Ok(Self {
            slots: slots
                .into_iter()
                .map(|tensors| Slot {
                    tensors,
                    left: Some(made.clone()),
                })
                .collect(),
            next: 0,
        })
    }

    /// Brings one list of parts after another, each with a key, and gives `work` every visit in order, to be used by what it
    /// queues, while the next ones come. What was visited to be written goes back then.
    ///
    /// # Errors
    /// Those of `work`, and what the device's driver reports.
    pub fn for_each<'a, K>(
        &mut self,
        purpose: Purpose,
        to_come: impl IntoIterator<Item = (K, Vec<Part<'a>>)>,
        mut work: impl FnMut(K, &[Tensor]) -> Result<()>,
    ) -> Result<()> {
        /// Visits on the device or on their way there, with a slot left for one on its way back.
        const AHEAD: usize = SLOTS - 1;
        let mut to_come = to_come.into_iter();
        let mut visits = VecDeque::new();
        loop {
            while visits.len() < AHEAD
                && let Some((key, parts)) = to_come.next()
            {
                let visit = self.fetch(&parts)?;
                visits.push_back((key, parts, visit));
            }
            let Some((key, parts, visit)) = visits.pop_front() else {
                return Ok(());
            };
            visit.begin()?;
            work(key, &visit.tensors)?;
            match purpose {
                Purpose::Read => self.release(visit)?,
                Purpose::Write => self.give_back(visit, &parts)?,
            }
        }
    }

    /// Begins to bring `parts` into the next slot.
    ///
    /// # Errors
    /// What the device's driver reports.
    pub fn fetch(&mut self, parts: &[Part<'_>]) -> Result<Visit> {
        let number = self.next;
        self.next = (number + 1) % SLOTS;
        let slot = &mut self.slots[number];
        let mut arrived = None;
        let mut tensors = Vec::with_capacity(parts.len());
        for (whole, (tensor, elements)) in slot.tensors.iter().zip(parts) {
            let here = whole.narrow(0, 0, elements.len())?;
            let launcher = Launcher::on(OP, here.device())?;
            let to = device::address_mut(&here)?;
            let copied = tensor.for_copy(elements.clone(), |bytes| {
                // SAFETY: the slot is free from `left` on, and whoever wants the bytes next waits for what this visit writes.
                unsafe { launcher.runtime().copy(bytes, to, slot.left.as_ref()) }
            })??;
            tensor.memory().read = Some(copied.clone());
            arrived = Some(copied);
            tensors.push(here);
        }
        Ok(Visit {
            slot: number,
            tensors,
            arrived,
        })
    }

    /// Begins to write a visit back to its `parts`; kernels that are queued later may not use it any more.
    ///
    /// # Errors
    /// What the device's driver reports.
    pub fn give_back(&mut self, visit: Visit, parts: &[Part<'_>]) -> Result<()> {
        for (here, (tensor, elements)) in visit.tensors.iter().zip(parts) {
            let launcher = Launcher::on(OP, here.device())?;
            let done = launcher.runtime().mark()?;
            let from = device::address(here)?;
            let copied = tensor.for_copy(elements.clone(), |bytes| {
                // SAFETY: nothing else writes the slot or reads the bytes before this copy is through: see `fetch`, `for_copy`.
                unsafe { launcher.runtime().copy_back(from, bytes, Some(&done)) }
            })??;
            let written = (elements.clone(), copied.clone());
            tensor.memory().written.push(written);
            self.slots[visit.slot].left = Some(copied);
        }
        Ok(())
    }

    /// Ends a visit that was only read; kernels that are queued later may not use it any more.
    ///
    /// # Errors
    /// What the device's driver reports.
    fn release(&mut self, visit: Visit) -> Result<()> {
        if let Some(tensor) = visit.tensors.first() {
            let launcher = Launcher::on(OP, tensor.device())?;
            self.slots[visit.slot].left = Some(launcher.runtime().mark()?);
        }
        Ok(())
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        // What next has the memory of a slot may not write it under a copy.
        for slot in &self.slots {
            let launcher = slot.tensors.first().map(|t| Launcher::on(OP, t.device()));
            if let (Some(Ok(launcher)), Some(left)) = (launcher, &slot.left) {
                // A device that fails here has lost the copy with everything else.
                let _ = launcher.runtime().wait(left);
            }
        }
    }
}

impl Visit {
    /// Lets the kernels that are queued from now on use it.
    ///
    /// # Errors
    /// What the device's driver reports.
    pub fn begin(&self) -> Result<()> {
        match (&self.arrived, self.tensors.first()) {
            (Some(arrived), Some(tensor)) => {
                let launcher = Launcher::on(OP, tensor.device())?;
                launcher.runtime().wait(arrived)
            }
            _ => Ok(()),
        }
    }
}
