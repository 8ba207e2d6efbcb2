//! The symbol that an address belongs to.

use std::fmt;
use std::path::{Path, PathBuf};

use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSymbol};

use crate::{library, sys};

/// A function or variable of a loaded object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbol {
    name: Option<String>,
    offset: u64,
    library: PathBuf,
    /// It is in a segment that the program can write.
    pub(crate) is_variable: bool,
    /// It is in a library whose data can be given to a domain.
    pub(crate) can_be_given: bool,
    /// It belongs to the C library, the loader or Rust's std.
    pub(crate) is_of_runtime: bool,
}

impl Symbol {
    /// Returns the name, if the file's symbol tables have one for the address: as the source has it for Rust, as the
    /// linker has it for C++.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Names it otherwise.
    pub(crate) fn with_name(self, name: &str) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// Returns the distance of the address from the symbol in bytes; from where the object was loaded, if there is no
    /// name.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the file that the object was loaded from.
    #[must_use]
    pub fn library(&self) -> &Path {
        &self.library
    }
}

impl fmt::Display for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let library = self.library.file_name().unwrap_or(self.library.as_os_str()).display();
        match &self.name {
            Some(name) if self.offset == 0 => write!(f, "{name} of {library}"),
            Some(name) => write!(f, "{name}+{:#x} of {library}", self.offset),
            None => write!(f, "{library}+{:#x}", self.offset),
        }
    }
}

/// Finds the symbol that an address belongs to; `None` if it is in no loaded object.
pub(crate) fn find(address: u64) -> Option<Symbol> {
    let libraries = sys::libraries();
    let library = libraries.iter().find(|library| library.contains(address as usize))?;
    let is_variable = library.constants_at(address as usize).is_none();
    let (can_be_given, is_program) = (library::can_be_given(library), library.name.is_empty());
    let (library, in_file) = (library.path(), address - library.base as u64);
    let (name, offset) = name(&library, in_file).map_or((None, in_file), |(name, offset)| (Some(name), offset));
    let is_of_std = |name: &String| {
        ["std::", "core::", "alloc::"].iter().any(|krate| name.trim_start_matches('<').starts_with(krate))
    };
    let is_of_runtime = !(is_program || can_be_given) || name.as_ref().is_some_and(is_of_std);
    Some(Symbol { name, offset, library, is_variable, can_be_given, is_of_runtime })
}

fn name(path: &Path, address: u64) -> Option<(String, u64)> {
    // The file may be gone, or another by now: then there is no name, which is not worth an error.
    let data = std::fs::read(path).ok()?;
    let file = ElfFile64::<Endianness>::parse(&*data).ok()?;
    let covers = |symbol: &object::read::elf::ElfSymbol64<'_, '_>| {
        symbol.size() != 0 && (symbol.address()..symbol.address() + symbol.size()).contains(&address)
    };
    let symbol = file.symbols().find(covers).or_else(|| file.dynamic_symbols().find(covers))?;
    let name = rustc_demangle::demangle(symbol.name().ok()?);
    Some((format!("{name:#}"), address - symbol.address()))
}
