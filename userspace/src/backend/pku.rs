//! Domains in the memory of this process, isolated by PKU.

#![expect(unsafe_code, reason = "it makes domain memory ready and enters the gate")]

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use pkru::domain::{Entry, Platform, Sizes};
use pkru::gate::{Context, Exit, Gate};
use pkru::heap::{DomainHeap, HeapChecks};
use pkru::{AccessRights, KeyRights, ProtectionKey};

use crate::descriptors::Descriptors;
use crate::keys::statics::{self, Globals};
use crate::keys::{Caller, Pin, Tagged};
use crate::loader::bind;
use crate::loader::library_data::LibraryData;
use crate::memory::layout::Layout;
use crate::memory::locals::{HeapWord, Locals};
use crate::memory::mapping::{Mapping, Use};
use crate::memory::tls;
use crate::signal::trap::{Running, Trap};
use crate::sys::{self, Inaccessible};
use crate::{Error, rights};

/// The size in bytes of the mailbox, the top of a domain's stack, where a call leaves its result.
pub(crate) const MAILBOX: usize = 4096;

/// The platform of one domain.
#[derive(Debug)]
pub(crate) struct PkuBackend {
    /// The domain's rights to all keys except its own and the statics' key.
    pub(crate) rights: KeyRights,
    /// Libraries whose data the domain owns.
    pub(crate) libraries: Vec<Arc<LibraryData>>,
    /// The domain's rights to all other statics.
    pub(crate) globals: Globals,
    /// The size in bytes of the addresses for what code in the domain maps.
    pub(crate) mapped: usize,
    /// The size in bytes of the memory for thread-locals.
    pub(crate) thread_locals: usize,
    /// Addresses that the program fills on demand.
    pub(crate) on_demand: Box<[Range<usize>]>,
    /// How thoroughly the domain's heap looks for mistakes.
    pub(crate) heap_checks: HeapChecks,
}

/// The memory of one domain.
pub(crate) struct Memory {
    pub(super) mapping: Mapping<4>,
    tagged: Arc<Tagged>,
    /// What is mapped there, and in the libraries that the domain owns.
    pub(super) layout: Layout,
    /// The layout of the domain when it is new.
    initial: Layout,
    /// What a discard undoes in each part of the mapping.
    pub(super) uses: [Use; 4],
    /// Boxed, because the gate and the fault handler rely on its address. Invariant: while the domain has a key, the
    /// context has the same key.
    running: Box<Running>,
    rights: KeyRights,
    globals: Globals,
    thread_locals: Option<tls::Template>,
    /// The descriptors that code in the domain has opened.
    pub(crate) descriptors: Descriptors,
    /// The [number](Caller::number) of the thread that the thread-locals were laid out for.
    thread: u64,
}

pub(super) const STACK: usize = 0;
const TLS: usize = 1;
pub(super) const HEAP: usize = 2;
/// What code in the domain maps.
pub(super) const MAPPED: usize = 3;

const UNCHANGED: [Use; 4] = [Use::Contents, Use::Contents, Use::Contents, Use::None];

/// A trap ended a call. The memory has a record of it, see [`Memory::trap`]: the trap is too large to be passed on.
#[derive(Debug)]
pub(crate) struct Trapped;

// SAFETY: during a call only its thread uses `Running`, and between calls only the owner of the memory does.
unsafe impl Send for Memory {}

impl Memory {
    #[cold]
    fn acquire_slowly(&mut self, caller: Caller, pin: Option<Pin>) -> Result<Pin, Error> {
        let pin = pin.map_or_else(|| self.assign_key(caller, None), Ok)?;
        // What is lost is discarded and made ready before code runs in it.
        if self.thread != caller.number && !self.mapping.is_lost() {
            ensure_rights(pin.key());
            // Code may have stored values in thread-locals that hold for its thread only.
            if let Some(template) = &mut self.thread_locals {
                // SAFETY: the template was made for this domain, in which no call runs.
                unsafe { template.lay_out() }.or_else(|_| {
                    // All of them are new, so what their pages are now does not matter.
                    self.mapping.make_part_accessible(TLS, pin.key())?;
                    // SAFETY: as above.
                    unsafe { template.lay_out() }.map_err(inaccessible)
                })?;
            }
            self.thread = caller.number;
        }
        Ok(pin)
    }

    /// Notes that code in the domain has changed pages of its memory by a system call of its own. The next discard maps
    /// them again.
    pub(crate) const fn distrust_pages(&mut self) {
        self.uses = [Use::Mappings; 4];
    }

    /// Returns whether an address lies in the domain's own memory, and in no guard page.
    pub(crate) fn is_own(&self, address: u64) -> bool {
        self.mapping.contains(address as usize)
    }

    /// Acquires the key that the domain had when its call was suspended, because the suspended code expects it.
    pub(crate) fn acquire_again(&mut self, caller: Caller) -> Result<Pin, Error> {
        self.assign_key(caller, Some(self.running.context.key()))
    }

    #[cold]
    fn assign_key(&mut self, caller: Caller, want: Option<ProtectionKey>) -> Result<Pin, Error> {
        let pin = self.tagged.assign_key(caller, want)?;
        let key = pin.key();
        ensure_rights(key);
        let rights = statics::add_rights(self.rights, self.globals).with(key, AccessRights::READ_WRITE);
        self.running.context.set_key(key, rights);
        Ok(pin)
    }

    /// Ensures after a call that the calling thread has rights to the domain's memory.
    #[inline]
    pub(crate) fn ensure_rights_after_call(&self) {
        let context = &self.running.context;
        if !context.caller_has_rights() {
            rights::allow(context.key());
        }
    }

    /// Returns the trap that ended the last call that did not return.
    pub(crate) const fn trap(&self) -> &Trap {
        // SAFETY: the handler, which alone writes it, runs only during a call; that needs the memory exclusively.
        let trap = unsafe { &*self.running.trap.as_ptr() };
        trap.as_ref().expect("the handler stores a trap before it rewinds a call")
    }

    /// Returns the domain's thread pointer, if the domain may write the program's statics.
    pub(crate) fn thread_pointer_with_statics(&self) -> Option<u64> {
        let template = self.thread_locals.as_ref().filter(|_| self.globals == Globals::Writable);
        template.map(tls::Template::fs_base)
    }

    /// Sets whether the next call is a trial call that panics.
    pub(crate) fn set_learning(&self, learning: bool) {
        self.running.learning.set(learning);
    }

    /// Returns whether the next call is a trial call that panics.
    pub(crate) const fn is_learning(&self) -> bool {
        self.running.learning.get()
    }

    /// Checks that the memory is usable. What code in the domain maps can leave a wrong record if the kernel's memory is
    /// short.
    pub(crate) const fn check(&self) -> Result<(), Error> {
        self.mapping.check()
    }

    /// Returns the key that the domain has now.
    pub(crate) fn key(&self) -> Option<ProtectionKey> {
        self.tagged.key()
    }

    /// Returns the key of the current or last call.
    pub(super) const fn key_in_call(&self) -> ProtectionKey {
        self.running.context.key()
    }

    /// Replaces the record of what is mapped, after a change of the mappings.
    pub(super) fn set_layout(&mut self, layout: Layout) {
        self.tagged.set_runs(layout.runs().into());
        self.layout = layout;
    }

    /// Returns the addresses of the mailbox.
    #[inline]
    pub(crate) fn mailbox(&self) -> Range<usize> {
        let stack = self.mapping.part(STACK);
        stack.end - MAILBOX..stack.end
    }

    /// Returns the memory that results may lie in.
    #[inline]
    pub(crate) fn readable(&self) -> [Range<usize>; 3] {
        [STACK, HEAP, MAPPED].map(|part| self.mapping.part(part))
    }

    /// Returns whether an address lies in a guard page of the domain.
    pub(crate) fn is_guard(&self, address: usize) -> bool {
        self.mapping.is_guard(address)
    }

    /// Returns whether nothing is mapped at an address of the domain's own.
    pub(crate) fn is_reserved(&self, address: usize) -> bool {
        let is_own = [STACK, TLS, HEAP, MAPPED].iter().any(|part| self.mapping.part(*part).contains(&address));
        is_own && self.layout.is_free(&(address..address + 1))
    }

    /// Returns the name of the part of the domain's memory that ends before a guard page, if the address is in one.
    pub(crate) fn ends_before(&self, address: u64) -> Option<&'static str> {
        const NAMES: [&str; 4] = ["stack", "thread-locals", "heap", "mapped memory"];
        self.mapping.part_before_guard(address as usize).map(|part| NAMES[part])
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

    /// Copies up to `most` words from the domain's stack, upwards from an address. The calling thread has rights to the
    /// memory.
    pub(crate) fn stack_words(&self, from: u64, most: usize) -> Vec<u64> {
        let Some(from) = (from as usize).checked_next_multiple_of(size_of::<u64>()) else { return Vec::new() };
        let (stack, end) = (self.stack(), self.mailbox().start);
        if !stack.contains(&from) || from >= end {
            return Vec::new();
        }
        let count = ((end - from) / size_of::<u64>()).min(most);
        let mut words = Vec::with_capacity(count);
        if sys::copy_from(from, &mut words.spare_capacity_mut()[..count]).is_ok() {
            // SAFETY: the words were copied.
            unsafe { words.set_len(count) };
        }
        words
    }

    /// Returns the size in bytes of the last allocation that failed in the domain, as its heap says. The calling thread
    /// has rights to the memory.
    pub(crate) fn failed_allocation(&self) -> usize {
        let mut heap = MaybeUninit::<DomainHeap>::zeroed();
        // If it is not readable, the size stays 0.
        let _ = sys::copy_value_from(self.heap().start, &mut heap);
        // SAFETY: the copy is as large, and the function reads only an integer, for which any bytes are valid.
        unsafe { DomainHeap::last_failed_of(heap.as_ptr()) }
    }

    /// Copies a text from the domain's memory, at most 4,096 bytes. Returns `None` if the text is not all in that
    /// memory. The calling thread has rights to the memory.
    pub(crate) fn text(&self, address: usize, length: usize) -> Option<String> {
        const MOST: usize = 4096;
        let length = length.min(MOST);
        let end = address.checked_add(length)?;
        self.readable().iter().find(|range| range.start <= address && end <= range.end)?;
        let mut bytes = Vec::with_capacity(length);
        sys::copy_from(address, &mut bytes.spare_capacity_mut()[..length]).ok()?;
        // SAFETY: the bytes were copied.
        unsafe { bytes.set_len(length) };
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Returns the [count of loaded objects](sys::loaded_count) when the domain was last made ready.
    pub(crate) fn loaded_count(&self) -> u64 {
        self.thread_locals.as_ref().map_or(0, tls::Template::loaded_count)
    }

    /// Returns the addresses of the thread-locals.
    pub(crate) fn thread_locals(&self) -> Range<usize> {
        self.mapping.part(TLS)
    }
}

impl PkuBackend {
    /// Writes what a call finds in the domain's memory, which is zeroed.
    fn lay_out(&self, memory: &mut Memory, heap: &DomainHeap) -> Result<(), Inaccessible> {
        // A lease pins this key.
        ensure_rights(memory.running.context.key());
        self.libraries.iter().try_for_each(|library| library.restore())?;
        let (start, size) = (memory.heap().start, size_of::<DomainHeap>());
        // SAFETY: no code runs in the domain, whose heap has room for this at its start.
        unsafe { sys::copy_to(ptr::from_ref(heap).cast(), start, size) }?;
        let template = memory.thread_locals.as_mut().expect("`prepare` has made it");
        // SAFETY: the template was made for this domain, in which no call runs.
        unsafe { template.lay_out() }?;
        let fs_base = template.fs_base();
        let stack = memory.mailbox().start as u64;
        memory.running.context.set_place(stack, fs_base);
        Ok(())
    }
}

/// The error if memory of a domain cannot be written.
fn inaccessible(_: Inaccessible) -> Error {
    Error::System { operation: "write a domain's memory", errno: libc::EFAULT }
}

/// Ensures that the calling thread has rights to a key.
fn ensure_rights(key: ProtectionKey) {
    if !rights::has(key) {
        rights::allow(key);
    }
}

// SAFETY: one table assigns all keys, a lease pins the key that all pages of its domain have, memory is unmapped before
// its key becomes free, and the gate returns with the caller's rights.
unsafe impl Platform for PkuBackend {
    type Memory = Memory;
    type Trap = Trapped;
    type Error = Error;
    type Caller = Caller;
    type Lease = Pin;

    fn map(&self, sizes: Sizes) -> Result<Memory, Error> {
        let mapping = Mapping::new([sizes.stack, self.thread_locals, sizes.heap, self.mapped])?;
        let running = Running {
            context: Context::without_key(0, 0),
            stack: mapping.part(STACK),
            trap: Cell::new(None),
            in_panic: Cell::new(false),
            learning: Cell::new(false),
            memory: mapping.addresses(),
            on_demand: self.on_demand.clone(),
            asked: (Cell::new(0), Cell::new(0)),
        };
        let own = [STACK, TLS, HEAP].map(|part| mapping.part(part));
        let ranges = own.into_iter().chain(self.libraries.iter().flat_map(|library| library.ranges()));
        let layout = Layout::new(ranges);
        Ok(Memory {
            mapping,
            tagged: Tagged::new(layout.runs().into()),
            initial: layout.clone(),
            layout,
            uses: UNCHANGED,
            running: Box::new(running),
            rights: self.rights,
            globals: self.globals,
            thread_locals: None,
            descriptors: Descriptors::default(),
            thread: 0,
        })
    }

    #[inline]
    fn acquire(&self, memory: &mut Memory, caller: Caller) -> Result<Pin, Error> {
        match memory.tagged.pin(caller) {
            Some(pin) if memory.thread == caller.number => Ok(pin),
            pin => memory.acquire_slowly(caller, pin),
        }
    }

    fn prepare(&self, memory: &mut Memory) -> Result<(), Error> {
        if memory.mapping.is_lost() {
            // A shortage that is over.
            self.discard(memory);
            memory.mapping.check()?;
        }
        let range = memory.heap();
        let start = NonNull::new(range.start as *mut u8).expect("a heap does not start at 0");
        let secret = sys::random_word() ^ range.start as u64;
        // SAFETY: the heap's memory is the domain's, and nothing else uses it until the domain runs.
        let heap = unsafe { DomainHeap::new(start, range.len(), self.heap_checks, secret) };
        let (place, stack) = (memory.thread_locals(), memory.stack());
        {
            // A signal handler that calls another domain would wait forever for locks that this thread holds.
            let _quiet = sys::BlockedSignals::new();
            drop(bind::bind_all());
            let locals = Locals::new(&stack, &raw const memory.running.context);
            let word = HeapWord::new(start.cast(), self.heap_checks);
            tls::update(&mut memory.thread_locals, &place, locals, word)?;
        }
        if self.lay_out(memory, &heap).is_err() {
            // Code in the domain has changed a page by a system call of its own, which no discard knows of.
            memory.distrust_pages();
            self.discard(memory);
            memory.mapping.check()?;
            self.lay_out(memory, &heap).map_err(inaccessible)?;
        }
        Ok(())
    }

    #[inline]
    unsafe fn enter(&self, memory: &mut Memory, lease: &Pin, entry: Entry, argument: u64) -> Result<u64, Trapped> {
        debug_assert_eq!(lease.key(), memory.running.context.key(), "the lease is of this memory");
        memory.running.asked.0.set(0);
        // The pointer is valid for all of `Running`, which the fault handler uses.
        let context = (&raw mut *memory.running).cast::<Context>();
        // SAFETY: the memory is mapped and ready, the lease pins its key, the thread is ready, the fault handler is
        // installed, and the caller guarantees that the entry point is valid.
        match unsafe { Gate::Pkru.enter(context, entry, argument) } {
            Exit::Returned(value) => Ok(value),
            Exit::Rewound => Err(Trapped),
        }
    }

    fn discard(&self, memory: &mut Memory) {
        memory.descriptors.close_all();
        let uses = std::mem::replace(&mut memory.uses, UNCHANGED);
        let was_lost = memory.mapping.is_lost();
        let is_mapped_again = memory.mapping.discard(&uses);
        if was_lost || uses.contains(&Use::Mappings) {
            memory.set_layout(memory.initial.clone());
        }
        if is_mapped_again && memory.tagged.tag_again().is_err() {
            memory.mapping.set_lost();
        }
    }

    fn unmap(&self, memory: Memory) {
        let Memory { mapping, tagged, mut descriptors, .. } = memory;
        descriptors.close_all();
        let (mut mapping, libraries) = (Some(mapping), self.libraries.clone());
        tagged.release(move || {
            mapping = mapping.take().and_then(|mapping| mapping.unmap().err());
            libraries.iter().fold(mapping.is_none(), |is_clean, library| library.give_back() && is_clean)
        });
    }
}
