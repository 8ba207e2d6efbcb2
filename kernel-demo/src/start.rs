//! Sets the kernel up, runs its program, and handles its panics.

use core::panic::PanicInfo;

use crate::{exit, fence, memory, segments, serial, traps};

/// Sets the kernel up and runs `program`. `start_info` is the address of PVH's start info.
pub(crate) fn run(start_info: u64, program: fn()) -> ! {
    serial::init();
    segments::init();
    traps::init();
    memory::init(start_info);
    fence::init();
    program();
    exit::pass("the program ended")
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if fence::in_domain() {
        // A panic in a domain ends the call by a trap, as any other violation does.
        traps::invalid_opcode();
    }
    fence::open();
    exit::fail(info)
}
