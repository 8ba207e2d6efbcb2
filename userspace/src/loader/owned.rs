//! The data of shared libraries that domains own.

#![expect(unsafe_code, reason = "it restores a library's data")]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pkru::ProtectionKey;

use crate::rights;
use crate::sys::{self, BlockedSignals, Inaccessible, Library};
use crate::trusted::trusted;

/// Pages of a library's data, and their contents when a domain got them.
#[derive(Debug)]
pub(crate) struct Part {
    pub(super) addresses: Range<usize>,
    pub(super) contents: Vec<u8>,
    /// The program does not have them back yet.
    pub(super) is_domains: AtomicBool,
}

impl Part {
    /// Restores the contents of the pages. Fails if the domain has made one of them inaccessible.
    pub(super) fn restore(&self) -> Result<(), Inaccessible> {
        // SAFETY: the pages are as large as the contents, and no code runs in the domain that owns them.
        unsafe { sys::copy_to(self.contents.as_ptr(), self.addresses.start, self.contents.len()) }
    }

    /// Returns the pages to the program, unless it has them. Returns whether it does now.
    pub(super) fn give_back(&self) -> bool {
        if !self.is_domains.load(Ordering::Relaxed) {
            return true;
        }
        // SAFETY: the pages are writable data of a library, and were readable and writable before.
        let is_accessible =
            unsafe { sys::protect(self.addresses.clone(), sys::Protection::READ_WRITE, ProtectionKey::DEFAULT) }
                .is_ok();
        let is_back = is_accessible && self.restore().is_ok();
        self.is_domains.store(!is_back, Ordering::Relaxed);
        is_back
    }
}

/// The parts that domains own.
pub(crate) type OwnedData = Vec<Arc<Part>>;

trusted! { static OWNED: Mutex<OwnedData> = Mutex::new(Vec::new()); }

/// Locks the list. The caller blocks signals, because their handlers may fork.
pub(crate) fn lock() -> MutexGuard<'static, OwnedData> {
    OWNED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the pages that domains own.
pub(crate) fn pages() -> Vec<Range<usize>> {
    lock().iter().map(|part| part.addresses.clone()).collect()
}

/// Returns all data to the program when it exits, before the loader runs the libraries' destructors.
pub(super) extern "C" fn return_all() {
    if rights::is_in_domain() {
        return;
    }
    let _quiet = BlockedSignals::new();
    for part in lock().iter() {
        // A call that still runs in the domain that owns the pages faults.
        let _ = part.give_back();
    }
}

/// Libraries that the whole program needs.
const INDISPENSABLE: [&str; 5] = ["libc.so", "libpthread.so", "ld-linux-x86-64.so", "libgcc_s.so", "linux-vdso.so"];

/// Returns whether a domain can own a library's data.
pub(crate) fn can_be_owned(library: &Library) -> bool {
    !library.name.is_empty() && !INDISPENSABLE.iter().any(|name| is_called(library, name))
}

/// Returns whether a library's file has this name, with or without the version at its end.
pub(crate) fn is_called(library: &Library, name: &str) -> bool {
    if library.name.is_empty() {
        return false;
    }
    let path = library.name.to_string_lossy();
    let file = path.rsplit('/').next().unwrap_or_default();
    file.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}
