//! A domain's thread-local variables.
//!
//! A domain runs with an FS base of its own: thread-locals of C and Rust, `errno` among them, are found through it, so
//! those of the caller are out of reach. The block is laid out as the loader lays out a new thread's: the initial
//! contents of each library's variables below the thread pointer, the C library's thread descriptor above it, and a
//! vector of block addresses.
//!
//! ```text
//!   ┌─ lowest address                         thread pointer = FS base
//!   ▼                                                   ▼
//!   ┌─────────────┬─────────────┬─────────────┬─────────┬──────────────────────────┬────────┬─────────────┐
//!   │ module n    │     …       │ module 2    │ module 1│ thread descriptor (TCB)  │ vector │ late modules│
//!   └─────────────┴─────────────┴─────────────┴─────────┴──────────────────────────┴────────┴─────────────┘
//! ```
//!
//! # References
//!
//! Ulrich Drepper, "ELF Handling For Thread-Local Storage", variant II; glibc 2.36, `nptl/descr.h` and
//! `sysdeps/x86_64/nptl/tls.h`.

#![expect(unsafe_code, reason = "it lays out thread-locals byte by byte")]

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::{self, NonNull};

use pkru::heap::DomainHeap;
use pkru::instructions::rdfsbase;

use super::locals::Locals;
use crate::{Error, sys};

/// The bytes of a domain that are set aside for this.
pub(crate) const SIZE: usize = 256 * 1024;

/// Offsets in the thread descriptor's head, which the ABI fixes: the descriptor's own address, the vector's, and again
/// its own.
const TCB_SELF: usize = 0;
const TCB_VECTOR: usize = 8;
const TCB_THREAD: usize = 16;

/// The size of the thread descriptor where glibc does not say it.
const DESCRIPTOR: usize = 0x900;

/// What was laid out once, to be laid out again after a discard, or for another thread.
#[derive(Debug)]
pub(crate) struct Template {
    /// The libraries that it was laid out for, see [`sys::loaded_count`].
    loaded: u64,
    /// Where it is laid out.
    start: usize,
    bytes: Vec<u8>,
    /// The thread pointer in it, where the thread's descriptor is.
    pointer: usize,
    /// The size of the descriptor in bytes.
    descriptor: usize,
}

impl Template {
    /// Returns the [count of loaded objects](sys::loaded_count) that it was laid out for.
    pub(crate) const fn loaded_count(&self) -> u64 {
        self.loaded
    }

    /// Lays it out, for the calling thread.
    ///
    /// # Safety
    ///
    /// The memory that it was made for is mapped and writable, and nothing else uses it.
    pub(crate) unsafe fn lay_out(&self) {
        let start = self.bytes.as_ptr() as usize;
        let (before, after) = (self.pointer - self.start, self.pointer - self.start + self.descriptor);
        let heads = [TCB_SELF, TCB_VECTOR, TCB_THREAD].map(|head| {
            // SAFETY: the descriptor's head is among the bytes.
            (head, unsafe { load(start + before + head) })
        });
        // SAFETY: the bytes were copied from there.
        unsafe { copy(start, self.start, before) };
        // SAFETY: the calling thread's descriptor has that size. What the copy says of the thread (its id, the stack
        // protector's canary, the pointer guard) stays true in the domain.
        unsafe { copy(sys::thread_pointer(), self.pointer, self.descriptor) };
        // SAFETY: as for the first.
        unsafe { copy(start + after, self.start + after, self.bytes.len() - after) };
        for (head, value) in heads {
            // SAFETY: the head lies in the domain's memory.
            unsafe { store(self.pointer + head, value) };
        }
    }
}

/// Lays out a domain's thread-locals, from the template if there is one that still fits, and returns the FS base to run
/// with.
///
/// # Errors
///
/// [`Error::ThreadLocals`] if they do not fit.
///
/// # Safety
///
/// As for [`build`]; and the template is of the same memory.
pub(crate) unsafe fn lay_out(
    template: &mut Option<Template>,
    memory: &Range<usize>,
    heap: NonNull<DomainHeap>,
    stack: &Range<usize>,
) -> Result<u64, Error> {
    let loaded = sys::loaded_count();
    if let Some(template) = template.as_ref().filter(|template| template.loaded == loaded) {
        // SAFETY: the caller answers for the memory.
        unsafe { template.lay_out() };
        return Ok(template.pointer as u64);
    }
    if let Some(old) = template.take() {
        // It may have been laid out there for another thread.
        // SAFETY: the caller answers for the memory.
        unsafe { ptr::write_bytes(old.start as *mut u8, 0, old.bytes.len()) };
    }
    // SAFETY: the caller answers for the memory.
    let (pointer, length) = unsafe { build(memory, heap, stack) }?;
    // SAFETY: the memory is mapped, and `build` has written that much of it.
    let bytes = unsafe { std::slice::from_raw_parts(memory.start as *const u8, length) }.to_vec();
    *template = Some(Template { loaded, start: memory.start, bytes, pointer, descriptor: descriptor_size() });
    Ok(pointer as u64)
}

/// Writes the thread-locals of a new thread into zeroed memory of a domain; returns the thread pointer to run with, and
/// the number of bytes used.
///
/// # Errors
///
/// [`Error::ThreadLocals`] if they do not fit.
///
/// # Safety
///
/// `memory` is mapped, zeroed and writable, and nothing else uses it. `heap` and `stack` are the domain's.
unsafe fn build(
    memory: &Range<usize>,
    heap: NonNull<DomainHeap>,
    stack: &Range<usize>,
) -> Result<(usize, usize), Error> {
    let caller = sys::thread_pointer();
    // Kept until the end: their initial contents are read.
    let libraries = sys::libraries();
    let modules: Vec<_> = libraries.iter().filter_map(|library| library.tls.as_ref()).collect();
    // A block that this thread has not used yet is not in its vector, and then neither is the loader's last generation.
    for module in modules.iter().filter(|module| module.block.is_none()) {
        sys::touch_module(module.id);
    }

    // A module in the static block lies at the same distance below every thread pointer.
    let distance = |module: &sys::TlsModule| {
        let distance = caller.checked_sub(module.block?)?;
        (distance <= SIZE).then_some(distance)
    };
    let below = modules.iter().copied().filter_map(distance).max().unwrap_or(0);
    let align = modules.iter().map(|module| module.align).max().unwrap_or(1).max(64);
    let pointer = (memory.start + below).next_multiple_of(align);
    let vector = (pointer + descriptor_size()).next_multiple_of(16);
    let last = modules.iter().map(|module| module.id).max().unwrap_or(0);
    let mut end = vector + (last + 2) * 16;

    let mut blocks = Vec::new();
    for module in modules.iter().copied() {
        let block = match distance(module) {
            Some(distance) => pointer - distance,
            None => {
                let block = end.next_multiple_of(module.align);
                end = block + module.size;
                block
            }
        };
        blocks.push((module, block));
    }
    if end > memory.end {
        return Err(Error::ThreadLocals { needed: end - memory.start, limit: memory.len() });
    }

    // SAFETY: the calling thread's descriptor has that size, and the copy lies in the domain's memory.
    unsafe { copy(caller, pointer, descriptor_size()) };
    for (module, block) in &blocks {
        // SAFETY: the image is in the library's data, and the block in the domain's memory, as large as the variables.
        unsafe { copy(module.image.0, *block, module.image.1) };
    }

    // The vector: its length, then the generation of the loader's list, then two words for each module: the block, and
    // null because there is nothing to free.
    // SAFETY: the thread descriptor's head has the address of the caller's vector.
    let callers_vector: usize = unsafe { load(caller + TCB_VECTOR) };
    // SAFETY: its first entry is the generation.
    let generation: usize = unsafe { load(callers_vector) };
    let words = [(vector, last), (vector + 16, generation)]
        .into_iter()
        .chain(blocks.iter().map(|(module, block)| (vector + 16 + 16 * module.id, *block)))
        .chain([(pointer + TCB_SELF, pointer), (pointer + TCB_VECTOR, vector + 16), (pointer + TCB_THREAD, pointer)]);
    for (address, value) in words {
        // SAFETY: the vector and the descriptor's head lie in the domain's memory.
        unsafe { store(address, value) };
    }

    let counterpart = |address: usize| address.wrapping_sub(caller).wrapping_add(pointer);
    // SAFETY: the executable's variables are in the static block, and so is this one's copy.
    unsafe { store(counterpart(Locals::address()), Locals::new(heap, stack)) };
    for table in character_tables() {
        // A new thread starts with these three unset, and the C library sets them before anything of the thread runs.
        // SAFETY: the C library's variables are in the static block, and so are their copies.
        unsafe { copy(table, counterpart(table), size_of::<usize>()) };
    }
    Ok((pointer, end - memory.start))
}

/// Returns where the calling thread has its pointers to the tables behind `isalpha`, `toupper` and `tolower`.
fn character_tables() -> impl Iterator<Item = usize> {
    // The addresses are asked of the functions that C's own macros use.
    [c"__ctype_b_loc", c"__ctype_toupper_loc", c"__ctype_tolower_loc"].into_iter().filter_map(sys::lookup).map(
        |function| {
            // SAFETY: these functions take nothing and return the address of a thread-local pointer.
            let function = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> usize>(function.as_ptr()) };
            function()
        },
    )
}

/// Returns the size of glibc's thread descriptor, which it tells debuggers.
fn descriptor_size() -> usize {
    sys::lookup(c"_thread_db_sizeof_pthread").map_or(DESCRIPTOR, |size| {
        // SAFETY: glibc defines the symbol as a `uint32_t`.
        unsafe { size.cast::<u32>().read() as usize }
    })
}

/// Reads a word.
///
/// # Safety
///
/// It is mapped.
unsafe fn load(address: usize) -> usize {
    // SAFETY: the caller answers for the address.
    unsafe { (address as *const usize).read() }
}

/// Writes a value.
///
/// # Safety
///
/// There is room at the address, which is nobody else's.
unsafe fn store<T>(address: usize, value: T) {
    // SAFETY: the caller answers for the address.
    unsafe { (address as *mut T).write(value) };
}

/// Copies bytes.
///
/// # Safety
///
/// Both ranges are mapped and apart, and the target is writable and nobody else's.
unsafe fn copy(from: usize, to: usize, size: usize) {
    // SAFETY: the caller answers for the ranges.
    unsafe { ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, size) };
}

/// Checks that FS base and thread pointer are the same, as the ABI has it and as the gate relies on.
pub(crate) fn is_as_expected() -> bool {
    // SAFETY: the capability check has found FSGSBASE.
    unsafe { rdfsbase() as usize == sys::thread_pointer() }
}
