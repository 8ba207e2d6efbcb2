//! Binding the functions that libraries call, before a domain calls them.
//!
//! In a lazily bound library the loader resolves a function at its first call: it takes a lock and writes the library's
//! table. A domain can do neither. So each slot that is still unbound is bound here, as the loader would bind it.
//!
//! # References
//!
//! System V ABI, AMD64 supplement, section "Procedure Linkage Table"; ELF gABI, chapter "Dynamic Linking";
//! Linux Standard Base, "Symbol Versioning".

#![expect(unsafe_code, reason = "it reads the loader's tables and writes unbound slots")]

use std::ffi::CStr;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{landmarks, owned};
use crate::fork_lock::{ForkLock, ForkLockGuard};
use crate::sys::{self, Library};
use crate::trusted::trusted;

const DT_PLTRELSZ: u64 = 2;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_JMPREL: u64 = 23;
const DT_BIND_NOW: u64 = 24;
const DT_FLAGS: u64 = 30;
const DT_VERSYM: u64 = 0x6fff_fff0;
const DT_FLAGS_1: u64 = 0x6fff_fffb;
const DT_VERDEF: u64 = 0x6fff_fffc;
const DT_VERNEED: u64 = 0x6fff_fffe;
const DF_BIND_NOW: u64 = 8;
const DF_1_NOW: u64 = 1;
const R_X86_64_JUMP_SLOT: u32 = 7;

trusted! {
    static BINDING: ForkLock = ForkLock::new();
    /// The [count of loaded objects](sys::loaded_count) when all of them were bound last.
    static DONE: AtomicU64 = AtomicU64::new(0);
}

/// Binds every unbound slot of every library. Does nothing if nothing was loaded since the last time.
///
/// No other thread binds slots until the result is dropped. Signals are blocked by the caller until then.
pub(crate) fn bind_all() -> ForkLockGuard<'static> {
    let guard = BINDING.lock();
    let loaded = sys::loaded_count();
    if DONE.load(Ordering::Relaxed) != loaded {
        let libraries = sys::libraries();
        // Objects that define symbols without versions, as executables do: these serve a reference to any version.
        let unversioned: Vec<_> = libraries.iter().filter(|library| entry(library, DT_VERDEF).is_none()).collect();
        // What domains own was bound before they got it, and this thread may have no rights to it.
        let owned = owned::pages();
        let is_owned = |library: &Library| library.writable_pages().iter().any(|pages| owned.contains(pages));
        for library in libraries.iter().filter(|library| !is_owned(library)) {
            bind(library, &unversioned);
        }
        landmarks::find(&libraries);
        DONE.store(loaded, Ordering::Relaxed);
    }
    guard
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Relocation {
    offset: u64,
    info: u64,
    _addend: i64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Symbol {
    name: u32,
    _info: u8,
    _other: u8,
    _section: u16,
    _value: u64,
    _size: u64,
}

/// Finds an entry of a library's dynamic section by its tag.
fn entry(library: &Library, tag: u64) -> Option<u64> {
    let section = library.dynamic.clone()?;
    let mut entries = section.step_by(16).map_while(|address| {
        // SAFETY: the dynamic section is an array of pairs of words in the library's data, ended by a tag of 0.
        let [tag, value]: [u64; 2] = unsafe { load(address) };
        (tag != 0).then_some((tag, value))
    });
    entries.find(|(found, _)| *found == tag).map(|(_, value)| value)
}

fn bind(library: &Library, unversioned: &[&Library]) {
    let Some(tables) = Tables::of(library) else { return };
    let (start, length) = tables.relocations;
    for (index, address) in (start..start + length).step_by(size_of::<Relocation>()).enumerate() {
        // SAFETY: the loader has relocated this table and uses it itself.
        let relocation: Relocation = unsafe { load(address) };
        if relocation.info as u32 != R_X86_64_JUMP_SLOT {
            continue;
        }
        let slot = (library.base + relocation.offset as usize) as *mut usize;
        // SAFETY: the slot is a word of the library's table.
        let bound = unsafe { slot.read_volatile() };
        if !library.has_code_at(bound) || !is_linkage_stub(bound, index) {
            continue;
        }
        let symbol = (relocation.info >> 32) as usize;
        let Some(target) = tables.resolve(library, unversioned, symbol) else { continue };
        if target != bound {
            // SAFETY: the slot is writable while it is unbound, and this is what the loader would write there.
            unsafe { slot.write_volatile(target) };
        }
    }
}

/// Whether the code at an address is where an unbound slot leads: it pushes the number of the slot's relocation, and
/// goes on to the loader. A slot that is bound to a function of its own library leads to something else.
fn is_linkage_stub(address: usize, index: usize) -> bool {
    const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
    const PUSH: u8 = 0x68;
    // SAFETY: a stub or a function is longer than this, and what follows either is code too.
    let code: [u8; 9] = unsafe { load(address) };
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

/// Reads a value of the loader's tables.
///
/// # Safety
///
/// There is such a value at the address.
unsafe fn load<T: Copy>(address: usize) -> T {
    // SAFETY: the caller answers for the address.
    unsafe { (address as *const T).read() }
}

/// The tables of a library that is bound lazily.
struct Tables {
    relocations: (usize, usize),
    symbols: usize,
    strings: usize,
    versions: Option<(usize, usize)>,
}

impl Tables {
    fn of(library: &Library) -> Option<Self> {
        let entry = |tag| entry(library, tag);
        let eager = entry(DT_BIND_NOW).is_some()
            || entry(DT_FLAGS).is_some_and(|flags| flags & DF_BIND_NOW != 0)
            || entry(DT_FLAGS_1).is_some_and(|flags| flags & DF_1_NOW != 0);
        if eager {
            return None;
        }
        // The loader has added the base to the addresses where it could write the section.
        let address = |tag| {
            let value = entry(tag)? as usize;
            Some(if value < library.base { value + library.base } else { value })
        };
        Some(Self {
            relocations: (address(DT_JMPREL)?, entry(DT_PLTRELSZ)? as usize),
            symbols: address(DT_SYMTAB)?,
            strings: address(DT_STRTAB)?,
            versions: address(DT_VERSYM).zip(address(DT_VERNEED)),
        })
    }

    fn resolve(&self, library: &Library, unversioned: &[&Library], index: usize) -> Option<usize> {
        // SAFETY: the index is from a relocation that the loader would follow.
        let symbol: Symbol = unsafe { load(self.symbols + index * size_of::<Symbol>()) };
        let name = self.string(symbol.name as usize);
        let first = library.resolve(name, None).map(|found| found.as_ptr() as usize);
        // `dlvsym` passes over definitions without a version, which the loader takes if they come first: malloc is such
        // a one.
        if let Some(first) = first.filter(|first| unversioned.iter().any(|library| library.contains(*first))) {
            return Some(first);
        }
        let versioned = self.version(index).and_then(|version| library.resolve(name, Some(version)));
        versioned.map(|found| found.as_ptr() as usize).or(first)
    }

    /// The name of the version that a symbol is needed in.
    fn version(&self, index: usize) -> Option<&CStr> {
        let (numbers, needed) = self.versions?;
        // SAFETY: the table has a number for each symbol.
        let number = unsafe { load::<u16>(numbers + index * 2) } & 0x7fff;
        // A list of files, each with a list of versions; both are linked by distances in bytes, 0 at the end.
        let mut file = needed;
        loop {
            // SAFETY: the loader has followed this list itself.
            let entry: NeededFile = unsafe { load(file) };
            let mut version = file + entry.first as usize;
            loop {
                // SAFETY: as above.
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
        // SAFETY: the loader's string table is NUL-terminated and stays while the library is loaded.
        unsafe { CStr::from_ptr((self.strings + offset) as *const libc::c_char) }
    }
}
