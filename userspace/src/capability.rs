//! What this machine and kernel can do, found by trying.

use std::arch::naked_asm;
use std::ptr::NonNull;

use pkru::cpuid::Features;
use pkru::{AccessRights, ProtectionKey};

use crate::domain::default_rights;
use crate::{Error, keys, sys, tls};

/// What domains can build on here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capability {
    /// Where PKRU stands in a signal frame's XSAVE area, in bytes.
    pub pkru_offset: usize,
    /// On what stack a signal that arrives in a domain can be taken.
    pub signal_frame: SignalFrame,
}

/// On what stack the kernel can write the frame of a signal that arrives in a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalFrame {
    /// On any: the kernel writes it with rights of its own. The stack is closed to domains.
    OnAnyStack,
    /// Only on one that the domain may write, because the kernel uses the domain's rights (before Linux 6.12).
    OnWritableStack,
}

/// Finds out what this machine and kernel can do.
///
/// # Errors
///
/// What is missing, in the order in which it is needed.
pub fn detect() -> Result<Capability, Error> {
    if tls::is_in_domain() {
        return Err(Error::InDomain);
    }
    let features = Features::of_this_cpu();
    if !features.pku {
        return Err(Error::NoPku);
    }
    if !features.ospke {
        return Err(Error::PkuOff);
    }
    if !features.fsgsbase || !kernel_allows_fsgsbase() {
        return Err(Error::NoFsgsbase);
    }
    let pkru_offset = features.pkru_offset.ok_or(Error::NoSignalFrame)? as usize;
    Ok(Capability { pkru_offset, signal_frame: signal_frame()? })
}

/// Linux says so in the auxiliary vector (6.12, `arch/x86/include/uapi/asm/hwcap2.h`).
fn kernel_allows_fsgsbase() -> bool {
    const AT_HWCAP2: u64 = 26;
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    sys::auxiliary(AT_HWCAP2) & HWCAP2_FSGSBASE != 0
}

fn signal_frame() -> Result<SignalFrame, Error> {
    // Before the fork: another thread may hold the loader's lock at that moment, and in the child for ever.
    let rseq = sys::rseq_area();
    let survives = |stack| {
        // SAFETY: the experiment makes system calls only.
        let survived = unsafe { sys::fork_probe(|| fault_as_a_domain(stack, rseq)) };
        survived.map_err(Error::system("fork a child to try how signals work"))
    };
    if survives(ProtectionKey::DEFAULT)? {
        return Ok(SignalFrame::OnAnyStack);
    }
    let key = keys::take()?;
    let survived = survives(key);
    keys::give_back(key);
    if survived? { Ok(SignalFrame::OnWritableStack) } else { Err(Error::NoSignalFrame) }
}

/// In a child: takes a fault with key 0 read-only, on a signal stack with this key. The handler exits with 0; if the signal cannot
/// be delivered the kernel kills the child; `false` if the stage could not be set.
fn fault_as_a_domain(of_stack: ProtectionKey, rseq: Option<usize>) -> bool {
    const STACK: usize = 64 * 1024;
    let set = || {
        rseq.map_or(Ok(()), sys::unregister_rseq).ok()?;
        sys::unblock(&[libc::SIGSEGV]).ok()?;
        let start = sys::map_reserved(STACK).ok()?;
        let stack = start.as_ptr() as usize..start.as_ptr() as usize + STACK;
        // SAFETY: the pages were just mapped.
        unsafe { sys::protect(stack.clone(), of_stack) }.ok()?;
        // SAFETY: the child ends with the stack in place.
        unsafe { sys::set_alternate_stack(stack) }.ok()?;
        let flags = (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64;
        // SAFETY: the handler uses nothing but registers.
        unsafe { sys::set_action(libc::SIGSEGV, sys::Action::new(exit_well as *const () as usize, flags, 0)) }.ok()?;
        Some(default_rights(of_stack).with(ProtectionKey::DEFAULT, AccessRights::READ_ONLY))
    };
    let Some(rights) = set() else { return false };
    // SAFETY: it faults, and the handler or the kernel ends the child.
    unsafe { write_with(rights.bits(), NonNull::from(&0u64)) };
    false
}

/// Writes to an address with these rights.
#[unsafe(naked)]
unsafe extern "C" fn write_with(rights: u32, address: NonNull<u64>) {
    naked_asm!("mov eax, edi", "xor ecx, ecx", "xor edx, edx", "wrpkru", "mov [rsi], rsi", "ud2")
}

/// exit_group(0), with nothing but registers.
#[unsafe(naked)]
unsafe extern "C" fn exit_well(_: i32, _: *mut libc::siginfo_t, _: *mut std::ffi::c_void) {
    naked_asm!("mov eax, 231", "xor edi, edi", "syscall", "ud2")
}
