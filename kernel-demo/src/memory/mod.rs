//! Memory: frames, page tables, the kernel's heap.
//!
//! The identity map covers the first 4 GiB. It holds the kernel, the kernel's heap, all free frames and all page tables.
//! Domains' memory is mapped above it, page by page.

mod frames;
mod heap;
mod tables;

pub use tables::{FLAGS, leaf, map, map_large, model_walk, set_flags, tag, unmap};
pub(crate) use tables::{flags, set_kernel_pages_user, tag_trap_stacks};

/// Sets up the frame allocator, the heap and the page tables. `start_info` is the address of PVH's start info.
pub(crate) fn init(start_info: u64) {
    let heap = frames::init(start_info);
    heap::init(heap);
    tables::init();
}

/// Returns the number of free frames.
#[must_use]
pub fn free_frames() -> usize {
    frames::ALLOCATOR.lock().free()
}
