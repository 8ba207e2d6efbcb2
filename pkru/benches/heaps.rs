//! Compares a domain's heap with glibc's, `linked_list_allocator` and `rlsf`, in nanoseconds a step.
//!
//! `cargo bench -p pkru --bench heaps`, followed by names of heaps to measure only those. The figures depend on the machine, so no test relies on them;
//! `userspace/tests/cost.rs` bounds counts of instructions.

#![allow(clippy::missing_safety_doc, reason = "the functions have the contracts of malloc, realloc and free")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::ptr::NonNull;
use std::time::Instant;

use pkru::heap::{DomainHeap, HeapChecks};

/// The size of each heap in bytes.
const SIZE: usize = 256 << 20;

trait Heap {
    fn allocate(&mut self, size: usize) -> NonNull<u8>;
    unsafe fn free(&mut self, block: NonNull<u8>, size: usize);
    unsafe fn resize(&mut self, block: NonNull<u8>, old: usize, new: usize) -> NonNull<u8>;
}

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 16).expect("the sizes are small")
}

fn memory() -> NonNull<u8> {
    // SAFETY: the size is not 0.
    let memory = unsafe { System.alloc(Layout::from_size_align(SIZE, 4096).expect("it is a power of two")) };
    NonNull::new(memory).expect("there is enough memory")
}

struct Domain(NonNull<DomainHeap>);

impl Domain {
    fn new(checks: HeapChecks) -> Self {
        // SAFETY: the memory is never used otherwise.
        Self(unsafe { DomainHeap::create(memory(), SIZE, checks, 0x5eed) })
    }
}

impl Heap for Domain {
    fn allocate(&mut self, size: usize) -> NonNull<u8> {
        // SAFETY: this is the only reference.
        unsafe { self.0.as_mut() }.allocate(size, 16, 0).expect("the heap is whole").expect("the heap is large enough")
    }

    unsafe fn free(&mut self, block: NonNull<u8>, _: usize) {
        // SAFETY: this is the only reference.
        let heap = unsafe { self.0.as_mut() };
        // SAFETY: the caller no longer uses the block.
        unsafe { heap.free(block, 0) }.expect("the block is live");
    }

    unsafe fn resize(&mut self, block: NonNull<u8>, _: usize, new: usize) -> NonNull<u8> {
        // SAFETY: this is the only reference.
        let heap = unsafe { self.0.as_mut() };
        // SAFETY: the caller no longer uses the block.
        unsafe { heap.reallocate(block, new, 0) }.expect("the block is live").expect("the heap is large enough")
    }
}

struct Glibc;

impl Heap for Glibc {
    fn allocate(&mut self, size: usize) -> NonNull<u8> {
        // SAFETY: the size is not 0.
        NonNull::new(unsafe { System.alloc(layout(size)) }).expect("there is enough memory")
    }

    unsafe fn free(&mut self, block: NonNull<u8>, size: usize) {
        // SAFETY: it was allocated so.
        unsafe { System.dealloc(block.as_ptr(), layout(size)) };
    }

    unsafe fn resize(&mut self, block: NonNull<u8>, old: usize, new: usize) -> NonNull<u8> {
        // SAFETY: it was allocated so.
        NonNull::new(unsafe { System.realloc(block.as_ptr(), layout(old), new) }).expect("there is enough memory")
    }
}

impl Heap for linked_list_allocator::Heap {
    fn allocate(&mut self, size: usize) -> NonNull<u8> {
        self.allocate_first_fit(layout(size)).expect("the heap is large enough")
    }

    unsafe fn free(&mut self, block: NonNull<u8>, size: usize) {
        // SAFETY: it was allocated so.
        unsafe { self.deallocate(block, layout(size)) };
    }

    unsafe fn resize(&mut self, block: NonNull<u8>, old: usize, new: usize) -> NonNull<u8> {
        let other = self.allocate(new);
        // SAFETY: both blocks have so many bytes.
        unsafe { block.copy_to_nonoverlapping(other, old.min(new)) };
        // SAFETY: it was allocated so.
        unsafe { self.free(block, old) };
        other
    }
}

struct Tlsf(rlsf::Tlsf<'static, u32, u32, 28, 8>);

impl Heap for Tlsf {
    fn allocate(&mut self, size: usize) -> NonNull<u8> {
        self.0.allocate(layout(size)).expect("the heap is large enough")
    }

    unsafe fn free(&mut self, block: NonNull<u8>, _: usize) {
        // SAFETY: it was allocated so.
        unsafe { self.0.deallocate(block, 16) };
    }

    unsafe fn resize(&mut self, block: NonNull<u8>, _: usize, new: usize) -> NonNull<u8> {
        // SAFETY: it was allocated so.
        unsafe { self.0.reallocate(block, layout(new)) }.expect("the heap is large enough")
    }
}

/// Numbers from a linear congruential generator.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// Replaces one of 1,000 live blocks in each step.
fn churn(heap: &mut dyn Heap, steps: usize, most: usize) {
    let mut numbers = Numbers(1);
    let mut blocks: Vec<_> =
        (0..1000).map(|_| numbers.below(most) + 1).map(|size| (heap.allocate(size), size)).collect();
    for _ in 0..steps {
        let index = numbers.below(blocks.len());
        let (old, size) = blocks[index];
        // SAFETY: the block is replaced.
        unsafe { heap.free(old, size) };
        let size = numbers.below(most) + 1;
        blocks[index] = (heap.allocate(size), size);
    }
    for (block, size) in blocks {
        // SAFETY: nothing uses the block.
        unsafe { heap.free(block, size) };
    }
}

/// Allocates and frees a block in each step.
fn pairs(heap: &mut dyn Heap, steps: usize, size: usize) {
    for _ in 0..steps {
        let block = black_box(heap.allocate(black_box(size)));
        // SAFETY: nothing uses the block.
        unsafe { heap.free(block, size) };
    }
}

/// The same, with 1,000 holes that are too small.
fn holes(heap: &mut dyn Heap, steps: usize) {
    const SMALL: usize = 2000;
    let blocks: Vec<_> = (0..2000).map(|_| heap.allocate(SMALL)).collect();
    let free = |heap: &mut dyn Heap, odd: usize| {
        for block in blocks.iter().skip(odd).step_by(2) {
            // SAFETY: each block is freed once.
            unsafe { heap.free(*block, SMALL) };
        }
    };
    free(heap, 0);
    pairs(heap, steps, 8192);
    free(heap, 1);
}

/// Grows two blocks in turn, by an eighth in each step.
fn growth(heap: &mut dyn Heap, steps: usize) {
    let start = 64;
    let mut blocks = [(); 2].map(|()| (heap.allocate(start), start));
    for step in 0..steps {
        let (block, size) = blocks[step % 2];
        let new = if size > 1 << 20 { start } else { size + size / 8 };
        // SAFETY: the block is replaced.
        blocks[step % 2] = (unsafe { heap.resize(block, size, new) }, new);
    }
    for (block, size) in blocks {
        // SAFETY: nothing uses the block.
        unsafe { heap.free(block, size) };
    }
}

type Pattern = (&'static str, usize, fn(&mut dyn Heap, usize));

fn main() {
    let patterns: [Pattern; 5] = [
        ("64 bytes", 1_000_000, |heap, steps| pairs(heap, steps, 64)),
        ("churn to 4 KiB", 300_000, |heap, steps| churn(heap, steps, 4096)),
        ("churn to 64 KiB", 300_000, |heap, steps| churn(heap, steps, 65_536)),
        ("8 KiB, 1,000 holes", 300_000, holes),
        ("realloc growth", 10_000, growth),
    ];
    let tlsf = || {
        let mut tlsf = rlsf::Tlsf::new();
        // SAFETY: the memory is never used otherwise.
        let bytes = unsafe { NonNull::slice_from_raw_parts(memory().cast(), SIZE / 2).as_mut() };
        tlsf.insert_free_block(bytes);
        Tlsf(tlsf)
    };
    // SAFETY: the memory is never used otherwise.
    let list = || unsafe { linked_list_allocator::Heap::new(memory().as_ptr(), SIZE) };
    let heaps: [(&str, Box<dyn Heap>); 5] = [
        ("glibc", Box::new(Glibc)),
        ("fast checks", Box::new(Domain::new(HeapChecks::Fast))),
        ("full checks", Box::new(Domain::new(HeapChecks::Full))),
        ("rlsf", Box::new(tlsf())),
        ("linked list", Box::new(list())),
    ];
    // Cargo adds an option.
    let wanted: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| name.contains(wanted));
    println!("{:14}{}", "", patterns.map(|(name, ..)| format!("{name:>20}")).concat());
    for (name, mut heap) in heaps.into_iter().filter(|(name, _)| is_wanted(name)) {
        print!("{name:14}");
        for (_, steps, pattern) in patterns {
            let steps = if name == "linked list" { steps / 10 } else { steps };
            let run = |heap: &mut dyn Heap| {
                let start = Instant::now();
                pattern(heap, steps);
                start.elapsed().as_nanos() as f64 / steps as f64
            };
            let best = (0..5).map(|_| run(&mut *heap)).fold(f64::INFINITY, f64::min);
            print!("{best:>20.1}");
        }
        println!();
    }
}
