//! The page tables in force.

#![expect(unsafe_code, reason = "a page table decides what every address means")]

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
    FrameAllocator, FrameDeallocator, Mapper, OffsetPageTable, Page, PageSize, PageTable, PageTableFlags, PhysFrame,
    Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use super::frames::ALLOCATOR;
use crate::segments;

/// The flags of memory for data.
pub const FLAGS: PageTableFlags =
    PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::NO_EXECUTE);

/// The identity map, for `pkru`'s walks of the page tables.
struct Mapping;

// SAFETY: frames come from the frame allocator or from the boot's tables, and both lie in the identity map.
unsafe impl PageTableFrameMapping for Mapping {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        frame.start_address().as_u64() as *mut PageTable
    }
}

/// The lock of the page tables.
static TABLES: Mutex<()> = Mutex::new(());

/// Runs a function with the top-level table.
fn with_top<R>(function: impl FnOnce(&mut PageTable) -> R) -> R {
    let _lock = TABLES.lock();
    let top = Cr3::read().0.start_address().as_u64() as *mut PageTable;
    // SAFETY: CR3 holds the address of the top-level table, which lies in the identity map. The lock is held, so this is
    // the only reference.
    function(unsafe { &mut *top })
}

/// Runs a function with a mapper over all tables.
fn with_mapper<R>(function: impl FnOnce(&mut OffsetPageTable<'_>) -> R) -> R {
    with_top(|top| {
        // SAFETY: `top` is the top of valid tables, and the identity map makes the offset of all of them 0.
        function(&mut unsafe { OffsetPageTable::new(top, VirtAddr::zero()) })
    })
}

/// Unmaps the first page, so that an access through a null pointer faults.
pub(super) fn init() {
    let null = VirtAddr::zero();
    split(null);
    with_mapper(|mapper| match mapper.unmap(Page::<Size4KiB>::containing_address(null)) {
        Ok((_, flush)) => flush.flush(),
        Err(error) => panic!("cannot unmap the first page: {error:?}"),
    });
}

/// Splits the large page at an address, if there is one.
fn split(address: VirtAddr) {
    let frames = &mut *ALLOCATOR.lock();
    // SAFETY: `with_top` holds the lock, the allocator's frames are unused and lie in the identity map, and a split keeps
    // translations, flags and keys.
    match with_top(|top| unsafe { paging::split(top, &Mapping, frames, address) }) {
        Ok(flush) => flush.flush(),
        Err(PagingError::NotLarge { .. }) => {}
        Err(error) => panic!("cannot split the identity map: {error}"),
    }
}

/// Tags the trap stacks.
///
/// # Panics
///
/// If the trap stacks are not in the identity map.
///
/// # Safety
///
/// As for [`tag`].
pub(crate) unsafe fn tag_trap_stacks(key: ProtectionKey) {
    let stacks = segments::trap_stacks();
    for address in [stacks.start, stacks.end - 1] {
        split(address);
    }
    // SAFETY: the caller promises that the rights suffice.
    unsafe { tag(stacks, key) }.expect("the identity map holds the trap stacks");
}

/// Tags a range of pages.
///
/// # Errors
///
/// If the range is not whole mapped pages. Then no page has changed.
///
/// # Safety
///
/// The rights in force, and those of every domain, allow what code will do with these pages.
pub unsafe fn tag(range: Range<VirtAddr>, key: ProtectionKey) -> Result<(), PagingError> {
    // SAFETY: `with_top` holds the lock of valid tables, and the caller promises that the rights suffice.
    with_top(|top| unsafe { paging::tag(top, &Mapping, range, key) })?.flush();
    Ok(())
}

/// Makes the pages of the identity map user pages or supervisor pages. The trap stacks stay supervisor pages.
///
/// # Panics
///
/// If a page other than the first is not mapped.
pub(crate) fn set_kernel_pages_user(user: bool) {
    const LIMIT: u64 = 1 << 32;
    let stacks = segments::trap_stacks();
    let mut address = 4096;
    while address < LIMIT {
        let at = VirtAddr::new(address);
        let leaf = leaf(at).expect("only the first page of the identity map is unmapped");
        let mut flags = flags(&leaf);
        flags.set(PageTableFlags::USER_ACCESSIBLE, user && !stacks.contains(&at));
        // SAFETY: only U/S changes. Ring 0 may use user and supervisor pages alike, because the boot code leaves
        // CR4.SMEP and CR4.SMAP 0, and outside a domain all rights are in force.
        unsafe { set_flags(at, flags) };
        address += leaf.size;
    }
}

/// Returns the flags of a leaf entry. They include the key, for they are all bits but the address.
pub(crate) const fn flags(leaf: &Leaf) -> PageTableFlags {
    PageTableFlags::from_bits_retain(leaf.entry & !0x000f_ffff_ffff_f000)
}

/// Replaces the flags, and with them the key, of the leaf entry that maps an address.
///
/// # Panics
///
/// If the address is not mapped.
///
/// # Safety
///
/// The flags and the rights in force allow what code will do with the page.
pub unsafe fn set_flags(address: VirtAddr, flags: PageTableFlags) {
    unsafe fn set<S: PageSize>(mapper: &mut OffsetPageTable<'_>, address: VirtAddr, flags: PageTableFlags)
    where
        for<'a> OffsetPageTable<'a>: Mapper<S>,
    {
        // SAFETY: the address of the page stays, and the caller promises that the new flags suffice.
        match unsafe { mapper.update_flags(Page::<S>::containing_address(address), flags) } {
            Ok(flush) => flush.flush(),
            Err(error) => panic!("cannot change the flags of {address:#x}: {error:?}"),
        }
    }
    with_mapper(|mapper| match mapper.translate(address) {
        TranslateResult::Mapped { frame: MappedFrame::Size4KiB(_), .. } => {
            // SAFETY: the caller promises that the new flags suffice.
            unsafe { set::<Size4KiB>(mapper, address, flags) }
        }
        TranslateResult::Mapped { frame: MappedFrame::Size2MiB(_), .. } => {
            // SAFETY: as above.
            unsafe { set::<Size2MiB>(mapper, address, flags) }
        }
        other => panic!("no page at {address:#x}: {other:?}"),
    });
}

/// Returns the leaf entry that maps an address.
#[must_use]
pub fn leaf(address: VirtAddr) -> Option<Leaf> {
    // SAFETY: the tables in force are valid and lie in the identity map.
    with_top(|top| unsafe { paging::leaf(top, &Mapping, address) })
}

/// Translates an address by the software model, with the tables in force.
///
/// # Errors
///
/// As for [`model::walk`].
pub fn model_walk(address: u64) -> Result<Translation, pkru::fault::ErrorCode> {
    let top = Cr3::read().0.start_address().as_u64();
    // SAFETY: the model reads only entries of page tables, which lie in the identity map, and nothing changes them
    // meanwhile: there is one CPU, and no trap handler changes a table.
    model::walk(|physical| unsafe { (physical as *const u64).read() }, top, address)
}

/// Maps zeroed frames over a range of pages.
///
/// # Errors
///
/// If no frame is left, or a page of the range is mapped already. Then no new page is mapped.
pub fn map(range: Range<VirtAddr>, flags: PageTableFlags) -> Result<(), MapToError<Size4KiB>> {
    let mut next = range.start;
    while next < range.end {
        if let Err(error) = map_page(next, flags) {
            // SAFETY: this call has mapped these pages, and nothing has used them.
            unsafe { unmap(range.start..next) };
            return Err(error);
        }
        next += 4096;
    }
    Ok(())
}

/// Maps a zeroed frame.
fn map_page(address: VirtAddr, flags: PageTableFlags) -> Result<(), MapToError<Size4KiB>> {
    let frames = &mut *ALLOCATOR.lock();
    let frame = frames.allocate_frame().ok_or(MapToError::FrameAllocationFailed)?;
    // SAFETY: the allocator's frames are unused and lie in the identity map.
    unsafe { (frame.start_address().as_u64() as *mut u8).write_bytes(0, 4096) };
    let page = Page::containing_address(address);
    // The upper levels allow everything, so that the leaf decides.
    let parents = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE;
    // SAFETY: the frame is unused, so the page aliases no memory that Rust code refers to.
    match with_mapper(|mapper| unsafe { mapper.map_to_with_table_flags(page, frame, flags, parents, frames) }) {
        Ok(flush) => {
            flush.flush();
            Ok(())
        }
        Err(error) => {
            // SAFETY: the frame was not mapped, so nothing uses it.
            unsafe { frames.deallocate_frame(frame) };
            Err(error)
        }
    }
}

/// Maps one large page to a physical address that is a multiple of 2 MiB.
///
/// # Errors
///
/// If no frame is left for a table, or the page is mapped already.
///
/// # Safety
///
/// Nothing else uses the physical memory.
pub unsafe fn map_large(
    address: VirtAddr,
    physical: PhysAddr,
    flags: PageTableFlags,
) -> Result<(), MapToError<Size2MiB>> {
    let frames = &mut *ALLOCATOR.lock();
    let (page, frame) = (Page::containing_address(address), PhysFrame::containing_address(physical));
    let parents = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE;
    // SAFETY: the caller promises that nothing else uses the physical memory.
    with_mapper(|mapper| unsafe { mapper.map_to_with_table_flags(page, frame, flags, parents, frames) })?.flush();
    Ok(())
}

/// Unmaps a range of 4 KiB pages and frees their frames. It skips pages that are not mapped.
///
/// # Panics
///
/// If a large page lies in the range.
///
/// # Safety
///
/// [`map`] mapped the pages, and nothing uses them any more.
pub unsafe fn unmap(range: Range<VirtAddr>) {
    let mut next = range.start;
    while next < range.end {
        match with_mapper(|mapper| mapper.unmap(Page::<Size4KiB>::containing_address(next))) {
            Ok((frame, flush)) => {
                flush.flush();
                // SAFETY: the frame came from the allocator, was mapped here alone, and is unmapped now.
                unsafe { ALLOCATOR.lock().deallocate_frame(frame) };
            }
            Err(UnmapError::PageNotMapped) => {}
            Err(error) => panic!("cannot unmap {next:#x}: {error:?}"),
        }
        next += 4096;
    }
}
