//! Signal actions, masks and alternate stacks.
//!
//! Before the first domain, these functions only make the system call. The first domain takes over the program's
//! handlers: the kernel then calls this crate's handler, and these functions keep what the program sets in a table of
//! this crate. Each thread that enters domains has this crate's alternate stack, and these functions keep the
//! program's.
//!
//! A program that makes these system calls without the C library overwrites what this crate has set.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::c_int;
use std::mem;

use super::{Next, fail};
use crate::inside::libc::{self as inside, not_permitted};
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
    /// SIGCANCEL and SIGSETXID, which the C library reserves (glibc 2.36,
    /// `sysdeps/unix/sysv/linux/internal-signals.h`).
    const OF_THE_LIBRARY: [c_int; 2] = [32, 33];
    if OF_THE_LIBRARY.contains(&signal) {
        return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
    }
    if rights::is_in_domain() {
        return Err(std::io::Error::from_raw_os_error(libc::EPERM));
    }
    if let Some(new) = &new {
        actions::note(signal, new);
    }
    if actions::is_in_force() && actions::is_kept(signal) {
        return actions::replace(signal, new);
    }
    let old = sys::action(signal)?;
    if let Some(new) = new {
        // SAFETY: the program guarantees that its handler may be called, as for sigaction(2).
        unsafe { sys::set_action(signal, new) }?;
    }
    Ok(old)
}

/// sigaction(2).
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    // SAFETY: the caller passes null or a valid pointer.
    let new = unsafe { new.as_ref() }.map(|new| {
        // SAFETY: the C library's set starts with the kernel's 64-bit set.
        let mask = unsafe { (&raw const new.sa_mask).cast::<u64>().read() };
        Action::new(new.sa_sigaction, u64::from(new.sa_flags as u32), mask)
    });
    match set(signal, new) {
        Ok(before) => {
            if !old.is_null() {
                // SAFETY: `sigaction` is a C struct of integers and pointers, for which all zeros are valid.
                let mut value: libc::sigaction = unsafe { mem::zeroed() };
                value.sa_sigaction = before.handler;
                value.sa_flags = before.flags as c_int;
                // SAFETY: the C library's set starts with the kernel's 64-bit set.
                unsafe { (&raw mut value.sa_mask).cast::<u64>().write(before.mask) };
                // SAFETY: the caller passes null or a valid pointer.
                unsafe { old.write(value) };
            }
            0
        }
        Err(error) => fail(error.raw_os_error().unwrap_or(libc::EINVAL)),
    }
}

/// Sets the handler of a signal. Returns the old one, or `SIG_ERR` on failure.
pub(super) fn install(signal: c_int, handler: libc::sighandler_t, flags: c_int, mask: u64) -> libc::sighandler_t {
    match set(signal, Some(Action::new(handler, u64::from(flags as u32), mask))) {
        Ok(old) => old.handler,
        Err(error) => {
            fail(error.raw_os_error().unwrap_or(libc::EINVAL));
            libc::SIG_ERR
        }
    }
}

/// signal(2), with BSD semantics like glibc's.
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn signal(signal: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    let mask = if (1..=64).contains(&signal) { 1 << (signal - 1) } else { 0 };
    install(signal, handler, libc::SA_RESTART, mask)
}

/// Another name of [`signal`].
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn bsd_signal(number: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { signal(number, handler) }
}

/// signal(2), with System V semantics: the handler runs once, and does not block the signal.
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn sysv_signal(signal: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    install(signal, handler, libc::SA_RESETHAND | libc::SA_NODEFER, 0)
}

/// Another name of [`sysv_signal`].
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn __sysv_signal(signal: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { sysv_signal(signal, handler) }
}

/// sigaltstack(2). In a thread that enters domains, the kernel keeps using this crate's stack.
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn sigaltstack(new: *const libc::stack_t, old: *mut libc::stack_t) -> c_int {
    if rights::is_in_domain() {
        return not_permitted();
    }
    let thread = thread::current();
    let before = match thread.map_or_else(sys::alternate_stack, |thread| Ok(thread.programs_stack().get())) {
        Ok(before) => before,
        Err(error) => return checked(Err(error)),
    };
    let here = (&raw const before).addr();
    let is_on_it = before.addresses().is_some_and(|stack| stack.contains(&here));
    // SAFETY: the caller passes null or a valid pointer.
    let result = match unsafe { new.as_ref() } {
        None => Ok(()),
        Some(new) => {
            let new = AlternateStack { start: new.ss_sp as usize, size: new.ss_size, flags: new.ss_flags };
            match thread {
                // A stack in use is not replaced, unless it is disarmed meanwhile.
                Some(_) if is_on_it && before.flags & sys::SS_AUTODISARM == 0 => {
                    Err(std::io::Error::from_raw_os_error(libc::EPERM))
                }
                Some(thread) => thread.set_programs_stack(new),
                None => sys::restore_alternate_stack(new),
            }
        }
    };
    if result.is_ok() && !old.is_null() {
        let flags = if is_on_it { before.flags | libc::SS_ONSTACK } else { before.flags };
        let value = libc::stack_t { ss_sp: before.start as *mut _, ss_flags: flags, ss_size: before.size };
        // SAFETY: the caller passes null or a valid pointer.
        unsafe { old.write(value) };
    }
    checked(result)
}

/// pthread_sigmask(3). In domains, and in threads that enter them, the signals of faults stay unblocked.
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn pthread_sigmask(
    how: c_int,
    new: *const libc::sigset_t,
    old: *mut libc::sigset_t,
) -> c_int {
    // SAFETY: the caller passes null or a valid pointer, and the C library's set starts with the kernel's 64-bit set.
    let mut mask = unsafe { new.cast::<u64>().as_ref() }.copied();
    if let Some(mask) = &mut mask {
        // SIGCANCEL and SIGSETXID.
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
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn sigprocmask(how: c_int, new: *const libc::sigset_t, old: *mut libc::sigset_t) -> c_int {
    // SAFETY: this function has the same contract, which the caller fulfils.
    match unsafe { pthread_sigmask(how, new, old) } {
        0 => 0,
        errno => fail(errno),
    }
}

/// pthread_kill(3). In a domain it works for the calling thread, and fails with EPERM for others. For those the C
/// library blocks every signal and then takes a lock, which a domain cannot write.
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
///
/// # References
///
/// glibc 2.36, `nptl/pthread_kill.c`.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn pthread_kill(target: libc::pthread_t, signal: c_int) -> c_int {
    type Function = unsafe extern "C" fn(libc::pthread_t, c_int) -> c_int;
    if rights::is_in_domain() {
        if target as usize != sys::thread_handle() {
            return libc::EPERM;
        }
        end_call_if_fatal(signal);
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, Function>(Next::pthread_kill.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(target, signal) }
}

/// In a domain: ends the call if a signal would end the program.
///
/// Those of faults and limits reach this crate's handler, which ends the call.
pub(super) fn end_call_if_fatal(signal: c_int) {
    if !sys::ends_process(signal) {
        return;
    }
    let is_handled = sys::is_fault(signal) || sys::is_limit(signal);
    if !is_handled && actions::is_default(signal) {
        inside::raise(signal);
    }
}

/// raise(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn raise(signal: c_int) -> c_int {
    if rights::is_in_domain() {
        end_call_if_fatal(signal);
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(c_int) -> c_int>(Next::raise.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(signal) }
}
