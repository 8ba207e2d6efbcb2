//! Thread-locals that tell code in a domain about its domain. Each domain has its own copy.
//!
//! They are set when the domain is made ready, so entering it writes nothing. Code in the domain can overwrite them.
//! They serve that code only: no decision outside the domain depends on them.

use std::cell::Cell;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::{self, NonNull};

use pkru::gate::Context;
use pkru::heap::DomainHeap;

/// The values. All are zero outside domains.
pub(crate) struct Locals {
    heap: Cell<*mut DomainHeap>,
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
            heap: Cell::new(ptr::null_mut()),
            stack: Cell::new((0, 0)),
            context: Cell::new(ptr::null()),
            call: Cell::new(ptr::null()),
        }
    };
}

impl Locals {
    /// Returns the values for a domain with this heap and stack. The gate keeps its calls in `context`, which lives as
    /// long as the domain.
    pub(crate) const fn new(heap: NonNull<DomainHeap>, stack: &Range<usize>, context: *const Context) -> Self {
        Self {
            heap: Cell::new(heap.as_ptr()),
            stack: Cell::new((stack.start, stack.end)),
            context: Cell::new(context),
            call: Cell::new(ptr::null()),
        }
    }

    /// Returns the address of the calling thread's copy.
    pub(crate) fn address() -> usize {
        LOCALS.with(|locals| ptr::from_ref(locals).addr())
    }
}

/// Returns the heap of the domain that the calling code runs in, or null outside domains.
#[inline]
pub(crate) fn heap() -> *mut DomainHeap {
    LOCALS.with(|locals| locals.heap.get())
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
