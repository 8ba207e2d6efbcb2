//! Memory and protection keys.

#![expect(unsafe_code, reason = "it makes system calls")]

use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};

use pkru::ProtectionKey;

/// Returns the size of a page in bytes.
pub(crate) fn page_size() -> usize {
    4096
}

/// Returns the size of the machine's memory and swap in bytes, or `usize::MAX` if it is unknown.
pub(crate) fn physical_memory() -> usize {
    // SAFETY: `sysinfo` is a C struct of integers, for which all zeros are valid.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is writable.
    if unsafe { libc::sysinfo(&raw mut info) } != 0 {
        return usize::MAX;
    }
    (info.totalram + info.totalswap) as usize * info.mem_unit as usize
}

/// Reserves `size` bytes of address space. The pages have no access and no memory.
pub(crate) fn map_reserved(size: usize) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the kernel chooses a free address, so no existing mapping changes.
    let address = unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

/// Replaces pages with fresh ones without access and without a key. Unlike [`discard`], this works on locked pages.
///
/// # Safety
///
/// The pages are the caller's private anonymous memory, and nothing relies on their contents.
pub(crate) unsafe fn map_again(pages: DontNeed) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the caller owns the pages.
    let address = unsafe { libc::mmap(pages.start.as_ptr().cast(), pages.size, libc::PROT_NONE, flags, -1, 0) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks the kernel to back a range with small pages only. A kernel without huge pages fails with EINVAL, which is
/// ignored.
///
/// # Safety
///
/// The pages are the caller's.
pub(crate) unsafe fn use_small_pages(start: NonNull<u8>, size: usize) {
    // SAFETY: MADV_NOHUGEPAGE changes no contents.
    unsafe { libc::madvise(start.as_ptr().cast(), size, libc::MADV_NOHUGEPAGE) };
}

/// Makes pages readable and writable, and tags them with a key.
///
/// # Safety
///
/// The pages are the caller's, and nothing relies on their previous protection.
///
/// # References
///
/// pkey_mprotect(2).
pub(crate) unsafe fn protect(pages: Range<usize>, key: ProtectionKey) -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let key = libc::c_int::from(key.number());
    // SAFETY: the caller owns the pages.
    let result = unsafe { libc::syscall(libc::SYS_pkey_mprotect, pages.start, pages.len(), protection, key) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A range of whole pages whose contents may be discarded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DontNeed {
    pub(crate) start: NonNull<u8>,
    pub(crate) size: usize,
}

/// Frees the memory of pages. Afterwards they read as zeros and have the same key.
///
/// # Errors
///
/// EINVAL if the pages are locked, as by mlockall(2).
///
/// # Safety
///
/// The pages are the caller's private anonymous memory, and nothing relies on their contents.
pub(crate) unsafe fn discard(pages: DontNeed) -> io::Result<()> {
    // SAFETY: the caller owns the pages.
    match unsafe { libc::madvise(pages.start.as_ptr().cast(), pages.size, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Unmaps pages.
///
/// # Safety
///
/// The pages are the caller's, and nothing uses them afterwards.
pub(crate) unsafe fn unmap(start: NonNull<u8>, size: usize) -> io::Result<()> {
    // SAFETY: the caller owns the pages.
    match unsafe { libc::munmap(start.as_ptr().cast(), size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Allocates a protection key. The calling thread has no rights to it.
///
/// # References
///
/// pkey_alloc(2).
pub(crate) fn pkey_alloc() -> io::Result<ProtectionKey> {
    const PKEY_DISABLE_ACCESS: libc::c_int = 1;
    // SAFETY: pkey_alloc touches no memory.
    let number = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, PKEY_DISABLE_ACCESS) };
    u8::try_from(number).ok().and_then(ProtectionKey::new).ok_or_else(io::Error::last_os_error)
}
