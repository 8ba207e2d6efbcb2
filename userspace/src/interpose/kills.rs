//! Functions that send signals to processes and threads. In a domain they reach the domain's own process and thread only:
//! elsewhere they fail with EPERM.
//!
//! A signal to the own thread ends the call, if it means a fault or would end the program, or runs the program's handler. Signal 0 sends nothing, and
//! is not refused.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::{c_int, c_uint, c_void};
use std::mem;

use super::signals::end_call_if_fatal;
use super::{Next, fail};
use crate::inside::libc::not_permitted;
use crate::{rights, sys};

fn is_other_process(process: c_int) -> bool {
    process != sys::process_id() as c_int
}

fn is_other_thread(thread: c_int) -> bool {
    thread != sys::thread_id()
}

macro_rules! kills {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*) unless $signal:ident, $is_other:expr;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                type Function = unsafe extern "C" fn($($type),*) -> c_int;
                if rights::is_in_domain() && $signal != 0 {
                    if $is_other {
                        return not_permitted();
                    }
                    end_call_if_fatal($signal);
                }
                let Some(next) = Next::$name.find() else { return fail(libc::ENOSYS) };
                // SAFETY: this is the address of the C library's function of this name, which has this type.
                let next = unsafe { mem::transmute::<usize, Function>(next) };
                // SAFETY: this function has the same contract, which the caller fulfils.
                unsafe { next($($argument),*) }
            }
        )*
    };
}

kills! {
    /// kill(2).
    fn kill(process: c_int, signal: c_int) unless signal, is_other_process(process);
    /// killpg(3).
    fn killpg(group: c_int, signal: c_int) unless signal, true;
    /// tgkill(2).
    fn tgkill(process: c_int, thread: c_int, signal: c_int) unless signal,
        is_other_process(process) || is_other_thread(thread);
    /// sigqueue(3).
    fn sigqueue(process: c_int, signal: c_int, value: *mut c_void) unless signal, is_other_process(process);
    /// pidfd_send_signal(2).
    fn pidfd_send_signal(process: c_int, signal: c_int, info: *mut c_void, flags: c_uint) unless signal, true;
}

/// pthread_sigqueue(3).
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn pthread_sigqueue(target: libc::pthread_t, signal: c_int, value: *mut c_void) -> c_int {
    type Function = unsafe extern "C" fn(libc::pthread_t, c_int, *mut c_void) -> c_int;
    if rights::is_in_domain() {
        if target as usize != sys::thread_handle() {
            return libc::EPERM;
        }
        end_call_if_fatal(signal);
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, Function>(Next::pthread_sigqueue.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(target, signal, value) }
}
