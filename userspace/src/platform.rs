//! Linux as the platform that `pkru`'s domains live on.

use std::cell::Cell;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use pkru::domain::{Entry, Platform, Sizes};
use pkru::gate::{Context, Exit, Gate};
use pkru::heap::{ALIGNMENT, DomainHeap};
use pkru::{AccessRights, KeyRights, ProtectionKey};

use crate::keys::{Pin, Tagged};
use crate::library::Given;
use crate::mapping::Mapping;
use crate::signal::{Running, Trap};
use crate::thread::{self, Thread};
use crate::{Error, Globals, binding, globals, sys, tls};

/// The bytes at the head of a domain's stack through which a result leaves it.
pub(crate) const MAILBOX: usize = 4096;

/// This system, as one domain sees it.
#[derive(Debug)]
pub(crate) struct Linux {
    /// The rights that the domain has whatever its own key is.
    pub(crate) rights: KeyRights,
    /// Libraries whose data the domain may write.
    pub(crate) libraries: Vec<Given>,
    /// What it may do with other statics.
    pub(crate) globals: Globals,
}

/// The memory of one domain.
pub(crate) struct Memory {
    mapping: Mapping<3>,
    tagged: Arc<Tagged>,
    /// Boxed, so that the gate and the fault handler can rely on its address. Invariant: while the domain has a key,
    /// the context has the same.
    running: Box<Running>,
    rights: KeyRights,
    globals: Globals,
    thread_locals: Option<tls::Template>,
    /// The [number](Thread::number) of the thread that the thread-locals were laid out for.
    thread: u64,
}

const STACK: usize = 0;
const TLS: usize = 1;
const HEAP: usize = 2;

// SAFETY: what `Running` holds is used by the call that is running, on its thread; between calls by the owner alone.
unsafe impl Send for Memory {}

impl Memory {
    /// Pins the domain's key for a call on this thread.
    #[inline]
    pub(crate) fn pin(&mut self, thread: &Thread) -> Result<Pin, Error> {
        match self.tagged.pin(thread) {
            Some(pin) if self.thread == thread.number() => Ok(pin),
            pin => self.prepare_for(thread, pin),
        }
    }

    #[cold]
    fn prepare_for(&mut self, thread: &Thread, pin: Option<Pin>) -> Result<Pin, Error> {
        let pin = pin.map_or_else(|| self.bind(thread, None), Ok)?;
        if self.thread != thread.number() {
            self.mapping.check()?;
            self.open(pin.key());
            // What code has left in thread-locals belongs to the thread that it ran on, like what it has left in others
            // there.
            if let Some(template) = &self.thread_locals {
                // SAFETY: it is of this memory, where nothing runs.
                unsafe { template.lay_out() };
            }
            self.thread = thread.number();
        }
        Ok(pin)
    }

    /// Pins the key that the domain had when its call was suspended.
    pub(crate) fn pin_again(&mut self, thread: &Thread) -> Result<Pin, Error> {
        self.bind(thread, Some(self.running.context.key()))
    }

    #[cold]
    fn bind(&mut self, thread: &Thread, want: Option<ProtectionKey>) -> Result<Pin, Error> {
        let pin = self.tagged.bind(thread, want)?;
        let key = pin.key();
        self.open(key);
        let rights = globals::grant(self.rights, self.globals).with(key, AccessRights::READ_WRITE);
        self.running.context.set_key(key, rights);
        Ok(pin)
    }

    /// Makes sure that the calling thread can use what carries the domain's key.
    fn open(&self, key: ProtectionKey) {
        if !thread::has_rights(key) {
            thread::open(key);
        }
    }

    /// Makes sure that the calling thread can read the domain's memory, after a call.
    #[inline]
    pub(crate) fn open_after_call(&self) {
        let context = &self.running.context;
        if !context.caller_has_rights() {
            thread::open(context.key());
        }
    }

    /// Says whether the next call is a trial that panics.
    pub(crate) fn set_learning(&self, learning: bool) {
        self.running.learning.set(learning);
    }

    /// Returns whether it is.
    pub(crate) const fn is_learning(&self) -> bool {
        self.running.learning.get()
    }

    /// Returns the key that the domain has at the moment.
    pub(crate) fn key(&self) -> Option<ProtectionKey> {
        self.tagged.key()
    }

    /// Returns the number of the key that it has, or had when it was last called; for the callback gate.
    pub(crate) const fn key_in_call(&self) -> u64 {
        self.running.context.key().number() as u64
    }

    /// Returns the end of the stack that code in the domain starts on.
    pub(crate) const fn stack_end(&self) -> u64 {
        self.running.context.stack()
    }

    /// Returns the addresses at which a result leaves the domain.
    #[inline]
    pub(crate) fn mailbox(&self) -> Range<usize> {
        let stack = self.mapping.part(STACK);
        stack.end - MAILBOX..stack.end
    }

    /// Returns the memory that results can lie in.
    #[inline]
    pub(crate) fn readable(&self) -> [Range<usize>; 2] {
        [self.mapping.part(STACK), self.mapping.part(HEAP)]
    }

    /// Returns whether an address lies in a guard page of the domain.
    pub(crate) fn is_guard(&self, address: usize) -> bool {
        self.mapping.is_guard(address)
    }

    /// Returns the heap's addresses.
    #[inline]
    pub(crate) fn heap(&self) -> Range<usize> {
        self.mapping.part(HEAP)
    }

    /// Returns the stack's addresses.
    pub(crate) fn stack(&self) -> Range<usize> {
        self.mapping.part(STACK)
    }

    /// Copies words from the domain's stack, upwards from an address; the calling thread can read the memory.
    pub(crate) fn stack_words(&self, from: u64, most: usize) -> Vec<u64> {
        let Some(from) = (from as usize).checked_next_multiple_of(size_of::<u64>()) else { return Vec::new() };
        let (stack, end) = (self.stack(), self.mailbox().start);
        if !stack.contains(&from) || from >= end {
            return Vec::new();
        }
        let count = ((end - from) / size_of::<u64>()).min(most);
        let mut words = vec![0u64; count];
        // SAFETY: the range is in the domain's memory, where nothing runs.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u64, words.as_mut_ptr(), count) };
        words
    }

    /// Returns how many bytes the last allocation asked for that failed in the domain, as its heap says; the calling
    /// thread can read the memory.
    pub(crate) fn failed_allocation(&self) -> usize {
        let heap = self.heap().start as *const DomainHeap;
        // SAFETY: the heap's bookkeeping is there, in mapped memory, where nothing runs. Only an integer in it is
        // looked at, of which any bytes are a value.
        unsafe { DomainHeap::last_failed_of(heap) }
    }

    /// Copies a text that code in the domain has left there, as far as it is one; the calling thread can read the
    /// memory.
    pub(crate) fn text(&self, address: usize, length: usize) -> Option<String> {
        const MOST: usize = 4096;
        let length = length.min(MOST);
        let end = address.checked_add(length)?;
        self.readable().iter().find(|range| range.start <= address && end <= range.end)?;
        let mut bytes = vec![0; length];
        // SAFETY: the range is in the domain's memory, where nothing runs.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), length) };
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Returns the addresses of the thread-locals.
    pub(crate) fn thread_locals(&self) -> Range<usize> {
        self.mapping.part(TLS)
    }
}

// SAFETY: keys come from one list, and a call pins the one that tags its domain's memory; memory is unmapped before its
// key is free again; the gate returns with the caller's rights.
unsafe impl Platform for Linux {
    type Memory = Memory;
    type Trap = Trap;
    type Error = Error;

    fn map(&self, sizes: Sizes) -> Result<Memory, Error> {
        let mapping = Mapping::new([sizes.stack, tls::SIZE, sizes.heap])?;
        let running = Running {
            context: Context::without_key(0, 0),
            stack: mapping.part(STACK),
            trap: Cell::new(None),
            in_panic: Cell::new(false),
            learning: Cell::new(false),
        };
        let own = [STACK, TLS, HEAP].map(|part| mapping.part(part));
        let ranges = own.into_iter().chain(self.libraries.iter().flat_map(Given::ranges)).collect();
        Ok(Memory {
            mapping,
            tagged: Tagged::new(ranges),
            running: Box::new(running),
            rights: self.rights,
            globals: self.globals,
            thread_locals: None,
            thread: 0,
        })
    }

    fn prepare(&self, memory: &mut Memory) -> Result<(), Error> {
        memory.mapping.check()?;
        // A handler that calls another domain, and makes it ready, would wait for locks that are held here.
        let _quiet = sys::BlockedSignals::new();
        // The key is pinned, and this thread is about to write what it tags.
        memory.open(memory.running.context.key());
        drop(binding::bind_all());
        self.libraries.iter().for_each(Given::restore);
        let range = memory.heap();
        let heap = NonNull::new(range.start as *mut DomainHeap).expect("a heap does not start at 0");
        let skip = size_of::<DomainHeap>().next_multiple_of(ALIGNMENT);
        // SAFETY: the heap has at least its smallest size, so the bookkeeping does not take it all.
        let bottom = unsafe { heap.cast::<u8>().add(skip) };
        // SAFETY: the heap's memory is the domain's and mapped; until the domain runs nothing else uses it.
        let value = unsafe { DomainHeap::new(bottom, range.len() - skip) };
        // SAFETY: the first bytes are left for the bookkeeping.
        unsafe { heap.write(value) };
        let (place, stack) = (memory.thread_locals(), memory.stack());
        // SAFETY: the memory for thread-locals is the domain's, fresh or discarded, so it is zeroed.
        let fs_base = unsafe { tls::lay_out(&mut memory.thread_locals, &place, heap, &stack) }?;
        let stack = memory.mailbox().start as u64;
        memory.running.context.set_place(stack, fs_base);
        Ok(())
    }

    #[inline]
    unsafe fn enter(&self, memory: &mut Memory, entry: Entry, argument: u64) -> Result<u64, Trap> {
        // The handler uses all of it.
        let context = (&raw mut *memory.running).cast::<Context>();
        // SAFETY: the memory was mapped and made ready, its key is pinned, the thread is ready; the fault handler is
        // installed; the caller answers for the entry point.
        match unsafe { Gate::Pkru.enter(context, entry, argument) } {
            Exit::Returned(value) => Ok(value),
            Exit::Rewound => {
                Err(memory.running.trap.take().expect("a call is rewound by the handler, which notes why"))
            }
        }
    }

    fn discard(&self, memory: &mut Memory) {
        if memory.mapping.discard() && memory.tagged.tag_again().is_err() {
            memory.mapping.lose();
        }
    }

    fn unmap(&self, memory: Memory) {
        let Memory { mapping, tagged, .. } = memory;
        tagged.leave(|| {
            let is_unmapped = mapping.unmap().is_ok();
            self.libraries.iter().fold(is_unmapped, |is_clean, library| library.take_back() && is_clean)
        });
    }
}
