//! The demo: two domains in a kernel, one of which makes violations that are contained.

#![no_main]
#![cfg(target_os = "none")]
#![no_std]

use core::sync::atomic::{AtomicU64, Ordering};

use kernel_demo::domain::{Domain, Kernel, heap_at};
use kernel_demo::fence::Fence;
use kernel_demo::{memory, println};
use pkru::domain::{Failure, Sizes};

kernel_demo::program!(demo);

const SIZES: Sizes = Sizes { stack: 32 * 1024, heap: 64 * 1024 };

/// Memory of the kernel, which no domain may write.
static KERNEL_DATA: AtomicU64 = AtomicU64::new(0x600d_c0de);

fn demo() {
    println!("pkru: isolated domains on bare metal");
    for fence in [Fence::Pks, Fence::Pku] {
        if fence.is_supported() {
            fence.select();
            println!();
            println!("== domains fenced by {} ==", name(fence));
            scenario();
        } else {
            println!();
            println!("== skipped: this CPU has no {fence:?} ==");
        }
    }
}

fn name(fence: Fence) -> &'static str {
    match fence {
        Fence::Pks => "PKS: supervisor pages, rights in the MSR IA32_PKRS",
        Fence::Pku => "PKU: user pages, rights in the register PKRU",
    }
}

fn scenario() {
    let free = memory::free_frames();
    let mut domains = ["A", "B"].map(|name| (name, new(name)));
    for (name, domain) in &mut domains {
        work(name, domain);
    }
    let [(_, a), (_, b)] = &mut domains;
    let heap_of_b = b.memory().heap().end.as_u64() - 64;

    println!("A writes into B's heap:");
    write(a, heap_of_b);
    println!("A writes into the kernel's memory:");
    write(a, KERNEL_DATA.as_ptr() as u64);
    println!("A writes below its own stack:");
    let below = a.memory().stack().start.as_u64() - 8;
    write(a, below);
    assert_eq!(KERNEL_DATA.load(Ordering::Relaxed), 0x600d_c0de, "the kernel's memory is unchanged");
    println!("the kernel's memory is unchanged, and both domains still work:");
    for (name, domain) in &mut domains {
        work(name, domain);
    }

    // SAFETY: all rights are in force, and the address is in B's heap, above every allocation.
    unsafe { (heap_of_b as *mut u64).write(1) };
    println!("control: the kernel writes into B's heap, and nothing stops it");
    drop(domains);
    // The page tables stay for the next domains.
    println!(
        "domains dropped; {}% of the frames that were free before are free again",
        memory::free_frames().min(free) * 100 / free
    );
}

fn new(name: &str) -> Domain {
    let domain = Domain::new(Kernel, SIZES).unwrap_or_else(|error| panic!("cannot create a domain: {error:?}"));
    let memory = domain.memory();
    println!(
        "domain {name}: key {}, stack {:#x}..{:#x}, heap {:#x}..{:#x}",
        domain.memory().key(),
        memory.stack().start,
        memory.stack().end,
        memory.heap().start,
        memory.heap().end
    );
    domain
}

fn work(name: &str, domain: &mut Domain) {
    let heap = domain.memory().heap().start.as_u64();
    // SAFETY: `sum_in_heap` uses only the domain's stack and heap.
    match unsafe { domain.enter(&(), sum_in_heap, heap) } {
        Ok(sum) => println!("domain {name} works in its own memory: the sum of its table is {sum}"),
        Err(failure) => panic!("the call in domain {name} failed: {failure:?}"),
    }
}

fn write(domain: &mut Domain, address: u64) {
    // SAFETY: the domain may not write the address, so the write traps and changes nothing.
    match unsafe { domain.enter(&(), write_word, address) } {
        Err(Failure::Trap(trap)) => println!("  trapped: {trap}\n  rewound"),
        other => panic!("the write to {address:#x} was not contained: {other:?}"),
    }
}

/// Fills a table on the domain's heap and returns its sum.
unsafe extern "C" fn sum_in_heap(heap: u64) -> u64 {
    const LENGTH: usize = 1000;
    // SAFETY: the argument is the start of the calling domain's heap, and this is the only reference.
    let heap = unsafe { heap_at(heap) };
    let Ok(Some(block)) = heap.allocate(LENGTH * size_of::<u64>(), align_of::<u64>(), 0) else { return 0 };
    // SAFETY: the block has the slice's size and alignment, and nothing else uses it. A domain's memory starts zeroed, so
    // every byte is initialised.
    let table = unsafe { core::slice::from_raw_parts_mut(block.cast::<u64>().as_ptr(), LENGTH) };
    for (value, slot) in (0..).zip(table.iter_mut()) {
        *slot = value;
    }
    let sum = table.iter().sum();
    // SAFETY: nothing uses the block any more.
    match unsafe { heap.free(block, 0) } {
        Ok(()) => sum,
        Err(_) => 0,
    }
}

unsafe extern "C" fn write_word(address: u64) -> u64 {
    // SAFETY: this is the violation. The write traps, so it changes nothing.
    unsafe { (address as *mut u64).write_volatile(0xbad) };
    0
}
