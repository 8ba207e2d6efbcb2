//! Giving a domain the data of a shared library.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pkru::ProtectionKey;

use crate::monitor::monitored;
use crate::sys::{self, BlockedSignals, Library};
use crate::{Error, binding, thread};

/// A library whose writable data belongs to a domain, and what that data was like.
#[derive(Debug)]
pub(crate) struct Given {
    /// Keeps it loaded.
    _library: Library,
    parts: Vec<Arc<Part>>,
    /// A page could not be untagged, so that nobody can have the data any more.
    is_lost: Cell<bool>,
}

#[derive(Debug)]
pub(crate) struct Part {
    addresses: Range<usize>,
    contents: Vec<u8>,
}

/// The data that domains have.
pub(crate) type Taken = Vec<Arc<Part>>;

impl Part {
    fn restore(&self) {
        let (from, to) = (self.contents.as_ptr(), self.addresses.start as *mut u8);
        // SAFETY: the pages are the library's, and as many; nothing runs in the domain that has them.
        unsafe { std::ptr::copy_nonoverlapping(from, to, self.contents.len()) };
    }
}

monitored! {
    static TAKEN: Mutex<Taken> = Mutex::new(Vec::new());
    /// Whether it is noticed that the program exits.
    static NOTICES_EXIT: AtomicBool = AtomicBool::new(false);
}

/// Lets nobody give libraries away or take them back meanwhile. Signals are to be blocked, for their handlers may fork.
pub(crate) fn lock() -> MutexGuard<'static, Taken> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Given {
    /// Takes a loaded library by the name of its file, with or without the version at its end, as it is now.
    ///
    /// # Errors
    ///
    /// If there is no such library, if another domain has it, or if it is one that the program itself cannot do
    /// without.
    pub(crate) fn new(name: &str) -> Result<Self, Error> {
        let library = sys::libraries().into_iter().find(|library| is_called(library, name));
        let library = library.ok_or_else(|| Error::NoLibrary { name: name.into() })?;
        if !can_be_given(&library) {
            return Err(Error::LibraryInUse { name: name.into() });
        }
        let ranges = library.writable_pages();
        let _quiet = BlockedSignals::new();
        // What is kept of the data is bound, for nobody else may write it from now on.
        let _alone = binding::bind_all();
        let mut taken = lock();
        if ranges.iter().any(|range| taken.iter().any(|other| other.addresses.start == range.start)) {
            return Err(Error::LibraryInUse { name: name.into() });
        }
        let contents = |range: &Range<usize>| {
            // SAFETY: the pages are the library's data, which is mapped while this value holds it. A library of which
            // other threads make use at this moment could change it; that is excluded by the builder's contract.
            unsafe { std::slice::from_raw_parts(range.start as *const u8, range.len()) }.to_vec()
        };
        let part = |range| Arc::new(Part { contents: contents(&range), addresses: range });
        let parts: Vec<_> = ranges.into_iter().map(part).collect();
        if !NOTICES_EXIT.load(Ordering::Relaxed) {
            sys::at_exit(take_all_back).map_err(Error::system("be told of the program's exit"))?;
            NOTICES_EXIT.store(true, Ordering::Relaxed);
        }
        taken.extend(parts.iter().cloned());
        Ok(Self { _library: library, parts, is_lost: Cell::new(false) })
    }

    /// Returns the pages of its writable data.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.parts.iter().map(|part| part.addresses.clone())
    }

    /// Makes the data what it was.
    pub(crate) fn restore(&self) {
        self.parts.iter().for_each(|part| part.restore());
    }

    /// Takes the data away from the domain, and makes it what it was; `false` if a page could not be untagged.
    pub(crate) fn take_back(&self) -> bool {
        for part in &self.parts {
            // SAFETY: the pages are the library's data.
            if unsafe { sys::protect(part.addresses.clone(), ProtectionKey::DEFAULT) }.is_ok() {
                part.restore();
            } else {
                self.is_lost.set(true);
            }
        }
        !self.is_lost.get()
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        if !self.is_lost.get() {
            let _quiet = BlockedSignals::new();
            let mut taken = lock();
            taken.retain(|taken| !self.parts.iter().any(|part| part.addresses == taken.addresses));
        }
    }
}

/// Returns the pages of data that domains have.
pub(crate) fn taken() -> Vec<Range<usize>> {
    lock().iter().map(|part| part.addresses.clone()).collect()
}

/// When the program exits: the loader is about to run the libraries' destructors, which are to find the data as it was.
extern "C" fn take_all_back() {
    if thread::is_in_domain() {
        return;
    }
    let _quiet = BlockedSignals::new();
    for part in lock().iter() {
        // SAFETY: the pages are a library's data. A call that is running in the domain which has them faults.
        if unsafe { sys::protect(part.addresses.clone(), ProtectionKey::DEFAULT) }.is_ok() {
            part.restore();
        }
    }
}

/// Libraries that the program uses at every step, and the object that is the program.
const INDISPENSABLE: [&str; 5] = ["libc.so", "libpthread.so", "ld-linux-x86-64.so", "libgcc_s.so", "linux-vdso.so"];

/// Whether a library's data can be given to a domain.
pub(crate) fn can_be_given(library: &Library) -> bool {
    !library.name.is_empty() && !INDISPENSABLE.iter().any(|name| is_called(library, name))
}

/// Whether a library's file has this name, or this name and a version.
fn is_called(library: &Library, name: &str) -> bool {
    if library.name.is_empty() {
        return false;
    }
    let path = library.name.to_string_lossy();
    let file = path.rsplit('/').next().unwrap_or_default();
    file.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}
