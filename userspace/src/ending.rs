//! Endings that show as something else: code of the C and C++ libraries that is about to abort writes a static first.

use std::ffi::CStr;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use pkru::fault::KeyFault;

use crate::globals;
use crate::monitor::monitored;
use crate::platform::Memory;
use crate::signal::Trap;
use crate::sys::{self, Library};
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

monitored! {
    /// glibc's abort(3), which takes a lock (2.36, `stdlib/abort.c`).
    static ABORT: Place = Place::new();
    /// Where glibc keeps the message of a check that failed, for a debugger (2.36, `sysdeps/posix/libc_fatal.c`).
    static ABORT_MESSAGE: Place = Place::new();
    /// What libstdc++ does about an exception that nobody catches; it notes that, so as not to do it twice.
    static TERMINATE: Place = Place::new();
    /// The functions through which a check of glibc's fails. What they call puts the message into memory of its own
    /// first.
    static FAILED_CHECKS: [Place; 3] = [const { Place::new() }; 3];
    /// The code of the C library, and the statics of the program: what endings that are worth a closer look have to do
    /// with.
    static LIBRARY_CODE: Place = Place::new();
    static PROGRAM_DATA: Place = Place::new();
}

/// Finds these places among the libraries that are loaded now.
pub(crate) fn prepare(libraries: &[Library]) {
    const PRIVATE: Option<&CStr> = Some(c"GLIBC_PRIVATE");
    ABORT.set(sys::next_symbol(c"abort", None));
    ABORT_MESSAGE.set(sys::next_symbol(c"__abort_msg", PRIVATE));
    TERMINATE.set(sys::next_symbol(c"_ZN9__gnu_cxx27__verbose_terminate_handlerEv", None));
    let checks = [(c"__chk_fail", None), (c"__fortify_fail", PRIVATE), (c"__libc_fatal", PRIVATE)];
    for (place, (name, version)) in FAILED_CHECKS.iter().zip(checks) {
        place.set(sys::next_symbol(name, version));
    }
    let in_library = |library: &&Library| {
        library.has_code_at(ABORT.start.load(Ordering::Relaxed)) && ABORT.end.load(Ordering::Relaxed) != 0
    };
    let library = libraries.iter().find(in_library);
    LIBRARY_CODE.set(library.and_then(|library| library.segment_at(ABORT.start.load(Ordering::Relaxed))));
    PROGRAM_DATA.set(libraries.first().and_then(|program| program.writable_pages().into_iter().next()));
}

/// Tells what a write to key 0 was about, if it was such a one. The calling thread can read the domain's memory.
pub(crate) fn of(memory: &Memory, fault: &KeyFault, trap: &Trap) -> Option<ViolationKind> {
    if !globals::is_of_the_program(fault.key) {
        None
    } else if ABORT.contains(trap.instruction) || ABORT_MESSAGE.contains(fault.address) {
        Some(ViolationKind::Abort)
    } else if TERMINATE.contains(trap.instruction) {
        Some(ViolationKind::Exception)
    } else if LIBRARY_CODE.contains(trap.instruction) || PROGRAM_DATA.contains(fault.address) {
        of_callers(memory, trap)
    } else {
        None
    }
}

/// Tells an ending by the functions whose frames are on the domain's stack.
fn of_callers(memory: &Memory, trap: &Trap) -> Option<ViolationKind> {
    /// More than the frames of these functions take, in words.
    const MOST: usize = 2048;
    let out_of_memory = std::alloc::handle_alloc_error as *const () as u64;
    let exit = std::process::exit as *const () as u64;
    memory.stack_words(trap.stack, MOST).into_iter().find_map(|word| {
        if FAILED_CHECKS.iter().any(|place| place.contains(word)) {
            return Some(ViolationKind::Abort);
        }
        // The return address of a call that does not return may be that of the next function.
        match sys::function_at(word.wrapping_sub(1))? {
            // It prints a message with locks that are statics of std.
            function if function == out_of_memory => {
                Some(ViolationKind::OutOfMemory { size: memory.failed_allocation() })
            }
            // It flushes standard output first.
            function if function == exit => Some(ViolationKind::Exit { status: None }),
            _ => None,
        }
    })
}

/// Copies a text that ends with a zero from the constants of a loaded object; `None` if there is none at the address.
pub(crate) fn text(address: usize) -> Option<String> {
    const MOST: usize = 1024;
    let libraries = sys::libraries();
    let segment = libraries.iter().find_map(|library| library.constants_at(address))?;
    let length = (segment.end - address).min(MOST);
    // SAFETY: the object's constants are mapped, readable and never written while `libraries` holds it.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, length) };
    let text = CStr::from_bytes_until_nul(bytes).ok()?;
    Some(text.to_string_lossy().into_owned())
}
