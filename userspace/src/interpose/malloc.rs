//! The malloc family.
//!
//! In a domain these functions allocate from the domain's heap. Outside domains they call the C library, or a sanitizer
//! if the program has one, and then it has no domains. Rust's default allocator calls them too. A thread-local says which
//! heap to use. Each domain has its own copy of it, so entering a domain writes nothing here.
//!
//! In a domain, a pointer that is not a live block of the domain's heap ends the call with a violation.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};
use std::ptr::{self, NonNull};

use pkru::heap::DomainHeap;

use super::Next;
use crate::inside::libc::{self as inside, heap};
use crate::loader::route;
use crate::memory::locals::{HeapWord, WhichHeap};
use crate::sys::{self, __libc_calloc, __libc_free, __libc_malloc, __libc_memalign, __libc_realloc};

fn fail(errno: c_int) -> *mut c_void {
    sys::set_errno(errno);
    ptr::null_mut()
}

/// malloc(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn malloc(size: usize) -> *mut c_void {
    // The return address identifies the code that allocates or frees.
    naked_asm!("mov rsi, [rsp]", "jmp {}", sym allocate)
}

#[unsafe(link_section = "pkru_malloc")]
unsafe extern "C" fn allocate(size: usize, caller: u64) -> *mut c_void {
    let word = HeapWord::current();
    match word.which() {
        // SAFETY: in a domain the pointer leads to its heap, which nothing else uses at this moment.
        WhichHeap::Fast(heap) => inside::malloc::<false>(unsafe { &mut *heap }, size, caller),
        WhichHeap::Full => allocate_with_full_checks(size, caller, word),
        WhichHeap::Outside => {
            let next = sys::sanitizers_malloc().unwrap_or(__libc_malloc);
            // SAFETY: this is the function of this name that this one replaces, with the same contract.
            unsafe { next(size) }
        }
    }
}

// The full checks have functions of their own, so that the fast ones save no registers.

#[inline(never)]
#[unsafe(link_section = "pkru_malloc")]
extern "C" fn allocate_with_full_checks(size: usize, caller: u64, word: HeapWord) -> *mut c_void {
    // SAFETY: this is called in a domain, whose heap nothing else uses at this moment.
    inside::malloc::<true>(unsafe { &mut *word.heap() }, size, caller)
}

#[inline(never)]
#[unsafe(link_section = "pkru_malloc")]
unsafe extern "C" fn release_with_full_checks(block: *mut c_void, caller: u64, word: HeapWord) {
    // SAFETY: this is called in a domain, whose heap nothing else uses at this moment.
    let heap = unsafe { &mut *word.heap() };
    // SAFETY: the caller no longer uses the block.
    unsafe { inside::free::<true>(heap, block, caller) };
}

/// calloc(3). Fails with ENOMEM if the product overflows.
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    naked_asm!("mov rdx, [rsp]", "jmp {}", sym allocate_zeroed)
}

unsafe extern "C" fn allocate_zeroed(count: usize, size: usize, caller: u64) -> *mut c_void {
    match heap() {
        Some(heap) => inside::calloc(heap, count, size, caller),
        None => {
            let next = sys::sanitizers_calloc().unwrap_or(__libc_calloc);
            // SAFETY: this is the function of this name that this one replaces, with the same contract.
            unsafe { next(count, size) }
        }
    }
}

/// realloc(3). In a domain a size of 0 allocates a block, as C17 allows.
///
/// # Safety
///
/// The block is null or was allocated here. It is not used afterwards, unless null is returned.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
    naked_asm!("mov rdx, [rsp]", "jmp {}", sym reallocate)
}

unsafe extern "C" fn reallocate(block: *mut c_void, size: usize, caller: u64) -> *mut c_void {
    match heap() {
        // SAFETY: the caller no longer uses the block.
        Some(heap) => unsafe { inside::realloc(heap, block, size, caller) },
        None => {
            if let Some(next) = sys::sanitizers_realloc() {
                // SAFETY: this is the function of this name that this one replaces, with the same contract.
                return unsafe { next(block, size) };
            }
            if let Some(old) = NonNull::new(block.cast()) {
                refuse_of_domain(old);
            }
            // SAFETY: this is the function of this name that this one replaces, with the same contract.
            unsafe { __libc_realloc(block, size) }
        }
    }
}

/// reallocarray(3). Fails with ENOMEM if the product overflows.
///
/// # Safety
///
/// As for [`realloc`].
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn reallocarray(block: *mut c_void, count: usize, size: usize) -> *mut c_void {
    naked_asm!("mov rcx, [rsp]", "jmp {}", sym reallocate_array)
}

unsafe extern "C" fn reallocate_array(block: *mut c_void, count: usize, size: usize, caller: u64) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: this function has the same contract, which the caller fulfils.
        Some(size) => unsafe { reallocate(block, size, caller) },
        None => fail(libc::ENOMEM),
    }
}

/// free(3).
///
/// # Safety
///
/// The block is null or was allocated here, and is not used afterwards.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn free(block: *mut c_void) {
    naked_asm!("mov rsi, [rsp]", "jmp {}", sym release)
}

#[unsafe(link_section = "pkru_malloc")]
unsafe extern "C" fn release(block: *mut c_void, caller: u64) {
    let word = HeapWord::current();
    match word.which() {
        WhichHeap::Fast(heap) => {
            // SAFETY: in a domain the pointer leads to its heap, which nothing else uses at this moment.
            let heap = unsafe { &mut *heap };
            // SAFETY: the caller no longer uses the block.
            unsafe { inside::free::<false>(heap, block, caller) }
        }
        // SAFETY: as above.
        WhichHeap::Full => unsafe { release_with_full_checks(block, caller, word) },
        WhichHeap::Outside => {
            let Some(given) = NonNull::new(block.cast()) else { return };
            if let Some(next) = sys::sanitizers_free() {
                // SAFETY: this is the function of this name that this one replaces, with the same contract.
                return unsafe { next(block) };
            }
            refuse_of_domain(given);
            // SAFETY: this is the function of this name that this one replaces, with the same contract.
            unsafe { __libc_free(block) };
        }
    }
}

/// Outside domains: aborts the program if a block is a domain's. The C library would trust the bytes before the block,
/// which the domain can write.
///
/// With a sanitizer it is not called: there are no domains, and the bytes before a block may be unmapped.
#[inline]
fn refuse_of_domain(block: NonNull<u8>) {
    // SAFETY: a block of the C library or of a domain has at least 8 readable bytes before it.
    if unsafe { DomainHeap::marks(block) } {
        refuse();
    }
}

#[cold]
fn refuse() -> ! {
    sys::abort_with(b"pkru-userspace: a domain's block was freed, resized or measured outside the domain\n")
}

/// memalign(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn memalign(align: usize, size: usize) -> *mut c_void {
    naked_asm!("mov rdx, [rsp]", "jmp {}", sym allocate_aligned)
}

unsafe extern "C" fn allocate_aligned(align: usize, size: usize, caller: u64) -> *mut c_void {
    match heap() {
        Some(heap) => inside::memalign(heap, align, size, caller),
        None => {
            let next = sys::sanitizers_memalign().unwrap_or(__libc_memalign);
            // SAFETY: this is the function of this name that this one replaces, with the same contract.
            unsafe { next(align, size) }
        }
    }
}

/// aligned_alloc(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    naked_asm!("mov rdx, [rsp]", "jmp {}", sym allocate_aligned_to_power)
}

unsafe extern "C" fn allocate_aligned_to_power(align: usize, size: usize, caller: u64) -> *mut c_void {
    if !align.is_power_of_two() {
        return fail(libc::EINVAL);
    }
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { allocate_aligned(align, size, caller) }
}

/// posix_memalign(3). It leaves `errno` alone.
///
/// # Safety
///
/// `out` is writable.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn posix_memalign(out: *mut *mut c_void, align: usize, size: usize) -> c_int {
    naked_asm!("mov rcx, [rsp]", "jmp {}", sym allocate_aligned_to)
}

unsafe extern "C" fn allocate_aligned_to(out: *mut *mut c_void, align: usize, size: usize, caller: u64) -> c_int {
    if !align.is_power_of_two() || !align.is_multiple_of(size_of::<*mut c_void>()) {
        return libc::EINVAL;
    }
    let block = match heap() {
        Some(heap) => inside::posix_memalign(heap, align, size, caller),
        None => {
            let next = sys::sanitizers_memalign().unwrap_or(__libc_memalign);
            // SAFETY: this is the function of this name that this one replaces, with the same contract.
            sys::keep_errno(|| unsafe { next(align, size) })
        }
    };
    if block.is_null() {
        return libc::ENOMEM;
    }
    // SAFETY: the caller guarantees that `out` is writable.
    unsafe { out.write(block) };
    0
}

/// valloc(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn valloc(size: usize) -> *mut c_void {
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { memalign(sys::page_size(), size) }
}

/// pvalloc(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn pvalloc(size: usize) -> *mut c_void {
    match size.max(1).checked_next_multiple_of(sys::page_size()) {
        // SAFETY: this function has the same contract, which the caller fulfils.
        Some(size) => unsafe { valloc(size) },
        None => fail(libc::ENOMEM),
    }
}

/// malloc_usable_size(3).
///
/// # Safety
///
/// The block is null or was allocated here.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn malloc_usable_size(block: *mut c_void) -> usize {
    naked_asm!("mov rsi, [rsp]", "jmp {}", sym usable_size)
}

unsafe extern "C" fn usable_size(block: *mut c_void, caller: u64) -> usize {
    let Some(block) = NonNull::new(block) else { return 0 };
    if let Some(heap) = heap() {
        return inside::malloc_usable_size(heap, block, caller);
    }
    if let Some(next) = sys::sanitizers_usable_size() {
        // SAFETY: this is the function of this name that this one replaces, with the same contract.
        return unsafe { next(block.as_ptr()) };
    }
    refuse_of_domain(block.cast());
    let Some(next) = Next::malloc_usable_size.find() else { return 0 };
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let function = unsafe { std::mem::transmute::<usize, sys::UsableSize>(next) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { function(block.as_ptr()) }
}

/// Returns whether an instruction belongs to the quick functions. They use the heap's records as they find them; the others
/// check these first, and do not fault.
pub(crate) fn is_quick_path(instruction: u64) -> bool {
    // The linker defines these for a section whose name is an identifier.
    unsafe extern "C" {
        #[link_name = "__start_pkru_malloc"]
        static START: u8;
        #[link_name = "__stop_pkru_malloc"]
        static STOP: u8;
    }
    (&raw const START as u64..&raw const STOP as u64).contains(&instruction)
}

/// Returns whether the loader binds libraries to these functions and not to another library's.
pub(crate) fn is_routed() -> bool {
    route::are_bound(&[c"malloc", c"calloc", c"realloc", c"free"])
}
