//! Endings that show as something else: code of the C and C++ libraries that is about to abort writes a static first.

use std::ffi::CStr;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use pkru::ProtectionKey;
use pkru::fault::KeyFault;

use crate::sys;
use crate::violation::ViolationKind;

/// A function or variable of a library: its addresses, 0 if it is not loaded.
struct Place {
    start: AtomicUsize,
    end: AtomicUsize,
}

impl Place {
    const fn new() -> Self {
        Self { start: AtomicUsize::new(0), end: AtomicUsize::new(0) }
    }

    fn set(&self, addresses: Option<Range<usize>>) {
        let Range { start, end } = addresses.unwrap_or(0..0);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
    }

    fn contains(&self, address: u64) -> bool {
        (self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed)).contains(&(address as usize))
    }
}

/// glibc's abort(3), which takes a lock (2.36, `stdlib/abort.c`).
static ABORT: Place = Place::new();
/// Where glibc keeps the message of a check that failed, for a debugger (2.36, `sysdeps/posix/libc_fatal.c`).
static ABORT_MESSAGE: Place = Place::new();
/// What libstdc++ does about an exception that nobody catches; it notes that, so as not to do it twice.
static TERMINATE: Place = Place::new();

/// Finds these places among the libraries that are loaded now.
pub(crate) fn prepare() {
    ABORT.set(sys::next_symbol(c"abort", None));
    ABORT_MESSAGE.set(sys::next_symbol(c"__abort_msg", Some(c"GLIBC_PRIVATE")));
    TERMINATE.set(sys::next_symbol(c"_ZN9__gnu_cxx27__verbose_terminate_handlerEv", None));
}

/// Tells what a write to key 0 was about, if it was such a one.
pub(crate) fn of(fault: &KeyFault, instruction: u64) -> Option<ViolationKind> {
    if fault.key != ProtectionKey::DEFAULT {
        None
    } else if ABORT.contains(instruction) || ABORT_MESSAGE.contains(fault.address) {
        Some(ViolationKind::Abort)
    } else if TERMINATE.contains(instruction) {
        Some(ViolationKind::Exception)
    } else {
        None
    }
}

/// Copies a text that ends with a zero from the data of a loaded object; `None` if there is none at the address.
pub(crate) fn text(address: usize) -> Option<String> {
    const MOST: usize = 1024;
    let libraries = sys::libraries();
    let segment = libraries.iter().find_map(|library| library.segment_at(address))?;
    let length = (segment.end - address).min(MOST);
    // SAFETY: the object's segments are mapped and readable while `libraries` holds it. What others write there meanwhile only
    // changes the text.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, length) };
    let text = CStr::from_bytes_until_nul(bytes).ok()?;
    Some(text.to_string_lossy().into_owned())
}
