//! Signal functions that are older than sigaction(2).
//!
//! In the C library they do not call the functions that [`signals`](super::signals) replaces, so they are replaced too.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::c_int;
use std::ptr;

use super::fail;
use super::signals::{install, pthread_sigmask};

/// `SIG_HOLD`
const HOLD: libc::sighandler_t = 2;

/// Changes the signal mask by a set of signals, one bit each, and returns the old mask.
fn change(how: c_int, signals: u64) -> Result<u64, c_int> {
    // SAFETY: `sigset_t` is a C struct of integers, for which all zeros are valid.
    let mut new: libc::sigset_t = unsafe { std::mem::zeroed() };
    let mut old = new;
    // SAFETY: the C library's set starts with the kernel's 64-bit set.
    unsafe { (&raw mut new).cast::<u64>().write(signals) };
    // SAFETY: both sets outlive the call.
    match unsafe { pthread_sigmask(how, &raw const new, &raw mut old) } {
        // SAFETY: as for `new`.
        0 => Ok(unsafe { (&raw const old).cast::<u64>().read() }),
        errno => Err(errno),
    }
}

/// Returns the set that contains one signal.
fn only(signal: c_int) -> Result<u64, c_int> {
    if (1..=64).contains(&signal) { Ok(1 << (signal - 1)) } else { Err(libc::EINVAL) }
}

fn checked(result: Result<u64, c_int>) -> c_int {
    result.map_or_else(fail, |_| 0)
}

/// sigset(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn sigset(signal: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    let set = || {
        let this = only(signal)?;
        let (before, old) = if handler == HOLD {
            (change(libc::SIG_BLOCK, this)?, current(signal))
        } else {
            let old = install(signal, handler, 0, 0);
            if old == libc::SIG_ERR {
                return Ok(old);
            }
            (change(libc::SIG_UNBLOCK, this)?, old)
        };
        Ok(if before & this == 0 { old } else { HOLD })
    };
    set().unwrap_or_else(|errno: c_int| {
        fail(errno);
        libc::SIG_ERR
    })
}

/// Returns the handler of a signal.
fn current(signal: c_int) -> libc::sighandler_t {
    // SAFETY: `sigaction` is a C struct of integers and pointers, for which all zeros are valid.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: `old` is writable.
    match unsafe { super::signals::sigaction(signal, ptr::null(), &raw mut old) } {
        0 => old.sa_sigaction,
        _ => libc::SIG_ERR,
    }
}

/// sigignore(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn sigignore(signal: c_int) -> c_int {
    if install(signal, libc::SIG_IGN, 0, 0) == libc::SIG_ERR { -1 } else { 0 }
}

/// sighold(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn sighold(signal: c_int) -> c_int {
    checked(only(signal).and_then(|this| change(libc::SIG_BLOCK, this)))
}

/// sigblock(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn sigblock(mask: c_int) -> c_int {
    change(libc::SIG_BLOCK, u64::from(mask as u32)).map_or_else(fail, |before| before as c_int)
}

/// sigsetmask(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn sigsetmask(mask: c_int) -> c_int {
    change(libc::SIG_SETMASK, u64::from(mask as u32)).map_or_else(fail, |before| before as c_int)
}
