//! The symbol tables of loaded objects, read once.

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

/// The loaded objects, and the tables of those that were asked for.
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
    table: Lookup,
}

/// The table of an object.
#[derive(Debug)]
enum Lookup {
    NotRead,
    Read(Table),
    /// The file is gone, unreadable or stripped. Symbols have no name then.
    None,
}

/// The symbols of a file, by address.
#[derive(Debug)]
struct Table {
    symbols: Vec<Entry>,
    /// The names of all symbols, one after the other.
    names: String,
}

#[derive(Debug)]
struct Entry {
    start: u64,
    size: u32,
    /// Where in `names` its name is, as the linker has it.
    name: Range<u32>,
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
    /// Replaces the list of objects, and keeps the tables of those that are still loaded.
    fn replace(&mut self, objects: Vec<Object>, loaded: u64) {
        let mut before = std::mem::replace(&mut self.objects, objects);
        for object in &mut self.objects {
            if let Some(same) = before.iter_mut().find(|before| before.path == object.path) {
                std::mem::swap(&mut object.table, &mut same.table);
            }
        }
        self.loaded = loaded;
    }

    fn find(&mut self, address: u64) -> Option<Symbol> {
        let object = self.objects.iter_mut().find(|object| object.segment_at(address).is_some())?;
        let in_file = address - object.base;
        if matches!(object.table, Lookup::NotRead) {
            object.table = Table::read(&object.path).map_or(Lookup::None, Lookup::Read);
        }
        let entry = if let Lookup::Read(table) = &object.table { table.find(in_file) } else { None };
        let name = entry.map(|(name, _)| format!("{:#}", rustc_demangle::demangle(name)));
        let is_of_std = |name: &String| {
            ["std::", "core::", "alloc::"].iter().any(|krate| name.trim_start_matches('<').starts_with(krate))
        };
        Some(Symbol {
            offset: entry.map_or(in_file, |(_, start)| in_file - start),
            file: object.path.file_name().unwrap_or(object.path.as_os_str()).to_string_lossy().into_owned(),
            library: object.path.clone(),
            is_variable: object.segment_at(address) == Some(true),
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
            table: Lookup::NotRead,
        }
    }

    /// Returns whether the segment is writable that an address lies in.
    fn segment_at(&self, address: u64) -> Option<bool> {
        let at = |(addresses, _): &&(Range<usize>, bool)| addresses.contains(&(address as usize));
        self.segments.iter().find(at).map(|(_, is_writable)| *is_writable)
    }
}

impl Table {
    fn read(path: &Path) -> Option<Self> {
        let data = std::fs::read(path).ok()?;
        let file = ElfFile64::<Endianness>::parse(&*data).ok()?;
        let is_loaded = |section: SectionIndex| {
            file.section_by_index(section).is_ok_and(
                |section| matches!(section.flags(), SectionFlags::Elf { sh_flags, .. } if sh_flags.contains(SHF_ALLOC)),
            )
        };
        let named = |symbol: object::read::elf::ElfSymbol64<'_, '_>| {
            // The value of a thread-local's symbol is no address, and neither is one in a section that is not loaded.
            let is_addressed =
                symbol.size() != 0 && symbol.kind() != SymbolKind::Tls && symbol.section_index().is_some_and(is_loaded);
            let size = u32::try_from(symbol.size()).unwrap_or(u32::MAX);
            if is_addressed { Some((symbol.address(), size, symbol.name().ok()?.to_owned())) } else { None }
        };
        let mut found: Vec<_> = file.symbols().chain(file.dynamic_symbols()).filter_map(named).collect();
        // Of several at one address the last is found: the largest, and the name without leading underscores.
        found.sort_unstable();
        found.dedup();
        let mut names = String::new();
        let mut symbols = Vec::with_capacity(found.len());
        for (start, size, name) in found {
            let begin = u32::try_from(names.len()).ok()?;
            names.push_str(&name);
            symbols.push(Entry { start, size, name: begin..u32::try_from(names.len()).ok()? });
        }
        names.shrink_to_fit();
        (!symbols.is_empty()).then_some(Self { symbols, names })
    }

    /// Returns the name of the symbol that covers an address of the file, and the symbol's own address.
    fn find(&self, address: u64) -> Option<(&str, u64)> {
        /// The most symbols that begin between a symbol and an address in it.
        const NESTED: usize = 8;
        let end = self.symbols.partition_point(|entry| entry.start <= address);
        let mut before = self.symbols[..end].iter().rev().take(NESTED);
        let entry = before.find(|entry| address - entry.start < entry.size.into())?;
        Some((&self.names[entry.name.start as usize..entry.name.end as usize], entry.start))
    }
}
