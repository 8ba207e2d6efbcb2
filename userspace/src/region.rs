//! Mapped, tagged memory between guard pages.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use pkru::ProtectionKey;

use crate::{Error, sys};

/// Parts of memory that carry one key, with a page without access before each and after the last.
#[derive(Debug)]
pub(crate) struct Region<const PARTS: usize> {
    start: NonNull<u8>,
    size: usize,
    key: ProtectionKey,
    // Invariant: these lie in the mapping, and are whole pages.
    parts: [Range<usize>; PARTS],
    /// A part could neither be discarded nor mapped anew.
    lost: bool,
}

// SAFETY: a region is memory that only its owner uses.
unsafe impl<const PARTS: usize> Send for Region<PARTS> {}

impl<const PARTS: usize> Region<PARTS> {
    /// Maps parts of these sizes in bytes, rounded up to pages, tagged with the key. They read as zeros.
    pub(crate) fn new(sizes: [usize; PARTS], key: ProtectionKey) -> Result<Self, Error> {
        let page = sys::page_size();
        let mut end = page;
        let parts = sizes.map(|size| {
            let start = end;
            let size = size.next_multiple_of(page);
            end = start + size + page;
            start..start + size
        });
        let start = sys::map_reserved(end).map_err(Error::system("reserve addresses for a domain"))?;
        let base = start.as_ptr() as usize;
        let parts = parts.map(|part| base + part.start..base + part.end);
        let region = Self { start, size: end, key, parts, lost: false };
        // A discard shall cost what was touched, not the clearing of 2 MiB for each first byte.
        // SAFETY: the pages were just reserved for this.
        unsafe { sys::use_small_pages(start, end) };
        for part in &region.parts {
            // SAFETY: the pages were just reserved for this.
            unsafe { sys::protect(pointer(part.start), part.len(), key) }
                .map_err(Error::system("map and tag a domain's memory"))?;
        }
        Ok(region)
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

    /// Drops everything that the memory holds: it reads as zeros afterwards.
    ///
    /// The cost is in proportion to the pages that were touched.
    pub(crate) fn discard(&mut self) {
        // Part by part: one call over the guard pages between them costs more (some 2,600 instructions on Linux 6.12).
        for part in &self.parts {
            let pages = sys::DontNeed { start: pointer(part.start), size: part.len() };
            // SAFETY: the pages are this region's; its owner has exclusive access and relies on nothing in them.
            if unsafe { sys::discard(pages) }.is_err() {
                // The kernel refuses locked pages (mlockall).
                // SAFETY: as above.
                self.lost |= unsafe { self.replace(pages) }.is_err();
            }
        }
    }

    /// Maps fresh pages in the place of these.
    ///
    /// # Safety
    ///
    /// As for [`sys::map_again`].
    unsafe fn replace(&self, pages: sys::DontNeed) -> io::Result<()> {
        // SAFETY: the caller answers for the pages.
        unsafe { sys::map_again(pages) }?;
        // SAFETY: the pages were just mapped for this.
        unsafe { sys::protect(pages.start, pages.size, self.key) }
    }

    /// Checks that no discard has failed, after which the memory can be used no more.
    pub(crate) const fn check(&self) -> Result<(), Error> {
        if self.lost {
            return Err(Error::System { operation: "map a domain's memory anew after a discard", errno: libc::ENOMEM });
        }
        Ok(())
    }
}

impl<const PARTS: usize> Drop for Region<PARTS> {
    fn drop(&mut self) {
        // SAFETY: the mapping is this region's, and its owner is done with it.
        unsafe { sys::unmap(self.start, self.size) };
    }
}

fn pointer(address: usize) -> NonNull<u8> {
    NonNull::new(address as *mut u8).expect("a region does not start at 0")
}
