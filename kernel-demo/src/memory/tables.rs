//! The page tables in force.

use core::ops::Range;

use pkru::ProtectionKey;
use pkru::model::{self, Translation};
use pkru::paging::{self, Leaf, PagingError};
use spin::Mutex;
use x86_64::registers::control::Cr3;
use x86_64::structures::paging::mapper::{
    MapToError, MappedFrame, PageTableFrameMapping, Translate, TranslateResult, UnmapError,
};
use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags, PhysFrame, Size2MiB,
    Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use super::frames::ALLOCATOR;
use crate::segments;

/// The flags of memory for data.
pub const FLAGS: PageTableFlags =
    PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::NO_EXECUTE);

/// Physical memory is mapped to itself.
#[derive(Debug)]
pub struct Mapping;

// SAFETY: every page table lies in the identity map.
unsafe impl PageTableFrameMapping for Mapping {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        frame.start_address().as_u64() as *mut PageTable
    }
}

/// Serialises changes of the tables.
static TABLES: Mutex<()> = Mutex::new(());

/// Runs a function with the top-level table.
fn with_top<R>(function: impl FnOnce(&mut PageTable) -> R) -> R {
    let _lock = TABLES.lock();
    let top = Cr3::read().0.start_address().as_u64() as *mut PageTable;
    // SAFETY: CR3 holds the top-level table, in the identity map; the lock makes this the only reference to it.
    function(unsafe { &mut *top })
}

fn with_mapper<R>(function: impl FnOnce(&mut OffsetPageTable<'_>) -> R) -> R {
    with_top(|top| {
        // SAFETY: physical memory is mapped to itself.
        function(&mut unsafe { OffsetPageTable::new(top, VirtAddr::zero()) })
    })
}

/// The first page is taken out of the identity map, so that a null pointer faults.
pub(super) fn init() {
    let null = VirtAddr::zero();
    split(null);
    with_mapper(|mapper| match mapper.unmap(Page::<Size4KiB>::containing_address(null)) {
        Ok((_, flush)) => flush.flush(),
        Err(error) => panic!("cannot unmap the first page: {error:?}"),
    });
}

fn split(address: VirtAddr) {
    let frames = &mut *ALLOCATOR.lock();
    // SAFETY: the lock is held; frames are unused and in the identity map; a split changes no translation.
    match with_top(|top| unsafe { paging::split(top, &Mapping, frames, address) }) {
        Ok(flush) => flush.flush(),
        Err(PagingError::NotLarge { .. }) => {}
        Err(error) => panic!("cannot split the identity map: {error}"),
    }
}

/// Gives the exception stacks their own key.
///
/// # Panics
///
/// If they are not in the identity map.
pub fn tag_trap_stacks(range: &Range<VirtAddr>, key: ProtectionKey) {
    for address in [range.start, range.end - 1] {
        split(address);
    }
    tag(range.clone(), key).expect("the identity map holds the exception stacks");
}

/// Writes a key into the leaf entries of a range.
///
/// # Errors
///
/// If the range is not whole mapped pages; then nothing has changed.
pub fn tag(range: Range<VirtAddr>, key: ProtectionKey) -> Result<(), PagingError> {
    // SAFETY: the lock is held, and the kernel has all rights to all keys.
    with_top(|top| unsafe { paging::tag(top, &Mapping, range, key) })?.flush();
    Ok(())
}

/// Makes all pages of the identity map user pages, or supervisor pages, but for the exception stacks.
///
/// # Panics
///
/// If the identity map has a hole besides the first page.
pub fn set_kernel_pages_user(user: bool) {
    const LIMIT: u64 = 1 << 32;
    let stacks = segments::trap_stacks();
    let mut address = 4096;
    while address < LIMIT {
        let at = VirtAddr::new(address);
        let leaf = leaf(at).expect("the identity map has one hole, at 0");
        let is_stack = stacks.contains(&at);
        let mut flags = PageTableFlags::from_bits_truncate(leaf.entry & !0x000f_ffff_ffff_f000);
        flags.set(PageTableFlags::USER_ACCESSIBLE, user && !is_stack);
        set_flags(at, flags);
        address += leaf.size;
    }
}

/// Replaces the flags of the leaf entry that maps an address, its key included.
///
/// # Panics
///
/// If nothing is mapped there.
pub fn set_flags(address: VirtAddr, flags: PageTableFlags) {
    fn of<S: x86_64::structures::paging::PageSize>(
        mapper: &mut OffsetPageTable<'_>,
        address: VirtAddr,
        flags: PageTableFlags,
    ) where
        for<'a> OffsetPageTable<'a>: Mapper<S>,
    {
        // SAFETY: callers change flags only of pages whose accesses they answer for.
        match unsafe { mapper.update_flags(Page::<S>::containing_address(address), flags) } {
            Ok(flush) => flush.flush(),
            Err(error) => panic!("cannot change the flags of {address:#x}: {error:?}"),
        }
    }
    with_mapper(|mapper| match mapper.translate(address) {
        TranslateResult::Mapped { frame: MappedFrame::Size4KiB(_), .. } => of::<Size4KiB>(mapper, address, flags),
        TranslateResult::Mapped { frame: MappedFrame::Size2MiB(_), .. } => of::<Size2MiB>(mapper, address, flags),
        other => panic!("no page at {address:#x}: {other:?}"),
    });
}

/// Returns the leaf entry of an address.
#[must_use]
pub fn leaf(address: VirtAddr) -> Option<Leaf> {
    // SAFETY: the tables in force are valid and in the identity map.
    with_top(|top| unsafe { paging::leaf(top, &Mapping, address) })
}

/// Translates an address by the software model, from the tables in force.
///
/// # Errors
///
/// As for [`model::walk`].
pub fn model_walk(address: u64) -> Result<Translation, pkru::fault::ErrorCode> {
    let top = Cr3::read().0.start_address().as_u64();
    // SAFETY: the model reads page tables, all of which lie in the identity map.
    model::walk(|physical| unsafe { (physical as *const u64).read() }, top, address)
}

/// Maps zeroed frames over a range of pages.
///
/// # Errors
///
/// If there are no frames, or something is mapped there; then nothing is left mapped.
pub fn map(range: Range<VirtAddr>, flags: PageTableFlags) -> Result<(), MapToError<Size4KiB>> {
    let mut next = range.start;
    while next < range.end {
        if let Err(error) = map_page(next, flags) {
            unmap(range.start..next);
            return Err(error);
        }
        next += 4096;
    }
    Ok(())
}

fn map_page(address: VirtAddr, flags: PageTableFlags) -> Result<(), MapToError<Size4KiB>> {
    let frames = &mut *ALLOCATOR.lock();
    let frame = frames.allocate_frame().ok_or(MapToError::FrameAllocationFailed)?;
    // SAFETY: the frame is unused and in the identity map.
    unsafe { (frame.start_address().as_u64() as *mut u8).write_bytes(0, 4096) };
    let page = Page::containing_address(address);
    // The leaves decide who may do what.
    let parents = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE;
    // SAFETY: the frame is unused, so mapping it breaks nobody's memory.
    match with_mapper(|mapper| unsafe { mapper.map_to_with_table_flags(page, frame, flags, parents, frames) }) {
        Ok(flush) => {
            flush.flush();
            Ok(())
        }
        Err(error) => {
            // SAFETY: nothing has come to use the frame.
            unsafe { frames.deallocate_frame(frame) };
            Err(error)
        }
    }
}

/// Maps one large page to a physical address that is a multiple of 2 MiB.
///
/// # Errors
///
/// If there is no frame for a table, or something is mapped there.
pub fn map_large(address: VirtAddr, physical: PhysAddr, flags: PageTableFlags) -> Result<(), MapToError<Size2MiB>> {
    let frames = &mut *ALLOCATOR.lock();
    let (page, frame) = (Page::containing_address(address), PhysFrame::containing_address(physical));
    let parents = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE;
    // SAFETY: the caller chooses memory that it answers for; the tests choose what nothing uses.
    with_mapper(|mapper| unsafe { mapper.map_to_with_table_flags(page, frame, flags, parents, frames) })?.flush();
    Ok(())
}

/// Unmaps a range of small pages and gives their frames back; pages that are not mapped are passed over.
///
/// # Panics
///
/// If a large page lies in the range.
pub fn unmap(range: Range<VirtAddr>) {
    let mut next = range.start;
    while next < range.end {
        match with_mapper(|mapper| mapper.unmap(Page::<Size4KiB>::containing_address(next))) {
            Ok((frame, flush)) => {
                flush.flush();
                // SAFETY: nothing maps the frame any more.
                unsafe { ALLOCATOR.lock().deallocate_frame(frame) };
            }
            Err(UnmapError::PageNotMapped) => {}
            Err(error) => panic!("cannot unmap {next:#x}: {error:?}"),
        }
        next += 4096;
    }
}
