//! The readers of `tests/hostile_files`, fed by libFuzzer.

use std::cell::OnceCell;
use std::panic;
use std::sync::Once;

#[allow(dead_code, reason = "a target takes one of the readers")]
#[path = "../../tests/hostile_files/readers.rs"]
mod readers;

use readers::{Scratch, reader};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

thread_local! {
    static SCRATCH: OnceCell<Scratch> = const { OnceCell::new() };
}

/// Gives `bytes` to the reader of this name. A panic ends the program, but not one that the reader catches, as libFuzzer's own
/// hook would have it.
pub fn read(name: &str, bytes: &[u8]) {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| panic::set_hook(Box::new(|_| ())));
    let read = || {
        SCRATCH.with(|scratch| {
            scratch
                .get_or_init(|| Scratch::new(reader(name)))
                .read(bytes)
        });
    };
    if panic::catch_unwind(read).is_err() {
        eprintln!("{name}: a panic");
        std::process::abort();
    }
}
