//! Functions that start a program, which code in a domain may not.
//!
//! The C library runs the child on memory that it maps for that, until it is another program. A domain cannot write
//! such memory, and the child would die there without a word. Nor may it fork: the C library takes locks of its own for
//! that, and a domain that may write some of them fails at the next, with the first locked for good. `vfork` takes
//! none: its child runs in the domain too, and can end or become another program.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::{c_char, c_int};
use std::mem;

use super::Next;
use crate::inside::libc::not_permitted;
use crate::rights;

macro_rules! spawns {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// As C says.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(
                child: *mut libc::pid_t,
                program: *const c_char,
                actions: *const libc::posix_spawn_file_actions_t,
                attributes: *const libc::posix_spawnattr_t,
                arguments: *const *mut c_char,
                environment: *const *mut c_char,
            ) -> c_int {
                type Function = unsafe extern "C" fn(
                    *mut libc::pid_t,
                    *const c_char,
                    *const libc::posix_spawn_file_actions_t,
                    *const libc::posix_spawnattr_t,
                    *const *mut c_char,
                    *const *mut c_char,
                ) -> c_int;
                if rights::is_in_domain() {
                    return libc::EPERM;
                }
                // SAFETY: it is the C library's function of this name.
                let next = unsafe { mem::transmute::<usize, Function>(Next::$name.get()) };
                // SAFETY: the same contract.
                unsafe { next(child, program, actions, attributes, arguments, environment) }
            }
        )*
    };
}

spawns! {
    /// posix_spawn(3).
    posix_spawn;
    /// posix_spawnp(3).
    posix_spawnp;
}

/// fork(2).
///
/// # Safety
///
/// As C says.
///
/// # References
///
/// glibc 2.36, `posix/fork.c`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fork() -> libc::pid_t {
    if rights::is_in_domain() {
        return not_permitted();
    }
    // SAFETY: it is the C library's function of this name.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn() -> libc::pid_t>(Next::fork.get()) };
    // SAFETY: the same contract.
    unsafe { next() }
}

/// system(3).
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn system(command: *const c_char) -> c_int {
    if rights::is_in_domain() {
        return not_permitted();
    }
    // SAFETY: it is the C library's function of this name.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(*const c_char) -> c_int>(Next::system.get()) };
    // SAFETY: the same contract.
    unsafe { next(command) }
}

/// popen(3).
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn popen(command: *const c_char, mode: *const c_char) -> *mut libc::FILE {
    type Function = unsafe extern "C" fn(*const c_char, *const c_char) -> *mut libc::FILE;
    if rights::is_in_domain() {
        not_permitted();
        return std::ptr::null_mut();
    }
    // SAFETY: it is the C library's function of this name.
    let next = unsafe { mem::transmute::<usize, Function>(Next::popen.get()) };
    // SAFETY: the same contract.
    unsafe { next(command, mode) }
}
