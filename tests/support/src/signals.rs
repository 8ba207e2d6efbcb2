//! Signal handlers, and ways to send signals.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a few C calls read better as one block")]

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};

use pkru_userspace::Domain;

/// A handler that is set with `SA_SIGINFO`.
pub type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void);

/// Sets the handler of a signal. Returns the previous action.
pub fn install(signal: i32, handler: Handler, flags: i32) -> libc::sigaction {
    // SAFETY: zeroed sigactions are valid, and each test raises its signal where its handler may run.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = handler as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | flags;
        let mut old: libc::sigaction = std::mem::zeroed();
        assert_eq!(libc::sigaction(signal, &raw const new, &raw mut old), 0);
        old
    }
}

/// Sends SIGALRM to this thread periodically. 0 stops the timer.
pub fn timer(microseconds: libc::c_long) {
    thread_local! { static TIMER: Timer = Timer::for_this_thread() }
    TIMER.with(|timer| timer.start(microseconds, microseconds));
}

/// A timer that sends a signal to the thread that created it. `setitimer` would send it to any thread of the process.
#[derive(Debug)]
pub struct Timer(libc::timer_t);

impl Timer {
    /// Creates a timer. It is not started.
    #[must_use]
    pub fn for_this_thread() -> Self {
        Self::of_this_thread(libc::SIGALRM)
    }

    /// Creates a timer that sends another signal. It is not started.
    #[must_use]
    pub fn of_this_thread(signal: i32) -> Self {
        // SAFETY: the structs are valid and live across the call.
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = std::ptr::null_mut();
            assert_eq!(libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer), 0);
            Self(timer)
        }
    }

    /// Starts the timer. It fires after `first` microseconds, and then every `interval` microseconds unless that is 0.
    pub fn start(&self, first: libc::c_long, interval: libc::c_long) {
        let [first, interval] = [first, interval].map(|time| libc::timespec { tv_sec: 0, tv_nsec: time * 1000 });
        let value = libc::itimerspec { it_interval: interval, it_value: first };
        // SAFETY: the struct lives across the call.
        assert_eq!(unsafe { libc::timer_settime(self.0, 0, &raw const value, std::ptr::null_mut()) }, 0);
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer exists.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// The number of handler runs.
pub static COUNT: AtomicU64 = AtomicU64::new(0);

/// A handler that counts its runs.
pub extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut c_void) {
    COUNT.fetch_add(1, Ordering::Relaxed);
}

/// Sends one SIGALRM while a domain runs. The code in the domain waits until a handler has counted it.
///
/// The timer does not repeat: a slow handler would leave no time for the domain.
pub fn wait_in(domain: &mut Domain) {
    let timer = Timer::for_this_thread();
    let before = COUNT.load(Ordering::Relaxed);
    let wait = || {
        timer.start(1000, 0);
        while COUNT.load(Ordering::Relaxed) == before {}
    };
    domain.call(wait).unwrap();
    assert!(COUNT.load(Ordering::Relaxed) > before, "the handler ran while the domain did");
}

/// Runs a function that the handler [`leave`] leaves by `siglongjmp`. A domain must be running at that moment: leaving
/// a function of the C library by a jump is undefined.
///
/// It has its own frame and does nothing after the jump, because the compiler does not know that `__sigsetjmp` returns
/// twice.
#[inline(never)]
pub fn with_a_way_out(function: impl FnOnce()) {
    unsafe extern "C" {
        fn __sigsetjmp(buffer: *mut c_void, save: i32) -> i32;
    }
    // SAFETY: the buffer is as large as glibc's.
    if unsafe { __sigsetjmp(BUFFER.as_ptr() as *mut c_void, 1) } == 0 {
        function();
    }
}

/// A `sigjmp_buf`. The libc crate does not define the type.
static BUFFER: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];

/// A handler that jumps back to [`with_a_way_out`].
pub extern "C" fn leave(_: i32, _: *mut libc::siginfo_t, _: *mut c_void) {
    unsafe extern "C" {
        fn siglongjmp(buffer: *mut c_void, value: i32) -> !;
    }
    COUNT.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the frame that filled the buffer is still active.
    unsafe { siglongjmp(BUFFER.as_ptr() as *mut c_void, 1) }
}
