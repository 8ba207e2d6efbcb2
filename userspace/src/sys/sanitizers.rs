//! The sanitizers of GCC and LLVM in this program.

#![expect(unsafe_code, reason = "it refers to a sanitizer's functions in assembly")]

use std::arch::asm;

macro_rules! sanitizers {
    ($($symbol:literal = $name:literal,)*) => {
        /// Returns the name of the sanitizer that the program is linked with or preloads.
        ///
        /// The references are weak, which finds static runtimes too: dlsym(3) does not.
        pub(crate) fn sanitizer() -> Option<&'static str> {
            $(
                let address: usize;
                // SAFETY: it reads a word of the global offset table.
                unsafe {
                    asm!(
                        concat!(".weak ", $symbol),
                        concat!("mov {}, [rip + ", $symbol, "@GOTPCREL]"),
                        out(reg) address,
                        options(pure, nomem, nostack, preserves_flags),
                    );
                }
                if address != 0 {
                    return Some($name);
                }
            )*
            None
        }
    };
}

sanitizers! {
    "__asan_init" = "AddressSanitizer",
    "__tsan_init" = "ThreadSanitizer",
    "__msan_init" = "MemorySanitizer",
    "__lsan_init" = "LeakSanitizer",
    // Whichever it is, there must be no domains where the malloc family is a sanitizer's (`interpose/malloc.rs`).
    "__interceptor_malloc" = "a sanitizer",
}
