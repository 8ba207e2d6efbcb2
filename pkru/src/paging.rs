//! Tagging page-table entries, and finding the leaf entry of an address.
//!
//! It works on the page tables of the `x86_64` crate, in four levels, with leaves of 4 KiB, 2 MiB and 1 GiB.

use core::fmt;
use core::ops::Range;

use x86_64::instructions::tlb;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::page_table::{PageTableEntry, PageTableLevel};
use x86_64::structures::paging::{FrameAllocator, PageTable, PageTableFlags, Size4KiB};
use x86_64::{PhysAddr, VirtAddr};

use crate::ProtectionKey;

/// The smallest page, in bytes.
pub const PAGE: u64 = 4096;

/// A leaf entry: the one that maps an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// The first address that it maps.
    pub start: VirtAddr,
    /// How many bytes it maps: 4 KiB, 2 MiB or 1 GiB.
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

    /// Returns whether the page is a user page by its leaf entry, so that PKRU and not PKRS rules it. The entries above
    /// it must be user entries too for that; [`model::walk`](crate::model::walk) looks at all of them.
    #[must_use]
    pub const fn is_user(&self) -> bool {
        self.entry & PageTableFlags::USER_ACCESSIBLE.bits() != 0
    }
}

/// Why a range was not tagged or a leaf not split. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PagingError {
    /// The range does not begin and end on a multiple of 4 KiB.
    Misaligned {
        /// The bound that is not.
        address: VirtAddr,
    },
    /// The range is empty, or goes past the end of the address space.
    BadRange,
    /// A page in the range is not mapped.
    NotMapped {
        /// Its address.
        address: VirtAddr,
    },
    /// A large leaf lies only partly in the range: tagging it would tag more than was asked. [`split`] it first.
    PartlyInsideLargeLeaf {
        /// The first address of the leaf.
        start: VirtAddr,
        /// Its size in bytes.
        size: u64,
    },
    /// The leaf to split is a 4 KiB page.
    NotLarge {
        /// Its address.
        address: VirtAddr,
    },
    /// There is no frame for a page table.
    NoFrame,
}

impl fmt::Display for PagingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Misaligned { address } => write!(f, "{address:#x} is not a multiple of 4 KiB"),
            Self::BadRange => f.write_str("the range is empty or leaves the address space"),
            Self::NotMapped { address } => write!(f, "{address:#x} is not mapped"),
            Self::PartlyInsideLargeLeaf { start, size } => {
                write!(f, "the range covers only a part of the {} KiB page at {start:#x}", size / 1024)
            }
            Self::NotLarge { address } => write!(f, "{address:#x} lies in a 4 KiB page, which cannot be split"),
            Self::NoFrame => f.write_str("no frame is left for a page table"),
        }
    }
}

impl core::error::Error for PagingError {}

/// A promise to flush the translations of a range that has changed.
///
/// The CPU may keep the old key until then.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the CPU may use the old translations until they are flushed"]
pub struct Flush {
    start: VirtAddr,
    length: u64,
}

impl Flush {
    /// Flushes the range on this CPU. Other CPUs must be told by the caller.
    ///
    /// Ring 0 only.
    pub fn flush(self) {
        // One by one up to a point; the figure is Linux's (6.12, `tlb_single_page_flush_ceiling`).
        if self.length / PAGE <= 33 {
            for offset in (0..self.length).step_by(PAGE as usize) {
                tlb::flush(self.start + offset);
            }
        } else {
            tlb::flush_all();
        }
    }

    /// Does nothing, because the tables are not in use or everything is flushed anyway.
    pub const fn ignore(self) {}

    /// Returns the range that must be flushed, as addresses.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.start.as_u64()..self.start.as_u64() + self.length
    }
}

/// Finds the leaf entry that maps an address.
///
/// # Safety
///
/// `table` is the top of a valid hierarchy of four levels whose frames `mapping` maps.
#[must_use]
pub unsafe fn leaf(table: &PageTable, mapping: &impl PageTableFrameMapping, address: VirtAddr) -> Option<Leaf> {
    // SAFETY: the pointer is not written through.
    let (entry, size) = unsafe { leaf_entry(table, mapping, address) }?;
    // SAFETY: it leads to an entry of a valid table.
    Some(Leaf { start: align_down(address, size), size, entry: bits(unsafe { &*entry }) })
}

/// Writes a key into every leaf entry of a range.
///
/// # Errors
///
/// If the range is not whole mapped pages. Then no entry has changed.
///
/// # Safety
///
/// - `table` is the top of a valid hierarchy of four levels whose frames `mapping` maps, and nothing else changes it
///   meanwhile.
/// - The rights in force, and those of every context that will run, allow what code needs to do with these pages.
pub unsafe fn tag(
    table: &mut PageTable,
    mapping: &impl PageTableFrameMapping,
    range: Range<VirtAddr>,
    key: ProtectionKey,
) -> Result<Flush, PagingError> {
    let length = check_range(&range)?;
    let end = range.start.as_u64() + (length - 1);

    // First look, then write: an error leaves everything as it was.
    for write in [false, true] {
        let mut address = range.start.as_u64();
        loop {
            let at = VirtAddr::new_truncate(address);
            // SAFETY: the caller answers for the hierarchy.
            let found = unsafe { leaf_entry(table, mapping, at) };
            let (entry, size) = found.ok_or(PagingError::NotMapped { address: at })?;
            let start = align_down(at, size);
            if start != at || end - address < size - 1 {
                return Err(PagingError::PartlyInsideLargeLeaf { start, size });
            }
            if write {
                // SAFETY: the entry is in a valid table that the caller holds alone.
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

/// Replaces the large leaf that maps an address by a table of 512 leaves of the next smaller size, with the same flags
/// and key.
///
/// # Errors
///
/// [`PagingError::NotMapped`], [`PagingError::NotLarge`] or [`PagingError::NoFrame`]. Then nothing has changed.
///
/// # Safety
///
/// As for [`tag`]; and `frames` gives frames that are unused and mapped by `mapping`.
pub unsafe fn split(
    table: &mut PageTable,
    mapping: &impl PageTableFrameMapping,
    frames: &mut impl FrameAllocator<Size4KiB>,
    address: VirtAddr,
) -> Result<Flush, PagingError> {
    /// In a large leaf the PAT bit is bit 12; in a 4 KiB leaf it is bit 7, which otherwise says that a leaf is large.
    const LARGE_PAT: u64 = 1 << 12;

    // SAFETY: the caller answers for the hierarchy.
    let (entry, size) = unsafe { leaf_entry(table, mapping, address) }.ok_or(PagingError::NotMapped { address })?;
    if size == PAGE {
        return Err(PagingError::NotLarge { address });
    }
    let frame = frames.allocate_frame().ok_or(PagingError::NoFrame)?;
    // SAFETY: the entry is in a valid table that the caller holds alone.
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
    // SAFETY: the frame is unused and mapped.
    unsafe { leaves.write(PageTable::new()) };
    // SAFETY: it holds an empty table now, which nothing else knows.
    for (index, leaf) in unsafe { &mut *leaves }.iter_mut().enumerate() {
        set_bits(leaf, |_| first + index as u64 * smaller);
    }
    // Rights narrow from level to level: the new entry gives everything, and its leaves decide, each for itself from
    // now on.
    let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE;
    set_bits(entry, |_| frame.start_address().as_u64() | flags.bits());
    Ok(Flush { start: align_down(address, size), length: size })
}

/// Finds the leaf entry of an address and its size. The entry may be written if `table` may be.
///
/// # Safety
///
/// As for [`leaf`].
unsafe fn leaf_entry(
    mut table: *const PageTable,
    mapping: &impl PageTableFrameMapping,
    address: VirtAddr,
) -> Option<(*mut PageTableEntry, u64)> {
    let mut level = PageTableLevel::Four;
    loop {
        let index = usize::from(address.page_table_index(level));
        // SAFETY: a table has 512 entries, and an index is below that.
        let pointer = unsafe { table.cast::<PageTableEntry>().add(index) };
        // SAFETY: the pointer leads to an entry of a table of the caller's hierarchy.
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
    // Both bounds in the same half: between the halves there are no addresses.
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

    /// Page tables in the host's memory, where a physical address is the host's own.
    struct Identity;

    // SAFETY: the tests' frames are boxes of this process, at their own addresses.
    unsafe impl PageTableFrameMapping for Identity {
        fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
            frame.start_address().as_u64() as *mut PageTable
        }
    }

    /// Gives out boxes, as many as it says.
    struct Boxes(usize);

    // SAFETY: a box that is leaked is unused.
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

    /// Maps 0..2 MiB by small pages, 2..4 MiB by a large one and 1..2 GiB by a huge one, all to the same physical
    /// addresses.
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
        // SAFETY: the test holds the tables alone, and no CPU uses them.
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
        assert_eq!(entry & !(0xf << 59), 0x4000 | FLAGS.bits(), "nothing but the key has changed");
    }

    #[test]
    fn large_and_huge_leaves_are_tagged_whole() {
        let table = tables();
        tag_range(table, LARGE..2 * LARGE, key(3)).unwrap().ignore();
        tag_range(table, HUGE..2 * HUGE, key(4)).unwrap().ignore();
        assert_eq!([LARGE, 2 * LARGE - 1, HUGE, 2 * HUGE - 1].map(|address| key_at(table, address)), [3, 3, 4, 4]);
        assert_eq!([LARGE, HUGE].map(|address| find(table, address).unwrap().size), [LARGE, HUGE]);
    }

    #[test]
    fn a_range_over_leaves_of_two_sizes() {
        let table = tables();
        tag_range(table, LARGE - PAGE..2 * LARGE, key(5)).unwrap().ignore();
        assert_eq!([LARGE - 2 * PAGE, LARGE - PAGE, LARGE].map(|address| key_at(table, address)), [0, 5, 5]);
    }

    #[test]
    fn a_partly_covered_leaf_is_an_error_and_nothing_changes() {
        let table = tables();
        let error = PagingError::PartlyInsideLargeLeaf { start: at(LARGE), size: LARGE };
        for range in [LARGE - PAGE..LARGE + PAGE, LARGE..2 * LARGE - PAGE, LARGE + PAGE..2 * LARGE] {
            assert_eq!(tag_range(table, range, key(5)), Err(error));
        }
        assert_eq!([LARGE - PAGE, LARGE].map(|address| key_at(table, address)), [0, 0]);
    }

    #[test]
    fn an_unmapped_page_is_an_error_and_nothing_changes() {
        let table = tables();
        let error = PagingError::NotMapped { address: at(2 * LARGE) };
        assert_eq!(tag_range(table, LARGE..3 * LARGE, key(5)), Err(error));
        assert_eq!(key_at(table, LARGE), 0);
    }

    #[test]
    fn bad_ranges_are_refused() {
        let table = tables();
        let tag = |table: &mut PageTable, range| tag_range(table, range, key(1)).unwrap_err();
        assert_eq!(tag(table, 0..1), PagingError::Misaligned { address: at(1) });
        assert_eq!(tag(table, 0x1000..0x1000), PagingError::BadRange);
        assert_eq!(tag(table, Range { start: 0x2000, end: 0x1000 }), PagingError::BadRange);
        assert_eq!(tag(table, 0x1000..0xffff_8000_0000_0000), PagingError::BadRange);
    }

    #[test]
    fn a_split_changes_no_translation() {
        let table = tables();
        tag_range(table, LARGE..2 * LARGE, key(3)).unwrap().ignore();
        tag_range(table, HUGE..2 * HUGE, key(4)).unwrap().ignore();
        let root = core::ptr::from_mut(table) as u64;
        // SAFETY: physical addresses of tables are the host's own.
        let read = |address: u64| unsafe { (address as *const u64).read() };
        let probes = [LARGE, LARGE + 5 * PAGE + 3, 2 * LARGE - 1, HUGE, HUGE + 3 * LARGE + 9, 2 * HUGE - 1];
        let walks = || probes.map(|address| model::walk(read, root, address).unwrap());
        let before = walks();
        for address in [LARGE + 5, HUGE + 3 * LARGE, HUGE + 3 * LARGE + 1] {
            // SAFETY: the test holds the tables alone, and boxes are unused frames.
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
    fn what_cannot_be_split() {
        let table = tables();
        // SAFETY: the test holds the tables alone.
        let mut split = |frames, address| unsafe { split(table, &Identity, &mut Boxes(frames), at(address)) };
        assert_eq!(split(1, 0x1000), Err(PagingError::NotLarge { address: at(0x1000) }));
        assert_eq!(split(1, 2 * LARGE), Err(PagingError::NotMapped { address: at(2 * LARGE) }));
        assert_eq!(split(0, LARGE), Err(PagingError::NoFrame));
        assert_eq!(find(table, LARGE).unwrap().size, LARGE);
    }
}
