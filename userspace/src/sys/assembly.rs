//! Functions in assembly.

#![expect(unsafe_code, reason = "it is assembly")]

use std::arch::{asm, naked_asm};
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

/// The code that a signal handler returns to.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn restorer() {
    // rt_sigreturn. Unwinders recognise signal frames by these exact bytes (GCC, `libgcc/config/i386/linux-unwind.h`).
    naked_asm!("mov rax, 15", "syscall")
}

/// A signal handler that exits with status 1, the "yes" of an experiment. It uses registers only.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn answer_yes(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    // exit_group.
    naked_asm!("mov eax, 231", "mov edi, 1", "syscall", "ud2")
}

/// The size of [`answer_yes`] in bytes, rounded up.
pub(super) const ANSWER_YES_SIZE: usize = 16;

/// Sets PKRU to `rights` and writes to `address`. Does not return.
///
/// A child faults this way to test whether the kernel can deliver a signal with a domain's rights.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn write_with(rights: u32, address: NonNull<u64>) {
    naked_asm!("mov eax, edi", "xor ecx, ecx", "xor edx, edx", "wrpkru", "mov [rsi], rsi", "ud2")
}

/// Returns the thread ID of the calling thread: gettid(2); async-signal-safe.
///
/// Each rewind calls it, so it does not go through the C library.
#[inline]
pub(crate) fn thread_id() -> c_int {
    let number: i64;
    // SAFETY: gettid touches no memory, and SYSCALL changes RAX, RCX and R11 only.
    unsafe {
        asm!(
            "syscall",
            inout("rax") libc::SYS_gettid => number,
            out("rcx") _,
            out("r11") _,
            options(nostack, nomem)
        );
    }
    number as c_int
}

/// Returns the thread pointer, the base of thread-local addresses.
pub(crate) fn thread_pointer() -> usize {
    let pointer;
    // SAFETY: the ABI puts the thread pointer at FS:0.
    unsafe { asm!("mov {}, fs:0", out(reg) pointer, options(nostack, readonly, preserves_flags)) };
    pointer
}

/// Returns the pointer guard of the calling thread, which glibc mixes into the addresses of jump buffers (2.36,
/// `sysdeps/unix/sysv/linux/x86_64/pointer_guard.h`).
pub(crate) fn pointer_guard() -> u64 {
    let guard;
    // SAFETY: glibc keeps the guard at offset 0x30 of the thread descriptor, which FS points to.
    unsafe { asm!("mov {}, fs:0x30", out(reg) guard, options(nostack, readonly, preserves_flags)) };
    guard
}
