//! The primitives that the key table is built on. The model checker's test compiles the table over its own.

use std::time::Duration;

pub(super) use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
pub(super) use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Lets other threads run, longer after the first hundred tries.
pub(super) fn pause(tries: u32) {
    if tries < 100 {
        std::thread::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(100));
    }
}
