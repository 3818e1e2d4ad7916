//! What this process uses of the machine's memory and what is free, from `/proc`.

use rayon::prelude::*;

/// The largest resident set of this process so far (`VmHWM`), or `None` where the system does not tell.
pub fn peak_memory_bytes() -> Option<u64> {
    status_bytes(&read_status()?, "VmHWM")
}

/// Starts [`peak_memory_bytes`] anew, where the system can; otherwise it goes on from the start of the process.
pub fn reset_peak_memory() {
    // 5 resets the high-water mark (proc(5)); a system that refuses leaves the larger figure, which is still a bound.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Resident memory that no file stands behind (`RssAnon`): what is used beside the mapped weights. `None` where the
/// system does not tell.
pub fn anonymous_memory_bytes() -> Option<u64> {
    status_bytes(&read_status()?, "RssAnon")
}

/// Memory that can be taken without swapping (`MemAvailable`), or `None` where the system does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    status_bytes(
        &std::fs::read_to_string("/proc/meminfo").ok()?,
        "MemAvailable",
    )
}

/// Tells the system that this part of a memory-mapped file will be read soon.
pub fn will_need(bytes: &[u8]) {
    advise(bytes, libc::MADV_WILLNEED);
}

/// Brings this part of a memory-mapped file to where it is read, by several threads: one that meets its pages one after the
/// other is several times slower.
pub fn bring_in(bytes: &[u8]) {
    /// Less is not worth another thread.
    const SMALLEST: usize = 4 << 20;
    #[cfg(target_os = "linux")]
    const ADVICE: i32 = libc::MADV_POPULATE_READ;
    #[cfg(not(target_os = "linux"))]
    const ADVICE: i32 = libc::MADV_WILLNEED;
    bytes
        .par_chunks(SMALLEST)
        .for_each(|part| advise(part, ADVICE));
}

fn advise(bytes: &[u8], advice: i32) {
    const PAGE: usize = 4096;
    let start = bytes.as_ptr() as usize / PAGE * PAGE;
    let len = bytes.as_ptr() as usize + bytes.len() - start;
    // SAFETY: advice about memory that is there; a system that takes none of it changes nothing.
    unsafe { libc::madvise(start as *mut _, len, advice) };
}

fn read_status() -> Option<String> {
    std::fs::read_to_string("/proc/self/status").ok()
}

/// A line is `VmHWM:     1234 kB`, where kB is 1024 bytes.
fn status_bytes(status: &str, name: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_by_its_whole_name_in_bytes() {
        let status = "Name:\tqlora\nVmHWMX:\t  7 kB\nVmHWM:\t  2048 kB\nRssAnon:\t 3 kB\n";
        assert_eq!(status_bytes(status, "VmHWM"), Some(2048 * 1024));
        assert_eq!(status_bytes(status, "RssAnon"), Some(3 * 1024));
        assert_eq!(status_bytes(status, "VmSwap"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_large_allocation_shows_in_both_figures() {
        let size = 64 << 20;
        let before = anonymous_memory_bytes().unwrap();
        let block = std::hint::black_box(vec![1u8; size]);
        assert!(anonymous_memory_bytes().unwrap() >= before + size as u64 / 2);
        assert!(peak_memory_bytes().unwrap() >= size as u64);
        drop(block);
    }
}
