//! Statics that no domain may write, whatever else is opened to it.
//!
//! [`Globals::Writable`](crate::Globals::Writable) opens the statics of the whole program to a domain, page by page.
//! This crate's own lie in a section of their own, on pages that nothing else is on, which are left out.

use std::ops::{Deref, Range};

use pkru::gate::Gate;

/// The name of the section. The linker defines symbols for its ends because it is a name in C.
macro_rules! monitored {
    ($($(#[$doc:meta])* static $name:ident: $type:ty = $value:expr;)*) => {
        $(
            $(#[$doc])*
            #[unsafe(link_section = "pkru_monitor")]
            static $name: crate::monitor::Monitored<$type> = crate::monitor::Monitored($value);
        )*
    };
}

pub(crate) use monitored;

/// A static on pages of its own.
#[repr(align(4096))]
pub(crate) struct Monitored<T>(pub(crate) T);

impl<T> Deref for Monitored<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// Returns the pages of these statics.
#[must_use]
pub fn pages() -> [Range<usize>; 2] {
    unsafe extern "C" {
        #[link_name = "__start_pkru_monitor"]
        static START: u8;
        #[link_name = "__stop_pkru_monitor"]
        static STOP: u8;
    }
    [(&raw const START).addr()..(&raw const STOP).addr(), Gate::Pkru.state()]
}
