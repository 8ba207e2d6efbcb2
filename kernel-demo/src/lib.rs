//! A kernel that QEMU boots directly, to show `pkru` on bare metal.
//!
//! | module | subject |
//! |---|---|
//! | `boot` | from QEMU's 32-bit entry (PVH) to [`run`] |
//! | [`serial`] | output |
//! | [`exit`] | the verdict to QEMU |
//! | [`segments`] | GDT, TSS, exception stacks |
//! | [`traps`] | IDT, exceptions, interrupts, and what they do with access rights |
//! | [`timer`] | a periodic hardware interrupt |
//! | [`memory`] | frames, page tables, the kernel's heap |
//! | [`fence`] | which register fences domains, PKRS or PKRU, and the kernel's own rights |
//! | [`domain`] | the platform that `pkru`'s domains live on |
//! | [`probe`] | single accesses whose faults are caught |
//! | [`testing`] | a test suite in one boot |
//!
//! The kernel runs on one CPU, in ring 0 throughout, in an identity map.
//!
//! # Programs
//!
//! A program is a binary or a test of this package. It begins with these attributes and calls
//! `program!` or `test_suite!`:
//!
//! ```text
//! #![no_main]
//! #![cfg(target_os = "none")]
//! #![no_std]
//! ```
//!
//! Their order matters. A build for the host keeps `no_main`, stops at `cfg`, and so compiles an empty program; `host.c`
//! is its `main`.

#![no_std]
#![cfg(target_os = "none")]

mod boot;
pub mod domain;
pub mod exit;
pub mod fence;
pub mod memory;
pub mod probe;
pub mod segments;
pub mod serial;
pub mod testing;
pub mod timer;
pub mod traps;

use core::panic::PanicInfo;

unsafe extern "Rust" {
    /// The program that [`program!`] defines; called once, with everything set up.
    safe fn kernel_program();
}

/// Defines what the kernel runs once it is set up: `program!(function)`, where the function takes and returns nothing.
#[macro_export]
macro_rules! program {
    ($function:path) => {
        #[unsafe(no_mangle)]
        fn kernel_program() {
            $function();
        }
    };
}

/// Sets the kernel up and runs its program. `boot` calls it.
fn run(start_info: u64) -> ! {
    serial::init();
    segments::init();
    traps::init();
    memory::init(start_info);
    fence::init();
    kernel_program();
    exit::pass("the program ended")
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if fence::in_domain() {
        // A domain's panic ends its call, like any other mistake in it.
        // SAFETY: the exception is rewound.
        unsafe { core::arch::asm!("ud2", options(noreturn)) };
    }
    fence::open();
    exit::fail(info)
}
