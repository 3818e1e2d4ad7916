//! Copies and launches beside the kernels, as late as they may be: each is done when somebody waits for it and not before, and
//! one that needs what a launch uses, which it does not come after, is an error. So is a launch or a product that is given
//! what a launch aside writes before that was waited for.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;

use qlora::device::{Argument, Marker};
use qlora::{Error, Result};

#[derive(Default)]
struct Queue {
    launches: u64,
    /// The last launch that was given an address.
    last_launch: BTreeMap<u64, u64>,
    /// What the last launches and products use, with the number of each.
    recent: VecDeque<(u64, Range<u64>)>,
    waiting: Vec<Copy>,
    aside: Vec<Aside>,
    queued: u64,
}

/// A launch aside that nobody waited for yet.
struct Aside {
    /// The addresses that it was given.
    uses: Vec<u64>,
    writes: Range<u64>,
    work: Box<dyn FnOnce() -> Result<()> + Send>,
    place: AsidePlace,
}

/// Each test has a queue aside of its own: they run in threads of one process.
#[derive(Clone, Copy)]
struct AsidePlace {
    thread: ThreadId,
    number: u64,
    /// The launch that it comes after.
    after: u64,
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
    Aside(AsidePlace),
}

fn marker(place: Place) -> Marker {
    Marker(Arc::new(place))
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Queue {
    fn note(&mut self, uses: impl IntoIterator<Item = Range<u64>>) {
        const RECENT: usize = 1 << 16;
        self.launches += 1;
        for used in uses {
            self.last_launch.insert(used.start, self.launches);
            self.recent.push_back((self.launches, used));
        }
        let surplus = self.recent.len().saturating_sub(RECENT);
        self.recent.drain(..surplus);
    }
}

/// One byte of memory.
pub fn byte(address: u64) -> Range<u64> {
    address..address + 1
}

/// The addresses among `arguments`, a byte each: how far a launch reads or writes they do not say.
pub fn addresses(arguments: &[Argument]) -> Vec<Range<u64>> {
    let addresses = arguments.iter().filter_map(|argument| match argument {
        Argument::Address(address) => Some(byte(*address)),
        _ => None,
    });
    addresses.collect()
}

/// A launch or product in the queue of kernels begins, and uses this memory.
pub fn note_launch(uses: &[Range<u64>]) -> Result<()> {
    with_queue(|queue| {
        let written = queue.aside.iter().map(|aside| &aside.writes);
        for writes in written {
            if let Some(used) = uses.iter().find(|used| overlap(used, writes)) {
                return Err(Error::Train(format!(
                    "a kernel uses {used:x?} of {writes:x?}, which a launch aside writes that was not waited for"
                )));
            }
        }
        queue.note(uses.iter().cloned());
        Ok(())
    })
}

/// Queues a launch aside, which is given the addresses `uses` and writes `writes`.
pub fn queue_aside(
    (uses, writes): (Vec<u64>, Range<u64>),
    after: &Marker,
    work: Box<dyn FnOnce() -> Result<()> + Send>,
) -> Result<Marker> {
    let after = reached(Some(after))?;
    with_queue(|queue| {
        let is_known = |(first, _): &(u64, _)| *first <= after + 1;
        assert!(queue.recent.front().is_none_or(is_known), "too old a mark");
        let later = queue.recent.iter().rev();
        let mut later = later.take_while(|(launch, _)| *launch > after);
        if let Some((launch, used)) = later.find(|(_, used)| overlap(used, &writes)) {
            return Err(Error::Train(format!(
                "a launch aside after launch {after} writes {writes:x?}, of which launch {launch} uses {used:x?}"
            )));
        }
        let arriving = queue.waiting.iter().map(Copy::on_device);
        for arriving in arriving {
            if overlap(&arriving, &writes) || uses.iter().any(|used| arriving.contains(used)) {
                return Err(Error::Train(format!(
                    "a launch aside uses {arriving:x?}, of a copy that was not waited for"
                )));
            }
        }
        queue.queued += 1;
        let place = AsidePlace {
            thread: std::thread::current().id(),
            number: queue.queued,
            after,
        };
        queue.aside.push(Aside {
            uses,
            writes,
            work,
            place,
        });
        Ok(marker(Place::Aside(place)))
    })
}

/// Whether the marker is that of a launch aside.
pub fn is_aside(marker: &Marker) -> bool {
    matches!(marker.0.downcast_ref(), Some(Place::Aside(_)))
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
    put(copy, after)
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
    put(copy, after)
}

impl Copy {
    /// The side that launches use.
    fn on_device(&self) -> Range<u64> {
        let start = match self.way {
            Way::ToDevice => self.to,
            Way::ToHost => self.from,
        };
        start..start + self.len as u64
    }
}

/// The launch that what comes after `marker` comes after.
fn reached(after: Option<&Marker>) -> Result<u64> {
    let Some(marker) = after else { return Ok(0) };
    match marker.0.downcast_ref() {
        Some(Place::Launch(number)) => Ok(*number),
        Some(Place::Copy { after, .. } | Place::Aside(AsidePlace { after, .. })) => {
            reach(marker)?;
            Ok(*after)
        }
        None => Ok(0),
    }
}

fn put(copy: Copy, after: Option<&Marker>) -> Result<Marker> {
    let after = reached(after)?;
    with_queue(|queue| {
        let range = copy.on_device();
        let mut asides = queue.aside.iter();
        let needs = |aside: &Aside| {
            overlap(&aside.writes, &range) || aside.uses.iter().any(|used| range.contains(used))
        };
        if asides.any(needs) {
            return Err(Error::Train(format!(
                "a copy needs {range:x?}, which a launch aside uses that was not waited for"
            )));
        }
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

/// Does all copies of its way, or launches aside of its thread, up to the marked one.
pub fn reach(marker: &Marker) -> Result<()> {
    match marker.0.downcast_ref() {
        Some(Place::Copy { way, number, .. }) => copy_up_to(*way, *number),
        Some(Place::Aside(place)) => return launch_up_to(*place),
        Some(Place::Launch(_)) | None => {}
    }
    Ok(())
}

fn copy_up_to(way: Way, number: u64) {
    with_queue(|queue| {
        let is_due = |copy: &Copy| copy.way == way && copy.number <= number;
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

fn launch_up_to(marked: AsidePlace) -> Result<()> {
    let due: Vec<Aside> = with_queue(|queue| {
        let is_due = |aside: &Aside| {
            let place = aside.place;
            place.thread == marked.thread && place.number <= marked.number
        };
        let (due, waiting) = queue.aside.drain(..).partition(is_due);
        queue.aside = waiting;
        let due: Vec<Aside> = due;
        // What is marked from now on comes after it.
        for aside in &due {
            let uses = aside.uses.iter().map(|&address| byte(address));
            queue.note(uses.chain([aside.writes.clone()]));
        }
        due
    });
    due.into_iter().try_for_each(|aside| (aside.work)())
}

/// Whether all launches aside of this thread were waited for.
pub fn is_idle() -> bool {
    let own = std::thread::current().id();
    with_queue(|queue| queue.aside.iter().all(|aside| aside.place.thread != own))
}
