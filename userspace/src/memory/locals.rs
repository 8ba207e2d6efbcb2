//! Thread-locals that tell code in a domain about its domain. Each domain has its own copy.
//!
//! They are set when the domain is made ready, so entering it writes nothing. Code in the domain can overwrite them.
//! They serve that code only: no decision outside the domain depends on them.

#![expect(unsafe_code, reason = "it defines a thread-local in assembly")]

use std::arch::{asm, global_asm};
use std::cell::Cell;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::{self, NonNull};

use pkru::gate::Context;
use pkru::heap::{DomainHeap, HeapChecks};

// A [`HeapWord`]. For a `thread_local!` the compiler emits a call, for which every allocation would save
// registers; the linker removes it too late.
global_asm!(
    ".pushsection .tbss.pkru_userspace_heap, \"awT\", @nobits",
    ".p2align 3",
    ".globl pkru_userspace_heap",
    ".hidden pkru_userspace_heap",
    ".type pkru_userspace_heap, @object",
    ".size pkru_userspace_heap, 8",
    "pkru_userspace_heap:",
    ".zero 8",
    ".popsection",
);

/// The other values. All are zero outside domains.
pub(crate) struct Locals {
    /// The start and the end of the stack.
    stack: Cell<(usize, usize)>,
    /// The gate's record of calls, outside the domain.
    context: Cell<*const Context>,
    /// The call that is running, if it has callbacks.
    call: Cell<*const c_void>,
}

thread_local! {
    static LOCALS: Locals = const {
        Locals {
            stack: Cell::new((0, 0)),
            context: Cell::new(ptr::null()),
            call: Cell::new(ptr::null()),
        }
    };
}

impl Locals {
    /// Returns the values for a domain with this stack. The gate keeps its calls in `context`, which lives as long as the
    /// domain.
    pub(crate) const fn new(stack: &Range<usize>, context: *const Context) -> Self {
        Self { stack: Cell::new((stack.start, stack.end)), context: Cell::new(context), call: Cell::new(ptr::null()) }
    }

    /// Returns the address of the calling thread's copy.
    pub(crate) fn address() -> usize {
        LOCALS.with(|locals| ptr::from_ref(locals).addr())
    }
}

/// Which heap serves the calling code. One comparison with 0 tells three cases apart.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct HeapWord(isize);

/// The three cases.
#[derive(Debug, Clone, Copy)]
pub(crate) enum WhichHeap {
    /// The C library's: the code runs outside domains.
    Outside,
    /// A domain's, with the fast checks.
    Fast(*mut DomainHeap),
    /// A domain's, with the full checks.
    Full,
}

impl HeapWord {
    /// Returns the word for a domain with this heap.
    pub(crate) fn new(heap: NonNull<DomainHeap>, checks: HeapChecks) -> Self {
        let address = heap.as_ptr().expose_provenance() as isize;
        Self(if checks == HeapChecks::Full { address | isize::MIN } else { address })
    }

    /// Returns the word of the calling code.
    #[inline(always)]
    pub(crate) fn current() -> Self {
        let word;
        // SAFETY: it reads the thread-local, which every thread and every domain has.
        unsafe {
            asm!(
                "mov {word}, qword ptr [rip + pkru_userspace_heap@GOTTPOFF]",
                "mov {word}, qword ptr fs:[{word}]",
                word = out(reg) word,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        Self(word)
    }

    #[inline(always)]
    pub(crate) fn which(self) -> WhichHeap {
        if self.0 > 0 {
            WhichHeap::Fast(self.heap())
        } else if self.0 == 0 {
            WhichHeap::Outside
        } else {
            WhichHeap::Full
        }
    }

    /// Returns the heap, or null outside domains.
    #[inline(always)]
    pub(crate) fn heap(self) -> *mut DomainHeap {
        ptr::with_exposed_provenance_mut((self.0 & isize::MAX) as usize)
    }
}

/// Returns the heap of the domain that the calling code runs in, or null outside domains.
#[inline(always)]
pub(crate) fn heap() -> *mut DomainHeap {
    HeapWord::current().heap()
}

/// Returns the address of the calling thread's copy of the [`HeapWord`].
pub(crate) fn heap_address() -> usize {
    let address;
    // SAFETY: the ABI has the thread pointer at the address that it is.
    unsafe {
        asm!(
            "mov {address}, qword ptr fs:[0]",
            "add {address}, qword ptr [rip + pkru_userspace_heap@GOTTPOFF]",
            address = out(reg) address,
            options(pure, readonly, nostack),
        );
    }
    address
}

/// Returns whether the thread-locals say that the calling code runs in a domain.
///
/// A domain can forge this. Code that must trust the answer calls
/// [`rights::is_in_domain`](crate::rights::is_in_domain).
pub(crate) fn says_in_domain() -> bool {
    !heap().is_null()
}

/// In a domain: returns whether an address lies on its stack.
pub(crate) fn is_on_own_stack(address: usize) -> bool {
    let (start, end) = LOCALS.with(|locals| locals.stack.get());
    (start..end).contains(&address)
}

/// In a domain: returns the gate's record of its calls.
pub(crate) fn context() -> *const Context {
    LOCALS.with(|locals| locals.context.get())
}

/// In a domain: returns the call that is running, or null if it has no callbacks.
pub(crate) fn call() -> *const c_void {
    LOCALS.with(|locals| locals.call.get())
}

/// In a domain: sets the call that is running; null when it ends.
pub(crate) fn set_call(call: *const c_void) {
    LOCALS.with(|locals| locals.call.set(call));
}
