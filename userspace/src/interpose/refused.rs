//! Functions that a domain may not call: they fail with EPERM.
//!
//! The child of a vfork(2) in a domain may call them, before it executes a program.

use crate::inside::descriptors::is_in_copy;
use crate::rights;

/// Returns whether the calling code runs in a domain, and not in a copy of the process that it has made.
pub(super) fn is_refused() -> bool {
    rights::is_in_domain() && !is_in_copy()
}

/// Defines functions that are refused in a domain, and are the C library's elsewhere.
macro_rules! refused {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> ::std::ffi::c_int {
                type Function = unsafe extern "C" fn($($type),*) -> ::std::ffi::c_int;
                if $crate::interpose::refused::is_refused() {
                    return $crate::inside::libc::not_permitted();
                }
                let Some(next) = $crate::interpose::Next::$name.find() else {
                    return $crate::interpose::fail(libc::ENOSYS);
                };
                // SAFETY: this is the address of the C library's function of this name, which has this type.
                let next = unsafe { ::std::mem::transmute::<usize, Function>(next) };
                // SAFETY: this function has the same contract, which the caller fulfils.
                unsafe { next($($argument),*) }
            }
        )*
    };
}

pub(super) use refused;
