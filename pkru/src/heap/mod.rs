//! A domain's heap, with the semantics of C's malloc family.
//!
//! The heap and its records lie in the domain's memory, and code in the domain can overwrite them. Therefore only code
//! in the domain allocates and frees. The caller must treat what it reads from a heap as hostile.
//!
//! Every operation takes a bounded number of steps, whatever was allocated before: small free chunks are on lists of one
//! size (`small`), other free memory is a two-level segregated fit (`holes`). When neither has room, the small chunks
//! are merged; each was freed once since the last time.
//!
//! # Checks
//!
//! The heap trusts nothing that it reads from its memory. Each chunk has a header that is checked against a secret
//! (`ground`). An overwritten header, link or list is found when it is used, and two live blocks never share memory
//! unless a header was forged. Beyond that it looks for mistakes of the code that uses it:
//!
//! | mistake | is found | [`Fast`](HeapChecks::Fast) | [`Full`](HeapChecks::Full) |
//! |---|---|---|---|
//! | write behind a block | by a canary, when it is freed, resized or [checked](DomainHeap::check) | yes | yes |
//! | write before a block | by the header, likewise | yes | yes |
//! | write to a freed block of at most 32 KiB, an eighth of the heap with `Full` | by its contents, when it is allocated again, merged or checked | the first 32 bytes without the fourth word, 64 of a large block | the first 4 KiB, without the fourth word |
//! | free of a free block | by the header, while it is held back or free | yes | yes |
//!
//! A check looks at what was allocated and freed since the last one: the last 128 times for small blocks, and the last 16
//! large blocks. The full checks look at 1,024 more chunks, in turn, and hold more back.
//!
//! | module | subject |
//! |---|---|
//! | `quick` | the quick paths |
//! | `ground` | chunks, headers, canaries and poison |
//! | `small`, `holes` | free memory |
//! | `recent` | what was touched lately, and large blocks that are held back |
//! | `check` | finding out what is damaged |
//! | `error` | what is wrong |

mod check;
mod error;
mod ground;
mod holes;
#[cfg(test)]
mod properties;
mod quick;
mod recent;
mod small;
#[cfg(test)]
mod tests;

use core::fmt;
use core::ptr::NonNull;

use error::Fault;
pub use error::{Corruption, Damage, HeapError};
use ground::{CANARY, GRANULE, Ground, HEADER, Header, LEAST, MOST, Place, State, WORDS};
use holes::Holes;
use recent::{Held, Touched};
use small::{SMALL, Small};

/// The minimum alignment of a block in bytes: that of C's `max_align_t`.
pub const ALIGNMENT: usize = GRANULE;

/// The bytes at the end of a chunk that record where it was allocated, with the full checks.
const SITE_BYTES: usize = 8;

/// How thoroughly a heap looks for mistakes of the code that uses it. The [module](self#checks) lists the differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum HeapChecks {
    /// The checks that cost little.
    #[default]
    Fast,
    /// All checks. A block also records where it was allocated, which takes 8 bytes more.
    Full,
}

/// A heap over one range of memory, at whose start it lies.
///
/// Code in the domain can overwrite it, so any bytes must be a value of each field's type.
#[repr(C)]
pub struct DomainHeap {
    ground: Ground,
    touched: Touched,
    small: Small,
    held: Held,
    holes: Holes,
    /// 1 with the full checks.
    full: usize,
    /// 1 as long as nothing was allocated: the memory is not a hole yet.
    is_new: usize,
    /// Where the next check of chunks in turn begins.
    cursor: usize,
    /// The size in bytes of the last failed allocation.
    failed: usize,
    root: *mut u8,
}

impl DomainHeap {
    /// The bytes at the start of its memory that a heap's records take.
    pub const RECORDS: usize = (size_of::<Self>() + GRANULE).next_multiple_of(GRANULE);

    /// The size in bytes of the largest heap. What is beyond it in its memory stays unused.
    pub const LARGEST: usize = MOST * GRANULE;

    /// Returns the records of an empty heap in `size` bytes of memory, to be written to its start. It touches no memory.
    ///
    /// `secret` makes headers hard to produce by mistake; it should differ from heap to heap.
    ///
    /// # Panics
    ///
    /// If the memory is not aligned to [`ALIGNMENT`], or `size` is below [`RECORDS`](Self::RECORDS) and 64 bytes.
    ///
    /// # Safety
    ///
    /// While the heap is in use, it lies at the start of the memory, which is mapped and writable, and nothing else uses
    /// that.
    #[must_use]
    pub unsafe fn new(memory: NonNull<u8>, size: usize, checks: HeapChecks, secret: u64) -> Self {
        assert!(memory.addr().get().is_multiple_of(ALIGNMENT), "the heap's memory is aligned");
        assert!(size >= Self::RECORDS + 64, "the heap's memory is large enough");
        let granules = ((size - Self::RECORDS) / GRANULE).min(MOST);
        let base = memory.as_ptr().wrapping_add(Self::RECORDS);
        // SAFETY: the caller gives this heap exclusive use of the range, in which the records precede the base.
        let ground = unsafe { Ground::new(base, granules, secret) };
        let (generation, held) = match checks {
            HeapChecks::Fast => (48, granules.min(1 << 15) / 16),
            HeapChecks::Full => (512, granules / 8),
        };
        Self {
            ground,
            touched: Touched::new(),
            small: Small::new(generation.min(granules / 64)),
            held: Held::new(held),
            holes: Holes::new(),
            full: usize::from(checks == HeapChecks::Full),
            is_new: 1,
            cursor: 1,
            failed: 0,
            root: core::ptr::null_mut(),
        }
    }

    /// Makes a heap in `size` bytes of memory, with its records at the start.
    ///
    /// # Panics
    ///
    /// As [`new`](Self::new) does.
    ///
    /// # Safety
    ///
    /// As for [`new`](Self::new).
    #[must_use = "the heap is used by the pointer"]
    pub unsafe fn create(memory: NonNull<u8>, size: usize, checks: HeapChecks, secret: u64) -> NonNull<Self> {
        let heap = memory.cast::<Self>();
        // SAFETY: the caller has the same contract.
        let value = unsafe { Self::new(memory, size, checks, secret) };
        // SAFETY: the memory is writable, aligned and large enough.
        unsafe { heap.write(value) };
        heap
    }

    /// Allocates a block of `size` bytes, aligned to `align` and to [`ALIGNMENT`]. `site` is a code address to record, or
    /// 0.
    ///
    /// A `size` of 0 allocates a distinct block that must not be accessed. Returns `None` if too little memory is free
    /// or `align` is above [`ALIGNMENT`] and not a power of two.
    ///
    /// # Errors
    ///
    /// [`HeapError::Corrupt`] if the heap is damaged.
    pub fn allocate(&mut self, size: usize, align: usize, site: usize) -> Result<Option<NonNull<u8>>, HeapError> {
        self.ground.check_seal().map_err(|fault| self.describe(fault))?;
        if align <= ALIGNMENT && size <= SMALL * GRANULE {
            if let Some(block) = self.allocate_small(size, site) {
                return Ok(Some(block));
            }
            let granules = (size + HEADER + CANARY + self.site_bytes()).div_ceil(GRANULE);
            if self.small.rotate(granules)
                && let Some(block) = self.allocate_small(size, site)
            {
                return Ok(Some(block));
            }
        }
        let Some((place, granules)) = self.find(size, align).map_err(|fault| self.describe(fault))? else {
            self.note_failed(size);
            return Ok(None);
        };
        Ok(Some(self.activate(place, granules, size, site)))
    }

    /// Allocates a block of `size` zero bytes, aligned to [`ALIGNMENT`].
    ///
    /// # Errors
    ///
    /// As for [`allocate`](Self::allocate).
    pub fn allocate_zeroed(&mut self, size: usize, site: usize) -> Result<Option<NonNull<u8>>, HeapError> {
        let block = self.allocate(size, ALIGNMENT, site)?;
        if let Some(block) = block {
            // SAFETY: the block has at least `size` bytes.
            unsafe { block.write_bytes(0, size) };
        }
        Ok(block)
    }

    /// Frees a block. `site` is a code address to record, or 0.
    ///
    /// # Errors
    ///
    /// Returns a [`HeapError`] if the pointer is not a live block of this heap, or if the heap is damaged.
    ///
    /// # Safety
    ///
    /// Nothing uses the block afterwards.
    pub unsafe fn free(&mut self, block: NonNull<u8>, site: usize) -> Result<(), HeapError> {
        self.ground.check_seal().map_err(|fault| self.describe(fault))?;
        let is_done = if self.is_full() {
            // SAFETY: nothing uses the block, by this function's contract.
            unsafe { self.free_quickly::<true>(block.as_ptr(), site) }
        } else {
            // SAFETY: as above.
            unsafe { self.free_quickly::<false>(block.as_ptr(), site) }
        };
        if is_done {
            return Ok(());
        }
        let (place, header) = self.live(block)?;
        // SAFETY: `live` found the chunk, and nothing uses it by this function's contract.
        unsafe { self.retire(place, &header, site) }.map_err(|fault| self.describe(fault))
    }

    /// Changes the size of a block, and moves it if necessary. The new block is aligned to [`ALIGNMENT`].
    ///
    /// Returns `None` if too little memory is free. The old block is then unchanged.
    ///
    /// # Errors
    ///
    /// Fails as [`free`](Self::free) does.
    ///
    /// # Safety
    ///
    /// Nothing uses the old block after a new one is returned.
    pub unsafe fn reallocate(
        &mut self,
        block: NonNull<u8>,
        size: usize,
        site: usize,
    ) -> Result<Option<NonNull<u8>>, HeapError> {
        let (place, header) = self.live(block)?;
        // SAFETY: `live` found the chunk.
        let resized = unsafe { self.resize(place, &header, size) };
        if let Some(granules) = resized.map_err(|fault| self.describe(fault))? {
            return Ok(Some(self.activate(place, granules, size, site)));
        }
        let Some(new) = self.allocate_to_grow(size, header.low, site)? else { return Ok(None) };
        // SAFETY: both blocks have at least that many bytes, and two live blocks do not overlap.
        unsafe { block.copy_to_nonoverlapping(new, header.low.min(size)) };
        // SAFETY: nothing uses the old block afterwards, by this function's contract.
        unsafe { self.free(block, site) }?;
        Ok(Some(new))
    }

    /// Returns the usable size of a block in bytes. It is the size requested.
    ///
    /// # Errors
    ///
    /// Fails as [`free`](Self::free) does.
    pub fn usable_size(&self, block: NonNull<u8>) -> Result<usize, HeapError> {
        Ok(self.live(block)?.1.low)
    }

    /// Returns whether a block looks like a block of any domain's heap, live or free.
    ///
    /// Code outside domains checks this before it passes a pointer to another allocator. That allocator would take a
    /// domain's bytes for its own records. glibc's blocks never have the mark, because of how their sizes are aligned. A
    /// domain can remove it.
    ///
    /// # Safety
    ///
    /// The 8 bytes before the block are readable. They are for any block of a malloc.
    #[must_use]
    #[inline]
    pub unsafe fn marks(block: NonNull<u8>) -> bool {
        let check = block.as_ptr().wrapping_sub(size_of::<u64>()).cast::<u64>();
        // SAFETY: the bytes are readable by this function's contract, and the read needs no alignment.
        unsafe { check.read_unaligned() & ground::MARK != 0 }
    }

    /// Returns whether an address is in this heap's memory for blocks.
    #[must_use]
    pub fn contains(&self, address: usize) -> bool {
        self.ground.contains(address)
    }

    /// Returns the size in bytes of the last failed allocation; 0 if none failed.
    #[must_use]
    pub const fn last_failed(&self) -> usize {
        self.failed
    }

    /// Returns [`last_failed`](Self::last_failed) of a heap whose contents may be corrupt. The result is hostile.
    ///
    /// # Safety
    ///
    /// `heap` is aligned and points to readable memory of the size of a `DomainHeap`. Nothing writes it during the
    /// call.
    #[must_use]
    pub const unsafe fn last_failed_of(heap: *const Self) -> usize {
        // SAFETY: the field is readable by this function's contract, and any bytes are a valid `usize`.
        unsafe { (*heap).failed }
    }

    /// Records that an allocation of `size` bytes failed. A `size` of 0 clears the record.
    #[inline]
    pub const fn note_failed(&mut self, size: usize) {
        self.failed = size;
    }

    /// Returns the pointer that the user of the heap stored with [`set_root`](Self::set_root), such as one to its own
    /// data in the heap; null at first.
    #[must_use]
    #[inline]
    pub const fn root(&self) -> *mut u8 {
        self.root
    }

    /// Stores a pointer for the user of the heap.
    pub const fn set_root(&mut self, root: *mut u8) {
        self.root = root;
    }

    /// Returns the granules of a chunk for a block; `None` if the heap is smaller.
    fn granules_for(&self, size: usize) -> Option<usize> {
        let bytes = size.checked_add(HEADER + CANARY + self.site_bytes())?;
        let granules = bytes.div_ceil(GRANULE).max(LEAST);
        (granules <= self.ground.granules()).then_some(granules)
    }

    fn is_full(&self) -> bool {
        self.full == 1
    }

    fn site_bytes(&self) -> usize {
        if self.is_full() { SITE_BYTES } else { 0 }
    }

    /// The words of a freed block that are filled.
    fn poisoned_words(&self, granules: usize) -> usize {
        match self.is_full() {
            false if granules <= SMALL => WORDS,
            false => 8,
            true => 512,
        }
    }

    #[inline]
    fn allocate_small(&mut self, size: usize, site: usize) -> Option<NonNull<u8>> {
        if self.is_full() {
            self.allocate_quickly::<true>(size, site)
        } else {
            self.allocate_quickly::<false>(size, site)
        }
    }

    /// Allocates a block for one that has outgrown its chunk, with room to grow on: code that grows a block little by
    /// little does not have it copied each time.
    fn allocate_to_grow(&mut self, size: usize, old: usize, site: usize) -> Result<Option<NonNull<u8>>, HeapError> {
        if size > old
            && let Some(granules) = self.granules_for(size).filter(|granules| *granules > SMALL)
            && let Some((place, granules)) =
                self.carve(granules + granules / 2, ALIGNMENT).map_err(|fault| self.describe(fault))?
        {
            return Ok(Some(self.activate(place, granules, size, site)));
        }
        self.allocate(size, ALIGNMENT, site)
    }

    /// Makes all memory a hole, the first time.
    fn begin(&mut self) -> Result<(), Fault> {
        if self.is_new != 1 {
            return Ok(());
        }
        self.is_new = 0;
        let Some(whole) = self.ground.place(1) else { return Err(self.ground.records()) };
        // SAFETY: nothing is allocated.
        unsafe { self.holes.add(&self.ground, whole, self.ground.granules()) }
    }

    /// Finds free memory for a block.
    fn find(&mut self, size: usize, align: usize) -> Result<Option<(Place, usize)>, Fault> {
        self.begin()?;
        let Some(granules) = self.granules_for(size) else { return Ok(None) };
        if align > ALIGNMENT && !align.is_power_of_two() {
            return Ok(None);
        }
        if align <= ALIGNMENT
            && granules <= SMALL
            && let Some((place, header)) = self.small.take(&self.ground, granules)?
        {
            self.ground.check_poison(place, &header, self.poisoned_words(granules))?;
            return Ok(Some((place, granules)));
        }
        if align <= ALIGNMENT
            && let Some(found) = self.take_held(granules)?
        {
            return Ok(Some(found));
        }
        if let Some(found) = self.carve(granules, align)? {
            return Ok(Some(found));
        }
        self.give_back_all()?;
        self.carve(granules, align)
    }

    /// Cuts a chunk out of a hole.
    fn carve(&mut self, granules: usize, align: usize) -> Result<Option<(Place, usize)>, Fault> {
        // Enough that what is left before the block is none or a chunk.
        let before = if align <= ALIGNMENT { 0 } else { align / GRANULE + LEAST - 1 };
        let Some((hole, mut total)) = self.holes.take(&self.ground, granules.saturating_add(before))? else {
            return Ok(None);
        };
        let mut place = hole;
        if align > ALIGNMENT {
            let is_good = |gap: &usize| (hole.address() + gap * GRANULE).is_multiple_of(align);
            // At most two multiples of the alignment are too near.
            let first = hole.address().next_multiple_of(align).wrapping_sub(hole.address()) / GRANULE;
            let gap = (first..).step_by(align / GRANULE).find(|gap| *gap == 0 || *gap >= LEAST).filter(is_good);
            let Some(gap) = gap else { return Ok(None) };
            if let Some(aligned) = self.ground.place(hole.offset + gap).filter(|_| gap != 0) {
                total -= gap;
                self.ground.write(aligned, State::Live, total, 0);
                // SAFETY: this part of the hole is before the block.
                unsafe { self.holes.add(&self.ground, hole, gap) }?;
                place = aligned;
            }
        }
        let Some(rest) = self.rest(place, total, granules) else { return Ok(Some((place, total))) };
        // SAFETY: this part of the hole is behind the block.
        unsafe { self.holes.add(&self.ground, rest, total - granules) }?;
        Ok(Some((place, granules)))
    }

    /// Returns the place where a chunk can be cut in two, if what is behind `keep` granules is large enough.
    fn rest(&self, place: Place, granules: usize, keep: usize) -> Option<Place> {
        self.ground.place(place.offset + keep).filter(|_| granules >= keep + LEAST)
    }

    /// Makes a free chunk a live block.
    fn activate(&mut self, place: Place, granules: usize, size: usize, site: usize) -> NonNull<u8> {
        let check = self.ground.write(place, State::Live, granules, size);
        // SAFETY: a chunk of so many granules is there, and `granules_for` has counted the canary.
        unsafe { Ground::set_canary(place, size, check) };
        if self.is_full() {
            // SAFETY: `granules_for` has counted these bytes.
            unsafe { self.ground.set_allocation_site(place, granules, site) };
        }
        if granules <= SMALL {
            self.touched.note_small(place.offset as u32);
        } else {
            self.touched.note_large(place.offset);
        }
        NonNull::new(place.block()).expect("no place is at address 0")
    }

    /// Takes a block back.
    ///
    /// # Safety
    ///
    /// Nothing uses the block.
    unsafe fn retire(&mut self, place: Place, header: &Header, site: usize) -> Result<(), Fault> {
        let granules = header.granules;
        // SAFETY: the header says that so many granules are there.
        unsafe { Ground::poison(place, granules, self.poisoned_words(granules), site) };
        if granules <= SMALL {
            self.small.put(&self.ground, place, granules);
            self.touched.note_small(place.offset as u32);
            return Ok(());
        }
        self.touched.note_any_large();
        self.ground.write(place, State::Held, granules, header.low);
        if !self.held.admits(granules) {
            return self.give_back_held(place.offset);
        }
        while self.held.is_full_for(granules) {
            let Some(oldest) = self.held.pop() else { break };
            self.give_back_held(oldest)?;
        }
        self.held.push(place.offset, granules);
        Ok(())
    }

    /// Checks a block that was held back.
    fn check_held(&self, offset: usize) -> Result<(Place, Header), Fault> {
        let place = self.ground.place(offset).ok_or_else(|| self.ground.records())?;
        let header = self.ground.expect_in(place, State::Held)?;
        self.ground.check_poison(place, &header, self.poisoned_words(header.granules))?;
        Ok((place, header))
    }

    /// Takes the block that was held back for longest, if it is of about this size and the next free would let it go.
    fn take_held(&mut self, granules: usize) -> Result<Option<(Place, usize)>, Fault> {
        let Some(oldest) = self.held.get(0).filter(|_| self.held.is_full_for(granules)) else { return Ok(None) };
        let (place, header) = self.check_held(oldest)?;
        if !(granules..=granules + granules / 32 + LEAST).contains(&header.granules) {
            return Ok(None);
        }
        self.held.pop();
        self.held.left(header.granules);
        Ok(Some((place, header.granules)))
    }

    /// Makes a block that was held back a hole.
    fn give_back_held(&mut self, offset: usize) -> Result<(), Fault> {
        let (place, header) = self.check_held(offset)?;
        self.touched.forget_large(offset);
        self.held.left(header.granules);
        // SAFETY: a chunk that is held back is not in use.
        unsafe { self.holes.merge(&self.ground, place, header.granules) }
    }

    /// Makes holes of all free chunks.
    #[cold]
    fn give_back_all(&mut self) -> Result<(), Fault> {
        // It forgets what was touched.
        self.check_touched()?;
        self.touched.forget_all();
        while let Some(offset) = self.held.pop() {
            self.give_back_held(offset)?;
        }
        for granules in LEAST..=SMALL {
            while let Some((place, header)) = self.small.take_any(&self.ground, granules)? {
                self.ground.check_poison(place, &header, self.poisoned_words(granules))?;
                // SAFETY: a chunk on a list is not in use.
                unsafe { self.holes.merge(&self.ground, place, granules) }?;
            }
        }
        Ok(())
    }

    /// Makes a chunk fit another size of its block, if that takes no move. Returns the chunk's granules.
    ///
    /// # Safety
    ///
    /// The place has a live chunk with this header.
    unsafe fn resize(&mut self, place: Place, header: &Header, size: usize) -> Result<Option<usize>, Fault> {
        let Some(needed) = self.granules_for(size) else { return Ok(None) };
        let mut granules = header.granules;
        if needed <= granules && needed >= granules / 2 {
            return Ok(Some(granules));
        }
        if granules <= SMALL {
            return Ok(None);
        }
        if needed > granules {
            let Some(after) = self.ground.after(place, granules) else { return Ok(None) };
            let next = self.ground.expect(after)?;
            if next.state != State::Hole || granules + next.granules < needed {
                return Ok(None);
            }
            self.holes.remove(&self.ground, after, next.granules, next.low)?;
            self.ground.write(after, State::Merged, next.granules, 0);
            granules += next.granules;
            self.ground.write(place, State::Live, granules, header.low);
        }
        let Some(rest) = self.rest(place, granules, needed) else { return Ok(Some(granules)) };
        // SAFETY: a hole that was added was not in use, and what is beyond the new size is so no more.
        unsafe { self.holes.merge(&self.ground, rest, granules - needed) }?;
        Ok(Some(needed))
    }
}

impl fmt::Debug for DomainHeap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = self.ground.base as usize;
        write!(f, "DomainHeap({start:#x}..{:#x})", start + self.ground.granules() * GRANULE)
    }
}
