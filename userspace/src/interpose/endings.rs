//! Functions that end the program or leave frames. In a domain they end the call.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::{c_char, c_int, c_void};
use std::mem;

use super::Next;
use crate::inside::libc as inside;
use crate::{rights, sys, thread};

/// abort(3).
///
/// # Safety
///
/// None: it is C's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn abort() -> ! {
    if let Some(heap) = inside::heap() {
        inside::abort(heap);
    }
    // SAFETY: it is the C library's function of this name.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn() -> !>(Next::abort.get()) };
    // SAFETY: the same contract.
    unsafe { next() }
}

macro_rules! exits {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// None: it is C's.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(status: c_int) -> ! {
                if rights::is_in_domain() {
                    inside::exit(status);
                }
                // SAFETY: it is the C library's function of this name.
                let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(c_int) -> !>(Next::$name.get()) };
                // SAFETY: the same contract.
                unsafe { next(status) }
            }
        )*
    };
}

exits! {
    /// exit(3).
    exit;
    /// _exit(2).
    _exit;
    /// _Exit(2).
    _Exit;
    /// quick_exit(3).
    quick_exit;
}

/// What code calls whose stack canary has changed.
///
/// # Safety
///
/// None: it is the compiler's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __stack_chk_fail() -> ! {
    if rights::is_in_domain() {
        inside::stack_chk_fail();
    }
    // SAFETY: it is the C library's function of this name.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn() -> !>(Next::__stack_chk_fail.get()) };
    // SAFETY: the same contract.
    unsafe { next() }
}

/// What a failed assertion in C calls.
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __assert_fail(
    assertion: *const c_char,
    file: *const c_char,
    line: libc::c_uint,
    function: *const c_char,
) -> ! {
    type Function = unsafe extern "C" fn(*const c_char, *const c_char, libc::c_uint, *const c_char) -> !;
    if rights::is_in_domain() {
        inside::assert_fail(assertion, file, line);
    }
    // SAFETY: it is the C library's function of this name.
    let next = unsafe { mem::transmute::<usize, Function>(Next::__assert_fail.get()) };
    // SAFETY: the same contract.
    unsafe { next(assertion, file, line, function) }
}

/// C++'s `std::terminate`, which an exception that nobody catches ends in.
///
/// # Safety
///
/// None: it is C++'s.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn _ZSt9terminatev() -> ! {
    if rights::is_in_domain() {
        inside::terminate();
    }
    match Next::terminate.find() {
        Some(next) => {
            // SAFETY: it is the C++ library's function of this name.
            let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn() -> !>(next) };
            // SAFETY: the same contract.
            unsafe { next() }
        }
        // Loaded out of reach of the search; this is what it does.
        // SAFETY: abort can be called at any time.
        None => unsafe { abort() },
    }
}

/// The same, by the name by which the C++ library calls it when an exception finds no handler.
///
/// # Safety
///
/// As for the C++ library.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn _ZN10__cxxabiv111__terminateEPFvvE(handler: *mut c_void) -> ! {
    if rights::is_in_domain() {
        inside::terminate();
    }
    match Next::terminate_with.find() {
        Some(next) => {
            // SAFETY: it is the C++ library's function of this name.
            let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(*mut c_void) -> !>(next) };
            // SAFETY: the same contract.
            unsafe { next(handler) }
        }
        None => {
            // SAFETY: the C++ library's own handler, to be called for this.
            let handler = unsafe { mem::transmute::<*mut c_void, Option<unsafe extern "C" fn()>>(handler) };
            if let Some(handler) = handler {
                // SAFETY: as above.
                unsafe { handler() };
            }
            // SAFETY: abort can be called at any time.
            unsafe { abort() }
        }
    }
}

/// Returns the stack pointer that a jump buffer holds.
///
/// glibc keeps it rotated and mixed with the thread's pointer guard (2.36, `sysdeps/x86_64/jmpbuf-offsets.h`).
///
/// # Safety
///
/// The buffer is readable.
unsafe fn stack_of(buffer: *const c_void) -> usize {
    const STACK: usize = 6;
    // SAFETY: the buffer is longer than that.
    let mangled = unsafe { buffer.cast::<u64>().wrapping_add(STACK).read() };
    (mangled.rotate_right(17) ^ sys::pointer_guard()) as usize
}

macro_rules! jumps {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// As C says.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(buffer: *mut c_void, value: c_int) -> ! {
                // SAFETY: the caller answers for the buffer.
                let target = unsafe { stack_of(buffer) };
                if rights::is_in_domain() {
                    inside::longjmp(target);
                } else if let Some(thread) = thread::current() {
                    thread.before_jump(target);
                }
                // SAFETY: it is the C library's function of this name.
                let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(*mut c_void, c_int) -> !>(Next::$name.get()) };
                // SAFETY: the same contract.
                unsafe { next(buffer, value) }
            }
        )*
    };
}

jumps! {
    /// longjmp(3).
    longjmp;
    /// longjmp(3), by another name.
    _longjmp;
    /// siglongjmp(3).
    siglongjmp;
    /// longjmp(3), with a check, for code that was compiled with `_FORTIFY_SOURCE`.
    __longjmp_chk;
}
