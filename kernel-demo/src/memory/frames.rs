//! Physical frames, taken from the memory map that QEMU hands over.

use core::ops::Range;

use spin::Mutex;
use x86_64::PhysAddr;
use x86_64::structures::paging::{FrameAllocator, FrameDeallocator, PhysFrame, Size4KiB};

const FRAME: u64 = 4096;

/// The kernel's heap is cut off the largest stretch of memory before it is given out in frames.
const HEAP: u64 = 1 << 20;

/// PVH's start info, version 1.
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

/// Hands out frames: first those given back, then new ones.
pub(crate) struct Frames {
    fresh: Range<u64>,
    /// The first frame given back; each holds the address of the next in its first word. 0 ends the list.
    returned: u64,
    returned_count: usize,
}

pub(crate) static ALLOCATOR: Mutex<Frames> = Mutex::new(Frames { fresh: 0..0, returned: 0, returned_count: 0 });

unsafe extern "C" {
    static kernel_end: u8;
}

/// Finds the largest stretch of memory above the kernel; returns the kernel's heap and keeps the rest.
pub(super) fn init(start_info: u64) -> Range<u64> {
    // SAFETY: by the PVH protocol EBX held the address of the start info, which is in the identity map.
    let info = unsafe { &*(start_info as *const StartInfo) };
    assert!(info.magic == MAGIC && info.version >= 1, "no PVH start info with a memory map at {start_info:#x}");
    // SAFETY: version 1 has a memory map of that many entries there.
    let map = unsafe { core::slice::from_raw_parts(info.map as *const MapEntry, info.map_entries as usize) };

    let kernel = (&raw const kernel_end) as u64;
    // The start info and its map may lie in ordinary memory; they are not read again.
    let usable = map.iter().filter(|entry| entry.kind == RAM).map(|entry| {
        let end = (entry.start + entry.size).min(1 << 32) & !(FRAME - 1);
        entry.start.max(kernel).next_multiple_of(FRAME)..end
    });
    let largest = usable.max_by_key(|range| range.end.saturating_sub(range.start)).unwrap_or(0..0);
    assert!(largest.end.saturating_sub(largest.start) > 2 * HEAP, "no memory above the kernel");

    let heap = largest.start..largest.start + HEAP;
    ALLOCATOR.lock().fresh = heap.end..largest.end;
    heap
}

impl Frames {
    pub(crate) fn free(&self) -> usize {
        self.returned_count + ((self.fresh.end - self.fresh.start) / FRAME) as usize
    }
}

// SAFETY: a frame is handed out once until it is given back.
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
            // SAFETY: a frame on the list holds the next one's address, and is in the identity map.
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
        // SAFETY: the frame is unused now, and in the identity map.
        unsafe { (frame as *mut u64).write(self.returned) };
        self.returned = frame;
        self.returned_count += 1;
    }
}
