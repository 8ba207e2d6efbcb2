//! Destructors of thread-locals. In a domain none is registered.
//!
//! A thread-local with a destructor registers it with the C library at its first use. The C library writes its own data
//! and the loader's, and a domain can write neither. A discard ends a domain's thread-locals without destructors, so in
//! a domain this function does nothing.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::{c_int, c_void};

use super::Next;
use crate::memory::locals;

type Destructor = unsafe extern "C" fn(*mut c_void);
type Register = unsafe extern "C" fn(Destructor, *mut c_void, *mut c_void) -> c_int;

/// Registers a destructor of the calling thread. Rust's std and C++'s `thread_local` call it.
///
/// # Safety
///
/// The destructor may be called with the object when the thread ends.
///
/// # References
///
/// glibc 2.36, `stdlib/cxa_thread_atexit_impl.c`.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn __cxa_thread_atexit_impl(
    destructor: Destructor,
    object: *mut c_void,
    library: *mut c_void,
) -> c_int {
    if locals::says_in_domain() {
        return 0;
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let register = unsafe { std::mem::transmute::<usize, Register>(Next::__cxa_thread_atexit_impl.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { register(destructor, object, library) }
}
