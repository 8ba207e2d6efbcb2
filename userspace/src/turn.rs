//! A lock that the child of a fork finds free, whoever had it.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys;

/// A lock for work that can be begun again: in the copy that a fork makes, the thread that was about it may not be
/// there.
#[derive(Debug)]
pub(crate) struct Turn {
    /// The process in which somebody has it, 0 if nobody does.
    taken_in: AtomicU32,
}

/// The lock on a [`Turn`].
#[must_use]
pub(crate) struct Taken<'a>(&'a Turn);

impl Turn {
    pub(crate) const fn new() -> Self {
        Self { taken_in: AtomicU32::new(0) }
    }

    /// Waits until nobody else in this process has it.
    pub(crate) fn take(&self) -> Taken<'_> {
        let here = sys::process_id();
        let take = |before| if before == here { None } else { Some(here) };
        while self.taken_in.fetch_update(Ordering::Acquire, Ordering::Relaxed, take).is_err() {
            std::thread::yield_now();
        }
        Taken(self)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.taken_in.store(0, Ordering::Release);
    }
}
