//! The platform that `pkru`'s domains live on in this kernel.

use core::ops::Range;
use core::ptr::NonNull;

use pkru::ProtectionKey;
use pkru::allocator::{KeyAllocator, KeyError};
use pkru::domain::{self, Entry, Platform, Sizes};
use pkru::gate::{Context, Exit};
use pkru::heap::DomainHeap;
use spin::Mutex;
use x86_64::VirtAddr;
use x86_64::structures::paging::mapper::MapToError;
use x86_64::structures::paging::{PageTableFlags, Size4KiB};

use crate::fence::{Fence, TRAP_STACK_KEY};
use crate::memory;
use crate::traps::{self, Trap};

/// A domain in this kernel.
pub type Domain = domain::Domain<Kernel>;

const PAGE: u64 = 4096;

/// Where domains' memory is mapped. Addresses are not used twice.
const REGION: u64 = 0x100_0000_0000;

static NEXT: Mutex<u64> = Mutex::new(REGION);

/// The keys of the fence in use.
static KEYS: Mutex<KeyAllocator> = Mutex::new(KeyAllocator::new());

/// This kernel.
#[derive(Debug, Clone, Copy)]
pub struct Kernel;

/// The memory of one domain: a stack between two pages that are not mapped, and a heap.
#[derive(Debug)]
pub struct Memory {
    context: Context,
    stack: Range<VirtAddr>,
    heap: Range<VirtAddr>,
    key: ProtectionKey,
}

/// Why there is no key or memory for a domain.
#[derive(Debug, Clone, Copy)]
pub enum Error {
    /// Every key is in use.
    Key(KeyError),
    /// A size is zero or no multiple of 4 KiB.
    Size(Sizes),
    /// The memory is not to be had.
    Map(&'static str),
}

impl From<KeyError> for Error {
    fn from(error: KeyError) -> Self {
        Self::Key(error)
    }
}

impl From<MapToError<Size4KiB>> for Error {
    fn from(error: MapToError<Size4KiB>) -> Self {
        Self::Map(match error {
            MapToError::FrameAllocationFailed => "no frame is left",
            MapToError::ParentEntryHugePage | MapToError::PageAlreadyMapped(_) => "the addresses are in use",
        })
    }
}

impl Memory {
    /// Returns the stack's addresses.
    #[must_use]
    pub const fn stack(&self) -> &Range<VirtAddr> {
        &self.stack
    }

    /// Returns the heap's addresses.
    #[must_use]
    pub const fn heap(&self) -> &Range<VirtAddr> {
        &self.heap
    }

    /// Returns the key that the memory carries.
    #[must_use]
    pub const fn key(&self) -> ProtectionKey {
        self.key
    }

    fn pages(&self) -> impl Iterator<Item = VirtAddr> + use<> {
        let pages = |range: &Range<VirtAddr>| (range.start.as_u64()..range.end.as_u64()).step_by(PAGE as usize);
        pages(&self.stack).chain(pages(&self.heap)).map(VirtAddr::new)
    }
}

// SAFETY: keys come from one allocator; memory is mapped with its key and unmapped before the key is free again; the
// gate returns with the caller's rights.
unsafe impl Platform for Kernel {
    type Memory = Memory;
    type Trap = Trap;
    type Error = Error;

    fn map(&self, sizes: Sizes) -> Result<Memory, Error> {
        let key = allocate_key()?;
        map(sizes, key).inspect_err(|_| free_key(key))
    }

    fn prepare(&self, memory: &mut Memory) -> Result<(), Error> {
        let start = memory.heap.start;
        let size = (memory.heap.end - start) as usize;
        let bottom =
            NonNull::new((start + BOOKKEEPING as u64).as_mut_ptr()).ok_or(Error::Map("a heap at address 0"))?;
        // SAFETY: the heap's memory is mapped, and until the domain runs nothing else uses it.
        let heap = unsafe { DomainHeap::new(bottom, size - BOOKKEEPING) };
        // SAFETY: the first bytes are left for the heap's own bookkeeping.
        unsafe { start.as_mut_ptr::<DomainHeap>().write(heap) };
        Ok(())
    }

    unsafe fn enter(&self, memory: &mut Memory, entry: Entry, argument: u64) -> Result<u64, Trap> {
        // SAFETY: the memory was mapped and made ready; the traps module rewinds; the caller answers for the entry
        // point.
        match unsafe { Fence::current().gate().enter(&raw mut memory.context, entry, argument) } {
            Exit::Returned(value) => Ok(value),
            Exit::Rewound => Err(traps::take_last().expect("a call is rewound by a trap")),
        }
    }

    fn discard(&self, memory: &mut Memory) {
        // Only what was written has to be cleared, and the CPU keeps a record of that.
        for page in memory.pages() {
            let Some(leaf) = memory::leaf(page) else { continue };
            let flags = PageTableFlags::from_bits_retain(leaf.entry & !0x000f_ffff_ffff_f000);
            if flags.contains(PageTableFlags::DIRTY) {
                // SAFETY: the page is mapped, and nothing runs in the domain.
                unsafe { page.as_mut_ptr::<u8>().write_bytes(0, PAGE as usize) };
                memory::set_flags(page, flags - PageTableFlags::DIRTY);
            }
        }
    }

    fn unmap(&self, memory: Memory) {
        memory::unmap(memory.stack);
        memory::unmap(memory.heap);
        free_key(memory.key);
    }
}

fn allocate_key() -> Result<ProtectionKey, Error> {
    let mut keys = KEYS.lock();
    // The exception stacks have their key in both modes; reserving it a second time says that it is not free.
    let _ = keys.reserve(TRAP_STACK_KEY);
    Ok(keys.allocate()?)
}

fn free_key(key: ProtectionKey) {
    KEYS.lock().free(key).expect("the domain had the key from here");
}

/// Maps the memory of a domain with its key.
fn map(sizes: Sizes, key: ProtectionKey) -> Result<Memory, Error> {
    let (stack, heap) = (sizes.stack as u64, sizes.heap as u64);
    if [stack, heap].iter().any(|size| *size == 0 || size % PAGE != 0 || *size > 1 << 32) {
        return Err(Error::Size(sizes));
    }
    if heap < SMALLEST_HEAP {
        return Err(Error::Map("the heap is too small to begin with"));
    }
    let start = {
        let mut next = NEXT.lock();
        let start = VirtAddr::new(*next);
        *next += stack + heap + 3 * PAGE;
        start
    };
    let stack = start + PAGE..start + PAGE + stack;
    let heap = stack.end + PAGE..stack.end + PAGE + heap;

    let mut flags = PageTableFlags::from_bits_retain(key.in_entry(memory::FLAGS.bits()));
    flags.set(PageTableFlags::USER_ACCESSIBLE, Fence::current() == Fence::Pku);
    memory::map(stack.clone(), flags)?;
    if let Err(error) = memory::map(heap.clone(), flags) {
        memory::unmap(stack);
        return Err(error.into());
    }
    let rights = Fence::current().grant(domain::default_rights(key));
    let context = Context::new(key, rights, stack.end.as_u64(), 0);
    Ok(Memory { context, stack, heap, key })
}

/// Room for the heap's own bookkeeping, and something beside it.
const SMALLEST_HEAP: u64 = BOOKKEEPING as u64 + PAGE / 2;

const BOOKKEEPING: usize = size_of::<DomainHeap>().next_multiple_of(pkru::heap::ALIGNMENT);

/// Returns the heap of a domain, for code that runs in it.
///
/// # Safety
///
/// It is called in the domain whose memory starts its heap there, and only one reference is used at a time.
#[must_use]
pub unsafe fn heap_at<'a>(start: u64) -> &'a mut DomainHeap {
    // SAFETY: `prepare` has written the heap's bookkeeping there.
    unsafe { &mut *(start as *mut DomainHeap) }
}
