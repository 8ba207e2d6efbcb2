//! Functions of the C library, as they act in a domain.
//!
//! The functions that replace the C library's (`interpose/`) call these where the calling code runs in a domain.

#![expect(unsafe_code, reason = "it is C, by contract")]

use std::ffi::{c_char, c_int, c_void};
use std::ptr::{self, NonNull};

use pkru::heap::{ALIGNMENT, DomainHeap, HeapError};

use super::abort::{AbortReason, abort_call};
use crate::memory::locals;
use crate::sys;

/// Returns the heap of the domain that is running; `None` outside any domain.
#[inline]
pub(crate) fn heap<'a>() -> Option<&'a mut DomainHeap> {
    // SAFETY: the pointer is null, or leads to the domain's heap, which only the call that is running there uses. The
    // functions that take this reference return before the next one is made.
    unsafe { locals::heap().as_mut() }
}

fn pointer(block: Option<NonNull<u8>>) -> *mut c_void {
    match block {
        Some(block) => block.as_ptr().cast(),
        None => {
            sys::set_errno(libc::ENOMEM);
            ptr::null_mut()
        }
    }
}

/// Ends the call on an invalid block. `caller` is the return address of the function that got it.
fn checked<T>(result: Result<T, HeapError>, caller: u64) -> T {
    match result {
        Ok(value) => value,
        Err(error) => abort_call(AbortReason::InvalidFree { error, caller }),
    }
}

/// Allocates `size` bytes.
#[inline]
pub(crate) fn malloc(heap: &mut DomainHeap, size: usize) -> *mut c_void {
    pointer(heap.allocate(size, ALIGNMENT))
}

/// Allocates zeroed memory. A product that overflows fails.
pub(crate) fn calloc(heap: &mut DomainHeap, count: usize, size: usize) -> *mut c_void {
    pointer(count.checked_mul(size).and_then(|size| heap.allocate_zeroed(size)))
}

/// Resizes a block. A size of 0 allocates a block, as C17 allows.
///
/// # Safety
///
/// The calling code uses the block no more.
pub(crate) unsafe fn realloc(heap: &mut DomainHeap, block: *mut c_void, size: usize, caller: u64) -> *mut c_void {
    match NonNull::new(block.cast()) {
        None => malloc(heap, size),
        // SAFETY: the caller answers for the block.
        Some(block) => pointer(checked(unsafe { heap.reallocate(block, size) }, caller)),
    }
}

/// Frees a block.
///
/// # Safety
///
/// The calling code uses the block no more.
#[inline]
pub(crate) unsafe fn free(heap: &mut DomainHeap, block: *mut c_void, caller: u64) {
    if let Some(block) = NonNull::new(block.cast()) {
        // SAFETY: the caller answers for the block.
        checked(unsafe { heap.free(block) }, caller);
    }
}

/// Allocates aligned memory.
pub(crate) fn memalign(heap: &mut DomainHeap, align: usize, size: usize) -> *mut c_void {
    if align.is_power_of_two() {
        pointer(heap.allocate(size, align))
    } else {
        sys::set_errno(libc::EINVAL);
        ptr::null_mut()
    }
}

/// Allocates aligned memory, without setting `errno`.
pub(crate) fn posix_memalign(heap: &mut DomainHeap, align: usize, size: usize) -> *mut c_void {
    heap.allocate(size, align).map_or(ptr::null_mut(), |block| block.as_ptr().cast())
}

/// Returns the usable size of a block in bytes.
pub(crate) fn malloc_usable_size(heap: &DomainHeap, block: NonNull<c_void>, caller: u64) -> usize {
    checked(heap.usable_size(block.cast()), caller)
}

/// abort(3).
pub(crate) fn abort(heap: &DomainHeap) -> ! {
    abort_call(match heap.last_failed() {
        0 => AbortReason::Abort,
        size => AbortReason::OutOfMemory { size },
    })
}

/// exit(3) and its variants.
pub(crate) fn exit(status: c_int) -> ! {
    abort_call(AbortReason::Exit { status })
}

/// raise(3) with a signal that would end the program.
pub(crate) fn raise(signal: c_int) -> ! {
    abort_call(AbortReason::Raised { signal })
}

/// The function that code calls whose stack canary has changed.
pub(crate) fn stack_chk_fail() -> ! {
    abort_call(AbortReason::StackSmashed)
}

/// The function that a failed assertion calls.
pub(crate) fn assert_fail(assertion: *const c_char, file: *const c_char, line: libc::c_uint) -> ! {
    let words = [assertion.addr(), file.addr(), line as usize];
    abort_call(AbortReason::Assertion { words: words.as_ptr().expose_provenance() })
}

/// C++'s `std::terminate`.
pub(crate) fn terminate() -> ! {
    abort_call(AbortReason::Exception)
}

/// Checks the stack pointer that longjmp(3) is about to set: a jump out of the domain ends the call.
pub(crate) fn longjmp(target: usize) {
    if !locals::is_on_own_stack(target) {
        abort_call(AbortReason::Jump { target });
    }
}

/// Fails as functions do that a domain may not call: returns -1 and sets `errno` to `EPERM`.
pub(crate) fn not_permitted() -> c_int {
    sys::set_errno(libc::EPERM);
    -1
}
