//! Physical and virtual memory: frames, page tables, the kernel's heap.
//!
//! The first 4 GiB are mapped to themselves; the kernel, its heap and all page tables lie there. Domains' memory is
//! mapped apart from it, page by page.

mod frames;
mod heap;
mod tables;

pub use tables::{
    FLAGS, Mapping, leaf, map, map_large, model_walk, set_flags, set_kernel_pages_user, tag, tag_trap_stacks, unmap,
};

pub(crate) fn init(start_info: u64) {
    let heap = frames::init(start_info);
    heap::init(heap);
    tables::init();
}

/// Returns how many frames are free.
#[must_use]
pub fn free_frames() -> usize {
    frames::ALLOCATOR.lock().free()
}
