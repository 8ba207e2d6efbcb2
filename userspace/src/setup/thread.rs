//! Making a thread ready to enter domains.
//!
//! The thread unblocks the signals of faults, unregisters its restartable sequences, and gets an alternate signal
//! stack.

#![expect(unsafe_code, reason = "it frees a thread's record when the thread ends")]

use std::ffi::c_void;
use std::sync::OnceLock;

use super::process;
use crate::thread::{Thread, current, signal_stack_key};
use crate::trusted::trusted;
use crate::{Error, rights, sys};

/// Makes the calling thread ready to enter domains.
///
/// # Errors
///
/// The errors of [`process::make_ready`]. [`Error::InDomain`] in a domain.
#[cold]
pub(crate) fn make_ready() -> Result<&'static Thread, Error> {
    if rights::is_in_domain() {
        return Err(Error::InDomain);
    }
    process::make_ready()?;
    if let Some(key) = signal_stack_key() {
        // The kernel checks rights when it writes a frame to a stack with this key.
        rights::allow(key);
    }
    if let Some(thread) = current() {
        return Ok(thread);
    }
    sys::unblock(&sys::FAULTS).map_err(Error::system("unblock the signals of faults"))?;
    // A signal handler that calls a domain would make a second record.
    let _quiet = sys::BlockedSignals::new();
    if let Some(thread) = current() {
        return Ok(thread);
    }
    if let Some(area) = sys::rseq_area() {
        sys::unregister_rseq(area).map_err(Error::system("unregister the thread's restartable sequences"))?;
    }
    let thread = Box::new(Thread::new()?);
    thread.install_stack().map_err(Error::system("set the thread's alternate signal stack"))?;
    let record = Box::into_raw(thread);
    free_at_thread_end(record)?;
    // SAFETY: the record lives until the thread ends.
    let thread = unsafe { &*record };
    thread.set_current();
    Ok(thread)
}

/// Frees the record when the calling thread ends. That is after the destructors of its thread-locals, which may call
/// domains.
fn free_at_thread_end(thread: *const Thread) -> Result<(), Error> {
    trusted! { static KEY: OnceLock<Option<libc::pthread_key_t>> = OnceLock::new(); }
    unsafe extern "C" fn free(thread: *mut c_void) {
        // SAFETY: `make_ready` created the record with `Box`, and this thread no longer uses it.
        drop(unsafe { Box::from_raw(thread.cast::<Thread>()) });
    }
    let set = KEY.get_or_init(|| sys::thread_key(free)).is_some_and(|key| sys::set_for_thread(key, thread.cast()));
    if set { Ok(()) } else { Err(Error::System { operation: "register a thread destructor", errno: libc::EAGAIN }) }
}
