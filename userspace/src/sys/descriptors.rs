//! File descriptors.
//!
//! These make system calls and do not call the C library's functions, which this crate replaces.

#![expect(unsafe_code, reason = "it makes system calls")]

use std::ffi::c_int;
use std::io;

/// The file that a descriptor refers to: its device, number and type. Files without a name of their own, such as those of
/// eventfd(2), are the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct File(u64, u64, u32);

fn checked(result: libc::c_long) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as c_int) }
}

/// Lets a close of a socket not wait for data to be sent (`SO_LINGER`, socket(7)). Other files fail with ENOTSOCK.
pub(crate) fn do_not_linger(descriptor: c_int) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = size_of::<libc::linger>() as libc::socklen_t;
    let (level, option) = (libc::SOL_SOCKET, libc::SO_LINGER);
    // SAFETY: the struct is readable.
    unsafe { libc::syscall(libc::SYS_setsockopt, descriptor, level, option, &raw const linger, size) };
}

/// Returns the file that a descriptor refers to.
pub(crate) fn file_of(descriptor: c_int) -> io::Result<File> {
    // SAFETY: `stat` is a C struct of integers, for which all zeros are valid.
    let mut status: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `status` is writable.
    checked(unsafe { libc::fstat(descriptor, &raw mut status) }.into())?;
    Ok(File(status.st_dev, status.st_ino, status.st_mode & libc::S_IFMT))
}

/// Returns whether a descriptor is open.
pub(crate) fn is_open(descriptor: c_int) -> bool {
    // SAFETY: F_GETFD changes nothing.
    unsafe { libc::syscall(libc::SYS_fcntl, descriptor, libc::F_GETFD) >= 0 }
}

/// Closes a descriptor: close(2).
pub(crate) fn close(descriptor: c_int) -> io::Result<()> {
    // SAFETY: closing touches no memory. The callers answer for the descriptor.
    checked(unsafe { libc::syscall(libc::SYS_close, descriptor) }).map(drop)
}

/// Duplicates a descriptor to the lowest free one from `least` on: fcntl(2) with `F_DUPFD`.
pub(crate) fn duplicate_from(descriptor: c_int, least: c_int, is_kept: bool) -> io::Result<c_int> {
    let command = if is_kept { libc::F_DUPFD } else { libc::F_DUPFD_CLOEXEC };
    // SAFETY: the new descriptor was free.
    checked(unsafe { libc::syscall(libc::SYS_fcntl, descriptor, command, least) })
}

/// Duplicates a descriptor to another, which it closes first: dup3(2).
pub(crate) fn duplicate_to(descriptor: c_int, to: c_int, flags: c_int) -> io::Result<c_int> {
    // SAFETY: the call touches no memory. The callers answer for the descriptor that it closes.
    checked(unsafe { libc::syscall(libc::SYS_dup3, descriptor, to, flags) })
}
