//! Mapped memory between guard pages.

#![expect(unsafe_code, reason = "it maps and unmaps memory")]

use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use pkru::ProtectionKey;

use crate::{Error, sys};

/// Parts of memory with a page without access before each and after the last. They have no access either until
/// they are [tagged](crate::keys::Tagged) or [made accessible](Self::make_accessible).
#[derive(Debug)]
pub(crate) struct Mapping<const PARTS: usize> {
    start: NonNull<u8>,
    size: usize,
    // Invariant: these lie in the mapping, and are whole pages.
    parts: [Range<usize>; PARTS],
    /// A part could neither be discarded nor mapped anew.
    lost: bool,
}

// SAFETY: a mapping is memory that only its owner uses.
unsafe impl<const PARTS: usize> Send for Mapping<PARTS> {}

impl<const PARTS: usize> Mapping<PARTS> {
    /// The size in bytes of the guard before the first part, which is where a stack is: beyond the reach of most local
    /// variables.
    const FIRST_GUARD: usize = 1 << 20;

    /// Maps parts of these sizes in bytes, rounded up to pages. They read as zeros.
    pub(crate) fn new(sizes: [usize; PARTS]) -> Result<Self, Error> {
        let page = sys::page_size();
        let mut end = Self::FIRST_GUARD;
        let parts = sizes.map(|size| {
            let start = end;
            let size = size.next_multiple_of(page);
            end = start + size + page;
            start..start + size
        });
        let start = sys::map_reserved(end).map_err(Error::system("reserve addresses for a domain"))?;
        let base = start.as_ptr() as usize;
        let parts = parts.map(|part| base + part.start..base + part.end);
        let region = Self { start, size: end, parts, lost: false };
        // A discard shall cost what was touched, not the clearing of 2 MiB for each first byte.
        // SAFETY: the pages were just reserved for this.
        unsafe { sys::use_small_pages(start, end) };
        Ok(region)
    }

    /// Makes all parts accessible with a key.
    pub(crate) fn make_accessible(&self, key: ProtectionKey) -> Result<(), Error> {
        for part in &self.parts {
            // SAFETY: the pages are this mapping's.
            unsafe { sys::protect(part.clone(), key) }.map_err(Error::system("map and tag a domain's memory"))?;
        }
        Ok(())
    }

    /// Returns the addresses of a part.
    #[inline]
    pub(crate) fn part(&self, index: usize) -> Range<usize> {
        self.parts[index].clone()
    }

    /// Returns whether an address lies in a guard page.
    pub(crate) fn is_guard(&self, address: usize) -> bool {
        let start = self.start.as_ptr() as usize;
        (start..start + self.size).contains(&address) && !self.parts.iter().any(|part| part.contains(&address))
    }

    /// Drops everything that the memory holds: it reads as zeros afterwards. Returns whether pages were mapped anew for
    /// that, and so have no access and no key.
    ///
    /// The cost is in proportion to the pages that were touched.
    #[must_use]
    pub(crate) fn discard(&mut self) -> bool {
        let mut anew = false;
        // Part by part: one call over the guard pages between them costs more (some 2,600 instructions on Linux 6.12).
        for part in &self.parts {
            let pages = sys::DontNeed { start: pointer(part.start), size: part.len() };
            // SAFETY: the pages are this mapping's; its owner has exclusive access and relies on nothing in them.
            if unsafe { sys::discard(pages) }.is_err() {
                // The kernel refuses locked pages (mlockall).
                // SAFETY: as above.
                self.lost |= unsafe { sys::map_again(pages) }.is_err();
                anew = true;
            }
        }
        anew
    }

    /// Notes that pages could not be made usable again.
    pub(crate) const fn set_lost(&mut self) {
        self.lost = true;
    }

    /// Checks that no discard has failed, after which the memory can be used no more.
    pub(crate) const fn check(&self) -> Result<(), Error> {
        if self.lost {
            return Err(Error::System { operation: "map a domain's memory anew after a discard", errno: libc::ENOMEM });
        }
        Ok(())
    }

    /// Unmaps the memory.
    pub(crate) fn unmap(self) -> io::Result<()> {
        let region = std::mem::ManuallyDrop::new(self);
        // SAFETY: the mapping is this mapping's, and its owner is done with it.
        unsafe { sys::unmap(region.start, region.size) }
    }
}

impl<const PARTS: usize> Drop for Mapping<PARTS> {
    fn drop(&mut self) {
        // It fails only where the kernel is out of memory for its own records; then the addresses stay taken.
        // SAFETY: the mapping is this mapping's, and its owner is done with it.
        let _ = unsafe { sys::unmap(self.start, self.size) };
    }
}

fn pointer(address: usize) -> NonNull<u8> {
    NonNull::new(address as *mut u8).expect("a mapping does not start at 0")
}
