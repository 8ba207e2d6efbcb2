//! POSIX timers that send a signal to one thread.

#![expect(unsafe_code, reason = "it makes system calls")]

use std::ffi::c_int;
use std::io;
use std::mem;
use std::ptr;
use std::time::Duration;

/// The kernel's ID of a POSIX timer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timer(c_int);

/// Creates a timer that sends a signal with a value to the calling thread.
pub(crate) fn create_timer(signal: c_int, value: usize) -> io::Result<Timer> {
    // SAFETY: gettid touches no memory.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    // SAFETY: `sigevent` is a C struct of integers and pointers, for which all zeros are valid.
    let mut event: libc::sigevent = unsafe { mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = signal;
    event.sigev_value.sival_ptr = ptr::without_provenance_mut(value);
    event.sigev_notify_thread_id = thread as c_int;
    let mut timer = 0;
    // SAFETY: `event` and `timer` outlive the call.
    match unsafe { libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } {
        0 => Ok(Timer(timer)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Arms a timer to expire after this time and then every millisecond. `None` disarms it.
pub(crate) fn set_timer(timer: Timer, after: Option<Duration>) -> io::Result<()> {
    let after = after.unwrap_or_default();
    let seconds = libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX);
    let value = libc::timespec { tv_sec: seconds, tv_nsec: after.subsec_nanos().into() };
    let new = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 }, it_value: value };
    // SAFETY: the struct outlives the call.
    match unsafe { libc::syscall(libc::SYS_timer_settime, timer.0, 0, &raw const new, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Disarms a timer. Returns the time that was left, if it was armed. Async-signal-safe.
pub(crate) fn pause_timer(timer: Timer) -> Option<Duration> {
    // SAFETY: `itimerspec` is a C struct of integers, for which all zeros are valid.
    let mut old: libc::itimerspec = unsafe { mem::zeroed() };
    // SAFETY: as above.
    let new: libc::itimerspec = unsafe { mem::zeroed() };
    // SAFETY: both structs outlive the call.
    if unsafe { libc::syscall(libc::SYS_timer_settime, timer.0, 0, &raw const new, &raw mut old) } != 0 {
        return None;
    }
    let left = Duration::new(old.it_value.tv_sec as u64, old.it_value.tv_nsec as u32);
    (!left.is_zero()).then_some(left)
}

/// Deletes a timer.
pub(crate) fn delete_timer(timer: Timer) {
    // It cannot fail for a timer that exists.
    // SAFETY: timer_delete touches no memory.
    unsafe { libc::syscall(libc::SYS_timer_delete, timer.0) };
}
