//! Statics that no domain can write.
//!
//! [`Globals::Writable`](crate::Globals::Writable) makes the statics of the whole program writable in a domain, page by
//! page. This crate's own statics have a section to themselves, whose pages are left out.

#![expect(unsafe_code, reason = "the linker defines the symbols for the ends of a section")]

use std::arch::global_asm;
use std::ops::{Deref, Range};

use pkru::gate::Gate;

// Each object has its own section. In a shared library these symbols would otherwise be the executable's, if that has them.
global_asm!(
    ".hidden __start_pkru_trusted",
    ".hidden __stop_pkru_trusted",
    ".hidden __start_pkru_malloc",
    ".hidden __stop_pkru_malloc",
);

/// Defines statics in that section. Its name is a C identifier, so that the linker defines symbols for its ends.
macro_rules! trusted {
    ($($(#[$doc:meta])* $visibility:vis static $name:ident: $type:ty = $value:expr;)*) => {
        $(
            $(#[$doc])*
            #[allow(unsafe_code, reason = "the section holds statics and nothing else")]
            #[unsafe(link_section = "pkru_trusted")]
            // Otherwise LLVM may replace it by its parts, and the section then ends within a page.
            #[used]
            $visibility static $name: crate::trusted::Trusted<$type> = crate::trusted::Trusted($value);
        )*
    };
}

pub(crate) use trusted;

/// A static with pages to itself.
#[repr(align(4096))]
pub(crate) struct Trusted<T>(pub(crate) T);

impl<T> Deref for Trusted<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// Returns the pages of these statics and of the gate's.
#[must_use]
pub fn pages() -> [Range<usize>; 2] {
    unsafe extern "C" {
        #[link_name = "__start_pkru_trusted"]
        static START: u8;
        #[link_name = "__stop_pkru_trusted"]
        static STOP: u8;
    }
    [(&raw const START).addr()..(&raw const STOP).addr(), Gate::Pkru.state()]
}

#[cfg(test)]
mod tests {
    use crate::sys;

    #[test]
    fn they_take_whole_pages() {
        for pages in super::pages() {
            assert!(!pages.is_empty());
            assert_eq!((pages.start % sys::page_size(), pages.end % sys::page_size()), (0, 0), "{pages:#x?}");
        }
    }
}
