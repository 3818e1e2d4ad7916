//! SIGBUS from a mapped file (it became shorter, or its disk failed): one line that names the file, and status 1.

use std::ffi::c_void;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

use qlora::store::mapped_path_at;

/// Where a progress bar may stand on the line.
static STDERR_IS_TERMINAL: AtomicBool = AtomicBool::new(false);

/// Lets the program end with a message when a mapped file is gone under it.
pub fn explain() {
    STDERR_IS_TERMINAL.store(std::io::stderr().is_terminal(), Ordering::Relaxed);
    let handler = on_sigbus as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void);
    // SAFETY: the action is complete, and the handler does only what is safe in one. All zeros is a valid action.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    let mut path = [0u8; 512];
    // SAFETY: the kernel gives a valid description of the signal to a handler with SA_SIGINFO.
    let address = unsafe { (*info).si_addr() }.addr();
    match mapped_path_at(address, &mut path) {
        Some(length) => {
            if STDERR_IS_TERMINAL.load(Ordering::Relaxed) {
                write(b"\n");
            }
            write(b"error: ");
            write(&path[..length]);
            write(b": cannot be read any more: it became shorter while it was mapped, or its disk failed; put it back and ");
            write(b"continue with resume_from_checkpoint = true\n");
            // SAFETY: `_exit` is async-signal-safe.
            unsafe { libc::_exit(1) }
        }
        None => {
            // SAFETY: both are async-signal-safe; the fault comes again when this returns, and ends the program.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}

fn write(bytes: &[u8]) {
    // SAFETY: the pointer and the length are those of a slice. What is not written cannot be helped here.
    unsafe {
        libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len());
    }
}
