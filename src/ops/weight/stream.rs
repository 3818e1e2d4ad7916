//! Frozen weights that stay on the host: blocks come to the device while those before them compute.
//!
//! A few slots on the device each hold the weights of one block; block `l` always lies in slot `l mod slots`. Whoever enters
//! a block asks for the ones behind it in the direction of travel, a thread copies them out of the memory map into pinned
//! memory and from there, on the copy stream, into their slots. A slot is overwritten once the kernels that read it are
//! through, and read once the copy is there; the host waits for neither, but for the thread to have queued the copy.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::OP;
use crate::device::{self, Marker, PinnedMemory, Runtime};
use crate::{Error, Result};

/// Pinned memory that a part of a block goes through.
const STAGE_BYTES: usize = 64 << 20;
/// One is filled while the others are copied from.
const STAGES: usize = 3;
/// Threads that fill it, at least and at most: one alone reads the memory map at a fraction of what the bus takes.
const COPY_THREADS: (usize, usize) = (4, 8);
/// Where the parts of a block begin in its slot: for wide accesses of kernels.
const ALIGNMENT: usize = 256;

/// Which blocks come after the present one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Up,
    Down,
}

/// The parts of one block, each with its place in a slot.
#[derive(Debug, Default)]
pub struct BlockBytes {
    parts: Vec<(usize, Bytes)>,
    len: usize,
}

impl BlockBytes {
    /// Takes up a part; gives its place.
    fn put(&mut self, bytes: &Bytes) -> usize {
        let start = self.len;
        self.parts.push((start, bytes.clone()));
        self.len = (start + bytes.len()).next_multiple_of(ALIGNMENT);
        start
    }

    /// Bytes of a slot that holds parts of these sizes.
    pub fn slot_bytes(parts: impl IntoIterator<Item = usize>) -> usize {
        let sizes = parts.into_iter();
        sizes.map(|bytes| bytes.next_multiple_of(ALIGNMENT)).sum()
    }
}

/// The slots while the weights of a model are assigned to them; then a [`BlockStream`].
#[derive(Debug)]
pub struct Slots {
    tensors: Vec<Tensor>,
    blocks: Vec<BlockBytes>,
}

impl Slots {
    /// `slots` slots of `slot_bytes`.
    ///
    /// # Errors
    /// [`Error::OutOfDeviceMemory`] where they do not fit.
    pub fn new(slots: usize, slot_bytes: usize, device: &Device) -> Result<Self> {
        let slot = || Tensor::zeros(slot_bytes, DType::U8, device);
        Ok(Self {
            tensors: (0..slots.max(1))
                .map(|_| slot())
                .collect::<Result<_, _>>()?,
            blocks: Vec::new(),
        })
    }

    pub(super) fn device(&self) -> &Device {
        self.tensors[0].device()
    }

    /// What comes next is of the next block.
    pub fn next_block(&mut self) {
        self.blocks.push(BlockBytes::default());
    }

    /// Where `bytes` of the present block will be on the device.
    pub(super) fn place(&mut self, bytes: &Bytes) -> Result<Tensor> {
        let slot = (self.blocks.len() - 1) % self.tensors.len();
        let block = self.blocks.last_mut().ok_or_else(no_block)?;
        let start = block.put(bytes);
        Ok(self.tensors[slot].narrow(0, start, bytes.len())?)
    }

    /// Starts the thread that fills the slots.
    ///
    /// # Errors
    /// [`Error::Shape`] for a device without kernels, and what its runtime reports.
    pub fn start(self) -> Result<BlockStream> {
        let runtime = device::runtime(self.device()).ok_or_else(no_block)?;
        let stages = (0..STAGES)
            .map(|_| {
                Ok(Stage {
                    memory: runtime.pinned(STAGE_BYTES.min(self.largest_part()))?,
                    busy: None,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let blocks = self.blocks.len();
        // Kernels that were queued so far may still use the memory that the slots were made of.
        let made = runtime.mark()?;
        let slot = |_| Slot {
            left: Some(made.clone()),
            ..Slot::default()
        };
        let slots = self.tensors.iter().map(slot).collect();
        let shared = Arc::new(Shared {
            slots: Mutex::new(slots),
            is_loaded: Condvar::new(),
            has_ended: AtomicBool::new(false),
        });
        let (requests, incoming) = channel();
        let loader = Loader {
            runtime: Arc::clone(&runtime),
            tensors: self.tensors,
            blocks: self.blocks,
            stages,
            next_stage: 0,
            copy_threads: copy_threads()?,
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new().name("weights".into());
        let thread = thread.spawn(move || loader.run(&incoming));
        let thread = thread.map_err(|e| Error::Train(format!("starting a thread: {e}")))?;
        Ok(BlockStream {
            runtime,
            blocks,
            shared,
            requests: Some(requests),
            thread: Some(thread),
        })
    }

    fn largest_part(&self) -> usize {
        let parts = self.blocks.iter().flat_map(|block| &block.parts);
        parts.map(|(_, bytes)| bytes.len()).max().unwrap_or(0)
    }
}

fn no_block() -> Error {
    Error::Shape {
        op: OP,
        expected: "blocks of weights for a device with kernels".into(),
        found: "none".into(),
    }
}

/// What a slot holds, and since when and until when.
#[derive(Debug, Default)]
struct Slot {
    block: Option<usize>,
    /// How often a block was asked for: what the thread brings for an earlier request is not what the slot is to hold.
    requests: u64,
    /// When the copy is there; the error if there was one.
    loaded: Option<Result<Marker, String>>,
    /// When the last kernel that reads it is through.
    left: Option<Marker>,
}

#[derive(Debug)]
struct Shared {
    slots: Mutex<Vec<Slot>>,
    is_loaded: Condvar,
    /// Whether the thread that loads is no more; written with `slots` locked.
    has_ended: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Request {
    block: usize,
    slot: usize,
    /// Of those for the slot.
    number: u64,
    after: Option<Marker>,
}

/// The weights of a model's blocks, on their way to the device and there.
#[derive(Debug)]
pub struct BlockStream {
    runtime: Arc<dyn Runtime>,
    blocks: usize,
    shared: Arc<Shared>,
    /// `None` once no more are wanted.
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

/// A block whose weights are in its slot for all that is queued while this lives.
#[derive(Debug)]
pub struct Entered<'a> {
    stream: &'a BlockStream,
    block: usize,
}

impl BlockStream {
    /// Has the weights of `block` there for what is queued from now on, and those behind it on their way.
    ///
    /// # Errors
    /// What the copying reported.
    pub fn enter(&self, block: usize, direction: Direction) -> Result<Entered<'_>> {
        let mut slots = self.shared.lock();
        let count = slots.len();
        for ahead in 0..count {
            let wanted = match direction {
                Direction::Up => Some(block + ahead).filter(|&wanted| wanted < self.blocks),
                Direction::Down => block.checked_sub(ahead),
            };
            let Some(wanted) = wanted else { break };
            let slot = &mut slots[wanted % count];
            if slot.block != Some(wanted) {
                // Blocks that are wanted together have different slots: this one holds a block that was left.
                slot.block = Some(wanted);
                slot.loaded = None;
                slot.requests += 1;
                self.request(Request {
                    block: wanted,
                    slot: wanted % count,
                    number: slot.requests,
                    after: slot.left.clone(),
                })?;
            }
        }
        loop {
            match &slots[block % count].loaded {
                Some(Ok(marker)) => {
                    self.runtime.wait(marker)?;
                    return Ok(Entered {
                        stream: self,
                        block,
                    });
                }
                Some(Err(reason)) => return Err(Error::Train(reason.clone())),
                None if self.shared.has_ended.load(Ordering::Relaxed) => return Err(ended()),
                None => {
                    let waited = self.shared.is_loaded.wait(slots);
                    slots = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn request(&self, request: Request) -> Result<()> {
        let sent = self.requests.as_ref().map(|to| to.send(request));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(ended()),
        }
    }
}

fn ended() -> Error {
    Error::Train("the thread that brings weights has ended".into())
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut slots = self.stream.shared.lock();
        let count = slots.len();
        // What the block announced has ended, so that nothing reads the slot aside any more.
        // A device that cannot mark its place any more fails at the next thing that is asked of it.
        slots[self.block % count].left = self.stream.runtime.mark().ok();
    }
}

impl Drop for BlockStream {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // It has nothing to say but its panic, which was printed.
            let _ = thread.join();
        }
    }
}

/// A piece of pinned memory, and the copy that reads it.
struct Stage {
    memory: Box<dyn PinnedMemory>,
    busy: Option<Marker>,
}

/// Tells whoever waits for a block, when the thread ends, by a panic too.
struct AtEnd<'a>(&'a Shared);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        let _slots = self.0.lock();
        self.0.has_ended.store(true, Ordering::Relaxed);
        self.0.is_loaded.notify_all();
    }
}

/// The thread that fills slots.
struct Loader {
    runtime: Arc<dyn Runtime>,
    tensors: Vec<Tensor>,
    blocks: Vec<BlockBytes>,
    stages: Vec<Stage>,
    next_stage: usize,
    copy_threads: ThreadPool,
    shared: Arc<Shared>,
}

impl Loader {
    fn run(mut self, incoming: &Receiver<Request>) {
        let shared = Arc::clone(&self.shared);
        let _at_end = AtEnd(&shared);
        for request in incoming {
            // A block that was on its way when the direction turned may not be wanted any more.
            if !self.is_wanted(&request) {
                continue;
            }
            let loaded = self.load(&request).map_err(|error| error.to_string());
            let mut slots = self.shared.lock();
            let slot = &mut slots[request.slot];
            if slot.requests == request.number {
                slot.loaded = Some(loaded);
            }
            self.shared.is_loaded.notify_all();
        }
        // The slots and the stages are freed next: no copy may still be on its way.
        for copy in self.stages.iter().filter_map(|stage| stage.busy.as_ref()) {
            // What fails here fails at the next thing that is asked of the device as well.
            let _ = self.runtime.wait_on_host(copy);
        }
    }

    fn is_wanted(&self, request: &Request) -> bool {
        self.shared.lock()[request.slot].requests == request.number
    }

    /// Queues the copies of a block; gives the last one's marker.
    fn load(&mut self, request: &Request) -> Result<Marker> {
        let slot = device::address_mut(&self.tensors[request.slot])?;
        let mut last = None;
        let parts = &self.blocks[request.block].parts;
        parts.iter().for_each(|(_, bytes)| device::will_need(bytes));
        for (start, bytes) in parts {
            for (piece, bytes) in bytes.chunks(STAGE_BYTES).enumerate() {
                let stage = &mut self.stages[self.next_stage];
                self.next_stage = (self.next_stage + 1) % STAGES;
                if let Some(copy) = stage.busy.take() {
                    self.runtime.wait_on_host(&copy)?;
                }
                let staged = &mut stage.memory.bytes_mut()[..bytes.len()];
                self.copy_threads
                    .install(|| copy_in_parallel(bytes, staged));
                let to = slot + (start + piece * STAGE_BYTES) as u64;
                // SAFETY: the slot has room for the block, and the stage is not written before this copy is through.
                let copy = unsafe { self.runtime.copy(staged, to, request.after.as_ref())? };
                stage.busy = Some(copy.clone());
                last = Some(copy);
            }
        }
        last.map_or_else(|| self.runtime.mark(), Ok)
    }
}

/// Threads of their own: one of the usual pool may be the one that waits for a block.
fn copy_threads() -> Result<ThreadPool> {
    let (least, most) = COPY_THREADS;
    ThreadPoolBuilder::new()
        .num_threads(rayon::current_num_threads().clamp(least, most))
        .thread_name(|number| format!("weights {number}"))
        .build()
        .map_err(|e| Error::Train(format!("starting threads: {e}")))
}

fn copy_in_parallel(from: &[u8], to: &mut [u8]) {
    /// Less is copied before another thread has begun.
    const PIECE: usize = 1 << 20;
    to.par_chunks_mut(PIECE)
        .zip(from.par_chunks(PIECE))
        .for_each(|(to, from)| to.copy_from_slice(from));
}
