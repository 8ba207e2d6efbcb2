//! Functions of the C library that change mappings, as they act in a domain.

#![expect(unsafe_code, reason = "it moves memory, as mremap does")]

use std::ffi::{c_int, c_void};
use std::ptr;

use super::service::{Service, ask};
use crate::sys;

/// Sets `errno`, and returns what a function returns that fails.
fn fail<T>(errno: c_int, failure: T) -> T {
    sys::set_errno(errno);
    failure
}

fn status(answer: Result<u64, c_int>) -> c_int {
    answer.map_or_else(|errno| fail(errno, -1), |_| 0)
}

fn address(answer: Result<u64, c_int>) -> *mut c_void {
    answer.map_or_else(|errno| fail(errno, libc::MAP_FAILED), |address| address as *mut c_void)
}

fn new_mapping(
    start: *mut c_void,
    size: usize,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: i64,
) -> Result<u64, c_int> {
    let words = [start as u64, size as u64, protection as u64, flags as u64, file as u64, offset as u64];
    ask(Service::Map, words)
}

/// mmap(2).
pub(crate) fn mmap(
    start: *mut c_void,
    size: usize,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: i64,
) -> *mut c_void {
    address(new_mapping(start, size, protection, flags, file, offset))
}

/// munmap(2).
pub(crate) fn munmap(start: *mut c_void, size: usize) -> c_int {
    status(ask(Service::Unmap, [start as u64, size as u64, 0, 0, 0, 0]))
}

/// mprotect(2).
pub(crate) fn mprotect(start: *mut c_void, size: usize, protection: c_int) -> c_int {
    status(ask(Service::Protect, [start as u64, size as u64, protection as u64, 0, 0, 0]))
}

/// mremap(2).
///
/// # Safety
///
/// The calling code uses the old mapping no more.
pub(crate) unsafe fn mremap(start: *mut c_void, size: usize, new_size: usize, flags: c_int) -> *mut c_void {
    match ask(Service::Remap, [start as u64, size as u64, new_size as u64, flags as u64, 0, 0]) {
        // SAFETY: the caller answers for the old mapping, which is readable and smaller than the new one.
        Err(libc::EAGAIN) => address(unsafe { relocate(start, size, new_size) }),
        answer => address(answer),
    }
}

/// Moves memory to a larger mapping.
unsafe fn relocate(start: *mut c_void, size: usize, new_size: usize) -> Result<u64, c_int> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let new = new_mapping(ptr::null_mut(), new_size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)?;
    // SAFETY: the caller guarantees that the old mapping has this size, and the new one is larger.
    unsafe { ptr::copy_nonoverlapping(start.cast::<u8>(), new as *mut u8, size) };
    ask(Service::Unmap, [start as u64, size as u64, 0, 0, 0, 0])?;
    Ok(new)
}

/// madvise(2).
pub(crate) fn madvise(start: *mut c_void, size: usize, advice: c_int) -> c_int {
    status(ask(Service::Advise, [start as u64, size as u64, advice as u64, 0, 0, 0]))
}

/// posix_madvise(3).
pub(crate) fn posix_madvise(start: *mut c_void, size: usize, advice: c_int) -> c_int {
    // glibc ignores this one, because Linux's destroys contents.
    if advice == libc::POSIX_MADV_DONTNEED {
        return 0;
    }
    ask(Service::Advise, [start as u64, size as u64, advice as u64, 0, 0, 0]).err().unwrap_or(0)
}

/// mlock2(2).
pub(crate) fn mlock(start: *const c_void, size: usize, flags: u64) -> c_int {
    status(ask(Service::Lock, [start as u64, size as u64, flags, 0, 0, 0]))
}

/// munlock(2).
pub(crate) fn munlock(start: *const c_void, size: usize) -> c_int {
    status(ask(Service::Unlock, [start as u64, size as u64, 0, 0, 0, 0]))
}

/// sbrk(2). The C library keeps the end of the program's heap in a static, which a domain cannot write.
pub(crate) fn sbrk() -> *mut c_void {
    fail(libc::ENOMEM, libc::MAP_FAILED)
}

/// brk(2).
pub(crate) fn brk() -> c_int {
    fail(libc::ENOMEM, -1)
}
