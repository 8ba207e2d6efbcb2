//! Linux as the platform that `pkru`'s domains live on.

use std::cell::Cell;
use std::ops::Range;
use std::ptr::NonNull;

use pkru::domain::{Entry, Platform, Sizes};
use pkru::gate::{Context, Exit, Gate};
use pkru::heap::{ALIGNMENT, DomainHeap};
use pkru::{KeyRights, ProtectionKey};

use crate::capability::signal_rights;
use crate::process::Process;
use crate::region::Region;
use crate::signal::{Running, Trap};
use crate::{Error, binding, keys, thread, tls};

/// The bytes at the head of a domain's stack through which a result leaves it.
pub(crate) const MAILBOX: usize = 4096;

/// This system.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linux(pub(crate) &'static Process);

/// The memory of one domain.
pub(crate) struct Memory {
    region: Region<3>,
    /// Boxed, so that the gate and the fault handler can rely on its address.
    running: Box<Running>,
    key: ProtectionKey,
    rights: KeyRights,
    thread_locals: Option<tls::Template>,
}

const STACK: usize = 0;
const TLS: usize = 1;
const HEAP: usize = 2;

// SAFETY: what `Running` holds is used by the call that is running, on its thread; between calls by the owner alone.
unsafe impl Send for Memory {}

impl Memory {
    /// Returns the addresses at which a result leaves the domain.
    #[inline]
    pub(crate) fn mailbox(&self) -> Range<usize> {
        let stack = self.region.part(STACK);
        stack.end - MAILBOX..stack.end
    }

    /// Returns the memory that results can lie in.
    #[inline]
    pub(crate) fn readable(&self) -> [Range<usize>; 2] {
        [self.region.part(STACK), self.region.part(HEAP)]
    }

    /// Returns whether an address lies in a guard page of the domain.
    pub(crate) fn is_guard(&self, address: usize) -> bool {
        self.region.is_guard(address)
    }

    /// Returns the heap's addresses.
    #[inline]
    pub(crate) fn heap(&self) -> Range<usize> {
        self.region.part(HEAP)
    }

    /// Returns the stack's addresses.
    pub(crate) fn stack(&self) -> Range<usize> {
        self.region.part(STACK)
    }
}

// SAFETY: keys come from one list; memory is mapped with its key, and unmapped before the key is free again; the gate returns
// with the caller's rights.
unsafe impl Platform for Linux {
    type Memory = Memory;
    type Trap = Trap;
    type Error = Error;

    fn allocate_key(&self) -> Result<ProtectionKey, Error> {
        keys::allocate()
    }

    fn free_key(&self, key: ProtectionKey) {
        keys::free(key);
    }

    fn map(&self, sizes: Sizes, key: ProtectionKey, rights: KeyRights) -> Result<Memory, Error> {
        let region = Region::new([sizes.stack, tls::SIZE, sizes.heap], key)?;
        let rights = signal_rights(rights, self.0.signal_stack_key());
        let running = Running {
            context: Context::new(key, rights, 0, 0),
            signal_stack: 0..0,
            stack: region.part(STACK),
            trap: Cell::new(None),
        };
        Ok(Memory { region, running: Box::new(running), key, rights, thread_locals: None })
    }

    fn prepare(&self, memory: &mut Memory) -> Result<(), Error> {
        memory.region.check()?;
        thread::make_ready(memory.key)?;
        binding::bind_all();
        let range = memory.heap();
        let heap = NonNull::new(range.start as *mut DomainHeap).expect("a heap does not start at 0");
        let skip = size_of::<DomainHeap>().next_multiple_of(ALIGNMENT);
        // SAFETY: the heap has at least its smallest size, so the bookkeeping does not take it all.
        let bottom = unsafe { heap.cast::<u8>().add(skip) };
        // SAFETY: the heap's memory is the domain's and mapped; until the domain runs nothing else uses it.
        let value = unsafe { DomainHeap::new(bottom, range.len() - skip) };
        // SAFETY: the first bytes are left for the bookkeeping.
        unsafe { heap.write(value) };
        // SAFETY: the memory for thread-locals is the domain's, fresh or discarded, so it is zeroed.
        let fs_base = unsafe { tls::lay_out(&mut memory.thread_locals, &memory.region.part(TLS), heap) }?;
        let stack = memory.mailbox().start as u64;
        memory.running.context = Context::new(memory.key, memory.rights, stack, fs_base);
        Ok(())
    }

    #[inline]
    unsafe fn enter(&self, memory: &mut Memory, entry: Entry, argument: u64) -> Result<u64, Trap> {
        // SAFETY: the memory was mapped and made ready, the thread too; the fault handler is installed; the caller answers for
        // the entry point.
        match unsafe { Gate::PKRU.enter(&mut memory.running.context, entry, argument) } {
            Exit::Returned(value) => Ok(value),
            Exit::Rewound => {
                Err(memory.running.trap.take().expect("a call is rewound by the handler, which notes why"))
            }
        }
    }

    fn discard(&self, memory: &mut Memory) {
        memory.region.discard();
    }

    fn unmap(&self, memory: Memory) {
        drop(memory);
    }
}

impl Memory {
    /// Tells the fault handler where the calling thread takes signals.
    #[inline]
    pub(crate) fn set_signal_stack(&mut self, stack: Range<usize>) {
        self.running.signal_stack = stack;
    }
}
