//! The symbols of loaded objects, as far as they were asked for.
//!
//! The first question about a symbol reads its file, which takes milliseconds. The tables themselves are not kept, because
//! those of a Rust program take megabytes.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
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

/// Finds the symbol that an address belongs to; `None` if it is in no loaded object.
///
/// Files are read and objects are listed without the lock and with signals unblocked: a file may block, and the loader's
/// locks may be held by a thread that waits for this one, in a library's constructor that calls a domain.
pub(super) fn find(address: u64) -> Option<Symbol> {
    if let Answer::Known(symbol) = ask(address) {
        return symbol;
    }
    let loaded = loaded_count();
    let libraries = sys::libraries();
    let library = libraries.iter().find(|library| library.contains(address as usize));
    let known = library.and_then(|library| {
        let in_file = address - library.base as u64;
        match Known::read(library, in_file) {
            Ok(known) => Some(known),
            // Without the file there is no name, here and until something is loaded.
            Err(Unread::Unfit) => Some(Known { range: in_file..in_file + 1, symbol: None }),
            Err(Unread::ForNow) => None,
        }
    });
    let _quiet = BlockedSignals::new();
    let mut tables = lock();
    if tables.loaded != loaded {
        tables.objects = libraries.iter().map(Object::of).collect();
        tables.loaded = loaded;
    }
    let object = tables.objects.iter_mut().find(|object| object.segment_at(address).is_some())?;
    known.into_iter().for_each(|known| object.learn(known));
    Some(object.symbol(address))
}

fn loaded_count() -> u64 {
    let _quiet = BlockedSignals::new();
    sys::loaded_count()
}

/// What the tables know of an address.
enum Answer {
    Known(Option<Symbol>),
    Unknown,
}

fn ask(address: u64) -> Answer {
    let _quiet = BlockedSignals::new();
    let loaded = sys::loaded_count();
    let tables = lock();
    if tables.loaded != loaded {
        return Answer::Unknown;
    }
    match tables.objects.iter().find(|object| object.segment_at(address).is_some()) {
        None => Answer::Known(None),
        Some(object) if object.known_at(address - object.base).is_some() => Answer::Known(Some(object.symbol(address))),
        Some(_) => Answer::Unknown,
    }
}

/// Why a library's file was not read.
enum Unread {
    /// It is gone, or is not the one that was loaded.
    Unfit,
    /// Something is short: descriptors, or memory.
    ForNow,
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN | libc::EINTR | libc::EIO) => Self::ForNow,
            _ => Self::Unfit,
        }
    }
}

/// Reads a regular file. A library's path may name something else by now, such as a pipe behind `/proc/self/fd`.
fn contents(path: &Path) -> Result<Vec<u8>, Unread> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let mut data = Vec::new();
    if !file.metadata()?.is_file() {
        return Err(Unread::Unfit);
    }
    file.read_to_end(&mut data)?;
    Ok(data)
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

    /// Returns what is known of an address of the file.
    fn known_at(&self, address: u64) -> Option<&Known> {
        let after = self.known.partition_point(|known| known.range.start <= address);
        self.known[..after].last().filter(|known| known.range.contains(&address))
    }

    fn learn(&mut self, known: Known) {
        /// The most ranges that are kept of one object.
        const MOST: usize = 256;
        if self.known_at(known.range.start).is_some() {
            // Another thread was faster.
            return;
        }
        if self.known.len() == MOST {
            self.known.clear();
        }
        let index = self.known.partition_point(|other| other.range.start <= known.range.start);
        self.known.insert(index, known);
    }

    /// Returns the symbol of an address in memory, as far as it is known.
    fn symbol(&self, address: u64) -> Symbol {
        let in_file = address - self.base;
        let known = self.known_at(in_file);
        let symbol = known.and_then(|known| known.symbol.clone());
        let (name, start) = symbol.map_or((None, 0), |(name, start)| (Some(name), start));
        let is_of_std = |name: &String| {
            ["std::", "core::", "alloc::"].iter().any(|krate| name.trim_start_matches('<').starts_with(krate))
        };
        Symbol {
            offset: in_file - start,
            file: self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned(),
            library: self.path.clone(),
            is_variable: self.segment_at(address) == Some(true),
            is_unread: known.is_none(),
            can_be_owned: self.can_be_owned,
            is_of_runtime: !(self.is_program || self.can_be_owned) || name.as_ref().is_some_and(is_of_std),
            name,
        }
    }
}

impl Known {
    /// Reads from the file of a library what an address of the file belongs to.
    fn read(library: &Library, address: u64) -> Result<Self, Unread> {
        let data = contents(&library.path())?;
        if !library.begins_like(&data) {
            return Err(Unread::Unfit);
        }
        let file = ElfFile64::<Endianness>::parse(&*data).map_err(|_| Unread::Unfit)?;
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
        Ok(match best {
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
            let [function, variable] = [code, data].map(|symbol| find(symbol + offset).unwrap());
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
        assert_eq!([0x10, &raw const local as u64].map(find), [None, None]);
    }
}
