//! The kernel's heap.

#![expect(unsafe_code, reason = "an allocator hands out memory")]

use core::alloc::{GlobalAlloc, Layout};
use core::ops::Range;
use core::ptr::{self, NonNull};

use linked_list_allocator::Heap;
use spin::Mutex;

struct KernelHeap(Mutex<Heap>);

#[global_allocator]
static HEAP: KernelHeap = KernelHeap(Mutex::new(Heap::empty()));

/// Gives the heap its memory, a range of the identity map.
pub(super) fn init(range: Range<u64>) {
    let size = (range.end - range.start) as usize;
    // SAFETY: the frame allocator has reserved the range for the heap, and `memory::init` calls this once.
    unsafe { HEAP.0.lock().init(range.start as *mut u8, size) };
}

// SAFETY: `Heap` returns blocks that have the layout's size and alignment and do not overlap, and never unwinds.
unsafe impl GlobalAlloc for KernelHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.lock().allocate_first_fit(layout).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the caller promises that `alloc` returned the block for this layout.
            unsafe { self.0.lock().deallocate(block, layout) };
        }
    }
}
