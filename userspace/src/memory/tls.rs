//! A domain's thread-local variables.
//!
//! A domain runs with its own FS base. Code finds thread-locals, `errno` among them, relative to the FS base, so a
//! domain uses its own and not its caller's.
//!
//! The layout is that of a new thread. Below the thread pointer are the variables of each library, with their initial
//! contents. Above it are the C library's thread descriptor and the dynamic thread vector, which holds the address of
//! each block.
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
use std::ptr;

use pkru::instructions::rdfsbase;

use super::locals::{self, HeapWord, Locals};
use crate::Error;
use crate::sys::{self, Inaccessible};

/// The size in bytes of a domain's memory for thread-locals, unless its builder is told another.
pub(crate) const SIZE: usize = 256 * 1024;

/// Offsets in the head of the thread descriptor, fixed by the ABI: the descriptor's own address, the vector's address,
/// and the descriptor's own address again.
const TCB_SELF: usize = 0;
const TCB_VECTOR: usize = 8;
const TCB_THREAD: usize = 16;

/// The size of the thread descriptor in bytes if glibc does not export it.
const DESCRIPTOR: usize = 0x900;

/// A domain's thread-locals, to lay them out anew after a discard or for another thread.
#[derive(Debug)]
pub(crate) struct Template {
    /// The [count of loaded objects](sys::loaded_count) that it was made for.
    loaded: u64,
    /// The address that it is laid out at.
    start: usize,
    bytes: Vec<u8>,
    /// The thread pointer, which is the address of the thread descriptor. Invariant: `bytes` contains the descriptor.
    pointer: usize,
    /// The size of the descriptor in bytes.
    descriptor: usize,
}

impl Template {
    /// Returns the [count of loaded objects](sys::loaded_count) that it was made for.
    pub(crate) const fn loaded_count(&self) -> u64 {
        self.loaded
    }

    /// Returns the domain's FS base.
    pub(crate) const fn fs_base(&self) -> u64 {
        self.pointer as u64
    }

    /// Lays out the thread-locals for the calling thread.
    ///
    /// # Errors
    ///
    /// [`Inaccessible`] if the domain has made a page of this memory inaccessible.
    ///
    /// # Safety
    ///
    /// The memory that it was made for is the domain's, and no code runs there.
    pub(crate) unsafe fn lay_out(&mut self) -> Result<(), Inaccessible> {
        let descriptor = self.bytes.as_mut_ptr().wrapping_add(self.pointer - self.start) as usize;
        let heads = [TCB_SELF, TCB_VECTOR, TCB_THREAD].map(|head| {
            // SAFETY: `bytes` contains the whole descriptor.
            (head, unsafe { load(descriptor + head) })
        });
        // The thread's ID, its stack canary and its pointer guard hold in the domain too.
        // SAFETY: the calling thread's descriptor has this size, and so has the one in `bytes`.
        unsafe { copy(sys::thread_pointer(), descriptor, self.descriptor) };
        for (head, value) in heads {
            // SAFETY: the head lies in `bytes`.
            unsafe { store(descriptor + head, value) };
        }
        // SAFETY: as above, for the copy of the calling thread's descriptor.
        unsafe { clear_specific_data(descriptor, self.descriptor, sys::thread_pointer(), self.pointer) };
        // SAFETY: the caller guarantees that the memory is a domain's in which no code runs.
        unsafe { sys::copy_to(self.bytes.as_ptr(), self.start, self.bytes.len()) }
    }
}

/// Makes a template of the thread-locals for a domain whose memory for them has these addresses, unless it is up to
/// date. Touches no memory of the domain's.
///
/// # Errors
///
/// [`Error::ThreadLocals`] if they do not fit.
pub(crate) fn update(
    template: &mut Option<Template>,
    memory: &Range<usize>,
    locals: Locals,
    heap: HeapWord,
) -> Result<(), Error> {
    let loaded = sys::loaded_count();
    if template.as_ref().is_some_and(|template| template.loaded == loaded) {
        return Ok(());
    }
    let mut new = build(memory, locals, heap, loaded)?;
    if let Some(old) = template.take() {
        // What was laid out for another thread may still be in the domain.
        let length = new.bytes.len().max(old.bytes.len());
        new.bytes.resize(length, 0);
    }
    *template = Some(new);
    Ok(())
}

/// Lays out the thread-locals of a new thread.
///
/// # Errors
///
/// [`Error::ThreadLocals`] if they do not fit.
fn build(memory: &Range<usize>, locals: Locals, heap: HeapWord, loaded: u64) -> Result<Template, Error> {
    let caller = sys::thread_pointer();
    // Kept until the end, because the initialisation images are read.
    let libraries = sys::libraries();
    let modules: Vec<_> = libraries.iter().filter_map(|library| library.tls.as_ref()).collect();
    // If this thread has not used a block yet, its vector lacks the block and has an old generation number.
    for module in modules.iter().filter(|module| module.block.is_none()) {
        // SAFETY: `libraries` keeps the module's library loaded.
        unsafe { sys::touch_module(module.id) };
    }

    // A module in the static TLS block lies at the same distance below every thread pointer.
    let distance = |module: &sys::TlsModule| {
        let distance = caller.checked_sub(module.block?)?;
        (distance <= memory.len()).then_some(distance)
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

    let mut bytes = vec![0u8; end - memory.start];
    let base = bytes.as_mut_ptr() as usize;
    // Where an address of the domain's lies in `bytes`.
    let here = |address: usize| address - memory.start + base;
    // SAFETY: the calling thread's descriptor has this size, and `bytes` contains its copy.
    unsafe { copy(caller, here(pointer), descriptor_size()) };
    for (module, block) in &blocks {
        // SAFETY: the image is loaded, and the block in `bytes` is at least as large.
        unsafe { copy(module.image.0, here(*block), module.image.1) };
    }

    // The vector holds its length, the loader's generation number, and two words for each module: the block's address,
    // and null because there is nothing to free.
    // SAFETY: the head of the caller's thread descriptor is mapped.
    let callers_vector: usize = unsafe { load(caller + TCB_VECTOR) };
    // SAFETY: the vector starts with the generation number.
    let generation: usize = unsafe { load(callers_vector) };
    let words = [(vector, last), (vector + 16, generation)]
        .into_iter()
        .chain(blocks.iter().map(|(module, block)| (vector + 16 + 16 * module.id, *block)))
        .chain([(pointer + TCB_SELF, pointer), (pointer + TCB_VECTOR, vector + 16), (pointer + TCB_THREAD, pointer)]);
    for (address, value) in words {
        // SAFETY: `bytes` contains the vector and the head of the descriptor.
        unsafe { store(here(address), value) };
    }

    let counterpart = |address: usize| here(address.wrapping_sub(caller).wrapping_add(pointer));
    // SAFETY: the executable's variables are in the static TLS block, so `bytes` contains this one's copy.
    unsafe { store(counterpart(Locals::address()), locals) };
    // SAFETY: as above.
    unsafe { store(counterpart(locals::heap_address()), heap) };
    for table in character_tables() {
        // The C library sets these three before a new thread runs any other code.
        // SAFETY: the C library's variables are in the static TLS block, so `bytes` contains their copies.
        unsafe { copy(table, counterpart(table), size_of::<usize>()) };
    }
    Ok(Template { loaded, start: memory.start, bytes, pointer, descriptor: descriptor_size() })
}

/// Clears the thread-specific data (pthread_setspecific(3)) in a copy of a thread descriptor.
///
/// The values of the first keys are in the descriptor, in a block that the first of some pointers behind it leads to. The
/// others are on the heap: the domain allocates its own.
///
/// # Safety
///
/// `copy` is the address of a copy of the descriptor at `original`, of `size` bytes, which will lie at `place`.
///
/// # References
///
/// glibc 2.36, `nptl/descr.h`, `specific_1stblock`, `specific` and `specific_used`.
unsafe fn clear_specific_data(copy: usize, size: usize, original: usize, place: usize) {
    /// The size in bytes of the block: of 32 keys, each with a sequence number and a value.
    const BLOCK: usize = 32 * 16;
    /// The size in bytes of the pointers.
    const POINTERS: usize = 32 * size_of::<usize>();
    const { assert!(BLOCK.is_multiple_of(size_of::<usize>())) };
    let mut offsets = (BLOCK..size.saturating_sub(POINTERS)).step_by(size_of::<usize>());
    // SAFETY: the copy contains the word.
    let Some(pointers) = offsets.find(|offset| unsafe { load(copy + offset) } == original + offset - BLOCK) else {
        return;
    };
    // The block, the pointers, and whether any is in use.
    // SAFETY: the copy contains the bytes.
    unsafe { ptr::write_bytes((copy + pointers - BLOCK) as *mut u8, 0, BLOCK + POINTERS + 1) };
    // SAFETY: as above.
    unsafe { store(copy + pointers, place + pointers - BLOCK) };
}

/// Returns the addresses of the calling thread's pointers to the tables of `isalpha`, `toupper` and `tolower`.
fn character_tables() -> impl Iterator<Item = usize> {
    // The macros in `ctype.h` call these functions.
    [c"__ctype_b_loc", c"__ctype_toupper_loc", c"__ctype_tolower_loc"].into_iter().filter_map(sys::lookup).map(
        |function| {
            // SAFETY: these functions take no argument, and return the address of a thread-local pointer.
            let function = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> usize>(function.as_ptr()) };
            function()
        },
    )
}

/// Returns the size of glibc's thread descriptor in bytes. glibc exports it for debuggers.
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
/// The word is mapped.
unsafe fn load(address: usize) -> usize {
    // SAFETY: the caller guarantees that the word is mapped.
    unsafe { (address as *const usize).read_unaligned() }
}

/// Writes a value.
///
/// # Safety
///
/// The address is writable, has room for the value, and nothing else uses it.
unsafe fn store<T>(address: usize, value: T) {
    // SAFETY: the caller guarantees that the address is writable.
    unsafe { (address as *mut T).write_unaligned(value) };
}

/// Copies bytes.
///
/// # Safety
///
/// Both ranges are mapped and do not overlap. The target is writable, and nothing else uses it.
unsafe fn copy(from: usize, to: usize, size: usize) {
    // SAFETY: the caller guarantees that the ranges are valid.
    unsafe { ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, size) };
}

/// Returns whether the FS base is the thread pointer. The ABI says so, and the gate relies on it.
pub(crate) fn is_as_expected() -> bool {
    // SAFETY: the caller has checked with `capability::detect` that FSGSBASE is enabled.
    unsafe { rdfsbase() as usize == sys::thread_pointer() }
}
