//! Giving a domain the writable data of a shared library.

#![expect(unsafe_code, reason = "it copies a library's data")]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::bind;
use super::owned::{self, Part, can_be_owned, is_called};
use crate::Error;
use crate::sys::{self, BlockedSignals, Inaccessible, Library};
use crate::trusted::trusted;

/// A library's data, owned by a domain.
#[derive(Debug)]
pub(crate) struct LibraryData {
    /// Keeps the library loaded.
    _library: Library,
    parts: Vec<Arc<Part>>,
}

trusted! {
    /// Whether [`owned::return_all`] is registered.
    static HAS_EXIT_HANDLER: AtomicBool = AtomicBool::new(false);
}

impl LibraryData {
    /// Takes the data of a loaded library with its present contents. `name` is the library's file name, with or without
    /// the version at its end.
    ///
    /// # Errors
    ///
    /// [`Error::NoLibrary`] if no such library is loaded. [`Error::LibraryInUse`] if a domain owns the data or the
    /// program needs the library.
    pub(crate) fn take(name: &str) -> Result<Self, Error> {
        let library = sys::libraries().into_iter().find(|library| is_called(library, name));
        let library = library.ok_or_else(|| Error::NoLibrary { name: name.into() })?;
        if !can_be_owned(&library) {
            return Err(Error::LibraryInUse { name: name.into() });
        }
        let ranges = library.writable_pages();
        let _quiet = BlockedSignals::new();
        // The copy below must have every slot bound, because nothing outside the domain can write the data later.
        let _binding = bind::bind_all();
        let mut owned = owned::lock();
        if ranges.iter().any(|range| owned.iter().any(|other| other.addresses.start == range.start)) {
            return Err(Error::LibraryInUse { name: name.into() });
        }
        let contents = |range: &Range<usize>| {
            // SAFETY: the pages are mapped while `library` exists, and `Builder::library` demands that no other thread
            // uses the library meanwhile.
            unsafe { std::slice::from_raw_parts(range.start as *const u8, range.len()) }.to_vec()
        };
        let part =
            |range| Arc::new(Part { contents: contents(&range), addresses: range, is_domains: AtomicBool::new(true) });
        let parts: Vec<_> = ranges.into_iter().map(part).collect();
        if !HAS_EXIT_HANDLER.load(Ordering::Relaxed) {
            sys::at_exit(owned::return_all).map_err(Error::system("register an exit handler"))?;
            HAS_EXIT_HANDLER.store(true, Ordering::Relaxed);
        }
        owned.extend(parts.iter().cloned());
        Ok(Self { _library: library, parts })
    }

    /// Returns the pages.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.parts.iter().map(|part| part.addresses.clone())
    }

    /// Restores the contents that the data had when it was taken.
    ///
    /// # Errors
    ///
    /// [`Inaccessible`] if the domain that owns it has made a page inaccessible.
    pub(crate) fn restore(&self) -> Result<(), Inaccessible> {
        self.parts.iter().try_for_each(|part| part.restore())
    }

    /// Returns the data to the program with the contents that it had when it was taken. Returns `false` if the domain's
    /// key could not be removed from a page, which is left to another attempt.
    pub(crate) fn give_back(&self) -> bool {
        self.parts.iter().filter(|part| !part.give_back()).count() == 0
    }
}

impl Drop for LibraryData {
    fn drop(&mut self) {
        let _quiet = BlockedSignals::new();
        let mut owned = owned::lock();
        owned.retain(|owned| !self.parts.iter().any(|part| part.addresses == owned.addresses));
    }
}
