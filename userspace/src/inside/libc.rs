//! Functions of the C library, as they act in a domain.
//!
//! The functions that replace the C library's (`interpose/`) call these where the calling code runs in a domain.

#![expect(unsafe_code, reason = "it is C, by contract")]

use std::ffi::{c_char, c_int, c_void};
use std::ptr::{self, NonNull};

use pkru::heap::{ALIGNMENT, DomainHeap, HeapError};

use super::abort::{AbortReason, abort_call, corruption_words};
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

/// Uses the heap where it may find a mistake, which ends the call. `caller` is the return address of the function that
/// the code in the domain has called, or 0.
fn checked<T>(heap: &mut DomainHeap, caller: u64, action: impl FnOnce(&mut DomainHeap) -> Result<T, HeapError>) -> T {
    match action(heap) {
        Ok(value) => value,
        Err(HeapError::Corrupt(corruption)) => {
            let words = corruption_words(&corruption);
            abort_call(AbortReason::HeapCorruption { words: words.as_ptr().expose_provenance(), caller })
        }
        Err(error) => abort_call(AbortReason::InvalidFree { error, caller }),
    }
}

/// Checks what the call has allocated and freed, before its result is accepted.
#[inline(always)]
pub(crate) fn check_heap(heap: *mut DomainHeap) {
    // SAFETY: `entry` passes the domain's heap, and nothing else uses that at this moment.
    if unsafe { (*heap).was_used() } {
        check_used_heap(heap);
    }
}

#[cold]
#[inline(never)]
fn check_used_heap(heap: *mut DomainHeap) {
    // SAFETY: as in `check_heap`.
    checked(unsafe { &mut *heap }, 0, DomainHeap::check);
}

/// Allocates `size` bytes. `FULL` says that the heap has the full checks.
#[inline(always)]
pub(crate) fn malloc<const FULL: bool>(heap: &mut DomainHeap, size: usize, caller: u64) -> *mut c_void {
    match heap.allocate_quickly::<FULL>(size, caller as usize) {
        Some(block) => block.as_ptr().cast(),
        None => malloc_slowly(size, caller, heap),
    }
}

// The slow paths do not unwind and take their arguments in the order of the quick ones, so that these can jump to them.

#[inline(never)]
extern "C" fn malloc_slowly(size: usize, caller: u64, heap: &mut DomainHeap) -> *mut c_void {
    memalign(heap, ALIGNMENT, size, caller)
}

/// Allocates zeroed memory. A product that overflows fails.
pub(crate) fn calloc(heap: &mut DomainHeap, count: usize, size: usize, caller: u64) -> *mut c_void {
    let size = count.checked_mul(size);
    pointer(size.and_then(|size| checked(heap, caller, |heap| heap.allocate_zeroed(size, caller as usize))))
}

/// Resizes a block. A size of 0 allocates a block, as C17 allows.
///
/// # Safety
///
/// The calling code uses the block no more.
pub(crate) unsafe fn realloc(heap: &mut DomainHeap, block: *mut c_void, size: usize, caller: u64) -> *mut c_void {
    match NonNull::new(block.cast()) {
        None => memalign(heap, ALIGNMENT, size, caller),
        Some(block) => {
            // SAFETY: the caller answers for the block.
            pointer(checked(heap, caller, |heap| unsafe { heap.reallocate(block, size, caller as usize) }))
        }
    }
}

/// Frees a block.
///
/// # Safety
///
/// The calling code uses the block no more.
#[inline(always)]
pub(crate) unsafe fn free<const FULL: bool>(heap: &mut DomainHeap, block: *mut c_void, caller: u64) {
    // SAFETY: the caller answers for the block.
    if !unsafe { heap.free_quickly::<FULL>(block.cast(), caller as usize) } {
        // SAFETY: as above.
        unsafe { free_slowly(block, caller, heap) };
    }
}

/// # Safety
///
/// As for [`free`].
#[inline(never)]
unsafe extern "C" fn free_slowly(block: *mut c_void, caller: u64, heap: &mut DomainHeap) {
    if let Some(block) = NonNull::new(block.cast()) {
        // SAFETY: the caller answers for the block.
        checked(heap, caller, |heap| unsafe { heap.free(block, caller as usize) });
    }
}

/// Allocates aligned memory.
pub(crate) fn memalign(heap: &mut DomainHeap, align: usize, size: usize, caller: u64) -> *mut c_void {
    if align.is_power_of_two() {
        pointer(checked(heap, caller, |heap| heap.allocate(size, align, caller as usize)))
    } else {
        sys::set_errno(libc::EINVAL);
        ptr::null_mut()
    }
}

/// Allocates aligned memory, without setting `errno`.
pub(crate) fn posix_memalign(heap: &mut DomainHeap, align: usize, size: usize, caller: u64) -> *mut c_void {
    let block = checked(heap, caller, |heap| heap.allocate(size, align, caller as usize));
    block.map_or(ptr::null_mut(), |block| block.as_ptr().cast())
}

/// Returns the usable size of a block in bytes.
pub(crate) fn malloc_usable_size(heap: &mut DomainHeap, block: NonNull<c_void>, caller: u64) -> usize {
    checked(heap, caller, |heap| heap.usable_size(block.cast()))
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
