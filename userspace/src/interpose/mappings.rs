//! Functions that change mappings. In a domain they change the domain's own memory, and fail with EPERM elsewhere.
//!
//! Outside domains they make the system call: an allocator may call them before the C library's function can be looked up.
//!
//! Those that change all mappings, protection keys or memory that processes share fail with EPERM in a domain.
//! brk(2) and sbrk(2) fail with ENOMEM: the program has one break, and the C library notes it in a static.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::{c_int, c_void};
use std::mem;

use super::Next;
use crate::inside::libc::not_permitted;
use crate::inside::mappings as inside;
use crate::rights;

/// Widens an argument: the kernel takes all 64 bits of it.
fn long(argument: c_int) -> libc::c_long {
    argument.into()
}

fn status(result: libc::c_long) -> c_int {
    result as c_int
}

/// mmap(2).
///
/// # Safety
///
/// As for mmap(2).
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn mmap(
    start: *mut c_void,
    size: usize,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: i64,
) -> *mut c_void {
    if rights::is_in_domain() {
        return inside::mmap(start, size, protection, flags, file, offset);
    }
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe {
        libc::syscall(libc::SYS_mmap, start, size, long(protection), long(flags), long(file), offset) as *mut c_void
    }
}

/// Another name of [`mmap`].
///
/// # Safety
///
/// As for mmap(2).
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn mmap64(
    start: *mut c_void,
    size: usize,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { mmap(start, size, protection, flags, file, offset) }
}

/// mremap(2). The fifth argument is read only with `MREMAP_FIXED`, and so may be absent.
///
/// # Safety
///
/// As for mremap(2).
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn mremap(
    start: *mut c_void,
    size: usize,
    new_size: usize,
    flags: c_int,
    new_start: *mut c_void,
) -> *mut c_void {
    if rights::is_in_domain() {
        // SAFETY: this function has the same contract, which the caller fulfils.
        return unsafe { inside::mremap(start, size, new_size, flags) };
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_mremap, start, size, new_size, long(flags), new_start) as *mut c_void }
}

macro_rules! functions {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*) = $number:ident, $inside:expr;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// As for the system call.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            #[allow(clippy::cast_lossless, reason = "the types vary, and the kernel takes 64 bits of each")]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                if rights::is_in_domain() {
                    return $inside;
                }
                // SAFETY: this function has the same contract, which the caller fulfils.
                status(unsafe { libc::syscall(libc::$number, $($argument as libc::c_long),*) })
            }
        )*
    };
}

functions! {
    /// munmap(2).
    fn munmap(start: *mut c_void, size: usize) = SYS_munmap, inside::munmap(start, size);
    /// mprotect(2).
    fn mprotect(start: *mut c_void, size: usize, protection: c_int) = SYS_mprotect, inside::mprotect(start, size, protection);
    /// madvise(2).
    fn madvise(start: *mut c_void, size: usize, advice: c_int) = SYS_madvise, inside::madvise(start, size, advice);
    /// mlock(2).
    fn mlock(start: *const c_void, size: usize) = SYS_mlock, inside::mlock(start, size, 0);
    /// mlock2(2).
    fn mlock2(start: *const c_void, size: usize, flags: libc::c_uint) = SYS_mlock2, inside::mlock(start, size, flags.into());
    /// munlock(2).
    fn munlock(start: *const c_void, size: usize) = SYS_munlock, inside::munlock(start, size);
    /// mlockall(2).
    fn mlockall(flags: c_int) = SYS_mlockall, not_permitted();
    /// munlockall(2).
    fn munlockall() = SYS_munlockall, not_permitted();
    /// pkey_mprotect(2).
    fn pkey_mprotect(start: *mut c_void, size: usize, protection: c_int, key: c_int) = SYS_pkey_mprotect, not_permitted();
    /// pkey_alloc(2).
    fn pkey_alloc(flags: libc::c_uint, rights: libc::c_uint) = SYS_pkey_alloc, not_permitted();
    /// pkey_free(2).
    fn pkey_free(key: c_int) = SYS_pkey_free, not_permitted();
    /// shmdt(2).
    fn shmdt(start: *const c_void) = SYS_shmdt, not_permitted();
    /// remap_file_pages(2).
    fn remap_file_pages(start: *mut c_void, size: usize, protection: c_int, page: usize, flags: c_int) =
        SYS_remap_file_pages, not_permitted();
}

/// shmat(2).
///
/// # Safety
///
/// As for shmat(2).
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn shmat(segment: c_int, start: *const c_void, flags: c_int) -> *mut c_void {
    if rights::is_in_domain() {
        not_permitted();
        return libc::MAP_FAILED;
    }
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { libc::syscall(libc::SYS_shmat, long(segment), start, long(flags)) as *mut c_void }
}

/// posix_madvise(3).
///
/// # Safety
///
/// As for posix_madvise(3).
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn posix_madvise(start: *mut c_void, size: usize, advice: c_int) -> c_int {
    type Function = unsafe extern "C" fn(*mut c_void, usize, c_int) -> c_int;
    if rights::is_in_domain() {
        return inside::posix_madvise(start, size, advice);
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, Function>(Next::posix_madvise.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(start, size, advice) }
}

/// brk(2).
///
/// # Safety
///
/// As for brk(2).
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn brk(end: *mut c_void) -> c_int {
    if rights::is_in_domain() {
        return inside::brk();
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(*mut c_void) -> c_int>(Next::brk.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(end) }
}

/// sbrk(2).
///
/// # Safety
///
/// As for sbrk(2).
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn sbrk(difference: isize) -> *mut c_void {
    if rights::is_in_domain() {
        return inside::sbrk();
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(isize) -> *mut c_void>(Next::sbrk.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(difference) }
}
