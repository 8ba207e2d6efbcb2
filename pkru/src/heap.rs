//! A domain's heap, with the semantics of C's malloc family.
//!
//! It lives inside the domain's memory, bookkeeping included, and only code in the domain calls it: the caller's side
//! never acts on anything that it finds there. Large blocks come from `linked_list_allocator`; small ones are kept on
//! lists by size when they are freed, so that the common pair of a small allocation and its release costs a few
//! instructions.

use core::alloc::Layout;
use core::fmt;
use core::mem::{offset_of, size_of};
use core::ptr::{self, NonNull};

use linked_list_allocator::Heap;

/// The alignment that every block has, as C's `max_align_t` demands.
pub const ALIGNMENT: usize = 16;

/// What stands before each block.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Header {
    /// The bytes from the start of the chunk that holds the block to the chunk's end, this header included.
    chunk: usize,
    /// The bytes from the start of the chunk to the block.
    offset: u32,
    state: u32,
}

const HEADER: usize = size_of::<Header>();
const LIVE: u32 = 0x6c69_7665;
const FREE: u32 = 0x6672_6565;

/// Chunks of up to this many bytes go on a list when freed.
const SMALL: usize = 1024 + HEADER;
const LISTS: usize = SMALL / ALIGNMENT + 1;

/// A heap over one range of memory.
pub struct DomainHeap {
    large: Heap,
    /// Freed small chunks by size in units of [`ALIGNMENT`], each linked through its first word.
    small: [*mut u8; LISTS],
    bottom: usize,
    top: usize,
    /// The bytes of the last allocation that failed.
    failed: usize,
    root: *mut u8,
}

/// Why a block cannot be freed or resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeapError {
    /// The pointer leads outside this heap.
    Foreign {
        /// That pointer.
        address: usize,
    },
    /// The pointer leads into the heap, but not to a block of it.
    NotABlock {
        /// That pointer.
        address: usize,
    },
    /// The block has been freed already.
    DoubleFree {
        /// The pointer to it.
        address: usize,
    },
}

impl fmt::Display for HeapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign { address } => write!(f, "{address:#x} is not in the domain's heap"),
            Self::NotABlock { address } => write!(f, "{address:#x} is not a block of the domain's heap"),
            Self::DoubleFree { address } => write!(f, "the block at {address:#x} was freed before"),
        }
    }
}

impl core::error::Error for HeapError {}

impl DomainHeap {
    /// Creates a heap over `size` bytes from `bottom`.
    ///
    /// # Safety
    ///
    /// The range is mapped and writable for as long as the heap is used, and nothing else uses it.
    ///
    /// # Panics
    ///
    /// If the range is smaller than 64 bytes.
    #[must_use]
    pub unsafe fn new(bottom: NonNull<u8>, size: usize) -> Self {
        assert!(size >= 64, "a heap needs 64 bytes to begin with");
        // SAFETY: the caller gives the range away.
        let large = unsafe { Heap::new(bottom.as_ptr(), size) };
        let bottom = bottom.as_ptr() as usize;
        Self { large, small: [ptr::null_mut(); LISTS], bottom, top: bottom + size, failed: 0, root: ptr::null_mut() }
    }

    /// Allocates `size` bytes aligned to `align` and to [`ALIGNMENT`]; `None` if they cannot be had, or if `align` is
    /// not a power of two. A size of 0 gives a block of its own that may not be accessed.
    pub fn allocate(&mut self, size: usize, align: usize) -> Option<NonNull<u8>> {
        if align <= ALIGNMENT && size <= SMALL - HEADER {
            let chunk = size.max(1).next_multiple_of(ALIGNMENT) + HEADER;
            if let Some(start) = self.take_small(chunk) {
                return Some(Self::place(start, chunk, HEADER));
            }
        }
        self.allocate_large(size, align)
    }

    /// Returns the bytes of the last allocation that failed; 0 if none has.
    #[must_use]
    pub const fn last_failed(&self) -> usize {
        self.failed
    }

    /// Returns the same of a heap of which nothing is known but that its bytes can be read.
    ///
    /// # Safety
    ///
    /// The bytes of a heap's value are mapped there, and nothing writes them meanwhile.
    #[must_use]
    pub const unsafe fn last_failed_of(heap: *const Self) -> usize {
        // SAFETY: the caller answers for the bytes.
        unsafe { (*heap).failed }
    }

    /// Notes that an allocation of so many bytes has failed; with 0, that none has.
    #[inline]
    pub const fn note_failed(&mut self, size: usize) {
        self.failed = size;
    }

    /// Returns a pointer that whoever uses the heap may keep here, such as one to what it has allocated for itself.
    /// Null at first.
    #[must_use]
    #[inline]
    pub const fn root(&self) -> *mut u8 {
        self.root
    }

    /// Sets that pointer.
    pub const fn set_root(&mut self, root: *mut u8) {
        self.root = root;
    }

    /// Allocates `size` bytes of zeros, aligned to [`ALIGNMENT`].
    pub fn allocate_zeroed(&mut self, size: usize) -> Option<NonNull<u8>> {
        let block = self.allocate(size, ALIGNMENT)?;
        // SAFETY: the block has at least `size` bytes.
        unsafe { block.write_bytes(0, size) };
        Some(block)
    }

    /// Frees a block.
    ///
    /// # Errors
    ///
    /// If the pointer does not lead to a live block of this heap; then nothing is changed. A forged header in the
    /// domain's memory can hide that: what follows stays in the domain.
    ///
    /// # Safety
    ///
    /// Nothing uses the block any more.
    pub unsafe fn free(&mut self, block: NonNull<u8>) -> Result<(), HeapError> {
        let header = self.header(block)?;
        // SAFETY: `header` found a live header in front of the block.
        unsafe { header_of(block).write(Header { state: FREE, ..header }) };
        // SAFETY: the offset was written with the header, and leads to the start of the chunk.
        let start = unsafe { block.sub(header.offset as usize) };
        if header.chunk <= SMALL && header.offset as usize == HEADER {
            let list = &mut self.small[header.chunk / ALIGNMENT];
            // SAFETY: the block has at least one word, which is the heap's now that it is free.
            unsafe { block.cast::<*mut u8>().write(*list) };
            *list = start.as_ptr();
        } else {
            self.give(start, header.chunk);
        }
        Ok(())
    }

    /// Returns whether a block looks like one of some domain's heap, free or not. Code outside any domain asks this
    /// about what it is about to free, for another allocator would take a domain's bytes for its own.
    ///
    /// # Safety
    ///
    /// The 16 bytes before the block can be read, as those of every block of a malloc can.
    #[must_use]
    #[inline]
    pub unsafe fn marks(block: NonNull<u8>) -> bool {
        let state = block.as_ptr().wrapping_sub(HEADER).wrapping_add(offset_of!(Header, state)).cast::<u32>();
        // SAFETY: the caller answers for the bytes. Where the block is not aligned it is none.
        let state = unsafe { state.read_unaligned() };
        state == LIVE || state == FREE
    }

    /// Changes the size of a block, moving it if it must; `None`, with the block untouched, if the memory cannot be
    /// had.
    ///
    /// # Errors
    ///
    /// As for [`free`](Self::free).
    ///
    /// # Safety
    ///
    /// Nothing uses the old block if a new one is returned.
    pub unsafe fn reallocate(&mut self, block: NonNull<u8>, size: usize) -> Result<Option<NonNull<u8>>, HeapError> {
        let old = self.usable_size(block)?;
        // In place, unless that would hold on to more than half for nothing.
        if size <= old && size >= old / 2 {
            return Ok(Some(block));
        }
        let Some(new) = self.allocate(size, ALIGNMENT) else { return Ok(None) };
        // SAFETY: both blocks have at least as many bytes, and they are different blocks.
        unsafe { block.copy_to_nonoverlapping(new, old.min(size)) };
        // SAFETY: the caller gives the old block up.
        unsafe { self.free(block) }?;
        Ok(Some(new))
    }

    /// Returns how many bytes of a block may be used.
    ///
    /// # Errors
    ///
    /// As for [`free`](Self::free).
    pub fn usable_size(&self, block: NonNull<u8>) -> Result<usize, HeapError> {
        let header = self.header(block)?;
        Ok(header.chunk - header.offset as usize)
    }

    /// Returns whether an address lies in the range of this heap.
    #[must_use]
    pub const fn contains(&self, address: usize) -> bool {
        address >= self.bottom && address < self.top
    }

    /// Allocates what no list has.
    #[inline(never)]
    fn allocate_large(&mut self, size: usize, align: usize) -> Option<NonNull<u8>> {
        let block = self.carve(size, align.max(ALIGNMENT));
        if block.is_none() {
            self.note_failed(size);
        }
        block
    }

    fn carve(&mut self, size: usize, align: usize) -> Option<NonNull<u8>> {
        // The header has room before the block: it is as large as the smallest alignment.
        let chunk = size.max(1).checked_next_multiple_of(ALIGNMENT)?.checked_add(align)?;
        let offset = u32::try_from(align).ok()?;
        let start = self.take(chunk, align)?;
        Some(Self::place(start, chunk, offset as usize))
    }

    fn take_small(&mut self, chunk: usize) -> Option<NonNull<u8>> {
        let list = &mut self.small[chunk / ALIGNMENT];
        let start = NonNull::new(*list)?;
        // SAFETY: a chunk on a list is longer than a header.
        let block = unsafe { start.add(HEADER) };
        // SAFETY: a free small block has its link in its first word.
        *list = unsafe { block.cast::<*mut u8>().read() };
        Some(start)
    }

    fn take(&mut self, chunk: usize, align: usize) -> Option<NonNull<u8>> {
        let layout = Layout::from_size_align(chunk, align).ok()?;
        self.large.allocate_first_fit(layout).ok().or_else(|| {
            self.give_back_small();
            self.large.allocate_first_fit(layout).ok()
        })
    }

    fn give(&mut self, start: NonNull<u8>, chunk: usize) {
        let layout = Layout::from_size_align(chunk, ALIGNMENT).expect("a chunk had a layout when it was taken");
        // SAFETY: the chunk was taken with this size; the allocator does not use the alignment of what is given back.
        unsafe { self.large.deallocate(start, layout) };
    }

    /// Empties the lists, so that neighbours among the small chunks can grow together.
    #[cold]
    fn give_back_small(&mut self) {
        for list in 0..LISTS {
            while let Some(start) = self.take_small(list * ALIGNMENT) {
                self.give(start, list * ALIGNMENT);
            }
        }
    }

    fn place(start: NonNull<u8>, chunk: usize, offset: usize) -> NonNull<u8> {
        // SAFETY: the chunk is longer than the offset.
        let block = unsafe { start.add(offset) };
        let header = Header { chunk, offset: offset as u32, state: LIVE };
        // SAFETY: the offset leaves room for a header, at an address that is aligned as both are.
        unsafe { header_of(block).write(header) };
        block
    }

    fn header(&self, block: NonNull<u8>) -> Result<Header, HeapError> {
        let address = block.as_ptr() as usize;
        if address < self.bottom.saturating_add(HEADER) || address >= self.top {
            return Err(HeapError::Foreign { address });
        }
        if !address.is_multiple_of(ALIGNMENT) {
            return Err(HeapError::NotABlock { address });
        }
        // SAFETY: the header's bytes lie in the heap's range, and any bytes make a header.
        let header = unsafe { header_of(block).read() };
        let fits = header.chunk >= header.offset as usize && header.chunk <= self.top - self.bottom;
        match header.state {
            LIVE if fits => Ok(header),
            FREE => Err(HeapError::DoubleFree { address }),
            _ => Err(HeapError::NotABlock { address }),
        }
    }
}

/// Returns where the header of a block stands.
fn header_of(block: NonNull<u8>) -> *mut Header {
    block.as_ptr().cast::<Header>().wrapping_sub(1)
}

impl fmt::Debug for DomainHeap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DomainHeap({:#x}..{:#x}, {} bytes in chunks)", self.bottom, self.top, self.large.used())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::boxed::Box;
    use std::vec;
    use std::vec::Vec;

    #[repr(C, align(4096))]
    struct Arena([u8; 1 << 16]);

    fn heap() -> DomainHeap {
        let arena = Box::leak(Box::new(Arena([0xaa; 1 << 16])));
        // SAFETY: the arena is leaked, and nothing else knows it.
        unsafe { DomainHeap::new(NonNull::from(&mut arena.0).cast(), arena.0.len()) }
    }

    fn free(heap: &mut DomainHeap, block: NonNull<u8>) -> Result<(), HeapError> {
        // SAFETY: the tests do not use blocks after this.
        unsafe { heap.free(block) }
    }

    #[test]
    fn blocks_are_aligned_apart_and_as_large_as_asked() {
        let mut heap = heap();
        let mut blocks: Vec<(usize, usize)> = Vec::new();
        for size in [0, 1, 15, 16, 17, 100, 1024, 1025, 5000] {
            for align in [1, 8, 16, 64, 512, 4096] {
                let Some(block) = heap.allocate(size, align) else { continue };
                assert!((block.as_ptr() as usize).is_multiple_of(align.max(ALIGNMENT)));
                assert!(heap.usable_size(block).unwrap() >= size);
                blocks.push((block.as_ptr() as usize, heap.usable_size(block).unwrap()));
            }
        }
        blocks.sort_unstable();
        assert!(blocks.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "no two blocks overlap");
    }

    #[test]
    fn what_is_freed_is_had_again() {
        let mut heap = heap();
        for round in 0..100 {
            let blocks: Vec<_> = (0..).map_while(|index| heap.allocate(16 + (index * 7 + round) % 2000, 16)).collect();
            assert!(blocks.len() > 20, "round {round} got {} blocks", blocks.len());
            for block in blocks {
                free(&mut heap, block).unwrap();
            }
        }
        assert!(heap.allocate(60_000, 16).is_some(), "small chunks grow together again");
    }

    #[test]
    fn zeroed_means_zeroed() {
        let mut heap = heap();
        let block = heap.allocate_zeroed(100).unwrap();
        // SAFETY: the block has 100 bytes.
        assert_eq!(unsafe { core::slice::from_raw_parts(block.as_ptr(), 100) }, vec![0; 100]);
    }

    #[test]
    fn growing_keeps_the_contents() {
        let mut heap = heap();
        let block = heap.allocate(10, 16).unwrap();
        // SAFETY: the block has 10 bytes.
        unsafe { block.copy_from_nonoverlapping(NonNull::from(b"0123456789").cast(), 10) };
        // SAFETY: the old block is not used again.
        let grown = unsafe { heap.reallocate(block, 3000) }.unwrap().unwrap();
        // SAFETY: the new block has 3000 bytes.
        assert_eq!(unsafe { core::slice::from_raw_parts(grown.as_ptr(), 10) }, b"0123456789");
        // SAFETY: on failure the block stays.
        assert_eq!(unsafe { heap.reallocate(grown, 1 << 20) }, Ok(None));
        assert!(heap.usable_size(grown).unwrap() >= 3000);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let mut heap = heap();
        for size in [1 << 16, usize::MAX, usize::MAX - 15, isize::MAX as usize] {
            assert_eq!(heap.allocate(size, 16), None);
            assert_eq!(heap.allocate(size, 4096), None);
        }
        assert_eq!(heap.allocate(16, 24), None, "24 is no power of two");
        assert_eq!(heap.last_failed(), 16);
    }

    #[test]
    fn misuse_is_told_apart() {
        let mut heap = heap();
        let block = heap.allocate(64, 16).unwrap();
        let address = block.as_ptr() as usize;
        let other = Box::new([0u64; 8]);
        // SAFETY: the bytes before both can be read.
        assert!(unsafe { DomainHeap::marks(block) } && !unsafe { DomainHeap::marks(NonNull::from(&other[4]).cast()) });
        free(&mut heap, block).unwrap();
        assert_eq!(free(&mut heap, block), Err(HeapError::DoubleFree { address }));
        // SAFETY: the address is inside the chunk.
        let inside = unsafe { block.add(16) };
        assert_eq!(free(&mut heap, inside), Err(HeapError::NotABlock { address: address + 16 }));
        let mut outside = 0u8;
        let foreign = NonNull::from(&mut outside);
        assert_eq!(free(&mut heap, foreign), Err(HeapError::Foreign { address: foreign.as_ptr() as usize }));
    }
}
