//! Copies beside the kernels, as late as they may be: a copy is done when somebody waits for it and not before, and one that
//! needs what a launch uses, which it does not come after, is an error.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use qlora::device::{Argument, Marker};
use qlora::{Error, Result};

#[derive(Default)]
struct Queue {
    launches: u64,
    /// The last launch that was given an address.
    last_launch: BTreeMap<u64, u64>,
    waiting: Vec<Copy>,
    queued: u64,
}

struct Copy {
    way: Way,
    number: u64,
    from: u64,
    to: u64,
    len: usize,
}

static QUEUE: Mutex<Option<Queue>> = Mutex::new(None);

fn with_queue<R>(work: impl FnOnce(&mut Queue) -> R) -> R {
    let mut queue = QUEUE.lock().unwrap_or_else(PoisonError::into_inner);
    work(queue.get_or_insert_with(Queue::default))
}

/// Copies of one way are done in their order; those of the other are not waited for with them.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    ToDevice,
    ToHost,
}

enum Place {
    Launch(u64),
    Copy {
        way: Way,
        number: u64,
        /// The launch that it comes after.
        after: u64,
    },
}

fn marker(place: Place) -> Marker {
    Marker(Arc::new(place))
}

pub fn note_launch(arguments: &[Argument]) {
    with_queue(|queue| {
        queue.launches += 1;
        for argument in arguments {
            if let Argument::Address(address) = argument {
                queue.last_launch.insert(*address, queue.launches);
            }
        }
    });
}

/// The last launch so far.
pub fn mark() -> Marker {
    with_queue(|queue| marker(Place::Launch(queue.launches)))
}

/// Queues a copy to the device.
pub fn queue(from: &[u8], to: u64, after: Option<&Marker>) -> Result<Marker> {
    let copy = Copy {
        way: Way::ToDevice,
        number: 0,
        from: from.as_ptr() as u64,
        to,
        len: from.len(),
    };
    put(copy, to, after)
}

/// Queues a copy to the host.
pub fn queue_back(from: u64, to: &mut [u8], after: Option<&Marker>) -> Result<Marker> {
    let copy = Copy {
        way: Way::ToHost,
        number: 0,
        from,
        to: to.as_mut_ptr() as u64,
        len: to.len(),
    };
    put(copy, from, after)
}

/// `on_device` is the copy's side that launches use.
fn put(copy: Copy, on_device: u64, after: Option<&Marker>) -> Result<Marker> {
    let after = match after.map(|marker| (marker, marker.0.downcast_ref())) {
        Some((_, Some(Place::Launch(number)))) => *number,
        Some((marker, Some(Place::Copy { after, .. }))) => {
            reach(marker);
            *after
        }
        _ => 0,
    };
    with_queue(|queue| {
        let range = on_device..on_device + copy.len as u64;
        let mut used = queue.last_launch.range(range);
        if let Some((address, launch)) = used.find(|(_, launch)| **launch > after) {
            return Err(Error::Train(format!(
                "a copy after launch {after} needs {address:#x}, which launch {launch} uses"
            )));
        }
        queue.queued += 1;
        let (way, number) = (copy.way, queue.queued);
        queue.waiting.push(Copy { number, ..copy });
        Ok(marker(Place::Copy { way, number, after }))
    })
}

/// Does all copies of its way up to the marked one.
pub fn reach(marker: &Marker) {
    let Some(Place::Copy { way, number, .. }) = marker.0.downcast_ref() else {
        return;
    };
    with_queue(|queue| {
        let is_due = |copy: &Copy| copy.way == *way && copy.number <= *number;
        let (due, waiting) = queue.waiting.drain(..).partition(is_due);
        queue.waiting = waiting;
        let due: Vec<Copy> = due;
        for copy in due {
            // SAFETY: pinned memory stays until its copy is waited for, and so does the place it goes to.
            unsafe {
                std::ptr::copy_nonoverlapping(copy.from as *const u8, copy.to as *mut u8, copy.len);
            }
        }
    });
}
