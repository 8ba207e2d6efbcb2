//! Functions that end the program or jump out of frames. In a domain they end the call.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::arch::naked_asm;
use std::ffi::{c_char, c_int, c_void};
use std::mem;

use super::Next;
use crate::inside::libc as inside;
use crate::thread::{self, Thread};
use crate::{rights, sys};

/// abort(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn abort() -> ! {
    if let Some(heap) = inside::heap() {
        inside::abort(heap);
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn() -> !>(Next::abort.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next() }
}

macro_rules! exits {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// None.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name(status: c_int) -> ! {
                if rights::is_in_domain() {
                    inside::exit(status);
                }
                // SAFETY: this is the address of the C library's function of this name, which has this type.
                let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(c_int) -> !>(Next::$name.get()) };
                // SAFETY: this function has the same contract, which the caller fulfils.
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

/// pthread_exit(3).
///
/// Within a signal handler that has interrupted a call of a domain, the call ends with the thread.
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C-unwind" fn pthread_exit(value: *mut c_void) -> ! {
    if rights::is_in_domain() {
        inside::exit(0);
    }
    let next = Next::pthread_exit.get();
    if thread::current().is_some_and(Thread::leave_handlers) {
        // SAFETY: this is the address of the C library's function of this name.
        unsafe { call_at_end(next, value) }
    }
    // SAFETY: as above.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C-unwind" fn(*mut c_void) -> !>(next) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(value) }
}

/// Calls a function as if nothing had called this one: an unwinder ends here.
///
/// `pthread_exit` unwinds the stack. Below a signal handler that has interrupted a domain lies the domain's stack, which
/// code in the domain can have written.
#[unsafe(naked)]
unsafe extern "C" fn call_at_end(function: usize, argument: *mut c_void) -> ! {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_undefined rip",
        "push rbp",
        "mov rax, rdi",
        "mov rdi, rsi",
        "call rax",
        "ud2",
        ".cfi_endproc",
    )
}

/// The function that compiled code calls when a stack canary has changed.
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn __stack_chk_fail() -> ! {
    if rights::is_in_domain() {
        inside::stack_chk_fail();
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn() -> !>(Next::__stack_chk_fail.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next() }
}

/// The function that a failed assert(3) calls.
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
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
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, Function>(Next::__assert_fail.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(assertion, file, line, function) }
}

/// C++'s `std::terminate`.
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn _ZSt9terminatev() -> ! {
    if rights::is_in_domain() {
        inside::terminate();
    }
    match Next::terminate.find() {
        Some(next) => {
            // SAFETY: this is the address of the C++ library's function of this name, which has this type.
            let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn() -> !>(next) };
            // SAFETY: this function has the same contract, which the caller fulfils.
            unsafe { next() }
        }
        // The C++ library is not in the loader's global scope. Its default handler aborts too.
        // SAFETY: abort has no requirements.
        None => unsafe { abort() },
    }
}

/// `__cxxabiv1::__terminate`, which the C++ library calls for an exception that nothing catches.
///
/// # Safety
///
/// `handler` is null or a terminate handler.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn _ZN10__cxxabiv111__terminateEPFvvE(handler: *mut c_void) -> ! {
    if rights::is_in_domain() {
        inside::terminate();
    }
    match Next::terminate_with.find() {
        Some(next) => {
            // SAFETY: this is the address of the C++ library's function of this name, which has this type.
            let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(*mut c_void) -> !>(next) };
            // SAFETY: this function has the same contract, which the caller fulfils.
            unsafe { next(handler) }
        }
        None => {
            // SAFETY: the caller guarantees that this is null or a function of this type.
            let handler = unsafe { mem::transmute::<*mut c_void, Option<unsafe extern "C" fn()>>(handler) };
            if let Some(handler) = handler {
                // SAFETY: a terminate handler may be called at any time.
                unsafe { handler() };
            }
            // SAFETY: abort has no requirements.
            unsafe { abort() }
        }
    }
}

/// Returns the stack pointer in a jump buffer.
///
/// glibc stores it XORed with the thread's pointer guard and rotated (2.36, `sysdeps/x86_64/jmpbuf-offsets.h`).
///
/// # Safety
///
/// The buffer is readable.
unsafe fn stack_of(buffer: *const c_void) -> usize {
    const STACK: usize = 6;
    // SAFETY: the buffer is readable, and the stack pointer is its seventh word.
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
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name(buffer: *mut c_void, value: c_int) -> ! {
                // SAFETY: the caller passes a valid jump buffer.
                let target = unsafe { stack_of(buffer) };
                if rights::is_in_domain() {
                    inside::longjmp(target);
                } else if let Some(thread) = thread::current() {
                    thread.before_jump(target);
                }
                // SAFETY: this is the address of the C library's function of this name, which has this type.
                let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(*mut c_void, c_int) -> !>(Next::$name.get()) };
                // SAFETY: this function has the same contract, which the caller fulfils.
                unsafe { next(buffer, value) }
            }
        )*
    };
}

jumps! {
    /// longjmp(3).
    longjmp;
    /// BSD's name of longjmp(3), which glibc defines as the same function.
    _longjmp;
    /// siglongjmp(3).
    siglongjmp;
    /// longjmp(3) with a check, for code that is compiled with `_FORTIFY_SOURCE`.
    __longjmp_chk;
}
