//! Forks by the C library: handlers, and which thread is forking.

#![expect(unsafe_code, reason = "it calls the C library")]

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::threads::thread_handle;
use crate::trusted::trusted;

trusted! {
    /// The [handle](thread_handle) of the thread that is forking, or 0.
    static FORKING: AtomicUsize = AtomicUsize::new(0);
}

/// Returns whether the calling thread is inside fork(2), for example in one of the program's fork handlers. It then
/// holds this crate's locks.
pub(crate) fn is_forking() -> bool {
    FORKING.load(Ordering::Relaxed) == thread_handle()
}

/// Marks the calling thread as the one that forks. The thread of the child has the same handle.
pub(crate) fn begin_fork() {
    FORKING.store(thread_handle(), Ordering::Relaxed);
}

/// Clears the mark.
pub(crate) fn end_fork() {
    FORKING.store(0, Ordering::Relaxed);
}

/// Registers fork handlers. The C library calls them before each fork, and after it in the parent and in the child.
///
/// # References
///
/// pthread_atfork(3).
pub(crate) fn around_forks(
    before: extern "C" fn(),
    in_parent: extern "C" fn(),
    in_child: extern "C" fn(),
) -> io::Result<()> {
    // SAFETY: the handlers are safe functions.
    match unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
