//! What this machine and kernel can do, found by trying.
//!
//! [`detect`] tries what domains need, and no more. [`survey()`] tries everything that bears on them, and says what
//! follows from each. What changes a process, or could kill it, is tried in a forked child.
//!
//! The example `doctor` prints the survey:
//!
//! ```text
//! cargo run --example doctor
//! ```

#![expect(unsafe_code, reason = "experiments change signal actions and rights in a forked child")]

mod survey;

use std::io;
use std::ptr::NonNull;

use pkru::cpuid::Features;
use pkru::domain::default_rights;
use pkru::{AccessRights, ProtectionKey};

use crate::sys::Outcome;
use crate::{Error, rights, sys};

pub use survey::{Finding, Found, Missing, Rseq, Subject, Survey, survey};

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

/// Finds out whether this machine and kernel have what domains need.
///
/// # Examples
///
/// ```
/// match pkru_userspace::capability::detect() {
///     Ok(found) => println!("signals in a domain: {:?}", found.signal_frame),
///     Err(error) => println!("no domains: {error}"),
/// }
/// ```
///
/// # Errors
///
/// What is missing, in the order in which it is needed.
pub fn detect() -> Result<Capability, Error> {
    if rights::is_in_domain() {
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

/// Finds out on what stack a signal that arrives in a domain can be taken.
fn signal_frame() -> Result<SignalFrame, Error> {
    const FORK: &str = "fork a child to try how signals work";
    const STAGE: &str = "try in a child how signals work";
    // Before the fork: another thread may hold the loader's lock at that moment, and in the child for ever.
    let rseq = sys::rseq_area();
    for frame in [SignalFrame::OnAnyStack, SignalFrame::OnWritableStack] {
        // SAFETY: the experiment makes system calls, and ends in a fault that its own handler or the kernel takes.
        match unsafe { sys::fork_probe(|| fault_as_a_domain(frame, rseq)) }.map_err(Error::system(FORK))? {
            Outcome::Done(1) => return Ok(frame),
            Outcome::Refused(errno) => return Err(Error::System { operation: STAGE, errno }),
            Outcome::Done(_) | Outcome::Killed(_) => {}
        }
    }
    Err(Error::NoSignalFrame)
}

/// In a child: takes a fault with key 0 read-only, on a signal stack with key 0 or with one that can be written. If the
/// signal cannot be delivered the kernel kills the child.
fn fault_as_a_domain(frame: SignalFrame, rseq: Option<usize>) -> io::Result<u8> {
    const STACK: usize = 64 * 1024;
    rseq.map_or(Ok(()), sys::unregister_rseq)?;
    sys::unblock(&[libc::SIGSEGV])?;
    let start = sys::map_reserved(STACK)?;
    let stack = start.as_ptr() as usize..start.as_ptr() as usize + STACK;
    let of_stack = match frame {
        SignalFrame::OnAnyStack => ProtectionKey::DEFAULT,
        SignalFrame::OnWritableStack => {
            // The process may have taken every key; the child has no other use for them.
            sys::free_all_keys();
            sys::pkey_alloc()?
        }
    };
    // SAFETY: the pages were just mapped.
    unsafe { sys::protect(stack.clone(), of_stack) }?;
    // SAFETY: the child ends with the stack in place.
    unsafe { sys::set_alternate_stack(stack) }?;
    let flags = (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64;
    // SAFETY: the handler uses nothing but registers.
    unsafe { sys::set_action(libc::SIGSEGV, sys::Action::new(sys::answer_yes as *const () as usize, flags, 0)) }?;
    let rights = default_rights(of_stack).with(ProtectionKey::DEFAULT, AccessRights::READ_ONLY);
    // SAFETY: it faults, and the handler or the kernel ends the child.
    unsafe { sys::write_with(rights.bits(), NonNull::from(&0u64)) };
    Ok(0)
}
