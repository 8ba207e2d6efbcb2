//! The survey: each feature that is related to domains, whether it is there, and what that means.

use std::arch::x86_64::__cpuid;
use std::fmt;
use std::io;

use pkru::cpuid::Features;

use super::{Capability, SignalFrame, detect, signal_frame};
use crate::sys::Outcome;
use crate::{Error, sys};

/// A feature that a survey tests.
///
/// `Display` writes the name that the table shows.
///
/// # Examples
///
/// ```
/// use pkru_userspace::capability::Subject;
///
/// assert_eq!(Subject::Fsgsbase.to_string(), "FSGSBASE");
/// ```
///
/// # References
///
/// pkeys(7); Linux 6.12, `Documentation/core-api/protection-keys.rst`, `Documentation/arch/x86/x86_64/fsgs.rst`,
/// `Documentation/admin-guide/syscall-user-dispatch.rst`, `Documentation/userspace-api/mseal.rst`, `kernel/rseq.c`;
/// memfd_secret(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Subject {
    /// The CPU's vendor and brand.
    Cpu,
    /// The kernel's release.
    Kernel,
    /// Protection keys of user pages in the CPU.
    Pku,
    /// Whether the kernel has enabled protection keys.
    Ospke,
    /// The number of keys that a process can allocate.
    Keys,
    /// The offset of PKRU in a signal frame, where a handler can read and change it.
    PkruInFrame,
    /// The stacks on which the kernel can deliver a signal that arrives in a domain.
    SignalFrame,
    /// The instructions that read and write the FS base.
    Fsgsbase,
    /// The restartable sequences of the calling thread.
    Rseq,
    /// Syscall User Dispatch: a thread's system calls raise SIGSYS instead.
    SyscallUserDispatch,
    /// Sealing: mappings that system calls can no longer change.
    Mseal,
    /// Memory that system calls such as process_vm_readv(2) cannot read.
    MemfdSecret,
}

impl Subject {
    const ALL: [Self; 12] = [
        Self::Cpu,
        Self::Kernel,
        Self::Pku,
        Self::Ospke,
        Self::Keys,
        Self::PkruInFrame,
        Self::SignalFrame,
        Self::Fsgsbase,
        Self::Rseq,
        Self::SyscallUserDispatch,
        Self::Mseal,
        Self::MemfdSecret,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::Kernel => "kernel",
            Self::Pku => "PKU",
            Self::Ospke => "OSPKE",
            Self::Keys => "protection keys",
            Self::PkruInFrame => "PKRU in a signal frame",
            Self::SignalFrame => "signals in a domain",
            Self::Fsgsbase => "FSGSBASE",
            Self::Rseq => "rseq",
            Self::SyscallUserDispatch => "Syscall User Dispatch",
            Self::Mseal => "mseal",
            Self::MemfdSecret => "memfd_secret",
        }
    }

    const fn method(self) -> &'static str {
        match self {
            Self::Cpu => "CPUID leaves 0 and 80000002H to 80000004H",
            Self::Kernel => "uname(2)",
            Self::Pku => "CPUID leaf 7, ECX bit 3",
            Self::Ospke => "CPUID leaf 7, ECX bit 4",
            Self::Keys => "a child process allocates keys until the kernel has none left",
            Self::PkruInFrame => {
                "a signal handler in a child process reads and changes PKRU at the offset that CPUID leaf 0DH gives"
            }
            Self::SignalFrame => "a child process causes a fault while key 0 is read-only, as in a domain",
            Self::Fsgsbase => "a child process reads and writes its FS base",
            Self::Rseq => "a child process unregisters the thread's area and registers another",
            Self::SyscallUserDispatch => "a child process enables it and makes a system call",
            Self::Mseal => "a child process seals a page and tries to unmap it",
            Self::MemfdSecret => "a child process maps a secret page and tries to read it with process_vm_readv",
        }
    }

    /// Tests the feature.
    fn look(self, features: &Features) -> Result<Found, Missing> {
        match self {
            Self::Cpu => cpu().map(Found::Text).ok_or(Missing::NotAnnounced),
            Self::Kernel => sys::kernel_release().map(Found::Text).map_err(|error| Missing::Refused(errno(&error))),
            Self::Pku => announced(features.pku),
            Self::Ospke => announced(features.ospke),
            Self::Keys => {
                needs_keys(features)?;
                match number(sys::keys_in_all())? {
                    // The first allocation has failed.
                    0 => Err(Missing::Refused(libc::ENOSPC)),
                    total => Ok(Found::Keys { total: total.into(), left: number(sys::keys_left())?.into() }),
                }
            }
            Self::PkruInFrame => {
                needs_keys(features)?;
                let offset = features.pkru_offset.ok_or(Missing::NotAnnounced)? as usize;
                yes(sys::pkru_in_signal_frame(offset))?;
                Ok(Found::Offset(offset))
            }
            Self::SignalFrame => {
                needs_keys(features)?;
                signal_frame().map(Found::SignalFrame).map_err(|error| match error {
                    Error::NoSignalFrame => Missing::Killed(libc::SIGSEGV),
                    error => Missing::NotTried(error),
                })
            }
            Self::Fsgsbase => yes(sys::fsgsbase()),
            Self::Rseq => Ok(Found::Rseq(match number(sys::rseq())? {
                sys::RSEQ_NONE => Rseq::NotRegistered,
                sys::RSEQ_UNREGISTERED => Rseq::CanBeUnregistered,
                _ => Rseq::Stays,
            })),
            Self::SyscallUserDispatch => yes(sys::syscall_user_dispatch()),
            Self::Mseal => yes(sys::mseal()),
            Self::MemfdSecret => yes(sys::memfd_secret()),
        }
    }

    /// Explains what a result means for domains.
    const fn consequence(self, state: &Result<Found, Missing>) -> &'static str {
        if let Err(Missing::NotTried(Error::NoPku | Error::PkuOff)) = state {
            return "It matters only where there are protection keys.";
        }
        if let Err(Missing::NotTried(_)) = state {
            return "The test could not run, so the answer is unknown.";
        }
        match (self, state) {
            (Self::Cpu | Self::Kernel, _) => "For information only. The tests below decide.",
            (Self::Pku, Ok(_)) => "The CPU can check every data access against the rights of a domain.",
            (Self::Pku, Err(_)) => {
                "No domain can be made: the CPU has no protection keys, or a hypervisor hides them. QEMU's `-cpu max` has them."
            }
            (Self::Ospke, Ok(_)) => {
                "The kernel has enabled protection keys. One instruction changes rights, so a call into a domain needs no system call."
            }
            (Self::Ospke, Err(_)) => "No domain can be made: the kernel has not enabled protection keys.",
            (Self::Keys, Ok(_)) => {
                "All but one or two are for domains. If there are more domains, a key moves to the domain that runs."
            }
            (Self::Keys, Err(_)) => "No domain can be made: each needs a key while it runs.",
            (Self::PkruInFrame, Ok(_)) => {
                "A violation ends only the call: the signal handler restores the caller's rights."
            }
            (Self::PkruInFrame, Err(_)) => {
                "No domain can be made: the signal handler could not restore the caller's rights after a violation."
            }
            (Self::SignalFrame, Ok(Found::SignalFrame(SignalFrame::OnWritableStack))) => {
                "Signal stacks need a key of their own, and every domain can write them."
            }
            (Self::SignalFrame, Ok(_)) => "No domain can write the stacks on which signals are delivered.",
            (Self::SignalFrame, Err(_)) => "No domain can be made: the first signal in it would kill the process.",
            (Self::Fsgsbase, Ok(_)) => {
                "A domain has its own thread-local variables, such as `errno`. One instruction switches to them."
            }
            (Self::Fsgsbase, Err(_)) => "No domain can be made: it would share its caller's thread-local variables.",
            (Self::Rseq, Ok(Found::Rseq(Rseq::CanBeUnregistered))) => {
                "A thread unregisters its area before its first call into a domain: there the kernel's write would kill the process."
            }
            (Self::Rseq, Ok(Found::Rseq(Rseq::Stays))) => {
                "This thread cannot call into a domain: the kernel's write to the area would kill the process there."
            }
            (Self::Rseq, _) => "The kernel has no area to write for this thread while it is in a domain.",
            (Self::SyscallUserDispatch, Ok(_)) => {
                "Not used yet. It could let the program check the system calls of a domain, at the cost of two stores per call."
            }
            (Self::SyscallUserDispatch, Err(_)) => {
                "Only a seccomp filter can deny system calls to a domain, and it applies to the whole thread."
            }
            (Self::Mseal, Ok(_)) => {
                "Not used yet. It could keep the system calls of a domain from unmapping memory or changing its key."
            }
            (Self::Mseal, Err(_)) => "A domain that makes system calls can unmap any memory or change its key.",
            (Self::MemfdSecret, Ok(_)) => {
                "Not used yet. It could keep secrets from system calls that ignore protection keys, such as process_vm_readv."
            }
            (Self::MemfdSecret, Err(_)) => {
                "A domain that makes system calls can read any memory through the kernel, which ignores protection keys there."
            }
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a survey found about a feature that is there.
///
/// # Examples
///
/// ```
/// use pkru_userspace::capability::{Found, Subject, survey};
///
/// if let Some(Ok(Found::Keys { total, left })) = survey().look_up(Subject::Keys) {
///     println!("{total} keys, {left} of them left");
/// }
/// ```
///
/// # References
///
/// See [`Subject`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Found {
    /// The feature works.
    Available,
    /// A name or a version.
    Text(String),
    /// An offset in bytes.
    Offset(usize),
    /// The number of protection keys, without key 0.
    Keys {
        /// The keys that a process can allocate.
        total: usize,
        /// The keys that this process can still allocate.
        left: usize,
    },
    /// The stacks on which the kernel can deliver a signal that arrives in a domain.
    SignalFrame(SignalFrame),
    /// The state of the calling thread's restartable sequences.
    Rseq(Rseq),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Available => f.write_str("available"),
            Self::Text(text) => f.write_str(text),
            Self::Offset(offset) => write!(f, "at offset {offset:#x} of the XSAVE area"),
            Self::Keys { total, left } => write!(f, "{total}, of which {left} are free"),
            Self::SignalFrame(SignalFrame::OnAnyStack) => f.write_str("delivered on any stack"),
            Self::SignalFrame(SignalFrame::OnWritableStack) => {
                f.write_str("delivered only on a stack that the domain can write")
            }
            Self::Rseq(Rseq::NotRegistered) => f.write_str("not registered"),
            Self::Rseq(Rseq::CanBeUnregistered) => f.write_str("registered, can be unregistered"),
            Self::Rseq(Rseq::Stays) => f.write_str("registered, cannot be unregistered"),
        }
    }
}

/// The state of a thread's restartable sequences.
///
/// # Examples
///
/// ```
/// use pkru_userspace::capability::{Found, Rseq, Subject, survey};
///
/// if survey().look_up(Subject::Rseq) == Some(Ok(&Found::Rseq(Rseq::Stays))) {
/// println!("this thread cannot call into a domain");
/// }
/// ```
///
/// # References
///
/// Linux 6.12, `kernel/rseq.c`; glibc 2.35 manual, "Restartable Sequences".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rseq {
    /// No area is registered for the thread.
    NotRegistered,
    /// The C library has registered an area, and it can be unregistered.
    CanBeUnregistered,
    /// An area is registered with arguments that this crate does not know, so it cannot be unregistered.
    Stays,
}

/// Why a survey found a feature missing.
///
/// # Examples
///
/// ```
/// use pkru_userspace::capability::Missing;
///
/// assert_eq!(Missing::NoEffect.to_string(), "accepted by the kernel, but has no effect");
/// ```
///
/// # References
///
/// See [`Subject`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Missing {
    /// CPUID does not report it.
    NotAnnounced,
    /// The system call failed with this error number.
    Refused(i32),
    /// This signal killed the child that tested it.
    Killed(i32),
    /// The system call succeeded, but the feature does not work.
    NoEffect,
    /// The test could not run.
    NotTried(Error),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAnnounced => f.write_str("not available"),
            Self::Refused(errno) => write!(f, "not available: {}", io::Error::from_raw_os_error(*errno)),
            Self::Killed(signal) => write!(f, "not available: signal {signal} killed the child that tested it"),
            Self::NoEffect => f.write_str("accepted by the kernel, but has no effect"),
            // The rows of PKU and OSPKE say more.
            Self::NotTried(Error::NoPku | Error::PkuOff) => f.write_str("not tried: there are no protection keys"),
            Self::NotTried(error) => write!(f, "not tried: {error}"),
        }
    }
}

/// One line of a [`Survey`]: a feature, what was found, and what that means.
///
/// # Examples
///
/// ```
/// for finding in pkru_userspace::capability::survey().findings() {
///     println!("{}: {}", finding.subject(), finding.consequence());
/// }
/// ```
///
/// # References
///
/// See [`Subject`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    subject: Subject,
    state: Result<Found, Missing>,
}

impl Finding {
    /// Returns the feature that was tested.
    #[must_use]
    pub const fn subject(&self) -> Subject {
        self.subject
    }

    /// Returns what was found.
    ///
    /// # Errors
    ///
    /// Why the feature is missing.
    pub const fn state(&self) -> Result<&Found, &Missing> {
        self.state.as_ref()
    }

    /// Describes how the feature was tested.
    #[must_use]
    pub const fn method(&self) -> &'static str {
        self.subject.method()
    }

    /// Explains what the result means for domains, in whole sentences.
    #[must_use]
    pub const fn consequence(&self) -> &'static str {
        self.subject.consequence(&self.state)
    }
}

/// What this machine and kernel support, as found by [`survey`].
///
/// `Display` writes a table. Each [`Finding`] has a line with the feature and what was found. Below it are the test and
/// what the result means for domains.
///
/// # Examples
///
/// ```
/// let survey = pkru_userspace::capability::survey();
/// println!("{survey}");
/// ```
///
/// # References
///
/// See [`Subject`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    capability: Result<Capability, Error>,
    findings: Vec<Finding>,
}

impl Survey {
    /// Returns how this machine supports domains, as [`detect`] does.
    ///
    /// # Errors
    ///
    /// The errors of [`detect`].
    pub fn capability(&self) -> Result<Capability, Error> {
        self.capability.clone()
    }

    /// Returns what was found. It is empty if the survey was made in a domain.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Returns what was found about one feature, or `None` if it was not tested.
    #[must_use]
    pub fn look_up(&self, subject: Subject) -> Option<Result<&Found, &Missing>> {
        self.findings.iter().find(|finding| finding.subject == subject).map(Finding::state)
    }
}

impl fmt::Display for Survey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Err(error), []) = (&self.capability, &self.findings[..]) {
            return writeln!(f, "nothing was tried: {error}");
        }
        let width = self.findings.iter().map(|finding| finding.subject.name().len()).max().unwrap_or(0);
        for finding in &self.findings {
            match &finding.state {
                Ok(found) => writeln!(f, "{:width$}  {found}", finding.subject)?,
                Err(missing) => writeln!(f, "{:width$}  {missing}", finding.subject)?,
            }
            // No test was made.
            if !matches!(finding.state, Err(Missing::NotTried(_))) {
                writeln!(f, "    how: {}", finding.method())?;
            }
            writeln!(f, "    {}", finding.consequence())?;
        }
        Ok(())
    }
}

/// Tests every feature that is related to domains.
///
/// It needs no protection keys. Any thread can call it at any time, before the first domain and after. It forks about
/// ten children, one after the other, and leaves nothing behind. A feature that a policy of the system denies to this
/// program, such as a seccomp filter, is reported as not available.
///
/// In a domain it tests nothing. The survey then has no findings, and its [`capability`](Survey::capability) is
/// [`Error::InDomain`].
///
/// # Examples
///
/// ```
/// use pkru_userspace::capability::{Subject, survey};
///
/// let survey = survey();
/// match survey.look_up(Subject::SyscallUserDispatch) {
/// Some(Ok(_)) => println!("Syscall User Dispatch works"),
///     Some(Err(missing)) => println!("Syscall User Dispatch: {missing}"),
///     None => println!("this runs in a domain"),
/// }
/// ```
///
/// # References
///
/// See [`Subject`].
#[must_use]
pub fn survey() -> Survey {
    let capability = detect();
    let mut findings = Vec::new();
    if capability != Err(Error::InDomain) {
        let features = Features::of_this_cpu();
        findings.extend(Subject::ALL.map(|subject| Finding { subject, state: subject.look(&features) }));
    }
    Survey { capability, findings }
}

const fn announced(bit: bool) -> Result<Found, Missing> {
    if bit { Ok(Found::Available) } else { Err(Missing::NotAnnounced) }
}

/// Fails if protection keys are not enabled. Some experiments raise #UD then, and the others have no meaning.
const fn needs_keys(features: &Features) -> Result<(), Missing> {
    match features {
        Features { pku: false, .. } => Err(Missing::NotTried(Error::NoPku)),
        Features { ospke: false, .. } => Err(Missing::NotTried(Error::PkuOff)),
        _ => Ok(()),
    }
}

/// Returns the number that an experiment returned.
fn number(outcome: io::Result<Outcome>) -> Result<u8, Missing> {
    match outcome.map_err(Error::system("fork a child")) {
        Ok(Outcome::Done(number)) => Ok(number),
        Ok(Outcome::Refused(errno)) => Err(Missing::Refused(errno)),
        Ok(Outcome::Killed(signal)) => Err(Missing::Killed(signal)),
        Err(error) => Err(Missing::NotTried(error)),
    }
}

/// Returns the answer of a yes-or-no experiment.
fn yes(outcome: io::Result<Outcome>) -> Result<Found, Missing> {
    if number(outcome)? == 1 { Ok(Found::Available) } else { Err(Missing::NoEffect) }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

/// Returns the CPU's vendor and brand.
///
/// # References
///
/// Intel SDM volume 2, CPUID, leaves 0 and 80000002H to 80000004H; AMD APM volume 3, appendix E.
fn cpu() -> Option<String> {
    const BRAND: u32 = 0x8000_0002;
    let leaf = __cpuid(0);
    let mut text: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    if __cpuid(0x8000_0000).eax >= BRAND + 2 {
        text.push(b' ');
        let registers = (BRAND..=BRAND + 2).map(__cpuid).flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
        text.extend(registers.flat_map(u32::to_le_bytes).take_while(|byte| *byte != 0));
    }
    let text = String::from_utf8_lossy(&text);
    // Some brands are padded to their 48 bytes with spaces, at either end.
    let words: Vec<_> = text.split(|c: char| c.is_whitespace() || c == '\0').filter(|word| !word.is_empty()).collect();
    (!words.is_empty()).then(|| words.join(" "))
}
