//! Mapped memory between guard pages.

#![expect(unsafe_code, reason = "it maps and unmaps memory")]

use std::ffi::c_int;
use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, Ordering};

use pkru::ProtectionKey;

use crate::sys::Protection;
use crate::trusted::trusted;
use crate::{Error, sys};

/// What code did to a part of memory since it was new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// It has mapped nothing there.
    None,
    /// It may have written there.
    Contents,
    /// It may also have changed mappings: protections, holes, locks, files.
    Mappings,
}

/// Parts of memory with guard pages before each and after the last.
///
/// The parts have no access until they are [tagged](crate::keys::Tagged) or [made accessible](Self::make_accessible).
#[derive(Debug)]
pub(crate) struct Mapping<const PARTS: usize> {
    start: NonNull<u8>,
    size: usize,
    // Invariant: these lie in the mapping, and are whole pages.
    parts: [Range<usize>; PARTS],
    /// A part was neither discarded nor mapped again, or the record of it is wrong.
    lost: bool,
}

// SAFETY: only the owner of a mapping uses its memory, and it is bound to no thread.
unsafe impl<const PARTS: usize> Send for Mapping<PARTS> {}

impl<const PARTS: usize> Mapping<PARTS> {
    /// The size in bytes of the guard before the first part. That part is a stack, and few local variables are larger
    /// than this guard.
    const FIRST_GUARD: usize = 1 << 20;

    /// Maps parts of these sizes in bytes, rounded up to pages. Once accessible, they read as zeros.
    pub(crate) fn new(sizes: [usize; PARTS]) -> Result<Self, Error> {
        unmap_left();
        let page = sys::page_size();
        let mut end = Self::FIRST_GUARD;
        let parts = sizes.map(|size| {
            let start = end;
            let size = size.next_multiple_of(page);
            end = start + size + page;
            start..start + size
        });
        let start = sys::map_reserved(end).map_err(Error::system("reserve address space"))?;
        let base = start.as_ptr() as usize;
        let parts = parts.map(|part| base + part.start..base + part.end);
        let region = Self { start, size: end, parts, lost: false };
        // With huge pages, the first write after a discard would clear 2 MiB.
        // SAFETY: the pages were just reserved.
        unsafe { sys::use_small_pages(start, end) };
        Ok(region)
    }

    /// Makes all parts readable and writable, and tags them with a key.
    pub(crate) fn make_accessible(&self, key: ProtectionKey) -> Result<(), Error> {
        (0..PARTS).try_for_each(|part| self.make_part_accessible(part, key))
    }

    /// Makes a part readable and writable, and tags it with a key.
    pub(crate) fn make_part_accessible(&self, index: usize, key: ProtectionKey) -> Result<(), Error> {
        // SAFETY: the pages are this mapping's, and nothing relies on their protection.
        unsafe { sys::protect(self.part(index), Protection::READ_WRITE, key) }
            .map_err(Error::system("tag memory with a protection key"))
    }

    /// Returns the addresses of a part.
    #[inline]
    pub(crate) fn part(&self, index: usize) -> Range<usize> {
        self.parts[index].clone()
    }

    /// Returns all addresses, those of guard pages included.
    pub(crate) fn addresses(&self) -> Range<usize> {
        let start = self.start.as_ptr() as usize;
        start..start + self.size
    }

    /// Returns whether an address lies in a part.
    pub(crate) fn contains(&self, address: usize) -> bool {
        self.addresses().contains(&address) && self.parts.iter().any(|part| part.contains(&address))
    }

    /// Returns whether an address lies in a guard page.
    pub(crate) fn is_guard(&self, address: usize) -> bool {
        let start = self.start.as_ptr() as usize;
        (start..start + self.size).contains(&address) && !self.parts.iter().any(|part| part.contains(&address))
    }

    /// Returns the part that ends before a guard page; `None` if the address is in no guard page, or in the first guard.
    pub(crate) fn part_before_guard(&self, address: usize) -> Option<usize> {
        let is_after = |part: &Range<usize>| part.end <= address;
        self.parts.iter().rposition(is_after).filter(|_| self.is_guard(address))
    }

    /// Discards the contents of all parts. They read as zeros afterwards.
    ///
    /// Returns whether pages were mapped again. Those have no access and no key. The cost is proportional to the number
    /// of touched pages.
    #[must_use]
    pub(crate) fn discard(&mut self, uses: &[Use; PARTS]) -> bool {
        let was_lost = std::mem::replace(&mut self.lost, false);
        let mut anew = false;
        // Part by part, because one call that spans the guard pages costs about 2,600 instructions more (Linux 6.12).
        for (part, used) in self.parts.iter().zip(uses) {
            let pages = sys::DontNeed { start: pointer(part.start), size: part.len() };
            let is_discarded = match used {
                _ if was_lost => part.is_empty(),
                Use::None => true,
                // MADV_DONTNEED fails for locked pages, as after mlockall(2).
                // SAFETY: the pages are this mapping's, and its owner, which has exclusive access, discards their
                // contents.
                Use::Contents => unsafe { sys::discard(pages) }.is_ok(),
                // MADV_DONTNEED restores neither protections nor mappings.
                Use::Mappings => false,
            };
            if !is_discarded {
                // SAFETY: as above.
                self.lost |= unsafe { sys::map_again(pages) }.is_err();
                // SAFETY: the pages were just reserved.
                unsafe { sys::use_small_pages(pages.start, pages.size) };
                anew = true;
            }
        }
        anew
    }

    /// Marks the memory as unusable, until a discard maps all of it again.
    pub(crate) const fn set_lost(&mut self) {
        self.lost = true;
    }

    /// Returns whether the memory is unusable.
    pub(crate) const fn is_lost(&self) -> bool {
        self.lost
    }

    /// Checks that the memory is usable. A failed discard makes it unusable, until one succeeds.
    pub(crate) const fn check(&self) -> Result<(), Error> {
        if self.lost {
            return Err(Error::System {
                operation: "map a domain's memory again after a discard",
                errno: libc::ENOMEM,
            });
        }
        Ok(())
    }

    /// Unmaps the memory.
    ///
    /// # Errors
    ///
    /// The mapping, if the kernel has no memory for its own records.
    pub(crate) fn unmap(self) -> Result<(), Self> {
        let region = std::mem::ManuallyDrop::new(self);
        // SAFETY: the pages are this mapping's, and its owner no longer uses them.
        let result = unsafe { sys::unmap(region.start, region.size) };
        result.map_err(|_| std::mem::ManuallyDrop::into_inner(region))
    }
}

impl<const PARTS: usize> Drop for Mapping<PARTS> {
    fn drop(&mut self) {
        // SAFETY: the pages are this mapping's, and its owner no longer uses them.
        if unsafe { sys::unmap(self.start, self.size) }.is_err() {
            leave(Box::new(Left { start: self.start, size: self.size, next: ptr::null_mut() }));
        }
    }
}

/// Returns whether the system maps a file, so that mapping it elsewhere can fail only for lack of memory.
pub(crate) fn can_map(size: usize, flags: c_int, file: c_int, offset: i64) -> io::Result<()> {
    unmap_left();
    let start = sys::map_somewhere(size, flags, file, offset)?;
    // SAFETY: the pages were just mapped, and nothing uses them.
    unsafe { sys::unmap(start, size) }.inspect_err(|_| leave(Box::new(Left { start, size, next: ptr::null_mut() })))
}

/// Memory that could not be unmapped, because the kernel had no memory for its own records.
struct Left {
    start: NonNull<u8>,
    size: usize,
    next: *mut Self,
}

trusted! {
    /// The first of these. A thread that tries them again takes them all: in a child that is forked meanwhile they stay
    /// mapped.
    static LEFT: AtomicPtr<Left> = AtomicPtr::new(ptr::null_mut());
}

/// Keeps memory, to be unmapped later.
fn leave(left: Box<Left>) {
    let left = Box::into_raw(left);
    let mut first = LEFT.load(Ordering::Relaxed);
    loop {
        // SAFETY: no other thread knows it yet.
        unsafe { (*left).next = first };
        match LEFT.compare_exchange(first, left, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => return,
            Err(other) => first = other,
        }
    }
}

/// Unmaps what could not be unmapped before.
fn unmap_left() {
    if LEFT.load(Ordering::Relaxed).is_null() {
        return;
    }
    let mut next = LEFT.swap(ptr::null_mut(), Ordering::Acquire);
    while !next.is_null() {
        // SAFETY: `leave` made it, and whoever takes it from the list owns it.
        let left = unsafe { Box::from_raw(next) };
        next = left.next;
        // SAFETY: its owner has left the memory here.
        if unsafe { sys::unmap(left.start, left.size) }.is_err() {
            leave(left);
        }
    }
}

fn pointer(address: usize) -> NonNull<u8> {
    NonNull::new(address as *mut u8).expect("a mapping does not start at 0")
}
