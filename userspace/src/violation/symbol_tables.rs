//! The symbols of loaded objects, as far as they were asked for.
//!
//! A file's tables are read for the first address in each symbol, which takes up to some milliseconds. They are not kept:
//! those of a Rust program take megabytes.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use object::elf::SHF_ALLOC;
use object::read::elf::ElfFile64;
use object::{Endianness, Object as _, ObjectSection, ObjectSymbol, SectionFlags, SectionIndex, SymbolKind};

use super::symbol::Symbol;
use crate::loader::owned::can_be_owned;
use crate::sys::{self, BlockedSignals, Library};
use crate::trusted::trusted;

/// The loaded objects, and the symbols of theirs that were asked for.
#[derive(Debug)]
pub(crate) struct SymbolTables {
    /// The [count of loaded objects](sys::loaded_count) for which `objects` was made.
    loaded: u64,
    objects: Vec<Object>,
}

/// A loaded object.
#[derive(Debug)]
struct Object {
    path: PathBuf,
    base: u64,
    /// Each segment's addresses, and whether the program can write it.
    segments: Vec<(Range<usize>, bool)>,
    is_program: bool,
    can_be_owned: bool,
    /// By address, and apart from each other.
    known: Vec<Known>,
}

/// A range of addresses in a file that was asked for: a symbol, or a gap between two.
#[derive(Debug)]
struct Known {
    /// Without what lies within the symbol and belongs to another.
    range: Range<u64>,
    /// The demangled name of the symbol, and its address.
    symbol: Option<(String, u64)>,
}

trusted! {
    static TABLES: Mutex<SymbolTables> = Mutex::new(SymbolTables { loaded: 0, objects: Vec::new() });
}

/// Locks the tables. Signals are blocked by the caller, because their handlers may fork.
pub(crate) fn lock() -> MutexGuard<'static, SymbolTables> {
    TABLES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Finds the symbols that addresses belong to; `None` for one that is in no loaded object.
pub(super) fn find<const N: usize>(addresses: [Option<u64>; N]) -> [Option<Symbol>; N] {
    let _quiet = BlockedSignals::new();
    let loaded = sys::loaded_count();
    // Objects are listed without the lock: that takes a lock of the loader's, whose holder may be waiting for this one,
    // in a library's constructor that calls a domain.
    let is_current = lock().loaded == loaded;
    let objects = (!is_current).then(|| sys::libraries().iter().map(Object::of).collect());
    let mut tables = lock();
    if let Some(objects) = objects {
        tables.replace(objects, loaded);
    }
    addresses.map(|address| tables.find(address?))
}

impl SymbolTables {
    /// Replaces the list of objects, and keeps what is known of those that are still loaded.
    fn replace(&mut self, objects: Vec<Object>, loaded: u64) {
        let mut before = std::mem::replace(&mut self.objects, objects);
        for object in &mut self.objects {
            if let Some(same) = before.iter_mut().find(|before| before.path == object.path) {
                std::mem::swap(&mut object.known, &mut same.known);
            }
        }
        self.loaded = loaded;
    }

    fn find(&mut self, address: u64) -> Option<Symbol> {
        let object = self.objects.iter_mut().find(|object| object.segment_at(address).is_some())?;
        let is_variable = object.segment_at(address) == Some(true);
        let in_file = address - object.base;
        let symbol = object.known_at(in_file).and_then(|known| known.symbol.clone());
        let (name, start) = symbol.map_or((None, 0), |(name, start)| (Some(name), start));
        let is_of_std = |name: &String| {
            ["std::", "core::", "alloc::"].iter().any(|krate| name.trim_start_matches('<').starts_with(krate))
        };
        Some(Symbol {
            offset: in_file - start,
            file: object.path.file_name().unwrap_or(object.path.as_os_str()).to_string_lossy().into_owned(),
            library: object.path.clone(),
            is_variable,
            can_be_owned: object.can_be_owned,
            is_of_runtime: !(object.is_program || object.can_be_owned) || name.as_ref().is_some_and(is_of_std),
            name,
        })
    }
}

impl Object {
    fn of(library: &Library) -> Self {
        let segments = library.segments.iter().map(|segment| (segment.addresses.clone(), segment.writable));
        Self {
            path: library.path(),
            base: library.base as u64,
            segments: segments.collect(),
            is_program: library.name.is_empty(),
            can_be_owned: can_be_owned(library),
            known: Vec::new(),
        }
    }

    /// Returns whether the segment is writable that an address lies in.
    fn segment_at(&self, address: u64) -> Option<bool> {
        let at = |(addresses, _): &&(Range<usize>, bool)| addresses.contains(&(address as usize));
        self.segments.iter().find(at).map(|(_, is_writable)| *is_writable)
    }
}

impl Object {
    /// Returns what is known of an address of the file; `None` if the file is unreadable.
    fn known_at(&mut self, address: u64) -> Option<&Known> {
        /// The most ranges that are kept of one object.
        const MOST: usize = 256;
        let after = |known: &[Known]| known.partition_point(|known| known.range.start <= address);
        let mut index = after(&self.known);
        if !self.known[..index].last().is_some_and(|known| known.range.contains(&address)) {
            if self.known.len() == MOST {
                self.known.clear();
                index = 0;
            }
            let found = Known::read(&self.path, address)?;
            self.known.insert(index, found);
            index += 1;
        }
        self.known[..index].last()
    }
}

impl Known {
    /// Reads from a file what an address of it belongs to.
    fn read(path: &Path, address: u64) -> Option<Self> {
        let data = std::fs::read(path).ok()?;
        let file = ElfFile64::<Endianness>::parse(&*data).ok()?;
        let is_loaded = |section: SectionIndex| {
            file.section_by_index(section).is_ok_and(
                |section| matches!(section.flags(), SectionFlags::Elf { sh_flags, .. } if sh_flags.contains(SHF_ALLOC)),
            )
        };
        // The value of a thread-local's symbol is no address, and neither is one in a section that is not loaded.
        let symbols = file.symbols().chain(file.dynamic_symbols()).filter(|symbol| {
            symbol.size() != 0 && symbol.kind() != SymbolKind::Tls && symbol.section_index().is_some_and(is_loaded)
        });
        let mut gap = 0..u64::MAX;
        // Of several symbols the narrowest names the address, and of several names the one without leading underscores.
        let mut best: Option<(Range<u64>, &str)> = None;
        for symbol in symbols {
            let range = symbol.address()..symbol.address().saturating_add(symbol.size());
            if range.contains(&address) {
                let Ok(name) = symbol.name() else { continue };
                let is_better = best.as_ref().is_none_or(|(best, old)| {
                    let (new, before) = (range.end - range.start, best.end - best.start);
                    new < before || (new == before && name > *old)
                });
                if is_better {
                    best = Some((range, name));
                }
            } else if range.end <= address {
                gap.start = gap.start.max(range.end);
            } else {
                gap.end = gap.end.min(range.start);
            }
        }
        Some(match best {
            Some((range, name)) => Self {
                range: range.start.max(gap.start)..range.end.min(gap.end),
                symbol: Some((format!("{:#}", rustc_demangle::demangle(name)), range.start)),
            },
            None => Self { range: gap, symbol: None },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::find;

    static VARIABLE: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(7);

    #[inline(never)]
    fn function() -> u64 {
        VARIABLE.load(std::sync::atomic::Ordering::Relaxed)
    }

    #[test]
    fn symbols_are_found_and_found_again() {
        let code = function as *const () as u64;
        let data = VARIABLE.as_ptr() as u64;
        for offset in [0, 1, 0] {
            let [function, variable] = find([Some(code + offset), Some(data + offset)]).map(Option::unwrap);
            assert!(function.name().unwrap().ends_with("tests::function"), "{function}");
            assert!(variable.name().unwrap().ends_with("tests::VARIABLE"), "{variable}");
            assert_eq!((function.offset(), variable.offset()), (offset, offset));
            assert_eq!((function.is_variable, variable.is_variable), (false, true));
        }
        assert_eq!(super::lock().objects[0].known.len(), 2, "what was asked for is kept");
    }

    #[test]
    fn an_address_in_no_object_has_no_symbol() {
        let local = 0u64;
        assert_eq!(find([None, Some(0x10), Some(&raw const local as u64)]), [None, None, None]);
    }
}
