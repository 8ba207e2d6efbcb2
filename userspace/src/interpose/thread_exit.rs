//! Destructors of thread-locals, of which a domain runs none.
//!
//! A thread-local with a destructor registers it, when it is first used, with the C library, which notes that in data
//! of its own and in the loader's. A domain may write neither. Its thread-locals are dropped without a destructor when
//! the domain is discarded, so in a domain there is nothing to note. Outside, registration goes to the C library as
//! ever.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::{c_int, c_void};

use super::Next;
use crate::memory::locals;

type Destructor = unsafe extern "C" fn(*mut c_void);
type Register = unsafe extern "C" fn(Destructor, *mut c_void, *mut c_void) -> c_int;

/// Registers a destructor of the calling thread, for Rust's std and for C++'s `thread_local`.
///
/// # Safety
///
/// The destructor may be called with the object when the thread ends.
///
/// # References
///
/// glibc 2.36, `stdlib/cxa_thread_atexit_impl.c`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __cxa_thread_atexit_impl(
    destructor: Destructor,
    object: *mut c_void,
    library: *mut c_void,
) -> c_int {
    if locals::says_in_domain() {
        return 0;
    }
    // SAFETY: it is the C library's function of this name.
    let register = unsafe { std::mem::transmute::<usize, Register>(Next::__cxa_thread_atexit_impl.get()) };
    // SAFETY: the same contract.
    unsafe { register(destructor, object, library) }
}
