//! Binding the functions that libraries call.
//!
//! In a lazily bound library the loader resolves a function at its first call. It takes a lock and writes the library's
//! table (GOT), and a domain can do neither. So this module binds each unbound slot of the table before domains run, as
//! the loader would.
//!
//! # References
//!
//! System V ABI, AMD64 supplement, section "Procedure Linkage Table"; ELF gABI, chapter "Dynamic Linking";
//! Linux Standard Base, "Symbol Versioning".

#![expect(unsafe_code, reason = "it reads the loader's tables and writes unbound slots")]

use std::ffi::CStr;
use std::sync::atomic::{AtomicU64, Ordering};

use super::elf::{
    DT_JMPREL, DT_PLTRELSZ, DT_STRTAB, DT_SYMTAB, R_X86_64_JUMP_SLOT, Relocation, Symbol, address, entry, load,
};
use super::{landmarks, owned, route};
use crate::fork_lock::{ForkLock, ForkLockGuard};
use crate::sys::{self, Library};
use crate::trusted::trusted;

const DT_BIND_NOW: u64 = 24;
const DT_FLAGS: u64 = 30;
const DT_VERSYM: u64 = 0x6fff_fff0;
const DT_FLAGS_1: u64 = 0x6fff_fffb;
const DT_VERDEF: u64 = 0x6fff_fffc;
const DT_VERNEED: u64 = 0x6fff_fffe;
const DF_BIND_NOW: u64 = 8;
const DF_1_NOW: u64 = 1;

trusted! {
    static BINDING: ForkLock = ForkLock::new();
    /// The [count of loaded objects](sys::loaded_count) that are bound.
    static DONE: AtomicU64 = AtomicU64::new(0);
}

/// Binds every unbound slot of every library. Does nothing if no object was loaded or unloaded since the last call.
///
/// No other thread binds slots until the result is dropped. The caller blocks signals until then.
pub(crate) fn bind_all() -> ForkLockGuard<'static> {
    let guard = BINDING.lock();
    let loaded = sys::loaded_count();
    if DONE.load(Ordering::Relaxed) != loaded {
        let libraries = sys::libraries();
        // Objects without symbol versions, such as executables. Their definitions match references to any version.
        let unversioned: Vec<_> = libraries.iter().filter(|library| entry(library, DT_VERDEF).is_none()).collect();
        // Data that domains own was bound before they got it, and this thread may have no rights to it.
        let owned = owned::pages();
        let is_owned = |library: &Library| library.writable_pages().iter().any(|pages| owned.contains(pages));
        for library in libraries.iter().filter(|library| !is_owned(library)) {
            bind(library, &unversioned);
        }
        route::rewrite_all(libraries.iter().filter(|library| !is_owned(library)));
        landmarks::find(&libraries);
        DONE.store(loaded, Ordering::Relaxed);
    }
    guard
}

/// Binds every unbound slot of a library.
fn bind(library: &Library, unversioned: &[&Library]) {
    let Some(tables) = Tables::of(library) else { return };
    let (start, length) = tables.relocations;
    for (index, address) in (start..start + length).step_by(size_of::<Relocation>()).enumerate() {
        // SAFETY: DT_JMPREL and DT_PLTRELSZ describe an array of relocations, which is mapped while the library is
        // loaded.
        let relocation: Relocation = unsafe { load(address) };
        if relocation.info as u32 != R_X86_64_JUMP_SLOT {
            continue;
        }
        let slot = (library.base + relocation.offset as usize) as *mut usize;
        // SAFETY: the relocation gives the address of a slot, which is a word of the library's data.
        let bound = unsafe { slot.read_volatile() };
        if !library.has_code_at(bound) || !library.has_code_at(bound + STUB - 1) || !is_linkage_stub(bound, index) {
            continue;
        }
        let symbol = (relocation.info >> 32) as usize;
        let Some(target) = tables.resolve(library, unversioned, symbol) else { continue };
        if target != bound {
            // SAFETY: the loader writes unbound slots, so the slot is writable, and it would write the same value.
            unsafe { slot.write_volatile(target) };
        }
    }
}

/// The bytes of a stub that are looked at.
const STUB: usize = 9;

/// Returns whether the code at an address is the stub that the unbound slot of relocation `index` points to.
///
/// A stub pushes the index of its relocation and jumps to the loader. A slot that is bound to a function of its own
/// library points to other code.
fn is_linkage_stub(address: usize, index: usize) -> bool {
    const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
    const PUSH: u8 = 0x68;
    // SAFETY: the caller has checked that this many bytes are in an executable segment.
    let code: [u8; STUB] = unsafe { load(address) };
    let push = code.strip_prefix(&ENDBR64).unwrap_or(&code);
    push[0] == PUSH && push[1..5] == (index as u32).to_le_bytes()
}

/// `Elf64_Verneed`.
#[derive(Clone, Copy)]
#[repr(C)]
struct NeededFile {
    _version: u16,
    _count: u16,
    _file: u32,
    first: u32,
    next: u32,
}

/// `Elf64_Vernaux`.
#[derive(Clone, Copy)]
#[repr(C)]
struct NeededVersion {
    _hash: u32,
    _flags: u16,
    number: u16,
    name: u32,
    next: u32,
}

/// The tables of a lazily bound library.
struct Tables {
    /// The address of the relocations of slots, and their size in bytes.
    relocations: (usize, usize),
    symbols: usize,
    strings: usize,
    /// The addresses of the version numbers of symbols, and of the list of needed versions.
    versions: Option<(usize, usize)>,
}

impl Tables {
    /// Returns the tables, or `None` if the library is bound eagerly or has no slots.
    fn of(library: &Library) -> Option<Self> {
        let entry = |tag| entry(library, tag);
        let eager = entry(DT_BIND_NOW).is_some()
            || entry(DT_FLAGS).is_some_and(|flags| flags & DF_BIND_NOW != 0)
            || entry(DT_FLAGS_1).is_some_and(|flags| flags & DF_1_NOW != 0);
        if eager {
            return None;
        }
        let address = |tag| address(library, tag);
        Some(Self {
            relocations: (address(DT_JMPREL)?, entry(DT_PLTRELSZ)? as usize),
            symbols: address(DT_SYMTAB)?,
            strings: address(DT_STRTAB)?,
            versions: address(DT_VERSYM).zip(address(DT_VERNEED)),
        })
    }

    /// Returns the address that the loader would bind a reference to a symbol to.
    fn resolve(&self, library: &Library, unversioned: &[&Library], index: usize) -> Option<usize> {
        // SAFETY: the index comes from a relocation of this library, so the symbol table has an entry for it.
        let symbol: Symbol = unsafe { load(self.symbols + index * size_of::<Symbol>()) };
        let name = self.string(symbol.name as usize);
        let first = library.resolve(name, None).map(|found| found.as_ptr() as usize);
        // The loader binds to a definition without a version if it comes first, but dlvsym skips it. This crate's
        // malloc is such a definition.
        if let Some(first) = first.filter(|first| unversioned.iter().any(|library| library.contains(*first))) {
            return Some(first);
        }
        let versioned = self.version(index).and_then(|version| library.resolve(name, Some(version)));
        versioned.map(|found| found.as_ptr() as usize).or(first)
    }

    /// Returns the name of the version that a reference to a symbol needs.
    fn version(&self, index: usize) -> Option<&CStr> {
        let (numbers, needed) = self.versions?;
        // SAFETY: the table has a 16-bit number for each symbol.
        let number = unsafe { load::<u16>(numbers + index * 2) } & 0x7fff;
        // A list of files, each with a list of versions. An entry gives the distance to the next in bytes, 0 at the
        // end.
        let mut file = needed;
        loop {
            // SAFETY: DT_VERNEED is the address of a list of such entries, which is mapped while the library is loaded.
            let entry: NeededFile = unsafe { load(file) };
            let mut version = file + entry.first as usize;
            loop {
                // SAFETY: each file's entry leads to a list of such entries in the same table.
                let entry: NeededVersion = unsafe { load(version) };
                if entry.number & 0x7fff == number {
                    return Some(self.string(entry.name as usize));
                }
                if entry.next == 0 {
                    break;
                }
                version += entry.next as usize;
            }
            if entry.next == 0 {
                return None;
            }
            file += entry.next as usize;
        }
    }

    fn string(&self, offset: usize) -> &CStr {
        // SAFETY: the string table ends with a NUL, and is mapped while the library is loaded.
        unsafe { CStr::from_ptr((self.strings + offset) as *const libc::c_char) }
    }
}
