//! The scratch buffer that 4-bit weights are dequantized into, a ring of the weights used last.
//!
//! It is allocated once and shared by all weights of a model. It keeps what was dequantized last, so that a block that fits is
//! dequantized once for recompute and backward together; where memory is short it holds one weight.
//!
//! A block announces in which order it will ask for its weights. When it asks for one, the next is dequantized beside the
//! product that the first is for, if the ring has a place for both: after all products that were queued so far, which may
//! read what lay there. The order is a hint. A weight that comes out of it is looked up or dequantized as without one.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::{DeviceWeight, OP, QuantizedParts, Weight};
use crate::device::Marker;
use crate::ops::launcher::Launcher;
use crate::{Error, Result};

/// Weights begin at multiples of this many elements of the scratch buffer: 256 bytes.
const ALIGNMENT: usize = 128;

/// The scratch buffer of the weights of a model.
#[derive(Debug)]
pub struct DenseCache {
    /// bf16, flat.
    buffer: Tensor,
    state: Mutex<State>,
    next_id: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    ring: Ring,
    order: Order,
    /// The weight that is being dequantized aside, which kernels do not wait for yet.
    pending: Option<Pending>,
}

#[derive(Debug)]
struct Pending {
    /// Held, since it is read until then.
    weight: Arc<QuantizedParts>,
    done: Marker,
}

/// What lies in the ring, the oldest first.
#[derive(Debug, Default)]
struct Ring {
    weights: VecDeque<(usize, Range<usize>)>,
    next: usize,
}

/// What was announced: the weight that was asked for last, and those to come.
#[derive(Debug, Default)]
struct Order {
    last: Option<usize>,
    left: VecDeque<Arc<QuantizedParts>>,
}

/// An order of weights, which ends when this is dropped: what was dequantized ahead is waited for then, asked for or not, so
/// that the slot of a streamed block can be left and the memory of a weight freed after it.
#[derive(Debug)]
#[must_use = "the order ends when this is dropped"]
pub struct Announced(Option<Arc<DenseCache>>);

impl Weight {
    /// Announces in which order products will need these weights, in place of what was announced before.
    pub fn announce<'a>(weights: impl IntoIterator<Item = &'a Self>) -> Announced {
        let mut parts = weights.into_iter().filter_map(|w| match &w.on_device {
            Some(DeviceWeight::Quantized(parts)) => Some(Arc::clone(parts)),
            _ => None,
        });
        let Some(first) = parts.next() else {
            return Announced(None);
        };
        let cache = Arc::clone(&first.cache);
        let others = parts.filter(|parts| Arc::ptr_eq(&parts.cache, &cache));
        cache.lock().order = Order {
            last: None,
            left: [Arc::clone(&first)].into_iter().chain(others).collect(),
        };
        Announced(Some(cache))
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        let Some(cache) = &self.0 else { return };
        let mut state = cache.lock();
        state.order = Order::default();
        // A device that cannot wait any more fails at the next thing that is asked of it.
        let _ = Launcher::on(OP, cache.device()).and_then(|launcher| state.settle(&launcher));
    }
}

impl DenseCache {
    /// Room for weights of these numbers of elements on `device` at a time.
    pub fn new(weights: &[usize], device: &Device) -> Result<Self> {
        Ok(Self {
            buffer: Tensor::zeros(Self::capacity(weights), DType::BF16, device)?,
            state: Mutex::default(),
            next_id: AtomicUsize::new(0),
        })
    }

    /// Elements that such a buffer has.
    pub fn capacity(weights: &[usize]) -> usize {
        weights.iter().map(|n| n.next_multiple_of(ALIGNMENT)).sum()
    }

    pub(super) fn device(&self) -> &Device {
        self.buffer.device()
    }

    pub(super) fn next_id(&self) -> usize {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weight in bf16, for what is queued until the next weight is asked for.
    pub(super) fn dense(&self, weight: &QuantizedParts, launcher: &Launcher) -> Result<Tensor> {
        let mut state = self.lock();
        let range = match state.ring.find(weight.id) {
            Some(range) => {
                if state.is_pending(weight.id) {
                    state.settle(launcher)?;
                }
                range
            }
            None => {
                // Its place may be that of a weight that is still being dequantized.
                state.settle(launcher)?;
                let range = self.place(&state.ring, weight)?;
                weight.dequantize(launcher, &self.part(&range, weight)?)?;
                state.ring.put(weight.id, range.clone());
                range
            }
        };
        self.dequantize_next(&mut state, (weight.id, &range), launcher)?;
        Ok(self.part(&range, weight)?.reshape(weight.shape)?)
    }

    /// Has the weight that was announced to follow `present` dequantized beside what is queued next, if both have room.
    fn dequantize_next(
        &self,
        state: &mut State,
        (present, taken): (usize, &Range<usize>),
        launcher: &Launcher,
    ) -> Result<()> {
        let Some(weight) = state.order.after(present) else {
            return Ok(());
        };
        if state.ring.find(weight.id).is_some() {
            return Ok(());
        }
        let range = self.place(&state.ring, &weight)?;
        if overlap(&range, taken) {
            return Ok(());
        }
        state.settle(launcher)?;
        let after = launcher.runtime().mark()?;
        let out = self.part(&range, &weight)?;
        // SAFETY: until `settle` the weight is held, and its place is given to nobody; what is queued before that reads the
        // present weight alone.
        let done = unsafe { weight.dequantize_aside(launcher, &out, &after)? };
        state.ring.put(weight.id, range);
        state.pending = Some(Pending { weight, done });
        Ok(())
    }

    /// Where a weight that is not there would lie.
    fn place(&self, ring: &Ring, weight: &QuantizedParts) -> Result<Range<usize>> {
        let capacity = self.buffer.elem_count();
        let elements = weight.elements();
        let range = ring.place(elements.next_multiple_of(ALIGNMENT), capacity);
        range.ok_or_else(|| Error::Shape {
            op: OP,
            expected: format!("weights of at most {capacity} elements"),
            found: elements.to_string(),
        })
    }

    fn part(&self, range: &Range<usize>, weight: &QuantizedParts) -> Result<Tensor> {
        Ok(self.buffer.narrow(0, range.start, weight.elements())?)
    }
}

impl State {
    fn is_pending(&self, id: usize) -> bool {
        let pending = self.pending.as_ref();
        pending.is_some_and(|pending| pending.weight.id == id)
    }

    /// Lets what is queued from now on wait for the weight that is being dequantized aside.
    fn settle(&mut self, launcher: &Launcher) -> Result<()> {
        if let Some(pending) = &self.pending {
            launcher.runtime().wait(&pending.done)?;
            self.pending = None;
        }
        Ok(())
    }
}

impl Order {
    /// The weight that follows `id`, which is asked for now.
    fn after(&mut self, id: usize) -> Option<Arc<QuantizedParts>> {
        if self.last != Some(id) {
            let at = self.left.iter().position(|weight| weight.id == id)?;
            self.left.drain(..=at);
            self.last = Some(id);
        }
        self.left.front().map(Arc::clone)
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Ring {
    fn find(&self, id: usize) -> Option<Range<usize>> {
        let found = self.weights.iter().find(|(held, _)| *held == id);
        found.map(|(_, range)| range.clone())
    }

    /// Where the next weight would lie, of so many elements.
    fn place(&self, elements: usize, capacity: usize) -> Option<Range<usize>> {
        if elements > capacity {
            return None;
        }
        let start = if self.next + elements <= capacity {
            self.next
        } else {
            0
        };
        Some(start..start + elements)
    }

    /// Weight `id` lies there from now on, in place of those it overlaps.
    fn put(&mut self, id: usize, range: Range<usize>) {
        self.weights.retain(|(_, other)| !overlap(other, &range));
        self.next = range.end;
        self.weights.push_back((id, range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks for weight `id` in a ring of 100 elements: where it lies, and whether it was there.
    fn ask(ring: &mut Ring, id: usize, elements: usize) -> (Range<usize>, bool) {
        if let Some(range) = ring.find(id) {
            return (range, true);
        }
        let range = ring.place(elements, 100).unwrap();
        ring.put(id, range.clone());
        (range, false)
    }

    #[test]
    fn weights_that_fit_together_stay() {
        let mut ring = Ring::default();
        assert_eq!(ask(&mut ring, 0, 40), (0..40, false));
        assert_eq!(ask(&mut ring, 1, 60), (40..100, false));
        assert_eq!(ask(&mut ring, 0, 40), (0..40, true));
        assert_eq!(ask(&mut ring, 1, 60), (40..100, true));
    }

    #[test]
    fn a_weight_takes_the_place_of_those_it_overlaps() {
        let mut ring = Ring::default();
        ask(&mut ring, 0, 40);
        ask(&mut ring, 1, 50);
        assert_eq!(ask(&mut ring, 2, 30), (0..30, false));
        assert_eq!(ask(&mut ring, 1, 50), (40..90, true));
        assert_eq!(ask(&mut ring, 0, 40), (30..70, false));
        assert_eq!(ask(&mut ring, 2, 30), (0..30, true));
        assert_eq!(ask(&mut ring, 1, 50), (0..50, false));
    }

    #[test]
    fn a_weight_larger_than_the_buffer_is_refused() {
        assert_eq!(Ring::default().place(101, 100), None);
    }

    #[test]
    fn a_place_that_is_asked_about_is_not_taken() {
        let mut ring = Ring::default();
        ask(&mut ring, 0, 60);
        assert_eq!(ring.place(60, 100), Some(0..60));
        assert_eq!(ring.find(0), Some(0..60));
        assert_eq!(ring.place(40, 100), Some(60..100));
    }
}
