//! A suite that must fail: a trap outside any domain ends the run.

#![no_main]
#![cfg(target_os = "none")]
#![no_std]

kernel_demo::test_suite!(a_trap_outside_a_domain_is_survived);

fn a_trap_outside_a_domain_is_survived() {
    // SAFETY: none: nothing is mapped there, and no domain is running.
    unsafe { (0x700_0000_0000_u64 as *mut u8).write_volatile(1) };
}
