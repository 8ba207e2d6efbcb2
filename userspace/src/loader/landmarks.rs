//! Addresses at which the C and C++ libraries end the program.
//!
//! Their code writes a static before it aborts. In a domain that write faults, and the address of the fault tells why.

use std::ffi::CStr;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sys::{self, Library};
use crate::trusted::trusted;

/// A range of addresses. It is empty if the function, variable or object is not loaded.
#[derive(Debug)]
pub(crate) struct Landmark {
    start: AtomicUsize,
    end: AtomicUsize,
}

impl Landmark {
    const fn new() -> Self {
        Self { start: AtomicUsize::new(0), end: AtomicUsize::new(0) }
    }

    fn set(&self, addresses: Option<Range<usize>>) {
        let Range { start, end } = addresses.unwrap_or(0..0);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
    }

    fn range(&self) -> Range<usize> {
        self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed)
    }

    pub(crate) fn contains(&self, address: u64) -> bool {
        self.range().contains(&(address as usize))
    }
}

trusted! {
    /// glibc's abort(3), which takes a lock (2.36, `stdlib/abort.c`).
    pub(crate) static ABORT: Landmark = Landmark::new();
    /// The variable in which glibc stores the message of a failed check for debuggers (2.36,
    /// `sysdeps/posix/libc_fatal.c`).
    pub(crate) static ABORT_MESSAGE: Landmark = Landmark::new();
    /// The function of libstdc++ that reports an uncaught exception. It first sets a flag, so that it reports only
    /// once.
    pub(crate) static TERMINATE: Landmark = Landmark::new();
    /// The functions that glibc's failed checks call. They first map memory for the message.
    pub(crate) static FAILED_CHECKS: [Landmark; 3] = [const { Landmark::new() }; 3];
    /// The code of the C library.
    pub(crate) static LIBRARY_CODE: Landmark = Landmark::new();
    /// The statics of the executable.
    pub(crate) static PROGRAM_DATA: Landmark = Landmark::new();
}

/// Finds all landmarks in the loaded libraries.
pub(crate) fn find(libraries: &[Library]) {
    const PRIVATE: Option<&CStr> = Some(c"GLIBC_PRIVATE");
    ABORT.set(sys::next_symbol(c"abort", None));
    ABORT_MESSAGE.set(sys::next_symbol(c"__abort_msg", PRIVATE));
    TERMINATE.set(sys::next_symbol(c"_ZN9__gnu_cxx27__verbose_terminate_handlerEv", None));
    let checks = [(c"__chk_fail", None), (c"__fortify_fail", PRIVATE), (c"__libc_fatal", PRIVATE)];
    for (landmark, (name, version)) in FAILED_CHECKS.iter().zip(checks) {
        landmark.set(sys::next_symbol(name, version));
    }
    let abort = ABORT.range();
    let c_library = libraries.iter().filter(|_| !abort.is_empty()).find(|library| library.has_code_at(abort.start));
    LIBRARY_CODE.set(c_library.and_then(|library| library.segment_at(abort.start)));
    PROGRAM_DATA.set(libraries.first().and_then(|program| program.writable_pages().into_iter().next()));
}
