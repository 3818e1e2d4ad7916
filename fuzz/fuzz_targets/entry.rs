//! The readers of `tests/hostile_files`, fed by libFuzzer.

use std::cell::OnceCell;

#[allow(dead_code, reason = "a target takes one of the readers")]
#[path = "../../tests/hostile_files/readers.rs"]
mod readers;

use readers::{Scratch, reader};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

thread_local! {
    static SCRATCH: OnceCell<Scratch> = const { OnceCell::new() };
}

/// Gives `bytes` to the reader of this name.
pub fn read(name: &str, bytes: &[u8]) {
    SCRATCH.with(|scratch| scratch.get_or_init(|| Scratch::new(reader(name))).read(bytes));
}
