//! The tables of loaded objects, as the loader uses them.
//!
//! # References
//!
//! ELF gABI, chapter "Dynamic Linking"; System V ABI, AMD64 supplement, section "Relocation".

#![expect(unsafe_code, reason = "it reads the loader's tables")]

use crate::sys::Library;

pub(super) const DT_PLTRELSZ: u64 = 2;
pub(super) const DT_STRTAB: u64 = 5;
pub(super) const DT_SYMTAB: u64 = 6;
pub(super) const DT_JMPREL: u64 = 23;
pub(super) const R_X86_64_JUMP_SLOT: u32 = 7;
pub(super) const DT_RELA: u64 = 7;
pub(super) const DT_RELASZ: u64 = 8;
pub(super) const R_X86_64_64: u32 = 1;
pub(super) const R_X86_64_GLOB_DAT: u32 = 6;

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Relocation {
    pub(super) offset: u64,
    pub(super) info: u64,
    _addend: i64,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Symbol {
    pub(super) name: u32,
    _info: u8,
    _other: u8,
    _section: u16,
    _value: u64,
    _size: u64,
}

/// Returns the value of the first entry with a tag in a library's dynamic section.
pub(super) fn entry(library: &Library, tag: u64) -> Option<u64> {
    let section = library.dynamic.clone()?;
    let mut entries = section.step_by(16).map_while(|address| {
        // SAFETY: the dynamic section is an array of pairs of words, which is mapped while the library is loaded.
        let [tag, value]: [u64; 2] = unsafe { load(address) };
        (tag != 0).then_some((tag, value))
    });
    entries.find(|(found, _)| *found == tag).map(|(_, value)| value)
}

/// Returns the address that an entry of a library's dynamic section gives.
pub(super) fn address(library: &Library, tag: u64) -> Option<usize> {
    let value = entry(library, tag)? as usize;
    // The loader adds the base if the section is writable.
    Some(if value < library.base { value + library.base } else { value })
}

/// Reads a value of the loader's tables.
///
/// # Safety
///
/// The address is mapped and aligned, and holds a value of this type.
pub(super) unsafe fn load<T: Copy>(address: usize) -> T {
    // SAFETY: the caller guarantees that the address holds such a value.
    unsafe { (address as *const T).read() }
}
