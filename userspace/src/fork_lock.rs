//! A lock that a forked child may take over, whichever thread held it.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys;

/// A lock for work that can be started again. In a forked child the thread that held it may not exist.
#[derive(Debug)]
pub(crate) struct ForkLock {
    /// The process in which a thread holds it, 0 if none does.
    held_in: AtomicU32,
}

/// Holds a [`ForkLock`] until it is dropped.
#[must_use]
pub(crate) struct ForkLockGuard<'a>(&'a ForkLock);

impl ForkLock {
    pub(crate) const fn new() -> Self {
        Self { held_in: AtomicU32::new(0) }
    }

    /// Waits until no other thread of this process holds it.
    pub(crate) fn lock(&self) -> ForkLockGuard<'_> {
        let here = sys::process_id();
        let take = |before| if before == here { None } else { Some(here) };
        while self.held_in.fetch_update(Ordering::Acquire, Ordering::Relaxed, take).is_err() {
            std::thread::yield_now();
        }
        ForkLockGuard(self)
    }
}

impl Drop for ForkLockGuard<'_> {
    fn drop(&mut self) {
        self.0.held_in.store(0, Ordering::Release);
    }
}
