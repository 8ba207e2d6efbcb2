//! Must fail: the check that a write is contained fails where no domain contains it.

#![no_main]
#![cfg(target_os = "none")]
#![no_std]

use core::sync::atomic::{AtomicU64, Ordering};

use kernel_demo::exit;

kernel_demo::test_suite!(a_write_without_a_domain_is_contained);

static DATA: AtomicU64 = AtomicU64::new(1);

fn a_write_without_a_domain_is_contained() {
    exit::expect_failure();
    // SAFETY: the address is that of an atomic, and nothing else accesses it.
    unsafe { DATA.as_ptr().write_volatile(0xbad) };
    assert_eq!(DATA.load(Ordering::Relaxed), 1, "the write landed");
}
