//! Functions of the C library that this crate replaces for the whole program.
//!
//! An executable that links this crate exports these symbols, and the loader binds every library's calls to them.
//! Outside domains they forward to the C library.
//!
//! | module | functions | why |
//! |---|---|---|
//! | [`malloc`] | the malloc family | code in a domain allocates from the domain's heap |
//! | [`thread_exit`] | `__cxa_thread_atexit_impl` | a domain's thread-locals have no destructors |
//! | [`signals`] | `sigaction`, `signal` and its other names, `sigaltstack`, `sigprocmask`, `pthread_sigmask` | the program's handlers run with the program's rights |
//! | [`signals`] | `pthread_kill` | in a domain it would fault with all signals blocked |
//! | [`old_signals`] | `sigset`, `sigignore`, `sighold`, `sigblock`, `sigsetmask` | as for `sigaction` and `sigprocmask` |
//! | [`endings`] | `abort`, `exit` and its like, `longjmp` and its like, `__stack_chk_fail`, `__assert_fail`, C++'s `terminate` | code in a domain that ends the program, or leaves its frames, ends its call |
//! | [`processes`] | `fork`, `posix_spawn`, `posix_spawnp`, `system`, `popen` | in a domain they fail, where their child would die or locks would be lost |

pub(crate) mod endings;
pub(crate) mod malloc;
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
        /// A function of the C library, or of C++'s, that one of this crate's hides; found at its first call.
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
    popen = c"popen",
    malloc_usable_size = c"malloc_usable_size",
    __cxa_thread_atexit_impl = c"__cxa_thread_atexit_impl",
}

trusted! {
    /// Their addresses, 0 where one was not yet looked for.
    static ADDRESSES: [AtomicUsize; NAMES.len()] = [const { AtomicUsize::new(0) }; NAMES.len()];
}

/// Finds all of them: code in a domain could not note where they are, and the child of a fork could wait for the loader
/// in vain.
pub(crate) fn find_all() {
    for next in Next::ALL {
        let _ = next.find();
    }
}

/// Fails as functions of the C library do.
fn fail(errno: c_int) -> c_int {
    sys::set_errno(errno);
    -1
}

impl Next {
    /// Returns its address, if there is such a function.
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

    /// Returns its address.
    ///
    /// # Panics
    ///
    /// If the C library has no such function, whose work would be lost in silence otherwise.
    pub(crate) fn get(self) -> usize {
        self.find().unwrap_or_else(|| panic!("the C library has no {}", NAMES[self as usize].to_string_lossy()))
    }
}
