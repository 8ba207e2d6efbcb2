//! Mappings that code in a domain changes: its caller makes the system calls.
//!
//! Every number comes from the domain and is hostile. A change is made only within the domain's own memory, and never to
//! its thread-locals and its mailbox, which the caller uses. What is unmapped stays reserved, so that the program's next
//! mapping does not lie there. The caller has acquired the domain's key.
//!
//! What fails is an `errno` value.

#![expect(unsafe_code, reason = "it changes mappings")]

use std::ffi::c_int;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use super::pku::{HEAP, MAPPED, Memory, STACK};
use crate::memory::layout::Run;
use crate::memory::mapping::{self, Use};
use crate::sys::{self, Protection};

/// What is returned to code in the domain, or the `errno` value.
type Answer = Result<u64, c_int>;

fn errno(error: &io::Error) -> c_int {
    error.raw_os_error().unwrap_or(libc::EINVAL)
}

/// Returns whole pages from an address on; `None` if they are none.
fn pages(start: u64, size: u64) -> Result<Option<Range<usize>>, c_int> {
    let page = sys::page_size();
    let (start, size) = (start as usize, size as usize);
    if !start.is_multiple_of(page) {
        return Err(libc::EINVAL);
    }
    let end = size.checked_next_multiple_of(page).and_then(|size| start.checked_add(size)).ok_or(libc::ENOMEM)?;
    Ok((end > start).then_some(start..end))
}

/// Returns the pages that a range of bytes touches; `None` if it touches none.
fn touched(start: u64, size: u64) -> Result<Option<Range<usize>>, c_int> {
    let inset = start % sys::page_size() as u64;
    pages(start - inset, size.checked_add(inset).ok_or(libc::ENOMEM)?)
}

impl Memory {
    /// Returns the part that a range of pages lies in, which code in the domain may map as it wants to.
    fn part_of(&self, pages: &Range<usize>) -> Result<usize, c_int> {
        let is_in = |part: &usize| {
            let all = self.mapping.part(*part);
            let end = if *part == STACK { self.mailbox().start } else { all.end };
            all.start <= pages.start && pages.end <= end
        };
        [STACK, HEAP, MAPPED].into_iter().find(is_in).ok_or(libc::EPERM)
    }

    /// mmap(2). Without a fixed address the mapping lies in the part that is reserved for mappings.
    pub(crate) fn map(&mut self, [start, size, protection, flags, file, offset]: [u64; 6]) -> Answer {
        const PLACE: c_int = libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE;
        const KIND: c_int = libc::MAP_PRIVATE | libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // Hints, which the kernel too may ignore.
        const HINTS: c_int = libc::MAP_POPULATE | libc::MAP_NONBLOCK | libc::MAP_STACK | libc::MAP_DENYWRITE;
        let (flags, file, offset) = (flags as c_int, file as c_int, offset as i64);
        let protection = Protection::from_bits(protection).ok_or(libc::EINVAL)?;
        if flags & !(PLACE | KIND | HINTS) != 0 {
            return Err(libc::EINVAL);
        }
        let is_fixed = flags & PLACE != 0;
        let place = if is_fixed { pages(start, size)? } else { pages(0, size)? }.ok_or(libc::EINVAL)?;
        let (part, pages) = if is_fixed {
            let part = self.part_of(&place)?;
            if flags & libc::MAP_FIXED_NOREPLACE != 0 && !self.layout.is_free(&place) {
                return Err(libc::EEXIST);
            }
            (part, place)
        } else {
            let hint = pages(start, size).ok().flatten();
            let hint = hint.filter(|hint| self.part_of(hint) == Ok(MAPPED) && self.layout.is_free(hint));
            let free = || self.layout.free(&self.mapping.part(MAPPED), place.len());
            (MAPPED, hint.or_else(free).ok_or(libc::ENOMEM)?)
        };
        let is_file = flags & libc::MAP_ANONYMOUS == 0 || flags & libc::MAP_PRIVATE == 0;
        let run = Run { pages: pages.clone(), protection, is_file };
        let layout = self.layout.replaced(&pages, Some(run)).ok_or(libc::ENOMEM)?;
        let flags = flags & KIND;
        if is_file {
            mapping::can_map(pages.len(), flags, file, offset).map_err(|error| errno(&error))?;
        }
        self.uses[part] = Use::Mappings;
        // SAFETY: the pages are the domain's own, and code in the domain wants them to be replaced.
        let mapped = unsafe { sys::map_file(&pages, flags, file, offset) };
        // SAFETY: as above.
        let tagged = mapped.and_then(|()| unsafe { sys::protect(pages.clone(), protection, self.key_in_call()) });
        if let Err(error) = tagged {
            // The record is wrong until a discard if that fails too.
            let _ = self.reserve(&pages).inspect_err(|_| self.mapping.set_lost());
            return Err(errno(&error));
        }
        let start = pages.start as u64;
        self.set_layout(layout);
        Ok(start)
    }

    /// munmap(2). The addresses stay reserved.
    pub(crate) fn unmap(&mut self, [start, size, ..]: [u64; 6]) -> Answer {
        let pages = pages(start, size)?.ok_or(libc::EINVAL)?;
        let part = self.part_of(&pages)?;
        if self.layout.replaced(&pages, None).is_none() {
            return Err(libc::ENOMEM);
        }
        self.uses[part] = Use::Mappings;
        self.reserve(&pages).inspect_err(|_| self.protect_as_recorded(&pages))?;
        Ok(0)
    }

    /// Maps nothing in place of pages, and records that. Fails where the kernel lacks memory for its records.
    fn reserve(&mut self, pages: &Range<usize>) -> Result<(), c_int> {
        let start = NonNull::new(pages.start as *mut u8).expect("a mapping does not start at 0");
        let layout = self.layout.replaced(pages, None).ok_or(libc::ENOMEM)?;
        // SAFETY: the pages are the domain's own, and code in the domain gives them up.
        unsafe { sys::map_again(sys::DontNeed { start, size: pages.len() }) }.map_err(|error| errno(&error))?;
        self.set_layout(layout);
        Ok(())
    }

    /// mprotect(2).
    pub(crate) fn protect(&mut self, [start, size, protection, ..]: [u64; 6]) -> Answer {
        let protection = Protection::from_bits(protection).ok_or(libc::EINVAL)?;
        let Some(pages) = pages(start, size)? else { return Ok(0) };
        let part = self.part_of(&pages)?;
        if !self.layout.is_mapped(&pages) {
            return Err(libc::ENOMEM);
        }
        let layout = self.layout.protected(&pages, protection).ok_or(libc::ENOMEM)?;
        self.uses[part] = Use::Mappings;
        // SAFETY: the pages are the domain's own, and the caller's copies from there and to there can fail.
        if let Err(error) = unsafe { sys::protect(pages.clone(), protection, self.key_in_call()) } {
            self.protect_as_recorded(&pages);
            return Err(errno(&error));
        }
        self.set_layout(layout);
        Ok(0)
    }

    /// Undoes a change that failed half-way.
    fn protect_as_recorded(&mut self, pages: &Range<usize>) {
        for run in self.layout.clipped(pages.clone()) {
            // SAFETY: the pages are the domain's own.
            if unsafe { sys::protect(run.pages, run.protection, self.key_in_call()) }.is_err() {
                // The record is wrong until the discard.
                self.mapping.set_lost();
                return;
            }
        }
    }

    /// mremap(2), as far as nothing moves. Fails with EAGAIN where code in the domain can move the contents itself.
    pub(crate) fn remap(&mut self, [start, size, new_size, flags, ..]: [u64; 6]) -> Answer {
        const MAYMOVE: u64 = libc::MREMAP_MAYMOVE as u64;
        let old = pages(start, size)?.ok_or(libc::EINVAL)?;
        let new = pages(start, new_size)?.ok_or(libc::EINVAL)?;
        let part = self.part_of(&old)?;
        if flags & !MAYMOVE != 0 {
            return Err(libc::EINVAL);
        }
        if !self.layout.is_mapped(&old) {
            return Err(libc::EFAULT);
        }
        if new.end < old.end {
            self.unmap([new.end as u64, (old.end - new.end) as u64, 0, 0, 0, 0])?;
        }
        if new.end <= old.end {
            return Ok(start);
        }
        let mut runs = self.layout.clipped(old.clone());
        let is_plain = runs.all(|run| run.protection == Protection::READ_WRITE && !run.is_file);
        drop(runs);
        if !is_plain {
            return Err(libc::ENOMEM);
        }
        let more = old.end..new.end;
        if part == MAPPED && self.part_of(&more) == Ok(MAPPED) && self.layout.is_free(&more) {
            let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u64;
            self.map([more.start as u64, more.len() as u64, protection, flags, u64::MAX, 0])?;
            return Ok(start);
        }
        Err(if flags & MAYMOVE == 0 { libc::ENOMEM } else { libc::EAGAIN })
    }

    /// madvise(2). Advice that takes memory away from children, or poisons it, is not given.
    pub(crate) fn advise(&mut self, [start, size, advice, ..]: [u64; 6]) -> Answer {
        /// Advice about contents, which leaves no trace in the mapping.
        const CONTENTS: [c_int; 7] = [
            libc::MADV_WILLNEED,
            libc::MADV_DONTNEED,
            libc::MADV_FREE,
            libc::MADV_COLD,
            libc::MADV_PAGEOUT,
            libc::MADV_POPULATE_READ,
            libc::MADV_POPULATE_WRITE,
        ];
        const MAPPING: [c_int; 7] = [
            libc::MADV_NORMAL,
            libc::MADV_RANDOM,
            libc::MADV_SEQUENTIAL,
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_DONTDUMP,
            libc::MADV_DODUMP,
        ];
        let advice = advice as c_int;
        let Some(pages) = pages(start, size)? else { return Ok(0) };
        let part = self.part_of(&pages)?;
        if MAPPING.contains(&advice) {
            self.uses[part] = Use::Mappings;
        } else if !CONTENTS.contains(&advice) {
            return Err(libc::EPERM);
        }
        if !self.layout.is_mapped(&pages) {
            return Err(libc::ENOMEM);
        }
        // SAFETY: the pages are the domain's own, and code in the domain gives up their contents.
        unsafe { sys::advise(&pages, advice) }.map(|()| 0).map_err(|error| errno(&error))
    }

    /// mlock2(2).
    pub(crate) fn lock(&mut self, [start, size, flags, ..]: [u64; 6]) -> Answer {
        let Some(pages) = touched(start, size)? else { return Ok(0) };
        let part = self.part_of(&pages)?;
        self.uses[part] = Use::Mappings;
        sys::lock(&pages, flags).map(|()| 0).map_err(|error| errno(&error))
    }

    /// munlock(2).
    pub(crate) fn unlock(&mut self, [start, size, ..]: [u64; 6]) -> Answer {
        let Some(pages) = touched(start, size)? else { return Ok(0) };
        self.part_of(&pages)?;
        sys::unlock(&pages).map(|()| 0).map_err(|error| errno(&error))
    }
}
