//! Memory and protection keys.

#![expect(unsafe_code, reason = "it makes system calls")]

use std::ffi::c_int;
use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};

use pkru::ProtectionKey;

/// The protection of pages: any of `PROT_READ`, `PROT_WRITE` and `PROT_EXEC`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Protection(c_int);

impl Protection {
    pub(crate) const NONE: Self = Self(libc::PROT_NONE);
    pub(crate) const READ: Self = Self(libc::PROT_READ);
    pub(crate) const READ_WRITE: Self = Self(libc::PROT_READ | libc::PROT_WRITE);

    /// Returns the protection with these bits; `None` if there are others among them.
    pub(crate) fn from_bits(bits: u64) -> Option<Self> {
        const KNOWN: u64 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
        (bits & !KNOWN == 0).then_some(Self(bits as c_int))
    }

    /// Returns whether it allows all that another does.
    pub(crate) const fn allows(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

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

/// Gives pages a protection, and tags them with a key.
///
/// # Safety
///
/// The pages are the caller's, and nothing relies on their previous protection.
///
/// # References
///
/// pkey_mprotect(2).
pub(crate) unsafe fn protect(pages: Range<usize>, protection: Protection, key: ProtectionKey) -> io::Result<()> {
    let protection = protection.0;
    let key = c_int::from(key.number());
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

/// Maps a file, or new memory, in place of pages. The pages have no access and no key.
///
/// # Safety
///
/// The pages are the caller's, and nothing relies on their contents.
pub(crate) unsafe fn map_file(pages: &Range<usize>, flags: c_int, file: c_int, offset: i64) -> io::Result<()> {
    let flags = flags | libc::MAP_FIXED;
    let start = pages.start as *mut libc::c_void;
    // SAFETY: the caller owns the pages.
    let address = unsafe { libc::mmap(start, pages.len(), libc::PROT_NONE, flags, file, offset) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Maps a file where the kernel finds room. The pages have no access.
pub(crate) fn map_somewhere(size: usize, flags: c_int, file: c_int, offset: i64) -> io::Result<NonNull<u8>> {
    // SAFETY: the kernel chooses a free address, so no existing mapping changes.
    let address = unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_NONE, flags, file, offset) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

/// Gives advice about pages: madvise(2).
///
/// # Safety
///
/// The pages are the caller's, and nothing relies on their contents if the advice discards these.
pub(crate) unsafe fn advise(pages: &Range<usize>, advice: c_int) -> io::Result<()> {
    // SAFETY: the caller owns the pages.
    checked(unsafe { libc::madvise(pages.start as *mut libc::c_void, pages.len(), advice) })
}

/// Locks pages in memory: mlock2(2).
pub(crate) fn lock(pages: &Range<usize>, flags: u64) -> io::Result<()> {
    // SAFETY: locking changes no contents.
    checked(unsafe { libc::syscall(libc::SYS_mlock2, pages.start, pages.len(), flags) } as c_int)
}

/// Undoes [`lock`]: munlock(2).
pub(crate) fn unlock(pages: &Range<usize>) -> io::Result<()> {
    // SAFETY: unlocking changes no contents.
    checked(unsafe { libc::syscall(libc::SYS_munlock, pages.start, pages.len()) } as c_int)
}

fn checked(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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
    const PKEY_DISABLE_ACCESS: c_int = 1;
    // SAFETY: pkey_alloc touches no memory.
    let number = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, PKEY_DISABLE_ACCESS) };
    u8::try_from(number).ok().and_then(ProtectionKey::new).ok_or_else(io::Error::last_os_error)
}
