//! A program with AddressSanitizer has no domains, and works otherwise.
//!
//! GCC's runtime is linked, and C code that it instruments. Where the compiler has no such runtime, the suite is empty.

use support::suite;

#[cfg(has_libasan)]
suite! {
    #[anywhere] no_domain_is_made_and_the_error_names_the_sanitizer,
    #[anywhere] blocks_of_the_sanitizers_allocator_are_freed_by_it,
    #[anywhere] an_overflow_outside_domains_is_found,
}

#[cfg(not(has_libasan))]
suite! {}

#[cfg(has_libasan)]
use with_libasan::*;

#[cfg(has_libasan)]
mod with_libasan {
    use std::ffi::{CStr, c_char, c_int};

    use pkru_userspace::{Domain, Error, Vault, capability};

    // The sanitizer's runtime must come before the C library.
    #[link(name = "sanitized", kind = "static")]
    #[link(name = "asan")]
    unsafe extern "C" {
        fn sanitized_duplicate(text: *const c_char) -> usize;
        safe fn sanitized_family() -> c_int;
        safe fn sanitized_overflow(size: usize) -> c_int;
    }

    pub(super) fn no_domain_is_made_and_the_error_names_the_sanitizer() {
        let expected = Error::Sanitizer { name: "AddressSanitizer" };
        assert_eq!(Domain::builder("test").build().err().as_ref(), Some(&expected));
        assert_eq!(Vault::new(1u64).err().as_ref(), Some(&expected));
        assert_eq!(capability::detect(), Err(expected.clone()));
        assert!(expected.to_string().starts_with("AddressSanitizer is part of this program"), "{expected}");
    }

    pub(super) fn blocks_of_the_sanitizers_allocator_are_freed_by_it() {
        const TEXT: &CStr = c"a copy of the sanitizer's";
        // SAFETY: the text is NUL-terminated.
        assert_eq!(unsafe { sanitized_duplicate(TEXT.as_ptr()) }, TEXT.count_bytes());
        assert_eq!(sanitized_family(), 1);
    }

    pub(super) fn an_overflow_outside_domains_is_found() {
        let status = support::in_child(|| assert_eq!(sanitized_overflow(100), 1));
        assert_eq!(libc::WEXITSTATUS(status), 42, "{status:#x}");
    }
}
