//! The survey: everything that bears on domains, what was found, and what follows.

use std::arch::x86_64::__cpuid;
use std::fmt;
use std::io;

use pkru::cpuid::Features;

use super::{Capability, SignalFrame, detect, signal_frame};
use crate::sys::Outcome;
use crate::{Error, sys};

/// What a survey looks at.
///
/// `Display` writes its name as the table has it.
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
    /// Whether the system has switched them on.
    Ospke,
    /// The keys that a process can have.
    Keys,
    /// The place of PKRU in a signal frame, which a handler may read and change.
    PkruInFrame,
    /// The stacks on which a signal that arrives in a domain can be taken.
    SignalFrame,
    /// The instructions that read and write the FS base.
    Fsgsbase,
    /// The restartable sequences of the calling thread.
    Rseq,
    /// Syscall User Dispatch: system calls that are handed to the thread that makes them.
    SyscallUserDispatch,
    /// Mappings that cannot be changed any more.
    Mseal,
    /// Memory that the kernel does not access on behalf of a process.
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
            Self::Cpu => "CPUID, leaves 0 and 80000002H to 80000004H",
            Self::Kernel => "uname",
            Self::Pku => "CPUID, leaf 7, ECX bit 3",
            Self::Ospke => "CPUID, leaf 7, ECX bit 4",
            Self::Keys => "a child takes all that the kernel gives",
            Self::PkruInFrame => {
                "a signal handler in a child reads it where CPUID, leaf 0DH, says, and changes it there"
            }
            Self::SignalFrame => "a child takes a fault with key 0 read-only",
            Self::Fsgsbase => "a child reads and writes its FS base",
            Self::Rseq => "a child unregisters the calling thread's area, and registers another",
            Self::SyscallUserDispatch => "a child asks for its system calls, and makes one",
            Self::Mseal => "a child seals a page, and tries to unmap it",
            Self::MemfdSecret => "a child maps a page of it, and tries to read that by process_vm_readv",
        }
    }

    /// Tries it.
    fn look(self, features: &Features) -> Result<Found, Missing> {
        match self {
            Self::Cpu => cpu().map(Found::Text).ok_or(Missing::NotAnnounced),
            Self::Kernel => sys::kernel_release().map(Found::Text).map_err(|error| Missing::Refused(errno(&error))),
            Self::Pku => announced(features.pku),
            Self::Ospke => announced(features.ospke),
            Self::Keys => {
                needs_keys(features)?;
                match number(sys::keys_in_all())? {
                    // With this number the kernel has refused the first.
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
                sys::RSEQ_GIVEN_UP => Rseq::CanBeUnregistered,
                _ => Rseq::Stays,
            })),
            Self::SyscallUserDispatch => yes(sys::syscall_user_dispatch()),
            Self::Mseal => yes(sys::mseal()),
            Self::MemfdSecret => yes(sys::memfd_secret()),
        }
    }

    /// Says what follows for domains.
    const fn consequence(self, state: &Result<Found, Missing>) -> &'static str {
        if let Err(Missing::NotTried(Error::NoPku | Error::PkuOff)) = state {
            return "Without protection keys there is no domain for which it would matter.";
        }
        if let Err(Missing::NotTried(_)) = state {
            return "It could not be tried, so nothing is known.";
        }
        match (self, state) {
            (Self::Cpu | Self::Kernel, _) => "A name decides nothing: what is found below does.",
            (Self::Pku, Ok(_)) => "The CPU can check each access to data against the rights of a domain.",
            (Self::Pku, Err(_)) => {
                "No domain can be made on this CPU, or a hypervisor hides its keys. QEMU's `-cpu max` has some."
            }
            (Self::Ospke, Ok(_)) => {
                "A program changes its rights with one instruction, so that a domain is entered without a system call."
            }
            (Self::Ospke, Err(_)) => "No domain can be made on this system, for only the kernel can switch keys on.",
            (Self::Keys, Ok(_)) => "All but one or two of them serve domains; more domains than that take turns.",
            (Self::Keys, Err(_)) => "No domain can be made, for each needs a key while it runs.",
            (Self::PkruInFrame, Ok(_)) => {
                "A violation ends the call alone: its handler returns with the rights of the caller."
            }
            (Self::PkruInFrame, Err(_)) => "No domain can be made, for a violation could not be turned into an error.",
            (Self::SignalFrame, Ok(Found::SignalFrame(SignalFrame::OnWritableStack))) => {
                "Signal stacks take a key for themselves, and every domain may write them."
            }
            (Self::SignalFrame, Ok(_)) => "No domain can write the stacks on which signals are taken.",
            (Self::SignalFrame, Err(_)) => "No domain can be made, for the first signal in it would kill the process.",
            (Self::Fsgsbase, Ok(_)) => {
                "A domain has thread-locals of its own, `errno` among them, at the price of an instruction."
            }
            (Self::Fsgsbase, Err(_)) => "No domain can be made, for code in it would have its caller's thread-locals.",
            (Self::Rseq, Ok(Found::Rseq(Rseq::CanBeUnregistered))) => {
                "A thread gives it up at its first call of a domain, where the kernel's writes would be fatal."
            }
            (Self::Rseq, Ok(Found::Rseq(Rseq::Stays))) => {
                "This thread must call no domain: there the kernel's writes to the area would kill the process."
            }
            (Self::Rseq, _) => "The kernel writes nothing to the memory of this thread while it is in a domain.",
            (Self::SyscallUserDispatch, Ok(_)) => {
                "Not used yet: the system calls of a domain could be handed to its caller's side, for two stores a call of the domain."
            }
            (Self::SyscallUserDispatch, Err(_)) => {
                "Only a seccomp filter can stop system calls of a domain, and it binds the rest of the thread too."
            }
            (Self::Mseal, Ok(_)) => {
                "Not used yet: a mapping could be sealed against system calls of a domain that would unmap or retag it."
            }
            (Self::Mseal, Err(_)) => {
                "No mapping can be sealed: a domain that may make system calls can unmap or retag any."
            }
            (Self::MemfdSecret, Ok(_)) => {
                "Not used yet: a secret could be kept from system calls that copy memory whatever its key, such as process_vm_readv."
            }
            (Self::MemfdSecret, Err(_)) => {
                "A domain that may make system calls can have the kernel read any secret, whatever its key."
            }
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a survey found.
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
    /// It is there, and does what it should.
    Available,
    /// A name or a version.
    Text(String),
    /// A distance in bytes.
    Offset(usize),
    /// How many protection keys there are besides key 0.
    Keys {
        /// Those that the kernel has for one process.
        total: usize,
        /// Those of them that it still has for this one.
        left: usize,
    },
    /// On what stack a signal that arrives in a domain can be taken.
    SignalFrame(SignalFrame),
    /// What the calling thread's restartable sequences are like.
    Rseq(Rseq),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Available => f.write_str("available"),
            Self::Text(text) => f.write_str(text),
            Self::Offset(offset) => write!(f, "at byte {offset:#x} of the XSAVE area"),
            Self::Keys { total, left } => write!(f, "{total}, {left} of them left"),
            Self::SignalFrame(SignalFrame::OnAnyStack) => f.write_str("on any stack"),
            Self::SignalFrame(SignalFrame::OnWritableStack) => f.write_str("only on a stack that the domain may write"),
            Self::Rseq(Rseq::NotRegistered) => f.write_str("not registered"),
            Self::Rseq(Rseq::CanBeUnregistered) => f.write_str("registered, can be unregistered"),
            Self::Rseq(Rseq::Stays) => f.write_str("registered, cannot be unregistered"),
        }
    }
}

/// What the restartable sequences of a thread are like.
///
/// # Examples
///
/// ```
/// use pkru_userspace::capability::{Found, Rseq, Subject, survey};
///
/// if survey().look_up(Subject::Rseq) == Some(Ok(&Found::Rseq(Rseq::Stays))) {
///     println!("this thread must call no domain");
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
    /// The C library has registered one, and it can be unregistered.
    CanBeUnregistered,
    /// One is registered that cannot be unregistered as the C library's can.
    Stays,
}

/// Why a survey found something missing.
///
/// # Examples
///
/// ```
/// use pkru_userspace::capability::Missing;
///
/// assert_eq!(Missing::NoEffect.to_string(), "allowed, but without effect");
/// ```
///
/// # References
///
/// See [`Subject`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Missing {
    /// CPUID does not announce it.
    NotAnnounced,
    /// The kernel refused it with this error number.
    Refused(i32),
    /// The child that tried it was killed by this signal.
    Killed(i32),
    /// The kernel allowed it, but it did not do what it should.
    NoEffect,
    /// It could not be tried.
    NotTried(Error),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAnnounced => f.write_str("not available"),
            Self::Refused(errno) => write!(f, "not available: {}", io::Error::from_raw_os_error(*errno)),
            Self::Killed(signal) => write!(f, "not available: killed by signal {signal}"),
            Self::NoEffect => f.write_str("allowed, but without effect"),
            // In a table these say enough in the rows of PKU and OSPKE.
            Self::NotTried(Error::NoPku | Error::PkuOff) => f.write_str("not tried: there are no protection keys"),
            Self::NotTried(error) => write!(f, "not tried: {error}"),
        }
    }
}

/// One line of a [`Survey`]: what was looked at, what was found, and what follows.
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
    /// Returns what was looked at.
    #[must_use]
    pub const fn subject(&self) -> Subject {
        self.subject
    }

    /// Returns what was found.
    ///
    /// # Errors
    ///
    /// Why it is missing.
    pub const fn state(&self) -> Result<&Found, &Missing> {
        self.state.as_ref()
    }

    /// Says how it was found out, in words.
    #[must_use]
    pub const fn method(&self) -> &'static str {
        self.subject.method()
    }

    /// Says in a sentence what follows for domains from what was found.
    #[must_use]
    pub const fn consequence(&self) -> &'static str {
        self.subject.consequence(&self.state)
    }
}

/// What this machine and kernel offer; made by [`survey`].
///
/// `Display` writes a table: for each [`Finding`] a line with its name and what was found, and under it how it was
/// found and what follows.
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
    /// Returns what domains can build on, as [`detect`] does.
    ///
    /// # Errors
    ///
    /// What is missing, in the order in which it is needed; [`Error::InDomain`] if the survey was made in a domain.
    pub fn capability(&self) -> Result<Capability, Error> {
        self.capability.clone()
    }

    /// Returns what was found; nothing if the survey was made in a domain.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Returns what was found about one subject; `None` if it was not looked at.
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
            // What was not tried was not found out in any way.
            if !matches!(finding.state, Err(Missing::NotTried(_))) {
                writeln!(f, "    how: {}", finding.method())?;
            }
            writeln!(f, "    {}", finding.consequence())?;
        }
        Ok(())
    }
}

/// Tries everything that bears on domains, and says what follows.
///
/// It needs no protection keys, and can be called at any time and from any thread, before the first domain and after.
/// It forks about ten children, one after the other, and leaves nothing behind. What a policy of the system refuses, by
/// a seccomp filter for example, is found as it is for a program here: not available.
///
/// Called by code in a domain, it tries nothing and returns a survey without findings, whose
/// [`capability`](Survey::capability) is [`Error::InDomain`].
///
/// # Examples
///
/// ```
/// use pkru_userspace::capability::{Subject, survey};
///
/// let survey = survey();
/// match survey.look_up(Subject::SyscallUserDispatch) {
///     Some(Ok(_)) => println!("system calls can be dispatched"),
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

/// Some experiments mean nothing, or raise #UD, where keys are not switched on.
const fn needs_keys(features: &Features) -> Result<(), Missing> {
    match features {
        Features { pku: false, .. } => Err(Missing::NotTried(Error::NoPku)),
        Features { ospke: false, .. } => Err(Missing::NotTried(Error::PkuOff)),
        _ => Ok(()),
    }
}

/// The number with which an experiment answered.
fn number(outcome: io::Result<Outcome>) -> Result<u8, Missing> {
    match outcome.map_err(Error::system("fork a child")) {
        Ok(Outcome::Done(number)) => Ok(number),
        Ok(Outcome::Refused(errno)) => Err(Missing::Refused(errno)),
        Ok(Outcome::Killed(signal)) => Err(Missing::Killed(signal)),
        Err(error) => Err(Missing::NotTried(error)),
    }
}

/// What an experiment found that answers yes or no.
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
