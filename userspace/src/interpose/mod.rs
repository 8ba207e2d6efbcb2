//! Functions of the C library that this crate replaces in the whole program.
//!
//! An executable that links this crate exports these symbols, and the loader binds the calls of every library to them.
//! Outside domains they call the C library's functions.
//!
//! The functions only dispatch: what they do in a domain is in [`inside::libc`](crate::inside::libc).
//!
//! | module | functions | why |
//! |---|---|---|
//! | [`malloc`] | the malloc family | In a domain they allocate from the domain's heap. |
//! | [`thread_exit`] | `__cxa_thread_atexit_impl` | In a domain it registers nothing. |
//! | [`signals`] | `sigaction`, `signal` and its variants, `sigaltstack`, `sigprocmask`, `pthread_sigmask` | The program's handlers run with the program's rights. |
//! | [`signals`] | `pthread_kill` | In a domain the C library's would fault with all signals blocked. |
//! | [`signals`] | `raise` | In a domain a signal that would end the program ends the call. |
//! | [`old_signals`] | `sigset`, `sigignore`, `sighold`, `sigblock`, `sigsetmask` | As for `sigaction` and `sigprocmask`. |
//! | [`endings`] | `abort`, `exit` and `longjmp` with their variants, `__stack_chk_fail`, `__assert_fail`, C++'s `terminate`, `pthread_exit` | In a domain they end the call. |
//! | [`processes`] | `fork`, `_Fork`, `posix_spawn`, `posix_spawnp`, `system`, `popen` | In a domain they fail with EPERM. |
//! | [`mappings`] | `mmap`, `munmap`, `mprotect`, `mremap`, `madvise`, `mlock`, `munlock` | In a domain its caller changes the domain's own memory. |

pub(crate) mod endings;
pub(crate) mod malloc;
pub(crate) mod mappings;
pub(crate) mod old_signals;
pub(crate) mod processes;
pub(crate) mod signals;
pub(crate) mod thread_exit;

use std::ffi::{CStr, c_int};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sys;
use crate::trusted::trusted;

macro_rules! next {
    ($($function:ident = $name:literal,)*) => {
        /// A function of the C or C++ library that this crate replaces. Its address is looked up at its first call.
        #[allow(non_camel_case_types, reason = "they are named after the functions")]
        #[derive(Debug, Clone, Copy)]
        pub(crate) enum Next {
            $($function,)*
        }

        impl Next {
            const ALL: &[Self] = &[$(Self::$function,)*];
        }

        const NAMES: &[&CStr] = &[$($name,)*];
    };
}

next! {
    abort = c"abort",
    exit = c"exit",
    _exit = c"_exit",
    _Exit = c"_Exit",
    quick_exit = c"quick_exit",
    __stack_chk_fail = c"__stack_chk_fail",
    __assert_fail = c"__assert_fail",
    terminate = c"_ZSt9terminatev",
    terminate_with = c"_ZN10__cxxabiv111__terminateEPFvvE",
    longjmp = c"longjmp",
    _longjmp = c"_longjmp",
    siglongjmp = c"siglongjmp",
    __longjmp_chk = c"__longjmp_chk",
    posix_spawn = c"posix_spawn",
    posix_spawnp = c"posix_spawnp",
    fork = c"fork",
    system = c"system",
    pthread_kill = c"pthread_kill",
    raise = c"raise",
    pthread_exit = c"pthread_exit",
    _Fork = c"_Fork",
    popen = c"popen",
    posix_madvise = c"posix_madvise",
    brk = c"brk",
    sbrk = c"sbrk",
    malloc_usable_size = c"malloc_usable_size",
    __cxa_thread_atexit_impl = c"__cxa_thread_atexit_impl",
}

trusted! {
    /// Their addresses, 0 until found.
    static ADDRESSES: [AtomicUsize; NAMES.len()] = [const { AtomicUsize::new(0) }; NAMES.len()];
}

/// Finds all of them now.
///
/// Code in a domain cannot store an address here. In a forked child, a lookup can wait forever for the loader's lock.
pub(crate) fn find_all() {
    for next in Next::ALL {
        let _ = next.find();
    }
}

/// Sets `errno` and returns -1.
fn fail(errno: c_int) -> c_int {
    sys::set_errno(errno);
    -1
}

impl Next {
    /// Returns the function's address, or `None` if no library defines it.
    pub(crate) fn find(self) -> Option<usize> {
        let place = &ADDRESSES[self as usize];
        match place.load(Ordering::Relaxed) {
            0 => {
                let found = sys::lookup_next(NAMES[self as usize])?.as_ptr() as usize;
                place.store(found, Ordering::Relaxed);
                Some(found)
            }
            found => Some(found),
        }
    }

    /// Returns the function's address.
    ///
    /// # Panics
    ///
    /// If no library defines the function.
    pub(crate) fn get(self) -> usize {
        self.find().unwrap_or_else(|| panic!("the C library has no {}", NAMES[self as usize].to_string_lossy()))
    }
}
