//! A domain's heap, with the semantics of C's malloc family.
//!
//! The heap and its records lie in the domain's memory, and code in the domain can overwrite them. Therefore only code
//! in the domain allocates and frees. The caller must treat what it reads from a heap as hostile.
//!
//! `linked_list_allocator` manages the memory in chunks. A chunk holds a header and one block. A freed small chunk goes
//! on a list of its size, so allocating and freeing small blocks takes a few instructions.

use core::alloc::Layout;
use core::fmt;
use core::mem::{offset_of, size_of};
use core::ptr::{self, NonNull};

use linked_list_allocator::Heap;

/// The minimum alignment of a block in bytes: that of C's `max_align_t`.
pub const ALIGNMENT: usize = 16;

/// The header in front of each block.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Header {
    /// The size of the chunk in bytes, with the header.
    chunk: usize,
    /// The offset in bytes of the block in the chunk.
    offset: u32,
    /// [`LIVE`] or [`FREE`].
    state: u32,
}

const HEADER: usize = size_of::<Header>();
const LIVE: u32 = 0x6c69_7665;
const FREE: u32 = 0x6672_6565;

/// The size in bytes of the largest chunk that goes on a list when it is freed.
const SMALL: usize = 1024 + HEADER;
const LISTS: usize = SMALL / ALIGNMENT + 1;

/// A heap over one range of memory.
pub struct DomainHeap {
    large: Heap,
    /// The lists of freed small chunks, indexed by chunk size in units of [`ALIGNMENT`]. The first word of a free block
    /// links to the next chunk.
    small: [*mut u8; LISTS],
    bottom: usize,
    top: usize,
    /// The size in bytes of the last failed allocation.
    failed: usize,
    root: *mut u8,
}

/// The error of freeing or resizing a pointer that is no live block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeapError {
    /// The pointer is outside this heap.
    Foreign {
        /// The pointer's address.
        address: usize,
    },
    /// The pointer is inside the heap, but does not point to a block.
    NotABlock {
        /// The pointer's address.
        address: usize,
    },
    /// The block is already free.
    DoubleFree {
        /// The block's address.
        address: usize,
    },
}

impl fmt::Display for HeapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign { address } => write!(f, "{address:#x} is not in the domain's heap"),
            Self::NotABlock { address } => {
                write!(f, "{address:#x} is not a block of the domain's heap, or what lies before it was overwritten")
            }
            Self::DoubleFree { address } => write!(f, "the block at {address:#x} is already free"),
        }
    }
}

impl core::error::Error for HeapError {}

impl DomainHeap {
    /// Creates a heap over `size` bytes from `bottom`.
    ///
    /// # Safety
    ///
    /// While the heap is in use, the range is mapped and writable, and nothing else uses it.
    ///
    /// # Panics
    ///
    /// Panics if `size` is below 64.
    #[must_use]
    pub unsafe fn new(bottom: NonNull<u8>, size: usize) -> Self {
        assert!(size >= 64, "a heap needs at least 64 bytes");
        // SAFETY: the caller gives this heap exclusive use of the range.
        let large = unsafe { Heap::new(bottom.as_ptr(), size) };
        let bottom = bottom.as_ptr() as usize;
        Self { large, small: [ptr::null_mut(); LISTS], bottom, top: bottom + size, failed: 0, root: ptr::null_mut() }
    }

    /// Allocates a block of `size` bytes, aligned to `align` and to [`ALIGNMENT`].
    ///
    /// A `size` of 0 allocates a distinct block that must not be accessed. Returns `None` if too little memory is free
    /// or `align` is above [`ALIGNMENT`] and not a power of two.
    pub fn allocate(&mut self, size: usize, align: usize) -> Option<NonNull<u8>> {
        if align <= ALIGNMENT && size <= SMALL - HEADER {
            let chunk = size.max(1).next_multiple_of(ALIGNMENT) + HEADER;
            if let Some(start) = self.take_small(chunk) {
                return Some(Self::place(start, chunk, HEADER));
            }
        }
        self.allocate_large(size, align)
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

    /// Allocates a block of `size` zero bytes, aligned to [`ALIGNMENT`]; `None` if too little memory is free.
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
    /// Returns a [`HeapError`] if the pointer is not a live block of this heap. Then nothing has changed. A forged
    /// header can pass this check. The damage is limited to the domain's own memory.
    ///
    /// # Safety
    ///
    /// Nothing uses the block afterwards.
    pub unsafe fn free(&mut self, block: NonNull<u8>) -> Result<(), HeapError> {
        let header = self.header(block)?;
        // SAFETY: `header` found a live header in front of the block.
        unsafe { header_of(block).write(Header { state: FREE, ..header }) };
        // SAFETY: the offset was written with the header, and the chunk starts that many bytes before the block.
        let start = unsafe { block.sub(header.offset as usize) };
        if header.chunk <= SMALL && header.offset as usize == HEADER {
            let list = &mut self.small[header.chunk / ALIGNMENT];
            // SAFETY: the block has at least one word, and the heap owns it now that the block is free.
            unsafe { block.cast::<*mut u8>().write(*list) };
            *list = start.as_ptr();
        } else {
            self.give(start, header.chunk);
        }
        Ok(())
    }

    /// Returns whether a block looks like a block of any domain's heap, live or free.
    ///
    /// Code outside domains checks this before it passes a pointer to another allocator. That allocator would take a
    /// domain's bytes for its own records. A domain can forge the mark, and so can other bytes by chance.
    ///
    /// # Safety
    ///
    /// The 16 bytes before the block are readable. They are for any block of a malloc.
    #[must_use]
    #[inline]
    pub unsafe fn marks(block: NonNull<u8>) -> bool {
        let state = block.as_ptr().wrapping_sub(HEADER).wrapping_add(offset_of!(Header, state)).cast::<u32>();
        // SAFETY: the bytes are readable by this function's contract, and the read needs no alignment.
        let state = unsafe { state.read_unaligned() };
        state == LIVE || state == FREE
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
    pub unsafe fn reallocate(&mut self, block: NonNull<u8>, size: usize) -> Result<Option<NonNull<u8>>, HeapError> {
        let old = self.usable_size(block)?;
        // Keep the block, unless more than half of it would be unused.
        if size <= old && size >= old / 2 {
            return Ok(Some(block));
        }
        let Some(new) = self.allocate(size, ALIGNMENT) else { return Ok(None) };
        // SAFETY: both blocks have at least that many bytes, and two live blocks do not overlap.
        unsafe { block.copy_to_nonoverlapping(new, old.min(size)) };
        // SAFETY: nothing uses the old block afterwards, by this function's contract.
        unsafe { self.free(block) }?;
        Ok(Some(new))
    }

    /// Returns the usable size of a block in bytes. It is at least the size requested.
    ///
    /// # Errors
    ///
    /// Fails as [`free`](Self::free) does.
    pub fn usable_size(&self, block: NonNull<u8>) -> Result<usize, HeapError> {
        let header = self.header(block)?;
        Ok(header.chunk - header.offset as usize)
    }

    /// Returns whether an address is in this heap's range.
    #[must_use]
    pub const fn contains(&self, address: usize) -> bool {
        address >= self.bottom && address < self.top
    }

    /// Allocates from `linked_list_allocator`, when no list has a chunk.
    #[inline(never)]
    fn allocate_large(&mut self, size: usize, align: usize) -> Option<NonNull<u8>> {
        let block = self.carve(size, align.max(ALIGNMENT));
        if block.is_none() {
            self.note_failed(size);
        }
        block
    }

    fn carve(&mut self, size: usize, align: usize) -> Option<NonNull<u8>> {
        // The block starts `align` bytes into the chunk. The header fits in front of it: `align` is at least its size.
        let chunk = size.max(1).checked_next_multiple_of(ALIGNMENT)?.checked_add(align)?;
        let offset = u32::try_from(align).ok()?;
        let start = self.take(chunk, align)?;
        Some(Self::place(start, chunk, offset as usize))
    }

    fn take_small(&mut self, chunk: usize) -> Option<NonNull<u8>> {
        let list = &mut self.small[chunk / ALIGNMENT];
        let start = NonNull::new(*list)?;
        // SAFETY: a chunk is larger than its header.
        let block = unsafe { start.add(HEADER) };
        // SAFETY: `free` has written the link to the first word of the block.
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
        let layout = Layout::from_size_align(chunk, ALIGNMENT).expect("the chunk was allocated with a valid layout");
        // SAFETY: the chunk was allocated with this size, and `linked_list_allocator` 0.10 ignores the alignment here.
        unsafe { self.large.deallocate(start, layout) };
    }

    /// Empties the lists, so that `linked_list_allocator` merges adjacent chunks.
    #[cold]
    fn give_back_small(&mut self) {
        for list in 0..LISTS {
            while let Some(start) = self.take_small(list * ALIGNMENT) {
                self.give(start, list * ALIGNMENT);
            }
        }
    }

    fn place(start: NonNull<u8>, chunk: usize, offset: usize) -> NonNull<u8> {
        // SAFETY: the chunk is larger than the offset.
        let block = unsafe { start.add(offset) };
        let header = Header { chunk, offset: offset as u32, state: LIVE };
        // SAFETY: the offset leaves room for a header, and chunk and offset are multiples of the header's alignment.
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
        // SAFETY: the header's bytes are aligned and in the heap's range, and any bytes are a valid header.
        let header = unsafe { header_of(block).read() };
        let fits = header.chunk >= header.offset as usize && header.chunk <= self.top - self.bottom;
        match header.state {
            LIVE if fits => Ok(header),
            FREE => Err(HeapError::DoubleFree { address }),
            _ => Err(HeapError::NotABlock { address }),
        }
    }
}

/// Returns a pointer to the header of a block.
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
        // SAFETY: the arena is leaked, and nothing else has a pointer to it.
        unsafe { DomainHeap::new(NonNull::from(&mut arena.0).cast(), arena.0.len()) }
    }

    fn free(heap: &mut DomainHeap, block: NonNull<u8>) -> Result<(), HeapError> {
        // SAFETY: the tests do not use blocks after this.
        unsafe { heap.free(block) }
    }

    #[test]
    fn blocks_are_aligned_disjoint_and_large_enough() {
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
    fn freed_memory_is_allocated_again() {
        let mut heap = heap();
        for round in 0..100 {
            let blocks: Vec<_> = (0..).map_while(|index| heap.allocate(16 + (index * 7 + round) % 2000, 16)).collect();
            assert!(blocks.len() > 20, "round {round}: {} blocks", blocks.len());
            for block in blocks {
                free(&mut heap, block).unwrap();
            }
        }
        assert!(heap.allocate(60_000, 16).is_some(), "adjacent small chunks are merged");
    }

    #[test]
    fn allocate_zeroed_clears_the_block() {
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
        // SAFETY: the request fails, and then the block stays valid.
        assert_eq!(unsafe { heap.reallocate(grown, 1 << 20) }, Ok(None));
        assert!(heap.usable_size(grown).unwrap() >= 3000);
    }

    #[test]
    fn impossible_sizes_and_alignments_fail() {
        let mut heap = heap();
        for size in [1 << 16, usize::MAX, usize::MAX - 15, isize::MAX as usize] {
            assert_eq!(heap.allocate(size, 16), None);
            assert_eq!(heap.allocate(size, 4096), None);
        }
        assert_eq!(heap.allocate(16, 24), None, "24 is not a power of two");
        assert_eq!(heap.last_failed(), 16);
    }

    #[test]
    fn each_misuse_has_its_error() {
        let mut heap = heap();
        let block = heap.allocate(64, 16).unwrap();
        let address = block.as_ptr() as usize;
        let other = Box::new([0u64; 8]);
        // SAFETY: the 16 bytes before both pointers are readable.
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
