//! The symbol that an address belongs to.

use std::fmt;
use std::path::{Path, PathBuf};

/// A function or variable of a loaded object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbol {
    pub(super) name: Option<String>,
    pub(super) offset: u64,
    pub(super) library: PathBuf,
    /// The file's name.
    pub(super) file: String,
    /// It lies in a segment that the program can write.
    pub(super) is_variable: bool,
    /// It is in a library whose data a domain can own.
    pub(super) can_be_owned: bool,
    /// It belongs to the C library, the loader or Rust's std.
    pub(super) is_of_runtime: bool,
    /// The file could not be read for now, so the name may be missing.
    pub(super) is_unread: bool,
}

impl Symbol {
    /// Returns the name, if the file's symbol tables have one for the address: as in the source for Rust, as the linker
    /// has it for C++.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Returns the distance of the address from the symbol in bytes. Without a name it is the distance from where the
    /// object was loaded.
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
        let library = &self.file;
        match &self.name {
            Some(name) if self.offset == 0 => write!(f, "{name} of {library}"),
            Some(name) => write!(f, "{name}+{:#x} of {library}", self.offset),
            None => write!(f, "{library}+{:#x}", self.offset),
        }
    }
}
