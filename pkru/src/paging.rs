//! Writing keys into page-table entries, and finding the leaf entry of an address.
//!
//! The functions work on the `x86_64` crate's page tables: four levels, with leaves of 4 KiB, 2 MiB and 1 GiB.
//!
//! # References
//!
//! Intel SDM volume 3, section "4-Level Paging and 5-Level Paging".

use core::fmt;
use core::ops::Range;

use x86_64::instructions::tlb;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::page_table::{PageTableEntry, PageTableLevel};
use x86_64::structures::paging::{FrameAllocator, PageTable, PageTableFlags, Size4KiB};
use x86_64::{PhysAddr, VirtAddr};

use crate::ProtectionKey;

/// The size of the smallest page in bytes.
pub const PAGE: u64 = 4096;

/// The leaf entry that maps an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// The first address of the page.
    pub start: VirtAddr,
    /// The size of the page in bytes: 4 KiB, 2 MiB or 1 GiB.
    pub size: u64,
    /// The entry itself.
    pub entry: u64,
}

impl Leaf {
    /// Returns the entry's protection key.
    #[must_use]
    pub const fn key(&self) -> ProtectionKey {
        ProtectionKey::of_entry(self.entry)
    }

    /// Returns whether U/S is 1 in the leaf entry.
    ///
    /// The page is a user page, to which PKRU applies, only if U/S is 1 in the entries above the leaf too.
    /// [`model::walk`](crate::model::walk) checks all levels.
    #[must_use]
    pub const fn is_user(&self) -> bool {
        self.entry & PageTableFlags::USER_ACCESSIBLE.bits() != 0
    }
}

/// The error of a failed [`tag`] or [`split`]. The page tables have not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PagingError {
    /// The start or end of the range is not a multiple of 4 KiB.
    Misaligned {
        /// The misaligned address.
        address: VirtAddr,
    },
    /// The range is empty, or not within one half of the canonical address space.
    BadRange,
    /// A page to tag or split is not mapped.
    NotMapped {
        /// The address of the page.
        address: VirtAddr,
    },
    /// The range covers only a part of a large page. [`split`] that page first.
    PartlyInsideLargeLeaf {
        /// The first address of the large page.
        start: VirtAddr,
        /// The size of the large page in bytes.
        size: u64,
    },
    /// The page to split is a 4 KiB page.
    NotLarge {
        /// The address passed to [`split`].
        address: VirtAddr,
    },
    /// No frame is free for a page table.
    NoFrame,
}

impl fmt::Display for PagingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Misaligned { address } => write!(f, "{address:#x} is not a multiple of 4 KiB"),
            Self::BadRange => f.write_str("the range is empty or not within one half of the address space"),
            Self::NotMapped { address } => write!(f, "{address:#x} is not mapped"),
            Self::PartlyInsideLargeLeaf { start, size } => {
                write!(f, "the range covers only a part of the {} KiB page at {start:#x}", size / 1024)
            }
            Self::NotLarge { address } => write!(f, "{address:#x} is in a 4 KiB page, which cannot be split"),
            Self::NoFrame => f.write_str("no frame is free for a page table"),
        }
    }
}

impl core::error::Error for PagingError {}

/// The obligation to flush the TLB entries of a range whose leaf entries have changed.
///
/// Until then the CPU may use the old entries, and with them the old key.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the CPU may use the old translations until they are flushed"]
pub struct Flush {
    start: VirtAddr,
    length: u64,
}

impl Flush {
    /// Flushes the range on this CPU. Must run in ring 0. Otherwise it raises #GP.
    ///
    /// The caller must flush the range on all other CPUs that use these page tables.
    ///
    /// A range of up to 33 pages of 4 KiB is flushed with INVLPG. For a longer range CR3 is reloaded, which does not
    /// flush global pages (G=1).
    ///
    /// # References
    ///
    /// Intel SDM volume 3, section "Operations that Invalidate TLBs and Paging-Structure Caches".
    pub fn flush(self) {
        // The limit is that of Linux 6.12, `arch/x86/mm/tlb.c`, `tlb_single_page_flush_ceiling`.
        if self.length / PAGE <= 33 {
            for offset in (0..self.length).step_by(PAGE as usize) {
                tlb::flush(self.start + offset);
            }
        } else {
            tlb::flush_all();
        }
    }

    /// Drops the obligation, because no CPU uses the page tables or another flush covers the range.
    pub const fn ignore(self) {}

    /// Returns the address range to flush.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.start.as_u64()..self.start.as_u64() + self.length
    }
}

/// Returns the leaf entry that maps an address; `None` if the address is not mapped.
///
/// # Safety
///
/// `table` is the level-4 table of a valid hierarchy whose frames `mapping` maps. Nothing changes the hierarchy during
/// the call, except for the CPU's page walks.
#[must_use]
pub unsafe fn leaf(table: &PageTable, mapping: &impl PageTableFrameMapping, address: VirtAddr) -> Option<Leaf> {
    // SAFETY: the hierarchy is valid by this function's contract, and the pointer is only read.
    let (entry, size) = unsafe { leaf_entry(table, mapping, address) }?;
    // SAFETY: the pointer points to an entry of a valid table.
    Some(Leaf { start: align_down(address, size), size, entry: bits(unsafe { &*entry }) })
}

/// Writes a key into each leaf entry of a range.
///
/// # Errors
///
/// If this fails, no entry has changed.
///
/// - [`PagingError::Misaligned`] if a bound is not a multiple of 4 KiB.
/// - [`PagingError::BadRange`] if the range is empty, or not within one half of the canonical address space.
/// - [`PagingError::NotMapped`] if a page of the range is not mapped.
/// - [`PagingError::PartlyInsideLargeLeaf`] if the range covers only a part of a large page.
///
/// # Safety
///
/// - `table` is the level-4 table of a valid hierarchy whose frames `mapping` maps. Nothing else reads or changes the
///   hierarchy during the call, except for the CPU's page walks.
/// - All code that accesses these pages afterwards runs with rights to `key` that allow these accesses.
pub unsafe fn tag(
    table: &mut PageTable,
    mapping: &impl PageTableFrameMapping,
    range: Range<VirtAddr>,
    key: ProtectionKey,
) -> Result<Flush, PagingError> {
    let length = check_range(&range)?;
    let end = range.start.as_u64() + (length - 1);

    // The first pass checks the range and the second writes, so an error changes nothing.
    for write in [false, true] {
        let mut address = range.start.as_u64();
        loop {
            let at = VirtAddr::new_truncate(address);
            // SAFETY: the hierarchy is valid by this function's contract.
            let found = unsafe { leaf_entry(table, mapping, at) };
            let (entry, size) = found.ok_or(PagingError::NotMapped { address: at })?;
            let start = align_down(at, size);
            if start != at || end - address < size - 1 {
                return Err(PagingError::PartlyInsideLargeLeaf { start, size });
            }
            if write {
                // SAFETY: the entry is in a valid table, to which this function has exclusive access by its contract.
                set_bits(unsafe { &mut *entry }, |entry| key.in_entry(entry));
            }
            if end - address == size - 1 {
                break;
            }
            address += size;
        }
    }
    Ok(Flush { start: range.start, length })
}

/// Splits the large page that maps an address into 512 pages of the next smaller size, with the same flags and key.
///
/// # Errors
///
/// If this fails, no entry has changed.
///
/// - [`PagingError::NotMapped`] if the address is not mapped.
/// - [`PagingError::NotLarge`] if it is in a 4 KiB page.
/// - [`PagingError::NoFrame`] if `frames` has no frame for the new table.
///
/// # Safety
///
/// - `table` is the level-4 table of a valid hierarchy whose frames `mapping` maps. Nothing else reads or changes the
///   hierarchy during the call, except for the CPU's page walks.
/// - `frames` returns frames that are unused and that `mapping` maps.
pub unsafe fn split(
    table: &mut PageTable,
    mapping: &impl PageTableFrameMapping,
    frames: &mut impl FrameAllocator<Size4KiB>,
    address: VirtAddr,
) -> Result<Flush, PagingError> {
    /// The PAT bit of a large leaf. In a 4 KiB leaf PAT is bit 7, which marks a large leaf (PS) at the levels above.
    const LARGE_PAT: u64 = 1 << 12;

    // SAFETY: the hierarchy is valid by this function's contract.
    let (entry, size) = unsafe { leaf_entry(table, mapping, address) }.ok_or(PagingError::NotMapped { address })?;
    if size == PAGE {
        return Err(PagingError::NotLarge { address });
    }
    let frame = frames.allocate_frame().ok_or(PagingError::NoFrame)?;
    // SAFETY: the entry is in a valid table, to which this function has exclusive access by its contract.
    let entry = unsafe { &mut *entry };
    let old = bits(entry);
    let smaller = size / 512;
    let first = if smaller == PAGE {
        let pat = if old & LARGE_PAT == 0 { 0 } else { PageTableFlags::HUGE_PAGE.bits() };
        old & !LARGE_PAT & !PageTableFlags::HUGE_PAGE.bits() | pat
    } else {
        old
    };
    let leaves = mapping.frame_to_pointer(frame);
    // SAFETY: the frame is unused and mapped by this function's contract.
    unsafe { leaves.write(PageTable::new()) };
    // SAFETY: the frame holds an empty table now, and nothing else has a pointer to it.
    for (index, leaf) in unsafe { &mut *leaves }.iter_mut().enumerate() {
        set_bits(leaf, |_| first + index as u64 * smaller);
    }
    // The CPU combines the flags of all levels. The new entry allows every access, so each new leaf alone decides.
    let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE;
    set_bits(entry, |_| frame.start_address().as_u64() | flags.bits());
    Ok(Flush { start: align_down(address, size), length: size })
}

/// Returns a pointer to the leaf entry of an address, and the size of its page in bytes. A caller with exclusive access
/// to the hierarchy may write through the pointer.
///
/// # Safety
///
/// The conditions of [`leaf`] hold.
unsafe fn leaf_entry(
    mut table: *const PageTable,
    mapping: &impl PageTableFrameMapping,
    address: VirtAddr,
) -> Option<(*mut PageTableEntry, u64)> {
    let mut level = PageTableLevel::Four;
    loop {
        let index = usize::from(address.page_table_index(level));
        // SAFETY: a table has 512 entries, and the index is below 512.
        let pointer = unsafe { table.cast::<PageTableEntry>().add(index) };
        // SAFETY: the pointer points to an entry of a valid table.
        let entry = unsafe { &*pointer };
        let flags = entry.flags();
        if !flags.contains(PageTableFlags::PRESENT) {
            return None;
        }
        let lower = level.next_lower_level();
        if lower.is_none() || (level != PageTableLevel::Four && flags.contains(PageTableFlags::HUGE_PAGE)) {
            return Some((pointer.cast_mut(), PAGE << (9 * (level as u32 - 1))));
        }
        level = lower?;
        table = mapping.frame_to_pointer(entry.frame().ok()?);
    }
}

fn check_range(range: &Range<VirtAddr>) -> Result<u64, PagingError> {
    for address in [range.start, range.end] {
        if !address.is_aligned(PAGE) {
            return Err(PagingError::Misaligned { address });
        }
    }
    let length = range.end.as_u64().checked_sub(range.start.as_u64()).filter(|length| *length != 0);
    let length = length.ok_or(PagingError::BadRange)?;
    // Bit 47 tells the halves of the canonical address space apart. The range must not contain the gap between them.
    let last = VirtAddr::try_new(range.end.as_u64() - 1).map_err(|_| PagingError::BadRange)?;
    if last.as_u64() >> 47 == range.start.as_u64() >> 47 { Ok(length) } else { Err(PagingError::BadRange) }
}

fn align_down(address: VirtAddr, size: u64) -> VirtAddr {
    address.align_down(size)
}

fn bits(entry: &PageTableEntry) -> u64 {
    entry.addr().as_u64() | entry.flags().bits()
}

fn set_bits(entry: &mut PageTableEntry, change: impl FnOnce(u64) -> u64) {
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let new = change(bits(entry));
    entry.set_addr(PhysAddr::new(new & ADDRESS), PageTableFlags::from_bits_retain(new & !ADDRESS));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model;
    use std::boxed::Box;
    use x86_64::structures::paging::PhysFrame;

    /// Maps page tables in the host's memory. Physical addresses are the host's virtual addresses.
    struct Identity;

    // SAFETY: the tests' frames are boxes of this process, and a frame's physical address is the box's address.
    unsafe impl PageTableFrameMapping for Identity {
        fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
            frame.start_address().as_u64() as *mut PageTable
        }
    }

    /// Allocates leaked boxes as frames, up to this number.
    struct Boxes(usize);

    // SAFETY: each frame is a new leaked box, so nothing else uses it.
    unsafe impl FrameAllocator<Size4KiB> for Boxes {
        fn allocate_frame(&mut self) -> Option<PhysFrame> {
            self.0 = self.0.checked_sub(1)?;
            let table = Box::leak(Box::new(PageTable::new()));
            PhysFrame::from_start_address(PhysAddr::new(core::ptr::from_mut(table) as u64)).ok()
        }
    }

    const LARGE: u64 = 2 << 20;
    const HUGE: u64 = 1 << 30;
    const FLAGS: PageTableFlags =
        PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::USER_ACCESSIBLE);

    /// Maps 0..2 MiB with 4 KiB pages, 2..4 MiB with one 2 MiB page and 1..2 GiB with one 1 GiB page, all to the same
    /// physical addresses.
    fn tables() -> &'static mut PageTable {
        let table = || Box::leak(Box::new(PageTable::new()));
        let address = |table: &PageTable| PhysAddr::new(core::ptr::from_ref(table) as u64);
        let (top, third, second, first) = (table(), table(), table(), table());
        for (page, entry) in (0..).zip(first.iter_mut()) {
            entry.set_addr(PhysAddr::new(page * PAGE), FLAGS);
        }
        second[0].set_addr(address(first), FLAGS);
        second[1].set_addr(PhysAddr::new(LARGE), FLAGS | PageTableFlags::HUGE_PAGE | PageTableFlags::NO_EXECUTE);
        third[0].set_addr(address(second), FLAGS);
        third[1].set_addr(PhysAddr::new(HUGE), FLAGS | PageTableFlags::HUGE_PAGE);
        top[0].set_addr(address(third), FLAGS);
        top
    }

    fn key(number: u8) -> ProtectionKey {
        ProtectionKey::new(number).unwrap()
    }

    fn at(address: u64) -> VirtAddr {
        VirtAddr::new(address)
    }

    fn tag_range(table: &mut PageTable, range: Range<u64>, key: ProtectionKey) -> Result<Flush, PagingError> {
        // SAFETY: the tables are valid, nothing else refers to them, and no CPU uses them.
        unsafe { tag(table, &Identity, at(range.start)..at(range.end), key) }
    }

    fn find(table: &PageTable, address: u64) -> Option<Leaf> {
        // SAFETY: the tables are valid.
        unsafe { leaf(table, &Identity, at(address)) }
    }

    fn key_at(table: &PageTable, address: u64) -> u8 {
        find(table, address).unwrap().key().number()
    }

    #[test]
    fn small_pages_are_tagged_one_by_one() {
        let table = tables();
        let flush = tag_range(table, 0x3000..0x5000, key(7)).unwrap();
        assert_eq!(flush.range(), 0x3000..0x5000);
        assert_eq!([0x2000, 0x3000, 0x4fff, 0x5000].map(|address| key_at(table, address)), [0, 7, 7, 0]);
        let entry = find(table, 0x4000).unwrap().entry;
        assert_eq!(entry & !(0xf << 59), 0x4000 | FLAGS.bits(), "only the key has changed");
    }

    #[test]
    fn large_pages_are_tagged_as_a_whole() {
        let table = tables();
        tag_range(table, LARGE..2 * LARGE, key(3)).unwrap().ignore();
        tag_range(table, HUGE..2 * HUGE, key(4)).unwrap().ignore();
        assert_eq!([LARGE, 2 * LARGE - 1, HUGE, 2 * HUGE - 1].map(|address| key_at(table, address)), [3, 3, 4, 4]);
        assert_eq!([LARGE, HUGE].map(|address| find(table, address).unwrap().size), [LARGE, HUGE]);
    }

    #[test]
    fn a_range_can_span_pages_of_two_sizes() {
        let table = tables();
        tag_range(table, LARGE - PAGE..2 * LARGE, key(5)).unwrap().ignore();
        assert_eq!([LARGE - 2 * PAGE, LARGE - PAGE, LARGE].map(|address| key_at(table, address)), [0, 5, 5]);
    }

    #[test]
    fn a_partly_covered_large_page_fails_and_changes_nothing() {
        let table = tables();
        let error = PagingError::PartlyInsideLargeLeaf { start: at(LARGE), size: LARGE };
        for range in [LARGE - PAGE..LARGE + PAGE, LARGE..2 * LARGE - PAGE, LARGE + PAGE..2 * LARGE] {
            assert_eq!(tag_range(table, range, key(5)), Err(error));
        }
        assert_eq!([LARGE - PAGE, LARGE].map(|address| key_at(table, address)), [0, 0]);
    }

    #[test]
    fn an_unmapped_page_fails_and_changes_nothing() {
        let table = tables();
        let error = PagingError::NotMapped { address: at(2 * LARGE) };
        assert_eq!(tag_range(table, LARGE..3 * LARGE, key(5)), Err(error));
        assert_eq!(key_at(table, LARGE), 0);
    }

    #[test]
    fn bad_ranges_fail() {
        let table = tables();
        let tag = |table: &mut PageTable, range| tag_range(table, range, key(1)).unwrap_err();
        assert_eq!(tag(table, 0..1), PagingError::Misaligned { address: at(1) });
        assert_eq!(tag(table, 0x1000..0x1000), PagingError::BadRange);
        assert_eq!(tag(table, Range { start: 0x2000, end: 0x1000 }), PagingError::BadRange);
        assert_eq!(tag(table, 0x1000..0xffff_8000_0000_0000), PagingError::BadRange);
    }

    #[test]
    fn split_changes_no_translation() {
        let table = tables();
        tag_range(table, LARGE..2 * LARGE, key(3)).unwrap().ignore();
        tag_range(table, HUGE..2 * HUGE, key(4)).unwrap().ignore();
        let root = core::ptr::from_mut(table) as u64;
        // SAFETY: the walk reads entries of valid tables, whose physical addresses are the host's virtual addresses.
        let read = |address: u64| unsafe { (address as *const u64).read() };
        let probes = [LARGE, LARGE + 5 * PAGE + 3, 2 * LARGE - 1, HUGE, HUGE + 3 * LARGE + 9, 2 * HUGE - 1];
        let walks = || probes.map(|address| model::walk(read, root, address).unwrap());
        let before = walks();
        for address in [LARGE + 5, HUGE + 3 * LARGE, HUGE + 3 * LARGE + 1] {
            // SAFETY: the tables are valid, nothing else refers to them, and the boxes are unused frames.
            unsafe { split(table, &Identity, &mut Boxes(1), at(address)) }.unwrap().ignore();
        }
        let after = walks();
        for (before, after) in before.into_iter().zip(after) {
            assert_eq!(before, model::Translation { size: before.size, ..after });
        }
        assert_eq!(
            [LARGE, HUGE, HUGE + 3 * LARGE].map(|address| find(table, address).unwrap().size),
            [PAGE, LARGE, PAGE]
        );
        tag_range(table, LARGE..LARGE + PAGE, key(9)).unwrap().ignore();
        assert_eq!([LARGE, LARGE + PAGE].map(|address| key_at(table, address)), [9, 3]);
    }

    #[test]
    fn split_fails_without_a_large_page_or_a_frame() {
        let table = tables();
        // SAFETY: the tables are valid, nothing else refers to them, and the boxes are unused frames.
        let mut split = |frames, address| unsafe { split(table, &Identity, &mut Boxes(frames), at(address)) };
        assert_eq!(split(1, 0x1000), Err(PagingError::NotLarge { address: at(0x1000) }));
        assert_eq!(split(1, 2 * LARGE), Err(PagingError::NotMapped { address: at(2 * LARGE) }));
        assert_eq!(split(0, LARGE), Err(PagingError::NoFrame));
        assert_eq!(find(table, LARGE).unwrap().size, LARGE);
    }
}
