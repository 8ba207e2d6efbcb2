//! The quick paths: small blocks.
//!
//! They do what the others do, in as few instructions as possible, or nothing. `FULL` says that the heap has the full
//! checks. If that is wrong they do nothing, or the memory that they take and give has fewer checks.

use core::ptr::NonNull;

use super::DomainHeap;
use super::ground::{CANARY, GRANULE, HEADER, LEAST, LOW_BITS, MARK, POISON, SITE, State};
use super::small::SMALL;

/// The bytes that a chunk needs beyond its block's.
const fn overhead(full: bool) -> usize {
    HEADER + CANARY + if full { super::SITE_BYTES } else { 0 }
}

impl DomainHeap {
    /// Allocates a block of `size` bytes, aligned to [`ALIGNMENT`](super::ALIGNMENT), if that is quick. If it returns
    /// `None`, nothing has changed: call [`allocate`](Self::allocate).
    #[inline(always)]
    pub fn allocate_quickly<const FULL: bool>(&mut self, size: usize, site: usize) -> Option<NonNull<u8>> {
        if size > SMALL * GRANULE - overhead(FULL) {
            return None;
        }
        let granules = (size + overhead(FULL) + GRANULE - 1) >> GRANULE.ilog2();
        let first = self.small.old[granules];
        if first.wrapping_sub(1) as usize >= self.ground.last {
            return None;
        }
        let block = self.ground.base.wrapping_add(first as usize * GRANULE).cast::<u64>();
        // SAFETY: the offset is one of a place in the heap, by the comparison above.
        let word = unsafe { block.wrapping_sub(2).read() };
        // SAFETY: as above.
        let check = unsafe { block.wrapping_sub(1).read() };
        if (word ^ check ^ block as u64) | MARK != self.ground.key(State::Small)
            || (word >> LOW_BITS) as usize != granules
        {
            return None;
        }
        // SAFETY: a block has at least four words.
        let words = unsafe { block.cast::<[u64; 4]>().read() };
        if words[0] != POISON || words[1] != POISON || words[2] != POISON {
            return None;
        }
        if FULL {
            let mut rest = block.wrapping_add(2 * granules - 2).cast::<[u64; 2]>();
            while rest > block.wrapping_add(SITE + 1).cast() {
                rest = rest.wrapping_sub(1);
                // SAFETY: the chunk has so many granules, as its header says.
                let words = unsafe { rest.read() };
                if words[0] != POISON || words[1] != POISON {
                    return None;
                }
            }
        }
        // Read again, because to keep it would take a register that has to be saved.
        // SAFETY: as above.
        let next = unsafe { block.wrapping_sub(2).cast::<u32>().read_volatile() };
        self.small.old[granules] = next;
        let word = ((granules as u64) << LOW_BITS) | size as u64;
        let check = (word ^ block as u64 ^ self.ground.key(State::Live)) | MARK;
        // SAFETY: as for the reads.
        unsafe { block.wrapping_sub(2).write(word) };
        // SAFETY: as for the reads.
        unsafe { block.wrapping_sub(1).write(check) };
        // SAFETY: the chunk has the granules for the block and its canary, as its header says.
        unsafe { block.wrapping_byte_add(size).write_unaligned(check) };
        if FULL {
            let site = self.ground.hide_site(block as usize, site);
            // SAFETY: the chunk has the granules for this word too.
            unsafe { block.wrapping_add(2 * granules - 3).write(site) };
        }
        self.touched.note_small(first);
        NonNull::new(block.cast())
    }

    /// Returns whether a small block is surely whole, with the fast checks.
    #[inline(always)]
    pub(super) fn is_whole(&self, offset: u32) -> bool {
        if offset.wrapping_sub(1) as usize >= self.ground.last {
            return false;
        }
        let block = self.ground.base.wrapping_add(offset as usize * GRANULE).cast::<u64>();
        // SAFETY: the offset is one of a place in the heap, by the comparison above.
        let word = unsafe { block.wrapping_sub(2).read() };
        // SAFETY: as above.
        let check = unsafe { block.wrapping_sub(1).read() };
        let key = (word ^ check ^ block as u64) | MARK;
        if key == self.ground.key(State::Live) && word >> LOW_BITS <= SMALL as u64 {
            // SAFETY: the header says that the block and its canary are there.
            return unsafe { block.wrapping_byte_add(word as u32 as usize).read_unaligned() } == check;
        }
        // SAFETY: a block has at least four words.
        let words = unsafe { block.cast::<[u64; 4]>().read() };
        key == self.ground.key(State::Small) && words[0] == POISON && words[1] == POISON && words[2] == POISON
    }

    /// Frees a block, if that is quick. If it returns `false`, nothing has changed: call [`free`](Self::free).
    ///
    /// # Safety
    ///
    /// As for [`free`](Self::free).
    #[inline(always)]
    #[must_use]
    pub unsafe fn free_quickly<const FULL: bool>(&mut self, block: *mut u8, site: usize) -> bool {
        let block = block.cast::<u64>();
        // A misaligned pointer becomes a large offset, and so does null.
        let offset = (block as usize).wrapping_sub(self.ground.base as usize).rotate_right(GRANULE.ilog2());
        if offset > self.ground.last {
            return false;
        }
        // SAFETY: the offset is one of a place in the heap, or 0, before which the heap's records lie.
        let word = unsafe { block.wrapping_sub(2).read() };
        // SAFETY: as above.
        let check = unsafe { block.wrapping_sub(1).read() };
        let granules = (word >> LOW_BITS) as usize;
        if (word ^ check ^ block as u64) | MARK != self.ground.key(State::Live) || granules > SMALL {
            return false;
        }
        let size = word as u32;
        // SAFETY: the header says that the block and its canary are there.
        if unsafe { block.wrapping_byte_add(size as usize).read_unaligned() } != check {
            return false;
        }
        const { assert!(SITE == 3) };
        // SAFETY: a block has at least four words.
        unsafe { block.cast::<[u64; 4]>().write([POISON, POISON, POISON, site as u64]) };
        if FULL {
            let count = granules - LEAST;
            let rest = block.wrapping_add(SITE + 1).cast::<[u64; 2]>();
            // SAFETY: the chunk has so many granules, as its header says.
            let fill = |index: usize| unsafe { rest.wrapping_add(index).write([POISON; 2]) };
            // In few instructions if there are few.
            if count != 0 {
                fill(0);
                fill(count - 1);
                if count > 2 {
                    fill(1);
                    fill(count - 2);
                    for word in 4..2 * count.max(4) - 4 {
                        // Volatile, because a call of memset takes more for so few.
                        // SAFETY: as above.
                        unsafe { rest.cast::<u64>().wrapping_add(word).write_volatile(POISON) };
                    }
                }
            }
        }
        let first = &mut self.small.young[granules];
        let word = (word ^ u64::from(size)) | u64::from(*first);
        *first = offset as u32;
        self.small.young_count[granules] = self.small.young_count[granules].wrapping_add(1);
        // SAFETY: as for the reads.
        unsafe { block.wrapping_sub(2).write(word) };
        // SAFETY: as for the reads.
        unsafe { block.wrapping_sub(1).write((word ^ block as u64 ^ self.ground.key(State::Small)) | MARK) };
        self.touched.note_small(offset as u32);
        true
    }
}
