//! The platform of `pkru`'s domains in this kernel.
//!
//! What it reads in a domain's memory is hostile.

#![expect(unsafe_code, reason = "a platform maps memory and enters domains")]

use core::ops::Range;
use core::ptr::NonNull;

use pkru::ProtectionKey;
use pkru::allocator::{KeyAllocator, KeyError};
use pkru::domain::{self, Entry, Platform, Sizes};
use pkru::gate::{Context, Exit};
use pkru::heap::{DomainHeap, HeapChecks};
use spin::Mutex;
use x86_64::VirtAddr;
use x86_64::structures::paging::mapper::MapToError;
use x86_64::structures::paging::{PageTableFlags, Size4KiB};

use crate::fence::{Fence, TRAP_STACK_KEY};
use crate::memory;
use crate::trap::Trap;
use crate::traps;

/// A domain in this kernel.
pub type Domain = domain::Domain<Kernel>;

const PAGE: u64 = 4096;

/// The first address of domains' memory. No address is used twice.
const REGION: u64 = 0x100_0000_0000;

/// The first address that no domain has used.
static NEXT: Mutex<u64> = Mutex::new(REGION);

/// The allocator of keys.
static KEYS: Mutex<KeyAllocator> = Mutex::new(KeyAllocator::new());

/// This kernel, as a platform.
#[derive(Debug, Clone, Copy)]
pub struct Kernel;

/// The memory of one domain: a stack and a heap, each between pages that are not mapped.
#[derive(Debug)]
pub struct Memory {
    context: Context,
    stack: Range<VirtAddr>,
    heap: Range<VirtAddr>,
    key: ProtectionKey,
}

/// The error of a domain that cannot be created.
#[derive(Debug, Clone, Copy)]
pub enum Error {
    /// Every key is in use.
    Key(KeyError),
    /// A size is zero, above 4 GiB, or not a multiple of 4 KiB.
    Size(Sizes),
    /// The memory cannot be mapped.
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
            MapToError::ParentEntryHugePage | MapToError::PageAlreadyMapped(_) => "an address is mapped already",
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

    /// Returns the key of the memory.
    #[must_use]
    pub const fn key(&self) -> ProtectionKey {
        self.key
    }

    /// Returns the addresses of all pages.
    fn pages(&self) -> impl Iterator<Item = VirtAddr> + use<> {
        let pages = |range: &Range<VirtAddr>| (range.start.as_u64()..range.end.as_u64()).step_by(PAGE as usize);
        pages(&self.stack).chain(pages(&self.heap)).map(VirtAddr::new)
    }
}

// SAFETY: one allocator hands out each key once. `map` tags the memory, and `unmap` unmaps it before it frees the key. The
// gate, and the rewind in `traps`, end a call with the caller's rights.
unsafe impl Platform for Kernel {
    type Memory = Memory;
    type Trap = Trap;
    type Error = Error;
    type Caller = ();
    /// A domain keeps its key for life.
    type Lease = ();

    fn acquire(&self, _: &mut Memory, (): ()) -> Result<(), Error> {
        Ok(())
    }

    fn map(&self, sizes: Sizes) -> Result<Memory, Error> {
        let key = allocate_key()?;
        map(sizes, key).inspect_err(|_| free_key(key))
    }

    fn prepare(&self, memory: &mut Memory) -> Result<(), Error> {
        let start = memory.heap.start;
        let size = (memory.heap.end - start) as usize;
        let memory = NonNull::new(start.as_mut_ptr()).ok_or(Error::Map("the heap is at address 0"))?;
        // The kernel has no source of random numbers. The address differs from domain to domain.
        let secret = start.as_u64();
        // SAFETY: `map` mapped the range, it stays mapped as long as the domain lives, and nothing else uses it.
        let _ = unsafe { DomainHeap::create(memory, size, HeapChecks::Fast, secret) };
        Ok(())
    }

    unsafe fn enter(&self, memory: &mut Memory, (): &(), entry: Entry, argument: u64) -> Result<u64, Trap> {
        // SAFETY: `map` made the context and its stack, and `memory` is borrowed, so no other call uses them. A fence is
        // selected only where CR4.FSGSBASE is 1. `traps` rewinds. The caller promises that the entry point may run.
        match unsafe { Fence::current().gate().enter(&raw mut memory.context, entry, argument) } {
            Exit::Returned(value) => Ok(value),
            Exit::Rewound => Err(traps::take_last().expect("every rewind records a trap")),
        }
    }

    fn discard(&self, memory: &mut Memory) {
        // The CPU sets the dirty flag of each page that is written, so only those need clearing.
        for page in memory.pages() {
            let Some(leaf) = memory::leaf(page) else { continue };
            let flags = memory::flags(&leaf);
            if flags.contains(PageTableFlags::DIRTY) {
                // SAFETY: the page is mapped writable, all rights are in force, and `memory` is borrowed, so nothing runs
                // in the domain.
                unsafe { page.as_mut_ptr::<u8>().write_bytes(0, PAGE as usize) };
                // SAFETY: only the dirty flag changes, which allows and denies nothing.
                unsafe { memory::set_flags(page, flags - PageTableFlags::DIRTY) };
            }
        }
    }

    fn unmap(&self, memory: Memory) {
        // SAFETY: `map` mapped the pages, and the domain that used them is gone.
        unsafe { memory::unmap(memory.stack) };
        // SAFETY: as above.
        unsafe { memory::unmap(memory.heap) };
        free_key(memory.key);
    }
}

fn allocate_key() -> Result<ProtectionKey, Error> {
    let mut keys = KEYS.lock();
    // With both fences the trap stacks have this key. From the second time on, `reserve` fails because it has it.
    let _ = keys.reserve(TRAP_STACK_KEY);
    Ok(keys.allocate()?)
}

fn free_key(key: ProtectionKey) {
    KEYS.lock().free(key).expect("the allocator handed out the key");
}

/// Maps a domain's memory and tags it.
fn map(sizes: Sizes, key: ProtectionKey) -> Result<Memory, Error> {
    let (stack, heap) = (sizes.stack as u64, sizes.heap as u64);
    if [stack, heap].iter().any(|size| *size == 0 || size % PAGE != 0 || *size > 1 << 32) {
        return Err(Error::Size(sizes));
    }
    if heap < SMALLEST_HEAP {
        return Err(Error::Map("the heap is too small for its records"));
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
        // SAFETY: the first `memory::map` mapped these pages, and nothing has used them.
        unsafe { memory::unmap(stack) };
        return Err(error.into());
    }
    let rights = Fence::current().grant(domain::default_rights(key));
    let context = Context::new(key, rights, stack.end.as_u64(), 0);
    Ok(Memory { context, stack, heap, key })
}

/// The smallest heap in bytes: its records and half a page.
const SMALLEST_HEAP: u64 = DomainHeap::RECORDS as u64 + PAGE / 2;

/// Returns a domain's heap. Code in the domain calls this with the heap's start address.
///
/// # Safety
///
/// The calling domain's heap starts at `start`, and no other reference to the heap is in use.
#[must_use]
pub unsafe fn heap_at<'a>(start: u64) -> &'a mut DomainHeap {
    // SAFETY: `prepare` wrote the bookkeeping to this address, and the caller promises that this is the only reference.
    unsafe { &mut *(start as *mut DomainHeap) }
}
