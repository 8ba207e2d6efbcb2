//! The verdict to QEMU: a sentinel line and an exit code, of which a pass needs both.

use core::fmt;

use qemu_exit::QEMUExit;

use crate::serial;

// These three are what `pkru-qemu` expects.
const DEBUG_EXIT_PORT: u16 = 0xf4;
const ORDERLY: u32 = 0x10;
const SENTINEL: &str = "pkru-kernel: passed";

/// Ends the run well.
pub fn pass(what: impl fmt::Display) -> ! {
    serial::print(format_args!("{SENTINEL}: {what}\n"));
    leave(ORDERLY)
}

/// Ends the run as a failure.
pub fn fail(why: impl fmt::Display) -> ! {
    serial::print_from_panic(format_args!("pkru-kernel: failed: {why}\n"));
    leave(ORDERLY + 1)
}

fn leave(code: u32) -> ! {
    // SAFETY: the port is the one that QEMU's `isa-debug-exit` device listens on.
    let device = unsafe { qemu_exit::X86::new(DEBUG_EXIT_PORT, ORDERLY << 1 | 1) };
    device.exit(code)
}
