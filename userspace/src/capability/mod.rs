//! Which features of domains this machine and kernel support.
//!
//! [`detect`] tests what domains need. [`survey()`] tests every related feature and explains each result. A test that
//! changes the process, or may kill it, runs in a forked child: this folder leaves the process as it was.
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

/// How this machine and kernel support domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capability {
    /// The offset of PKRU in the XSAVE area of a signal frame, in bytes.
    pub pkru_offset: usize,
    /// The stacks on which the kernel can deliver a signal in a domain.
    pub signal_frame: SignalFrame,
}

/// The stacks on which the kernel can deliver a signal that arrives in a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalFrame {
    /// Any stack. The kernel writes the signal frame with all rights, so domains have no rights to write the stack.
    OnAnyStack,
    /// Only a stack that the domain may write, because the kernel writes the signal frame with the domain's rights.
    /// This is so before Linux 6.12.
    OnWritableStack,
}

/// Tests whether this machine and kernel support domains.
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
/// [`Error::Sanitizer`] if the program has one, and otherwise the first missing feature: [`Error::NoPku`],
/// [`Error::PkuOff`], [`Error::NoFsgsbase`], [`Error::ShadowStack`], [`Error::KeysRefused`] or [`Error::NoSignalFrame`].
/// [`Error::System`] if a test fails to run, and [`Error::InDomain`] in a domain.
pub fn detect() -> Result<Capability, Error> {
    if rights::is_in_domain() {
        return Err(Error::InDomain);
    }
    // Before anything forks, which sanitizers change.
    if let Some(name) = sys::sanitizer() {
        return Err(Error::Sanitizer { name });
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
    if sys::has_shadow_stack() {
        return Err(Error::ShadowStack);
    }
    match sys::keys_in_all().map_err(Error::system(FORK))? {
        Outcome::Done(0) => return Err(Error::KeysRefused { errno: libc::ENOSPC }),
        Outcome::Refused(errno) => return Err(Error::KeysRefused { errno }),
        Outcome::Done(_) | Outcome::Killed(_) => {}
    }
    let pkru_offset = features.pkru_offset.ok_or(Error::NoSignalFrame)? as usize;
    Ok(Capability { pkru_offset, signal_frame: signal_frame()? })
}

/// The operation of which an error speaks if no child can be made.
const FORK: &str = "fork a child that tests what the kernel offers";

/// Returns whether the auxiliary vector has the bit for FSGSBASE (Linux 6.12, `arch/x86/include/uapi/asm/hwcap2.h`).
fn kernel_allows_fsgsbase() -> bool {
    const AT_HWCAP2: u64 = 26;
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    sys::auxiliary(AT_HWCAP2) & HWCAP2_FSGSBASE != 0
}

/// Tests on which stacks the kernel can deliver a signal that arrives in a domain.
fn signal_frame() -> Result<SignalFrame, Error> {
    const STAGE: &str = "test signal delivery in a child";
    // Before the fork: if another thread holds the loader's lock then, it stays locked in the child.
    let rseq = sys::rseq_area();
    for frame in [SignalFrame::OnAnyStack, SignalFrame::OnWritableStack] {
        // SAFETY: the experiment only makes system calls, and ends in a fault on which its handler or the kernel ends
        // the child.
        match unsafe { sys::fork_probe(|| fault_as_a_domain(frame, rseq)) }.map_err(Error::system(FORK))? {
            Outcome::Done(1) => return Ok(frame),
            Outcome::Refused(errno) => return Err(Error::System { operation: STAGE, errno }),
            Outcome::Done(_) | Outcome::Killed(_) => {}
        }
    }
    Err(Error::NoSignalFrame)
}

/// In a child: causes a fault while key 0 is read-only, as it is in a domain. The signal stack has key 0, or a key that
/// can be written. The kernel kills the child if it cannot deliver the signal.
fn fault_as_a_domain(frame: SignalFrame, rseq: Option<usize>) -> io::Result<u8> {
    const STACK: usize = 64 * 1024;
    rseq.map_or(Ok(()), sys::unregister_rseq)?;
    sys::unblock(&[libc::SIGSEGV])?;
    let start = sys::map_reserved(STACK)?;
    let stack = start.as_ptr() as usize..start.as_ptr() as usize + STACK;
    let of_stack = match frame {
        SignalFrame::OnAnyStack => ProtectionKey::DEFAULT,
        SignalFrame::OnWritableStack => {
            // The process may have allocated every key, and the child needs none of them.
            sys::free_all_keys();
            sys::pkey_alloc()?
        }
    };
    // SAFETY: the pages were just mapped.
    unsafe { sys::protect(stack.clone(), sys::Protection::READ_WRITE, of_stack) }?;
    // SAFETY: the stack stays mapped until the child ends.
    unsafe { sys::set_alternate_stack(stack) }?;
    let flags = (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64;
    // SAFETY: the handler uses registers only.
    unsafe { sys::set_action(libc::SIGSEGV, sys::Action::new(sys::answer_yes as *const () as usize, flags, 0)) }?;
    let rights = default_rights(of_stack).with(ProtectionKey::DEFAULT, AccessRights::READ_ONLY);
    // A variable, which only its key makes read-only.
    let mut target = 0u64;
    // SAFETY: the write faults, and the handler or the kernel ends the child.
    unsafe { sys::write_with(rights.bits(), NonNull::from(&mut target)) };
    Ok(0)
}
