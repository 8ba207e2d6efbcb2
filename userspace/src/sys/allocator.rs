//! The malloc family of the C library, and of a sanitizer that is in the program.
//!
//! A sanitizer's other functions, `strdup` among them, return blocks of the sanitizer's allocator, which the C library's
//! `free` cannot free. So where there is a sanitizer, all blocks outside domains have to come from its allocator.

#![expect(unsafe_code, reason = "it declares C functions and refers to a sanitizer's in assembly")]

use std::arch::asm;
use std::ffi::c_void;
use std::mem;

macro_rules! family {
    ($($type:ident $find:ident = $name:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        $(
            /// The type of the function.
            pub(crate) type $type = unsafe extern "C" fn($($argument),*) $(-> $result)?;

            /// Returns a sanitizer's function.
            ///
            /// GCC's and LLVM's sanitizers define these names for programs that define malloc (GCC 12,
            /// `libsanitizer/interception/interception.h`). The reference is weak: the loader resolves it, to null if there
            /// is no sanitizer, before it first calls malloc. A lookup could not be as early.
            #[inline]
            pub(crate) fn $find() -> Option<$type> {
                let function: usize;
                // SAFETY: it reads a word of the global offset table.
                unsafe {
                    asm!(
                        concat!(".weak ", $name),
                        concat!("mov {}, [rip + ", $name, "@GOTPCREL]"),
                        out(reg) function,
                        options(pure, nomem, nostack, preserves_flags),
                    );
                }
                // SAFETY: the loader has written null, or the address of a function of this type.
                unsafe { mem::transmute::<usize, Option<$type>>(function) }
            }
        )*
    };
}

family! {
    Malloc sanitizers_malloc = "__interceptor_malloc": fn(usize) -> *mut c_void;
    Calloc sanitizers_calloc = "__interceptor_calloc": fn(usize, usize) -> *mut c_void;
    Realloc sanitizers_realloc = "__interceptor_realloc": fn(*mut c_void, usize) -> *mut c_void;
    Free sanitizers_free = "__interceptor_free": fn(*mut c_void);
    Memalign sanitizers_memalign = "__interceptor_memalign": fn(usize, usize) -> *mut c_void;
    UsableSize sanitizers_usable_size = "__interceptor_malloc_usable_size": fn(*mut c_void) -> usize;
}

unsafe extern "C" {
    pub(crate) fn __libc_malloc(size: usize) -> *mut c_void;
    pub(crate) fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
    pub(crate) fn __libc_realloc(block: *mut c_void, size: usize) -> *mut c_void;
    pub(crate) fn __libc_free(block: *mut c_void);
    pub(crate) fn __libc_memalign(align: usize, size: usize) -> *mut c_void;
}
