//! The panic hook, as it acts in a domain.
//!
//! Before std calls the hook, it counts the panic and takes a lock: two writes to statics, which fault in a domain. The
//! fault handler skips them (`signal/panics.rs`), so that the hook runs in the domain and ends the call with the
//! panic's message.

#![expect(unsafe_code, reason = "it undoes writes to std's statics")]

use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::abort::{AbortReason, abort_call};
use crate::keys::statics;
use crate::rights;
use crate::trusted::trusted;

/// An instruction by which std notes a panic in a static.
#[derive(Debug)]
pub(crate) struct PanicWrite {
    /// The address of the instruction, 0 if there is none.
    pub(crate) instruction: AtomicU64,
    /// The address of the static.
    pub(crate) target: AtomicU64,
    /// What the instruction adds to the static.
    pub(crate) difference: AtomicU64,
    /// The size of the static in bytes.
    pub(crate) size: AtomicU64,
}

trusted! {
    /// The instructions, learned from a panic in a trial call. The fault handler writes them, and code in a domain can
    /// only read them.
    pub(crate) static PANIC_WRITES: [PanicWrite; 4] = [const {
        PanicWrite {
            instruction: AtomicU64::new(0),
            target: AtomicU64::new(0),
            difference: AtomicU64::new(0),
            size: AtomicU64::new(0),
        }
    }; 4];
}

/// Ends the call that has panicked.
pub(crate) fn end_call(panic: &PanicHookInfo<'_>) -> ! {
    undo_writes();
    let message = panic.to_string();
    // A panic ends the call here, and so never unwinds to a frame that cannot unwind. A C++ exception does.
    if message.ends_with("panic in a function that cannot unwind") {
        abort_call(AbortReason::Exception);
    }
    abort_call(AbortReason::Panic { text: message.as_ptr().addr(), length: message.len() })
}

/// Undoes the writes, which were made in a domain that may write statics.
fn undo_writes() {
    let Some(key) = statics::key() else { return };
    if !rights::has(key) {
        return;
    }
    for write in PANIC_WRITES.iter().filter(|write| write.instruction.load(Ordering::Relaxed) != 0) {
        let (address, difference) = (write.target.load(Ordering::Relaxed), write.difference.load(Ordering::Relaxed));
        if write.size.load(Ordering::Relaxed) == 8 {
            // SAFETY: it is a static of std's, an atomic of that size, to which this panic has added the difference.
            unsafe { &*(address as *const AtomicU64) }.fetch_sub(difference, Ordering::Release);
        } else {
            // SAFETY: as above.
            unsafe { &*(address as *const AtomicU32) }.fetch_sub(difference as u32, Ordering::Release);
        }
    }
}
