//! What only assembly can do.

#![expect(unsafe_code, reason = "it is assembly")]

use std::arch::{asm, naked_asm};
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

/// Where a signal handler returns to.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn restorer() {
    // rt_sigreturn. Unwinders know it by these very bytes.
    naked_asm!("mov rax, 15", "syscall")
}

/// A signal handler that ends a child with 1, the yes of an experiment, with nothing but registers.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn answer_yes(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    // exit_group.
    naked_asm!("mov eax, 231", "mov edi, 1", "syscall", "ud2")
}

/// The bytes of [`answer_yes`], rounded up.
pub(super) const ANSWER_YES_SIZE: usize = 16;

/// Writes to an address with these rights, and does not return. This is how a child tries whether a signal can be taken in a
/// domain.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn write_with(rights: u32, address: NonNull<u64>) {
    naked_asm!("mov eax, edi", "xor ecx, ecx", "xor edx, edx", "wrpkru", "mov [rsi], rsi", "ud2")
}

/// Returns the kernel's number of the calling thread; async-signal-safe. Each rewind calls it, so it does not go through the
/// C library.
#[inline]
pub(crate) fn thread_id() -> c_int {
    let number: i64;
    // SAFETY: the call touches no memory, and the kernel changes these two registers beside the result.
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

/// Returns the thread pointer, which thread-locals are addressed by.
pub(crate) fn thread_pointer() -> usize {
    let pointer;
    // SAFETY: the ABI puts the thread pointer at FS:0.
    unsafe { asm!("mov {}, fs:0", out(reg) pointer, options(nostack, readonly, preserves_flags)) };
    pointer
}

/// Copies bytes that another thread may be writing.
///
/// # Safety
///
/// Both ranges are mapped and apart, and this thread has rights to them.
pub(crate) unsafe fn copy_shared(from: *const u8, to: *mut u8, length: usize) {
    // In assembly, because the bytes may change during the copy: in Rust that would be a data race.
    // SAFETY: the caller answers for the ranges.
    unsafe {
        asm!(
            "rep movsb",
            inout("rsi") from => _,
            inout("rdi") to => _,
            inout("rcx") length => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Returns the pointer guard of the calling thread, which glibc mixes into the addresses of jump buffers (2.36,
/// `sysdeps/unix/sysv/linux/x86_64/pointer_guard.h`).
pub(crate) fn pointer_guard() -> u64 {
    let guard;
    // SAFETY: the C library keeps the guard at this place of the thread's descriptor.
    unsafe { asm!("mov {}, fs:0x30", out(reg) guard, options(nostack, readonly, preserves_flags)) };
    guard
}
