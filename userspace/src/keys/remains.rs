//! What is left of system calls that failed: pages that may carry keys which nothing else can have.

use std::fmt;

use pkru::KeySet;

use super::sync::Arc;
use super::tagged::Tagged;

/// Unmaps memory. Returns whether no page of it is left. It is called until it succeeds.
pub(crate) trait Unmap: FnMut() -> bool + Send + 'static {}

impl<F: FnMut() -> bool + Send + 'static> Unmap for F {}

/// Pages that may carry keys.
pub(super) struct Remains {
    /// The keys. No one else gets them.
    pub(super) keys: KeySet,
    pages: Pages,
}

enum Pages {
    /// Memory of a domain without a key. It was not all tagged.
    Tainted(Arc<Tagged>),
    /// Memory that was not unmapped.
    Mapped(Box<dyn Unmap>),
}

impl Remains {
    pub(super) const fn of_memory(keys: KeySet, memory: Arc<Tagged>) -> Self {
        Self { keys, pages: Pages::Tainted(memory) }
    }

    pub(super) fn of_mapping(keys: KeySet, unmap: impl Unmap) -> Self {
        Self { keys, pages: Pages::Mapped(Box::new(unmap)) }
    }

    /// Returns the memory that is to get another key; `None` if it is to be unmapped.
    pub(super) fn memory(&self) -> Option<Arc<Tagged>> {
        match &self.pages {
            Pages::Tainted(memory) => Some(memory.clone()),
            Pages::Mapped(_) => None,
        }
    }

    /// Returns whether the pages are those of a domain's memory.
    pub(super) fn is_of(&self, memory: &Tagged) -> bool {
        matches!(&self.pages, Pages::Tainted(tainted) if std::ptr::eq(&raw const **tainted, memory))
    }

    /// Unmaps what is to be unmapped. Returns whether it is.
    pub(super) fn unmap(&mut self) -> bool {
        match &mut self.pages {
            Pages::Tainted(_) => false,
            Pages::Mapped(unmap) => unmap(),
        }
    }
}

impl fmt::Debug for Remains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remains").field("keys", &self.keys).finish_non_exhaustive()
    }
}
