//! Making a thread ready to enter domains.
//!
//! The thread unblocks the signals of faults, unregisters its restartable sequences, and gets an alternate signal
//! stack.

#![expect(unsafe_code, reason = "it frees a thread's record when the thread ends")]

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};

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
    // Before the kernel gets the stack, so that a failure leaves nothing behind.
    free_at_thread_end(&thread)?;
    if let Err(error) = thread.install_first() {
        forget_at_thread_end();
        return Err(Error::system("set the thread's alternate signal stack")(error));
    }
    let thread: &'static Thread = Box::leak(thread);
    thread.set_current();
    Ok(thread)
}

trusted! {
    /// The key of the thread-specific value that holds the record, for its destructor, plus 1; 0 until there is one. Not a
    /// `OnceLock`, which stays locked in a child that is forked while it is set.
    static RECORD: AtomicU64 = AtomicU64::new(0);
}

/// Returns the key of the thread-specific value that holds the record.
fn record() -> Option<libc::pthread_key_t> {
    RECORD.load(Ordering::Acquire).checked_sub(1).map(|key| key as libc::pthread_key_t)
}

/// Makes that key, if there is none.
fn make_record() -> Option<libc::pthread_key_t> {
    unsafe extern "C" fn free(thread: *mut c_void) {
        // SAFETY: `make_ready` created the record with `Box`, and this thread no longer uses it.
        drop(unsafe { Box::from_raw(thread.cast::<Thread>()) });
    }
    if let Some(key) = record() {
        return Some(key);
    }
    let key = sys::thread_key(free)?;
    match RECORD.compare_exchange(0, u64::from(key) + 1, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Some(key),
        Err(_) => {
            // Another thread was faster.
            sys::delete_thread_key(key);
            record()
        }
    }
}

/// Frees the record when the calling thread ends. That is after the destructors of its thread-locals, which may call
/// domains.
fn free_at_thread_end(thread: &Thread) -> Result<(), Error> {
    let record = std::ptr::from_ref(thread).cast();
    let is_set = make_record().is_some_and(|key| sys::set_for_thread(key, record));
    is_set.then_some(()).ok_or(Error::System { operation: "register a thread destructor", errno: libc::EAGAIN })
}

/// Undoes [`free_at_thread_end`].
fn forget_at_thread_end() {
    if let Some(key) = record() {
        // It does not fail for a value that has been set before.
        let _ = sys::set_for_thread(key, std::ptr::null());
    }
}
