//! The micro-kernel of AMX: four tiles of the result, 16 x 16 each, stay in registers while k runs; each step loads two tiles of
//! either side for four products.
//!
//! Written as assembly, since Rust has no stable names for these instructions.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::mem::MaybeUninit;

use super::{GROUP, LINES, Line, Tile};

/// Rows of a tile register.
const ROWS: usize = 16;

/// Whether the processor has tiles of bf16, and the system gives them to this process.
pub(super) fn is_available() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    let has = |bits: u32| __cpuid_count(7, 0).edx & bits == bits;
    has(AMX_BF16 | AMX_TILE) && are_tiles_granted()
}

/// Asks Linux for the part of the processor's state that no process has by itself.
#[cfg(target_os = "linux")]
fn are_tiles_granted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    let request = (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
    // SAFETY: this request touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, request.0, request.1) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn are_tiles_granted() -> bool {
    false
}

/// The tile registers of this thread, configured until this is dropped: each of 16 rows of 64 bytes.
pub(super) struct Tiles(());

#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// Where AMX [`is_available`].
    pub(super) fn new() -> Self {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        config.row_bytes[..8].fill(size_of::<Line>() as u16);
        config.rows[..8].fill(ROWS as u8);
        // SAFETY: a valid configuration; nothing that the compiler makes uses tiles.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: gives the registers back; the kernel has less to save from then on.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// `tile = lhs rhs` over the steps of one part of `lhs` after the other, or the same added.
///
/// # Safety
/// This thread has [`Tiles`]; the parts of `lhs` have as many lines as `rhs`, and `tile` is ours to write.
pub(super) unsafe fn multiply(lhs: &[&[Line]], rhs: &[Line], tile: Tile) {
    debug_assert_eq!(lhs.iter().map(|part| part.len()).sum::<usize>(), rhs.len());
    let is_whole = tile.rows == GROUP && tile.cols == GROUP;
    let mut aside = MaybeUninit::<[[f32; GROUP]; GROUP]>::uninit();
    let (at, row_stride) = match is_whole {
        true => (tile.at, tile.row_stride),
        false => (aside.as_mut_ptr().cast(), GROUP),
    };
    let stride = row_stride * size_of::<f32>();
    let right = at.wrapping_add(ROWS);
    let below = at.wrapping_add(ROWS * row_stride);
    let below_right = right.wrapping_add(ROWS * row_stride);
    let mut rhs = rhs.as_ptr();
    // SAFETY: tiles 0 to 3 are the result's from here to the store; every load and store is of 16 rows of 64 bytes that are
    // there: of the result, or what takes its place, of a step of 32 lines of `lhs`, and of 16 pairs of `rhs`, two lines each.
    unsafe {
        if is_whole && tile.add {
            asm!(
                "tileloadd tmm0, [{at} + {stride}*1]",
                "tileloadd tmm1, [{right} + {stride}*1]",
                "tileloadd tmm2, [{below} + {stride}*1]",
                "tileloadd tmm3, [{below_right} + {stride}*1]",
                at = in(reg) at,
                right = in(reg) right,
                below = in(reg) below,
                below_right = in(reg) below_right,
                stride = in(reg) stride,
                options(nostack, readonly)
            );
        } else {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem)
            );
        }
        for part in lhs.iter().filter(|part| !part.is_empty()) {
            asm!(
                "2:",
                "tileloadd tmm4, [{a} + {line}*1]",
                "tileloadd tmm6, [{b} + {pair}*1]",
                "tileloadd tmm7, [{b} + {pair}*1 + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a} + {line}*1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                a = inout(reg) part.as_ptr() => _,
                b = inout(reg) rhs,
                steps = inout(reg) part.len() / LINES => _,
                line = in(reg) size_of::<Line>(),
                pair = in(reg) 2 * size_of::<Line>(),
                options(nostack, readonly)
            );
        }
        asm!(
            "tilestored [{at} + {stride}*1], tmm0",
            "tilestored [{right} + {stride}*1], tmm1",
            "tilestored [{below} + {stride}*1], tmm2",
            "tilestored [{below_right} + {stride}*1], tmm3",
            at = in(reg) at,
            right = in(reg) right,
            below = in(reg) below,
            below_right = in(reg) below_right,
            stride = in(reg) stride,
            options(nostack)
        );
    }
    if is_whole {
        return;
    }
    // SAFETY: all of it was stored.
    let aside = unsafe { aside.assume_init_ref() };
    for (row, sums) in aside.iter().enumerate().take(tile.rows) {
        // SAFETY: a row of the tile.
        let row = unsafe {
            std::slice::from_raw_parts_mut(tile.at.add(row * tile.row_stride), tile.cols)
        };
        for (value, sum) in row.iter_mut().zip(sums) {
            *value = if tile.add { *value + sum } else { *sum };
        }
    }
}
