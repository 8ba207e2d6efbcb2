//! Must fail: a trap outside a domain ends the run.

#![no_main]
#![cfg(target_os = "none")]
#![no_std]

use kernel_demo::exit;

kernel_demo::test_suite!(a_trap_outside_a_domain_is_survived);

fn a_trap_outside_a_domain_is_survived() {
    exit::expect_failure();
    // SAFETY: this is the violation. Nothing is mapped at the address, so the write traps and changes nothing.
    unsafe { (0x700_0000_0000_u64 as *mut u8).write_volatile(1) };
}
