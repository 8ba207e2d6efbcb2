//! Physical frames, from QEMU's memory map.

#![expect(unsafe_code, reason = "physical memory is read and written by address")]

use core::ops::Range;

use spin::Mutex;
use x86_64::PhysAddr;
use x86_64::structures::paging::{FrameAllocator, FrameDeallocator, PhysFrame, Size4KiB};

const FRAME: u64 = 4096;

/// The size of the kernel's heap in bytes.
const HEAP: u64 = 1 << 20;

/// PVH's start info, version 1. It is version 0 with a memory map.
///
/// # References
///
/// Xen, `xen/include/public/arch-x86/hvm/start_info.h`.
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    map: u64,
    map_entries: u32,
    reserved: u32,
}

const MAGIC: u32 = 0x336e_c578;

#[repr(C)]
struct MapEntry {
    start: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const RAM: u32 = 1;

/// The frame allocator. It reuses returned frames before it takes new ones.
pub(crate) struct Frames {
    /// The frames that were never allocated.
    fresh: Range<u64>,
    /// The first frame of the list of returned frames, or 0. The first word of each holds the address of the next.
    returned: u64,
    returned_count: usize,
}

pub(crate) static ALLOCATOR: Mutex<Frames> = Mutex::new(Frames { fresh: 0..0, returned: 0, returned_count: 0 });

unsafe extern "C" {
    static kernel_end: u8;
}

/// Finds the largest range of memory above the kernel. Its first part becomes the kernel's heap and is returned; the
/// allocator takes the rest.
pub(super) fn init(start_info: u64) -> Range<u64> {
    // SAFETY: the boot code passes EBX, which by the PVH protocol holds the address of the start info, below 4 GiB and so
    // in the identity map. Nothing has written memory outside the kernel yet.
    let info = unsafe { &*(start_info as *const StartInfo) };
    assert!(info.magic == MAGIC && info.version >= 1, "no PVH start info with a memory map at {start_info:#x}");
    // SAFETY: a start info of version 1 points to a map of that many entries, and QEMU puts it below 4 GiB.
    let map = unsafe { core::slice::from_raw_parts(info.map as *const MapEntry, info.map_entries as usize) };

    let kernel = (&raw const kernel_end) as u64;
    // The start info and its map may lie in this memory. Nothing reads them again.
    let usable = map.iter().filter(|entry| entry.kind == RAM).map(|entry| {
        let end = (entry.start + entry.size).min(1 << 32) & !(FRAME - 1);
        entry.start.max(kernel).next_multiple_of(FRAME)..end
    });
    let largest = usable.max_by_key(|range| range.end.saturating_sub(range.start)).unwrap_or(0..0);
    assert!(largest.end.saturating_sub(largest.start) > 2 * HEAP, "too little memory above the kernel");

    let heap = largest.start..largest.start + HEAP;
    ALLOCATOR.lock().fresh = heap.end..largest.end;
    heap
}

impl Frames {
    /// Returns the number of free frames.
    pub(crate) fn free(&self) -> usize {
        self.returned_count + ((self.fresh.end - self.fresh.start) / FRAME) as usize
    }
}

// SAFETY: a frame comes from `fresh`, which shrinks, or from the list, which it leaves; so nothing else uses it.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let frame = if self.returned == 0 {
            if self.fresh.is_empty() {
                return None;
            }
            let frame = self.fresh.start;
            self.fresh.start += FRAME;
            frame
        } else {
            let frame = self.returned;
            // SAFETY: the frame is on the list, so it lies in the identity map and its first word holds the next address.
            self.returned = unsafe { (frame as *const u64).read() };
            self.returned_count -= 1;
            frame
        };
        Some(PhysFrame::containing_address(PhysAddr::new(frame)))
    }
}

impl FrameDeallocator<Size4KiB> for Frames {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
        let frame = frame.start_address().as_u64();
        // SAFETY: the caller promises that the frame is unused, and frames lie in the identity map.
        unsafe { (frame as *mut u64).write(self.returned) };
        self.returned = frame;
        self.returned_count += 1;
    }
}
