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

/// Returns the bytes of memory and swap that the machine has.
pub(crate) fn physical_memory() -> usize {
    // SAFETY: sysinfo is a C struct of integers, for which zero is a value.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is writable.
    if unsafe { libc::sysinfo(&raw mut info) } != 0 {
        return usize::MAX;
    }
    (info.totalram + info.totalswap) as usize * info.mem_unit as usize
}

/// Reserves `size` bytes of addresses, without access and without memory.
pub(crate) fn map_reserved(size: usize) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let address = unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

/// Maps fresh pages, without access, in the place of others; locked pages too, whose contents cannot be dropped
/// otherwise.
///
/// # Safety
///
/// The pages are private anonymous memory of the caller, and nothing relies on their contents.
pub(crate) unsafe fn map_again(pages: DontNeed) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the caller answers for the pages.
    let address = unsafe { libc::mmap(pages.start.as_ptr().cast(), pages.size, libc::PROT_NONE, flags, -1, 0) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks the kernel to back a range with small pages only. A kernel without huge pages refuses, and does so anyway.
///
/// # Safety
///
/// The pages are the caller's.
pub(crate) unsafe fn use_small_pages(start: NonNull<u8>, size: usize) {
    // SAFETY: the advice changes no contents.
    unsafe { libc::madvise(start.as_ptr().cast(), size, libc::MADV_NOHUGEPAGE) };
}

/// Makes pages readable and writable, and tags them.
///
/// # Safety
///
/// The pages are the caller's, and nothing relies on their having been without access.
///
/// # References
///
/// pkey_mprotect(2).
pub(crate) unsafe fn protect(pages: Range<usize>, key: ProtectionKey) -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let key = libc::c_int::from(key.number());
    // SAFETY: the caller answers for the pages.
    let result = unsafe { libc::syscall(libc::SYS_pkey_mprotect, pages.start, pages.len(), protection, key) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A range of whole pages whose contents may be dropped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DontNeed {
    pub(crate) start: NonNull<u8>,
    pub(crate) size: usize,
}

/// Gives the memory of pages back; they read as zeros from then on, and keep their key.
///
/// # Safety
///
/// The pages are private anonymous memory of the caller, and nothing relies on their contents.
pub(crate) unsafe fn discard(pages: DontNeed) -> io::Result<()> {
    // SAFETY: the caller answers for the pages.
    match unsafe { libc::madvise(pages.start.as_ptr().cast(), pages.size, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Unmaps pages.
///
/// # Safety
///
/// The pages are the caller's, and nothing uses them any more.
pub(crate) unsafe fn unmap(start: NonNull<u8>, size: usize) -> io::Result<()> {
    // SAFETY: the caller answers for the pages.
    match unsafe { libc::munmap(start.as_ptr().cast(), size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes a protection key from the kernel. No thread has rights to it.
///
/// # References
///
/// pkey_alloc(2).
pub(crate) fn pkey_alloc() -> io::Result<ProtectionKey> {
    const PKEY_DISABLE_ACCESS: libc::c_int = 1;
    // SAFETY: allocating a key changes no memory.
    let number = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, PKEY_DISABLE_ACCESS) };
    u8::try_from(number).ok().and_then(ProtectionKey::new).ok_or_else(io::Error::last_os_error)
}
