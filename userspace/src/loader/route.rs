//! Routing the C library's functions to this crate's, where the loader does not.
//!
//! In an executable that links this crate, the loader binds every library to the functions that the executable exports.
//! A shared library that links it and is opened later comes last in the loader's search, and the others are bound to the
//! C library by then. So the slots of every loaded object are rewritten. Memory from before stays valid, because this
//! crate's functions call the C library's outside domains.

#![expect(unsafe_code, reason = "it writes slots of loaded objects")]

use std::ffi::CStr;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pkru::ProtectionKey;

use super::elf::{
    DT_JMPREL, DT_PLTRELSZ, DT_RELA, DT_RELASZ, DT_STRTAB, DT_SYMTAB, R_X86_64_64, R_X86_64_GLOB_DAT,
    R_X86_64_JUMP_SLOT, Relocation, Symbol, address, entry, load,
};
use super::owned::is_called;
use crate::Error;
use crate::sys::{self, Library, Protection};
use crate::trusted::trusted;

/// A function that this crate replaces.
#[derive(Debug)]
struct Route {
    name: &'static CStr,
    /// The address of the C library's function.
    from: usize,
    /// The address of this crate's.
    to: usize,
}

trusted! {
    /// The functions whose slots are rewritten; none if the loader binds to this crate's.
    static ROUTES: OnceLock<Vec<Route>> = OnceLock::new();
}

/// Whether this library's copy of the crate has routed functions to itself. Other copies look for it by name.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "it is a symbol of the library's")]
pub(crate) static pkru_userspace_is_active: AtomicBool = AtomicBool::new(false);

fn has_active_copy(library: &Library) -> bool {
    let found = library.definition(c"pkru_userspace_is_active").filter(|found| library.contains(*found));
    // SAFETY: every copy of this crate defines the symbol as this type, and the library is loaded.
    found.is_some_and(|found| unsafe { AtomicBool::from_ptr(found as *mut bool) }.load(Ordering::Relaxed))
}

/// Returns the loaded object that this code is part of.
fn own_object(libraries: &[Library]) -> Option<&Library> {
    let here = (&raw const ROUTES).addr();
    libraries.iter().find(|library| library.contains(here))
}

/// Returns whether the loader itself binds references to these functions to this object's.
///
/// The addresses of the functions, as this code would take them, do not tell: in a shared library they may be another
/// object's.
pub(crate) fn are_bound(names: &[&CStr]) -> bool {
    let libraries = sys::libraries();
    let is_ours = |name: &&CStr| {
        let found = sys::lookup(name).map(|found| found.as_ptr().addr());
        own_object(&libraries).zip(found).is_some_and(|(object, found)| object.contains(found))
    };
    names.iter().all(is_ours)
}

/// Rewrites the slots of all loaded objects that lead to the C library's functions of these names, and those of objects
/// that are loaded later when they are [bound](super::bind::bind_all). The caller blocks signals.
///
/// # Errors
///
/// [`Error::MallocNotRouted`] if this code is the executable's, or if `malloc` is another library's than the C library's.
/// [`Error::AnotherCopy`] if another library has routed them to its own copy of this crate.
pub(crate) fn begin(names: &[&'static CStr]) -> Result<(), Error> {
    let libraries = sys::libraries();
    let object = own_object(&libraries).filter(|object| !object.name.is_empty()).ok_or(Error::MallocNotRouted)?;
    let library = libraries.iter().find(|library| is_called(library, "libc.so")).ok_or(Error::MallocNotRouted)?;
    if !sys::lookup(c"malloc").is_some_and(|found| library.contains(found.as_ptr().addr())) {
        return Err(Error::MallocNotRouted);
    }
    let route = |name: &'static CStr| {
        let to = object.definition(name)?;
        let from = sys::lookup_next(name)?.as_ptr().addr();
        (object.contains(to) && !object.contains(from)).then_some(Route { name, from, to })
    };
    let mut routes: Vec<_> = names.iter().copied().filter_map(route).collect();
    routes.sort_unstable_by_key(|route| route.name);
    let is_other = |library: &&Library| !std::ptr::eq(*library, object);
    if let Some(other) = libraries.iter().filter(is_other).find(|library| has_active_copy(library)) {
        return Err(Error::AnotherCopy { name: other.name.to_string_lossy().into_owned() });
    }
    object.keep_loaded();
    pkru_userspace_is_active.store(true, Ordering::Relaxed);
    let _ = ROUTES.set(routes);
    rewrite_all(libraries.iter());
    Ok(())
}

/// Rewrites the slots of objects, if [`begin`] was called. No domain owns the data of any of them.
pub(super) fn rewrite_all<'a>(libraries: impl Iterator<Item = &'a Library>) {
    let Some(routes) = ROUTES.get() else { return };
    // The loader's own calls are not bound by slots that it would share.
    libraries.filter(|library| !is_called(library, "ld-linux-x86-64.so")).for_each(|library| rewrite(library, routes));
}

fn rewrite(library: &Library, routes: &[Route]) {
    let (Some(symbols), Some(strings)) = (address(library, DT_SYMTAB), address(library, DT_STRTAB)) else { return };
    let tables = [(DT_JMPREL, DT_PLTRELSZ), (DT_RELA, DT_RELASZ)].into_iter().filter_map(|(start, size)| {
        let start = address(library, start)?;
        Some((start..start + entry(library, size)? as usize).step_by(size_of::<Relocation>()))
    });
    let mut relro = Relro { pages: library.relro(), is_open: false };
    for at in tables.flatten() {
        // SAFETY: the dynamic section describes arrays of relocations, which are mapped while the library is loaded.
        let relocation: Relocation = unsafe { load(at) };
        if !matches!(relocation.info as u32, R_X86_64_JUMP_SLOT | R_X86_64_GLOB_DAT | R_X86_64_64) {
            continue;
        }
        let symbol = symbols + (relocation.info >> 32) as usize * size_of::<Symbol>();
        // SAFETY: the index comes from a relocation of this library, so the symbol table has an entry for it.
        let symbol: Symbol = unsafe { load(symbol) };
        // SAFETY: the string table ends with a NUL, and is mapped while the library is loaded.
        let name = unsafe { CStr::from_ptr((strings + symbol.name as usize) as *const libc::c_char) };
        let Ok(index) = routes.binary_search_by_key(&name, |route| route.name) else { continue };
        let slot = library.base + relocation.offset as usize;
        // SAFETY: the relocation gives the address of a word of the library's data. Other threads may read it.
        let word = unsafe { AtomicUsize::from_ptr(slot as *mut usize) };
        // A library may be bound to a definition of its own.
        if word.load(Ordering::Relaxed) == routes[index].from && relro.open(slot) {
            word.store(routes[index].to, Ordering::Relaxed);
        }
    }
}

/// The pages that the loader has made read-only after it had bound them. They are again when this is dropped.
struct Relro {
    pages: Option<Range<usize>>,
    is_open: bool,
}

impl Relro {
    /// Makes a slot writable. Returns whether it is.
    fn open(&mut self, slot: usize) -> bool {
        let Some(pages) = self.pages.clone().filter(|pages| !self.is_open && pages.contains(&slot)) else {
            return true;
        };
        // SAFETY: the pages are the library's data, and were writable while it was loaded.
        self.is_open = unsafe { sys::protect(pages, Protection::READ_WRITE, ProtectionKey::DEFAULT) }.is_ok();
        self.is_open
    }
}

impl Drop for Relro {
    fn drop(&mut self) {
        if let Some(pages) = self.pages.clone().filter(|_| self.is_open) {
            // On failure they stay writable, as they are without RELRO.
            // SAFETY: the loader has given the pages this protection.
            let _ = unsafe { sys::protect(pages, Protection::READ, ProtectionKey::DEFAULT) };
        }
    }
}
