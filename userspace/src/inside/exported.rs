//! Blocks of the domain's heap that a result refers to.
//!
//! The caller copies them after the call, so the domain frees them when its next call begins. The list of them lies in
//! the domain. Wires are not asked: they can be copied, and be received twice or never.

#![expect(unsafe_code, reason = "it frees forgotten blocks")]

use std::alloc::Layout;
use std::mem::ManuallyDrop;

use pkru::heap::DomainHeap;

use crate::memory::locals;

/// A block that the caller may still read.
struct Exported {
    start: *mut u8,
    layout: Layout,
}

impl Drop for Exported {
    fn drop(&mut self) {
        // SAFETY: it is the block of a vector that `export` has forgotten, with that vector's layout.
        unsafe { std::alloc::dealloc(self.start, self.layout) };
    }
}

/// Keeps a vector's block until the next call, and then frees it.
pub(crate) fn export<W>(wires: Vec<W>) {
    let layout = Layout::array::<W>(wires.capacity()).expect("a vector has a layout");
    let mut wires = ManuallyDrop::new(wires);
    // SAFETY: the pointer is null, or leads to the domain's heap, which nothing else uses at this moment.
    let Some(heap) = (unsafe { locals::heap().as_ref() }) else { return };
    // A vector forged of other memory has no block of the heap's.
    if layout.size() == 0 || !heap.contains(wires.as_ptr().addr()) {
        return;
    }
    let root = heap.root().cast::<Vec<Exported>>();
    let list = if root.is_null() { Box::into_raw(Box::default()) } else { root };
    if root.is_null() {
        // SAFETY: as above; the allocation is over.
        if let Some(heap) = unsafe { locals::heap().as_mut() } {
            heap.set_root(list.cast());
        }
    }
    // SAFETY: this function made the list, and this thread alone runs in the domain.
    unsafe { &mut *list }.push(Exported { start: wires.as_mut_ptr().cast(), layout });
}

/// Frees what the last call exported from the domain's heap.
///
/// # Safety
///
/// Code runs in a domain, and this is its heap.
#[inline]
pub(crate) unsafe fn free_exported(heap: *mut DomainHeap) {
    // SAFETY: nothing else uses the heap at this moment.
    let heap = unsafe { &mut *heap };
    // An allocation that failed in an earlier call is not the reason if this one aborts.
    heap.note_failed(0);
    let list = heap.root().cast::<Vec<Exported>>();
    if !list.is_null() {
        free_all(list);
    }
}

#[cold]
fn free_all(list: *mut Vec<Exported>) {
    // SAFETY: as in `export`.
    unsafe { &mut *list }.clear();
}
