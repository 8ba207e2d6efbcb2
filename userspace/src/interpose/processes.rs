//! Functions that start a process, or a program in this one. In a domain they fail with EPERM.
//!
//! posix_spawn(3), system(3) and popen(3) map a stack for the child. A domain cannot write that stack, so the child
//! would crash. fork(2) takes several locks of the C library. A domain that may write only some of them would fault at
//! the next one, and those taken so far would stay locked. vfork(2) is not replaced. It takes no lock, and its child
//! runs in the domain until it exits or executes a program: that child may call execve(2) and its variants.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::arch::naked_asm;
use std::ffi::{c_char, c_int};
use std::mem;

use super::Next;
use super::refused::{is_refused, refused};
use crate::inside::libc::not_permitted;
use crate::signal::stacks;
use crate::{rights, thread};

macro_rules! spawns {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
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
                // SAFETY: this is the address of the C library's function of this name, which has this type.
                let next = unsafe { mem::transmute::<usize, Function>(Next::$name.get()) };
                // SAFETY: this function has the same contract, which the caller fulfils.
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

refused! {
    /// execve(2).
    fn execve(path: *const c_char, arguments: *const *const c_char, environment: *const *const c_char);
    /// execv(3).
    fn execv(path: *const c_char, arguments: *const *const c_char);
    /// execvp(3).
    fn execvp(file: *const c_char, arguments: *const *const c_char);
    /// execvpe(3).
    fn execvpe(file: *const c_char, arguments: *const *const c_char, environment: *const *const c_char);
    /// fexecve(3).
    fn fexecve(file: c_int, arguments: *const *const c_char, environment: *const *const c_char);
    /// execveat(2).
    fn execveat(
        folder: c_int,
        path: *const c_char,
        arguments: *const *const c_char,
        environment: *const *const c_char,
        flags: c_int
    );
}

macro_rules! variadic_execs {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// It passes on its arguments, of which there may be any number.
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            #[unsafe(naked)]
            pub(crate) unsafe extern "C" fn $name() -> c_int {
                extern "C" fn next() -> usize {
                    if is_refused() {
                        not_permitted();
                        return 0;
                    }
                    Next::$name.get()
                }
                naked_asm!(
                    "push rdi",
                    "push rsi",
                    "push rdx",
                    "push rcx",
                    "push r8",
                    "push r9",
                    "push rax",
                    "call {next}",
                    "mov r11, rax",
                    "pop rax",
                    "pop r9",
                    "pop r8",
                    "pop rcx",
                    "pop rdx",
                    "pop rsi",
                    "pop rdi",
                    "test r11, r11",
                    "jz 2f",
                    "jmp r11",
                    "2: mov eax, -1",
                    "ret",
                    next = sym next,
                )
            }
        )*
    };
}

variadic_execs! {
    /// execl(3).
    execl;
    /// execlp(3).
    execlp;
    /// execle(3).
    execle;
}

/// fork(2).
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
///
/// # References
///
/// glibc 2.36, `posix/fork.c`.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn fork() -> libc::pid_t {
    if rights::is_in_domain() {
        return not_permitted();
    }
    // The child may close descriptors.
    super::find_all();
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn() -> libc::pid_t>(Next::fork.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next() }
}

/// `_Fork`, which runs no fork handlers.
///
/// # Safety
///
/// None.
///
/// # References
///
/// glibc 2.36, `posix/_Fork.c`.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn _Fork() -> libc::pid_t {
    if rights::is_in_domain() {
        return not_permitted();
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn() -> libc::pid_t>(Next::_Fork.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    let child = unsafe { next() };
    if child == 0 {
        stacks::after_fork();
        // The child may call domains if the parent has no other thread.
        if let Some(thread) = thread::current() {
            thread.after_fork();
        }
    }
    child
}

/// system(3).
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn system(command: *const c_char) -> c_int {
    if rights::is_in_domain() {
        return not_permitted();
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(*const c_char) -> c_int>(Next::system.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(command) }
}

/// popen(3).
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn popen(command: *const c_char, mode: *const c_char) -> *mut libc::FILE {
    type Function = unsafe extern "C" fn(*const c_char, *const c_char) -> *mut libc::FILE;
    if rights::is_in_domain() {
        not_permitted();
        return std::ptr::null_mut();
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, Function>(Next::popen.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(command, mode) }
}
