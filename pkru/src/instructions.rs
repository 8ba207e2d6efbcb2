//! The instructions of protection keys and of the FS base: the only inline assembly outside [`gate`](crate::gate).
//!
//! No block here says `nomem`: a change of rights decides whether the accesses around it trap, so the compiler must not
//! move them across.

use core::arch::{asm, naked_asm};

/// IA32_PKRS, the rights to the keys of supervisor pages.
///
/// # References
///
/// Intel SDM volume 4, table "IA-32 Architectural MSRs".
pub const IA32_PKRS: u32 = 0x6e1;

/// Reads PKRU.
///
/// # Safety
///
/// CR4.PKE is 1 (CPUID reports OSPKE); otherwise this raises #UD.
#[must_use]
#[inline]
pub unsafe fn rdpkru() -> u32 {
    let value;
    // SAFETY: the caller has CR4.PKE set; ECX is 0 as the instruction demands.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _, options(nostack, preserves_flags)) };
    value
}

/// Writes PKRU.
///
/// It is a function that is called, not an instruction at each use: a binary has few places that can change rights, and
/// a tool that looks for them knows this one. Code that jumps to the instruction stops at the comparison behind it unless
/// it has set both registers.
///
/// # Safety
///
/// CR4.PKE is 1, and every access that follows is one that the new rights allow, down to the compiler's own to the
/// stack.
#[unsafe(naked)]
pub unsafe extern "C" fn wrpkru(value: u32) {
    naked_asm!("mov eax, edi", "xor ecx, ecx", "xor edx, edx", "wrpkru", "cmp eax, edi", "jne 2f", "ret", "2: ud2",)
}

/// Reads PKRS.
///
/// # Safety
///
/// The CPU runs in ring 0 and has PKS; otherwise this raises #GP.
#[must_use]
#[inline]
pub unsafe fn rdpkrs() -> u32 {
    let value;
    // SAFETY: the caller is in ring 0, and the MSR exists where PKS does.
    unsafe {
        asm!("rdmsr", in("ecx") IA32_PKRS, out("eax") value, out("edx") _, options(nostack, preserves_flags));
    }
    value
}

/// Writes PKRS.
///
/// # Safety
///
/// The CPU runs in ring 0 and has PKS, and every access that follows is one that the new rights allow, down to the
/// compiler's own to the stack.
#[inline]
pub unsafe fn wrpkrs(value: u32) {
    // SAFETY: the caller is in ring 0, the MSR exists where PKS does, and its high half is 0 as it must be.
    unsafe { asm!("wrmsr", in("ecx") IA32_PKRS, in("eax") value, in("edx") 0, options(nostack, preserves_flags)) };
}

/// Reads the FS base.
///
/// # Safety
///
/// CR4.FSGSBASE is 1; otherwise this raises #UD.
#[must_use]
#[inline]
pub unsafe fn rdfsbase() -> u64 {
    let base;
    // SAFETY: the caller has CR4.FSGSBASE set.
    unsafe { asm!("rdfsbase {}", out(reg) base, options(nostack, preserves_flags)) };
    base
}

/// Writes the FS base.
///
/// # Safety
///
/// CR4.FSGSBASE is 1, and `base` is a canonical address at which everything that reads through FS finds what it
/// expects: thread-local variables, the stack protector's canary.
#[inline]
pub unsafe fn wrfsbase(base: u64) {
    // SAFETY: the caller has CR4.FSGSBASE set and answers for the base.
    unsafe { asm!("wrfsbase {}", in(reg) base, options(nostack, preserves_flags)) };
}
