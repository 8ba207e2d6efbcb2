//! Stacks for the handler in threads that enter no domains.
//!
//! Such a thread has no signal stack of this crate's. The kernel puts the frame on the thread's own stack or on its own
//! alternate stack, which may be small. The handler uses nothing more of these: it runs on one of the stacks here, with
//! every signal blocked, for a few microseconds. A thread that finds none free waits for one.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use pkru::ProtectionKey;

use crate::Error;
use crate::memory::mapping::Mapping;
use crate::trusted::trusted;

/// How many there are: one for each bit of [`TAKEN`].
pub(super) const COUNT: usize = u32::BITS as usize;

/// The size of each in bytes, as a power of two.
pub(super) const SHIFT: u32 = 15;

trusted! {
    /// The address of the first.
    pub(super) static STACKS: AtomicUsize = AtomicUsize::new(0);
    /// Those that are in use, one bit for each.
    pub(super) static TAKEN: AtomicU32 = AtomicU32::new(0);
}

/// Maps the stacks, for as long as the process lives. Does nothing if they are mapped.
pub(super) fn map() -> Result<(), Error> {
    if STACKS.load(Ordering::Relaxed) == 0 {
        let stacks = Mapping::new([COUNT << SHIFT])?;
        stacks.make_accessible(ProtectionKey::DEFAULT)?;
        STACKS.store(stacks.part(0).start, Ordering::Release);
        std::mem::forget(stacks);
    }
    Ok(())
}

/// In a forked child: frees the stacks of threads that the child does not have.
pub(crate) fn after_fork() {
    TAKEN.store(0, Ordering::Relaxed);
}
