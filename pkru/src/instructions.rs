//! The instructions that read and write PKRU, PKRS and the FS base.
//!
//! All inline assembly of this crate is here and in [`gate`](crate::gate). No block has the option `nomem`: a write of
//! rights decides which accesses trap, so the compiler must not move memory accesses across it.

use core::arch::{asm, naked_asm};

/// The address of the MSR IA32_PKRS: the rights to the keys of supervisor pages.
///
/// # References
///
/// Intel SDM volume 4, table "IA-32 Architectural MSRs".
pub const IA32_PKRS: u32 = 0x6e1;

/// Reads PKRU.
///
/// # Safety
///
/// CR4.PKE is 1 (CPUID reports OSPKE). Otherwise this raises #UD.
///
/// # References
///
/// Intel SDM volume 2, RDPKRU.
#[must_use]
#[inline]
pub unsafe fn rdpkru() -> u32 {
    let value;
    // SAFETY: CR4.PKE is 1 by this function's contract, and ECX is 0 as the instruction requires.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _, options(nostack, preserves_flags)) };
    value
}

/// Writes PKRU.
///
/// This function is never inlined, so a binary has few WRPKRU instructions. A tool that scans for them can recognize
/// this one. The code after the instruction compares the value written, in EAX, with the argument in EDI, and executes
/// UD2 if they differ. So a wild jump to the instruction traps, unless both registers hold the same value.
///
/// # Safety
///
/// - CR4.PKE is 1. Otherwise this raises #UD.
/// - The new rights allow every access that follows, including the compiler's accesses to the stack.
///
/// # References
///
/// Intel SDM volume 2, WRPKRU.
#[unsafe(naked)]
pub unsafe extern "C" fn wrpkru(value: u32) {
    naked_asm!("mov eax, edi", "xor ecx, ecx", "xor edx, edx", "wrpkru", "cmp eax, edi", "jne 2f", "ret", "2: ud2",)
}

/// Reads PKRS.
///
/// # Safety
///
/// The CPU runs in ring 0 and has PKS. Otherwise this raises #GP.
#[must_use]
#[inline]
pub unsafe fn rdpkrs() -> u32 {
    let value;
    // SAFETY: the CPU runs in ring 0 and has PKS, and thus the MSR, by this function's contract.
    unsafe {
        asm!("rdmsr", in("ecx") IA32_PKRS, out("eax") value, out("edx") _, options(nostack, preserves_flags));
    }
    value
}

/// Writes PKRS.
///
/// # Safety
///
/// - The CPU runs in ring 0 and has PKS. Otherwise this raises #GP.
/// - The new rights allow every access that follows, including the compiler's accesses to the stack.
#[inline]
pub unsafe fn wrpkrs(value: u32) {
    // SAFETY: the CPU runs in ring 0 and has PKS by this function's contract. The reserved high half is 0.
    unsafe { asm!("wrmsr", in("ecx") IA32_PKRS, in("eax") value, in("edx") 0, options(nostack, preserves_flags)) };
}

/// Reads the FS base.
///
/// # Safety
///
/// CR4.FSGSBASE is 1. Otherwise this raises #UD.
///
/// # References
///
/// Intel SDM volume 2, RDFSBASE/RDGSBASE.
#[must_use]
#[inline]
pub unsafe fn rdfsbase() -> u64 {
    let base;
    // SAFETY: CR4.FSGSBASE is 1 by this function's contract.
    unsafe { asm!("rdfsbase {}", out(reg) base, options(nostack, preserves_flags)) };
    base
}

/// Writes the FS base.
///
/// # Safety
///
/// - CR4.FSGSBASE is 1. Otherwise this raises #UD.
/// - `base` is a canonical address. Otherwise this raises #GP.
/// - The memory there holds everything that later code reads through FS, such as thread-local variables and the stack
///   protector's canary.
///
/// # References
///
/// Intel SDM volume 2, WRFSBASE/WRGSBASE.
#[inline]
pub unsafe fn wrfsbase(base: u64) {
    // SAFETY: CR4.FSGSBASE is 1 and the base is valid, by this function's contract.
    unsafe { asm!("wrfsbase {}", in(reg) base, options(nostack, preserves_flags)) };
}
