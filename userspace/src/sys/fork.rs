//! Forks that the C library makes.

#![expect(unsafe_code, reason = "it calls the C library")]

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::threads::thread_handle;
use crate::trusted::trusted;

trusted! {
    /// The thread that is forking, as [`thread_handle`] numbers it. 0 if none is.
    static FORKING: AtomicUsize = AtomicUsize::new(0);
}

/// Returns whether the calling thread is in the middle of a fork, as in a fork handler of the program's. It holds this
/// crate's locks then.
pub(crate) fn is_forking() -> bool {
    FORKING.load(Ordering::Relaxed) == thread_handle()
}

/// Marks the calling thread as the one that forks. The child's thread has the same handle.
pub(crate) fn begin_fork() {
    FORKING.store(thread_handle(), Ordering::Relaxed);
}

/// Clears the mark.
pub(crate) fn end_fork() {
    FORKING.store(0, Ordering::Relaxed);
}

/// Has functions called around each fork that the C library makes: before it, and after it in the parent and in the
/// child.
pub(crate) fn around_forks(
    before: extern "C" fn(),
    in_parent: extern "C" fn(),
    in_child: extern "C" fn(),
) -> io::Result<()> {
    // SAFETY: the functions may be called at any time.
    match unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
