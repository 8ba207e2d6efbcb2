//! A suite that must fail: a trap outside any domain ends the run.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this suite boots: `make qemu-test`");
}

#[cfg(target_os = "none")]
mod suite {
    kernel_demo::test_suite!(a_trap_outside_a_domain_is_survived);

    fn a_trap_outside_a_domain_is_survived() {
        // SAFETY: none: nothing is mapped there, and no domain is running.
        unsafe { (0x700_0000_0000_u64 as *mut u8).write_volatile(1) };
    }
}
