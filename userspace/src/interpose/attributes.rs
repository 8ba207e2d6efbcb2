//! Functions that change attributes of the whole process, or of the calling thread, or start timers of it. In a domain they
//! fail with EPERM.
//!
//! They act on the program and not on the domain, and a discard could not undo them. The list has those that a mistake or
//! a careless library calls: working folder, users and groups, session, limits, priority, namespaces, alarms and timers.
//! umask(2) is not in it, because it cannot fail and code sets it for a moment only; nor is prctl(2), of which most uses
//! are harmless; nor timer_settime(2), for which the program has handed a timer in.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem;

use super::Next;
use super::refused::{is_refused, refused};
use crate::inside::libc::not_permitted;

refused! {
    /// chdir(2).
    fn chdir(path: *const c_char);
    /// fchdir(2).
    fn fchdir(folder: c_int);
    /// chroot(2).
    fn chroot(path: *const c_char);
    /// setuid(2).
    fn setuid(user: c_uint);
    /// seteuid(2).
    fn seteuid(user: c_uint);
    /// setreuid(2).
    fn setreuid(real: c_uint, effective: c_uint);
    /// setresuid(2).
    fn setresuid(real: c_uint, effective: c_uint, saved: c_uint);
    /// setgid(2).
    fn setgid(group: c_uint);
    /// setegid(2).
    fn setegid(group: c_uint);
    /// setregid(2).
    fn setregid(real: c_uint, effective: c_uint);
    /// setresgid(2).
    fn setresgid(real: c_uint, effective: c_uint, saved: c_uint);
    /// setgroups(2).
    fn setgroups(count: usize, groups: *const c_uint);
    /// setsid(2).
    fn setsid();
    /// setpgid(2).
    fn setpgid(process: c_int, group: c_int);
    /// setrlimit(2).
    fn setrlimit(resource: c_uint, limit: *const c_void);
    /// setrlimit(2).
    fn setrlimit64(resource: c_uint, limit: *const c_void);
    /// setpriority(2).
    fn setpriority(which: c_uint, who: c_uint, priority: c_int);
    /// nice(2).
    fn nice(increment: c_int);
    /// sched_setaffinity(2).
    fn sched_setaffinity(process: c_int, size: usize, set: *const c_void);
    /// sched_setscheduler(2).
    fn sched_setscheduler(process: c_int, policy: c_int, parameters: *const c_void);
    /// sched_setparam(2).
    fn sched_setparam(process: c_int, parameters: *const c_void);
    /// setfsuid(2).
    fn setfsuid(user: c_uint);
    /// setfsgid(2).
    fn setfsgid(group: c_uint);
    /// sethostname(2).
    fn sethostname(name: *const c_char, length: usize);
    /// setdomainname(2).
    fn setdomainname(name: *const c_char, length: usize);
    /// unshare(2).
    fn unshare(flags: c_int);
    /// setns(2).
    fn setns(space: c_int, kind: c_int);
    /// setitimer(2).
    fn setitimer(which: c_int, new: *const c_void, old: *mut c_void);
    /// timer_create(2).
    fn timer_create(clock: c_int, event: *mut c_void, timer: *mut c_void);
    /// timer_delete(2).
    fn timer_delete(timer: *mut c_void);
}

macro_rules! of_threads {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*);)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name(thread: libc::pthread_t, $($argument: $type),*) -> c_int {
                type Function = unsafe extern "C" fn(libc::pthread_t, $($type),*) -> c_int;
                if is_refused() {
                    return libc::EPERM;
                }
                // SAFETY: this is the address of the C library's function of this name, which has this type.
                let next = unsafe { mem::transmute::<usize, Function>(Next::$name.get()) };
                // SAFETY: this function has the same contract, which the caller fulfils.
                unsafe { next(thread, $($argument),*) }
            }
        )*
    };
}

of_threads! {
    /// pthread_setschedparam(3).
    fn pthread_setschedparam(policy: c_int, parameters: *const c_void);
    /// pthread_setschedprio(3).
    fn pthread_setschedprio(priority: c_int);
    /// pthread_setaffinity_np(3).
    fn pthread_setaffinity_np(size: usize, set: *const c_void);
}

/// personality(2). In a domain it only returns the persona.
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn personality(persona: libc::c_ulong) -> c_int {
    const QUERY: libc::c_ulong = 0xffff_ffff;
    if persona != QUERY && is_refused() {
        return not_permitted();
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next =
        unsafe { mem::transmute::<usize, unsafe extern "C" fn(libc::c_ulong) -> c_int>(Next::personality.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(persona) }
}

macro_rules! limits {
    ($($name:ident)*) => {
        $(
            /// prlimit(2). In a domain it only returns limits.
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name(
                process: c_int,
                resource: c_uint,
                new: *const c_void,
                old: *mut c_void,
            ) -> c_int {
                type Function = unsafe extern "C" fn(c_int, c_uint, *const c_void, *mut c_void) -> c_int;
                if !new.is_null() && is_refused() {
                    return not_permitted();
                }
                // SAFETY: this is the address of the C library's function of this name, which has this type.
                let next = unsafe { mem::transmute::<usize, Function>(Next::$name.get()) };
                // SAFETY: this function has the same contract, which the caller fulfils.
                unsafe { next(process, resource, new, old) }
            }
        )*
    };
}

limits! { prlimit prlimit64 }

/// alarm(2). In a domain it returns 0 and sets `errno`, as it has no value for a failure.
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn alarm(seconds: c_uint) -> c_uint {
    if is_refused() {
        not_permitted();
        return 0;
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(c_uint) -> c_uint>(Next::alarm.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(seconds) }
}

/// ualarm(3).
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn ualarm(after: c_uint, interval: c_uint) -> c_uint {
    if is_refused() {
        return not_permitted() as c_uint;
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(c_uint, c_uint) -> c_uint>(Next::ualarm.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(after, interval) }
}
