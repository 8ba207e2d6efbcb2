//! A program whose global allocator writes a static. Code in a domain cannot allocate, and the error names the static.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use pkru_userspace::{Domain, Error};
use support::suite;

suite! {
    an_allocator_that_writes_a_static_is_named,
}

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls go to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the same contract.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn an_allocator_that_writes_a_static_is_named() {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    drop(std::hint::black_box(Box::new(1u64)));
    assert!(ALLOCATIONS.load(Ordering::Relaxed) > before, "control: outside a domain it counts");
    let error = Domain::builder("counted").build().unwrap_err();
    let Error::TrialCall { violation } = &error else { panic!("{error}") };
    assert!(violation.contains("write of") && violation.contains("ALLOCATIONS"), "{error}");
}
