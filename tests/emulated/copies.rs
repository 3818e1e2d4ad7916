//! Copies beside the kernels, as late as they may be: a copy is done when somebody waits for it and not before, and one that
//! would overwrite what a launch reads, which it does not come after, is an error.

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

enum Place {
    Launch(u64),
    Copy(u64),
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

pub fn queue(from: &[u8], to: u64, after: Option<&Marker>) -> Result<Marker> {
    let after = match after.and_then(|after| after.0.downcast_ref()) {
        Some(Place::Launch(number)) => *number,
        _ => 0,
    };
    with_queue(|queue| {
        let mut overwritten = queue.last_launch.range(to..to + from.len() as u64);
        if let Some((address, launch)) = overwritten.find(|(_, launch)| **launch > after) {
            return Err(Error::Train(format!(
                "a copy after launch {after} overwrites {address:#x}, which launch {launch} reads"
            )));
        }
        queue.queued += 1;
        queue.waiting.push(Copy {
            number: queue.queued,
            from: from.as_ptr() as u64,
            to,
            len: from.len(),
        });
        Ok(marker(Place::Copy(queue.queued)))
    })
}

/// Does all copies up to the marked one.
pub fn reach(marker: &Marker) {
    let Some(Place::Copy(number)) = marker.0.downcast_ref() else {
        return;
    };
    with_queue(|queue| {
        let later = queue.waiting.partition_point(|copy| copy.number <= *number);
        for copy in queue.waiting.drain(..later) {
            // SAFETY: pinned memory stays until its copy is waited for, and so does the place it goes to.
            unsafe {
                std::ptr::copy_nonoverlapping(copy.from as *const u8, copy.to as *mut u8, copy.len);
            }
        }
    });
}
