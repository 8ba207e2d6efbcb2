//! What the program says about signals, kept so that its handlers can be called as it asked.
//!
//! Before the first domain everything goes to the kernel. Then this crate takes over the handlers that there are, and
//! from then on the kernel has this crate's handler for all of them, and each thread that enters domains has this
//! crate's alternate stack. A program that makes these system calls itself, past the C library, changes that behind
//! this crate's back.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::c_int;
use std::mem;

use super::{Next, fail};
use crate::inside::libc::not_permitted;
use crate::signal::actions;
use crate::sys::{self, Action, AlternateStack, FAULTS};
use crate::{rights, thread};

fn checked(result: std::io::Result<()>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(error) => fail(error.raw_os_error().unwrap_or(libc::EINVAL)),
    }
}

fn set(signal: c_int, new: Option<Action>) -> std::io::Result<Action> {
    /// The C library keeps two signals for itself (glibc 2.36, `nptl/libc_start_call_main.h`, `SIGCANCEL` and
    /// `SIGSETXID`).
    const OF_THE_LIBRARY: [c_int; 2] = [32, 33];
    if OF_THE_LIBRARY.contains(&signal) {
        return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
    }
    if rights::is_in_domain() {
        return Err(std::io::Error::from_raw_os_error(libc::EPERM));
    }
    if actions::is_in_force() && actions::is_kept(signal) {
        return actions::replace(signal, new);
    }
    let old = sys::action(signal)?;
    if let Some(new) = new {
        // SAFETY: what the program wants is its own business.
        unsafe { sys::set_action(signal, new) }?;
    }
    Ok(old)
}

/// sigaction(2).
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    // SAFETY: the caller answers for the pointer.
    let new = unsafe { new.as_ref() }.map(|new| {
        // SAFETY: the C library's sets begin with the kernel's.
        let mask = unsafe { (&raw const new.sa_mask).cast::<u64>().read() };
        Action::new(new.sa_sigaction, u64::from(new.sa_flags as u32), mask)
    });
    match set(signal, new) {
        Ok(before) => {
            if !old.is_null() {
                // SAFETY: sigaction is a C struct for which zero is a value.
                let mut value: libc::sigaction = unsafe { mem::zeroed() };
                value.sa_sigaction = before.handler;
                value.sa_flags = before.flags as c_int;
                // SAFETY: as above.
                unsafe { (&raw mut value.sa_mask).cast::<u64>().write(before.mask) };
                // SAFETY: the caller answers for the pointer.
                unsafe { old.write(value) };
            }
            0
        }
        Err(error) => fail(error.raw_os_error().unwrap_or(libc::EINVAL)),
    }
}

/// Sets a handler; returns the one before, or `SIG_ERR`.
pub(super) fn install(signal: c_int, handler: libc::sighandler_t, flags: c_int, mask: u64) -> libc::sighandler_t {
    match set(signal, Some(Action::new(handler, u64::from(flags as u32), mask))) {
        Ok(old) => old.handler,
        Err(error) => {
            fail(error.raw_os_error().unwrap_or(libc::EINVAL));
            libc::SIG_ERR
        }
    }
}

/// signal(2), with BSD's semantics, as glibc has it.
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn signal(signal: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    let mask = if (1..=64).contains(&signal) { 1 << (signal - 1) } else { 0 };
    install(signal, handler, libc::SA_RESTART, mask)
}

/// The same by another name.
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn bsd_signal(number: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    // SAFETY: the same contract.
    unsafe { signal(number, handler) }
}

/// signal(2), with System V's semantics: once, and with the signal not blocked meanwhile.
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn sysv_signal(signal: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    install(signal, handler, libc::SA_RESETHAND | libc::SA_NODEFER, 0)
}

/// The same by another name.
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __sysv_signal(signal: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    // SAFETY: the same contract.
    unsafe { sysv_signal(signal, handler) }
}

/// sigaltstack(2). In a thread that enters domains the kernel keeps this crate's stack.
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn sigaltstack(new: *const libc::stack_t, old: *mut libc::stack_t) -> c_int {
    if rights::is_in_domain() {
        return not_permitted();
    }
    let thread = thread::current();
    let before = thread.map_or_else(sys::alternate_stack, |thread| thread.programs_stack().get());
    // SAFETY: the caller answers for the pointer.
    let result = match unsafe { new.as_ref() } {
        None => Ok(()),
        Some(new) => {
            let new = AlternateStack { start: new.ss_sp as usize, size: new.ss_size, flags: new.ss_flags };
            match thread {
                Some(thread) => thread.set_programs_stack(new),
                None => sys::restore_alternate_stack(new),
            }
        }
    };
    if result.is_ok() && !old.is_null() {
        let here = (&raw const before).addr();
        let on_it = before.addresses().is_some_and(|stack| stack.contains(&here));
        let flags = if on_it { before.flags | libc::SS_ONSTACK } else { before.flags };
        let value = libc::stack_t { ss_sp: before.start as *mut _, ss_flags: flags, ss_size: before.size };
        // SAFETY: the caller answers for the pointer.
        unsafe { old.write(value) };
    }
    checked(result)
}

/// pthread_sigmask(3). In a thread that enters domains, and in domains, the signals that faults raise stay unblocked.
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pthread_sigmask(
    how: c_int,
    new: *const libc::sigset_t,
    old: *mut libc::sigset_t,
) -> c_int {
    // SAFETY: the caller answers for the pointer; the C library's sets begin with the kernel's.
    let mut mask = unsafe { new.cast::<u64>().as_ref() }.copied();
    if let Some(mask) = &mut mask {
        // Those two are the C library's own.
        let mut never = 1u64 << 31 | 1 << 32;
        if rights::is_in_domain() || thread::current().is_some() {
            never |= FAULTS.iter().fold(0, |all, signal| all | 1 << (signal - 1));
        }
        if how != libc::SIG_UNBLOCK {
            *mask &= !never;
        }
    }
    sys::change_mask(how, mask, old.cast())
}

/// sigprocmask(2).
///
/// # Safety
///
/// As C says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn sigprocmask(how: c_int, new: *const libc::sigset_t, old: *mut libc::sigset_t) -> c_int {
    // SAFETY: the same contract.
    match unsafe { pthread_sigmask(how, new, old) } {
        0 => 0,
        errno => fail(errno),
    }
}

/// pthread_kill(3). A domain sends its own thread signals, and others none: for those the C library blocks every
/// signal, and then takes a lock that a domain cannot write.
///
/// # Safety
///
/// As C says.
///
/// # References
///
/// glibc 2.36, `nptl/pthread_kill.c`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pthread_kill(target: libc::pthread_t, signal: c_int) -> c_int {
    type Function = unsafe extern "C" fn(libc::pthread_t, c_int) -> c_int;
    if rights::is_in_domain() && target as usize != sys::thread_handle() {
        return libc::EPERM;
    }
    // SAFETY: it is the C library's function of this name.
    let next = unsafe { mem::transmute::<usize, Function>(Next::pthread_kill.get()) };
    // SAFETY: the same contract.
    unsafe { next(target, signal) }
}
