//! Functions of the C library that this crate replaces for the whole program.
//!
//! An executable that links this crate exports these symbols, and the loader binds every library's calls to them. Outside
//! domains they forward to the C library.
//!
//! | module | functions | why |
//! |---|---|---|
//! | [`malloc`] | the malloc family | code in a domain allocates from the domain's heap |
//! | [`thread_exit`] | `__cxa_thread_atexit_impl` | a domain's thread-locals have no destructors |
//! | [`signals`] | `sigaction`, `signal`, `sigaltstack`, `sigprocmask`, `pthread_sigmask` | the program's handlers run with the program's rights |
//! | [`endings`] | `abort`, `exit`, `longjmp`, … | code in a domain that ends the program, or leaves its frames, ends its call |

pub(crate) mod endings;
pub(crate) mod malloc;
pub(crate) mod signals;
pub(crate) mod thread_exit;

use std::ffi::CStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sys;

/// A function of the C library that one of this crate's hides; found at its first call.
pub(crate) struct Next {
    name: &'static CStr,
    /// 0: not yet looked for.
    address: AtomicUsize,
}

impl Next {
    pub(crate) const fn new(name: &'static CStr) -> Self {
        Self { name, address: AtomicUsize::new(0) }
    }

    /// Returns its address, if there is such a function.
    pub(crate) fn find(&self) -> Option<usize> {
        match self.address.load(Ordering::Relaxed) {
            0 => {
                let found = sys::lookup_next(self.name)?.as_ptr() as usize;
                self.address.store(found, Ordering::Relaxed);
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
    pub(crate) fn get(&self) -> usize {
        self.find().unwrap_or_else(|| panic!("the C library has no {}", self.name.to_string_lossy()))
    }
}
