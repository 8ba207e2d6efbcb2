//! Memory that carries one key.

use super::slots::{Number, Slot};
use super::sync::{AtomicPtr, Mutex, MutexGuard, PoisonError};
use crate::memory::layout::Run;

/// Memory that carries one key: a domain's.
#[derive(Debug)]
pub(crate) struct Tagged {
    pub(super) number: Number,
    /// Whole pages, which nothing else tags. Changed under the table's lock.
    pub(super) runs: Mutex<Box<[Run]>>,
    /// The slot of its key, in the table that it belongs to. Changed under that table's lock.
    pub(super) slot: AtomicPtr<Slot>,
}

impl Tagged {
    pub(super) fn runs(&self) -> MutexGuard<'_, Box<[Run]>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
