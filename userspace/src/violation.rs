//! What ended a call in a domain.

use std::fmt;
use std::sync::Arc;

use pkru::ProtectionKey;
use pkru::fault::{ErrorCode, KeyFault};
use pkru::heap::HeapError;
use pkru::rights::Access;

use crate::Error;
use crate::platform::Memory;
use crate::report::Report;
use crate::signal::Trap;
use crate::symbol::{self, Symbol};
use crate::transfer::InvalidResult;

/// The outcome of a call whose code misbehaved.
///
/// Everything outside the domain is as it was, and the next call finds the domain empty and works. What code in a domain had done
/// with the outside world by system calls is not undone. `Debug` writes the same message as `Display`, which `unwrap` shows.
#[derive(Clone)]
pub struct Violation {
    domain: Arc<str>,
    kind: ViolationKind,
    instruction: Option<u64>,
}

/// How code in a domain misbehaved.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ViolationKind {
    /// It accessed memory whose protection key denies that: memory that is not the domain's.
    Key(KeyFault),
    /// It accessed an address where nothing is mapped, or in a way that the mapping does not allow.
    Unmapped {
        /// The address.
        address: u64,
        /// The kind of access.
        access: Access,
    },
    /// It ran into the guard page of its stack.
    StackOverflow {
        /// The address.
        address: u64,
    },
    /// It used an address that is no address (not canonical), or a privileged instruction.
    GeneralProtection,
    /// It accessed a mapping beyond the end of its file, or one whose memory failed.
    Bus {
        /// The address.
        address: u64,
    },
    /// It ran an instruction that does not exist; compilers put one where a program aborts.
    IllegalInstruction,
    /// It divided by zero, or overflowed in a division.
    Arithmetic,
    /// It ran into a breakpoint.
    Breakpoint,
    /// It raised SIGABRT. (glibc's `abort` before version 2.41 takes a lock first, and is seen as a write to key 0.)
    Abort,
    /// It was sent a signal, by itself or another, that otherwise means a fault.
    Raised {
        /// The signal's number.
        signal: i32,
    },
    /// It freed or resized what is no live block of the domain's heap.
    InvalidFree(HeapError),
    /// It returned what is no value of the result's type.
    InvalidResult(InvalidResult),
    /// Nothing ran: the domain could not be made ready.
    NotReady(Error),
}

impl Violation {
    pub(crate) const fn new(domain: Arc<str>, kind: ViolationKind) -> Self {
        Self { domain, kind, instruction: None }
    }

    pub(crate) fn of_trap(domain: &Arc<str>, memory: &Memory, trap: &Trap) -> Self {
        let kind = match trap.report {
            Some(Report::InvalidFree(error)) => ViolationKind::InvalidFree(error),
            None => ViolationKind::of_signal(memory, trap),
        };
        Self { domain: domain.clone(), kind, instruction: Some(trap.instruction) }
    }

    /// Returns the name of the domain.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Returns how the code misbehaved.
    #[must_use]
    pub const fn kind(&self) -> &ViolationKind {
        &self.kind
    }

    /// Returns the address that was accessed, if the violation is an access.
    #[must_use]
    pub const fn address(&self) -> Option<u64> {
        match self.kind {
            ViolationKind::Key(KeyFault { address, .. })
            | ViolationKind::Unmapped { address, .. }
            | ViolationKind::StackOverflow { address }
            | ViolationKind::Bus { address } => Some(address),
            _ => None,
        }
    }

    /// Returns the kind of access, if a key or a mapping denied it.
    #[must_use]
    pub const fn access(&self) -> Option<Access> {
        match self.kind {
            ViolationKind::Key(KeyFault { access, .. }) | ViolationKind::Unmapped { access, .. } => Some(access),
            _ => None,
        }
    }

    /// Returns the key of the page, if a key denied the access.
    #[must_use]
    pub const fn key(&self) -> Option<ProtectionKey> {
        match self.kind {
            ViolationKind::Key(KeyFault { key, .. }) => Some(key),
            _ => None,
        }
    }

    /// Returns the address of the instruction, if one was stopped.
    #[must_use]
    pub const fn instruction(&self) -> Option<u64> {
        self.instruction
    }

    /// Returns the function that the instruction belongs to, if it can be told.
    ///
    /// It reads the symbol tables of the file that the code was loaded from, which takes a while.
    #[must_use]
    pub fn symbol(&self) -> Option<Symbol> {
        symbol::find(self.instruction?)
    }

    /// Returns the variable or function that the accessed address belongs to, if it can be told.
    #[must_use]
    pub fn target(&self) -> Option<Symbol> {
        symbol::find(self.address()?)
    }
}

impl ViolationKind {
    fn of_signal(memory: &Memory, trap: &Trap) -> Self {
        /// The kernel's own reason, where the CPU gave no page fault.
        const SI_KERNEL: i32 = 0x80;
        let access = ErrorCode::from_bits_retain(trap.error_code).access();
        let address = trap.address;
        match trap.signal {
            libc::SIGABRT => Self::Abort,
            // The kernel's own codes are positive.
            signal if trap.code <= 0 => Self::Raised { signal },
            libc::SIGBUS => Self::Bus { address },
            libc::SIGILL => Self::IllegalInstruction,
            libc::SIGFPE => Self::Arithmetic,
            libc::SIGTRAP => Self::Breakpoint,
            _ if trap.code == SI_KERNEL => Self::GeneralProtection,
            // A guard page belongs to key 0, which the kernel blames first.
            _ if memory.is_guard(address as usize) && is_near(address, trap.stack) => Self::StackOverflow { address },
            _ => match trap.key {
                Some(key) => Self::Key(KeyFault { address, access, key, rights: trap.rights }),
                None => Self::Unmapped { address, access },
            },
        }
    }
}

/// Whether an access is one that code makes around its stack pointer: a push, a call, or a local variable.
fn is_near(address: u64, stack: u64) -> bool {
    address.abs_diff(stack) < 64 * 1024
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "domain `{}`: {}", self.domain, self.kind)?;
        if let Some(target) = self.target() {
            write!(f, " ({target})")?;
        }
        match (self.instruction, self.symbol()) {
            (Some(instruction), Some(symbol)) => write!(f, ", at instruction {instruction:#x} in {symbol}"),
            (Some(instruction), None) => write!(f, ", at instruction {instruction:#x}"),
            (None, _) => Ok(()),
        }
    }
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Violation {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            ViolationKind::InvalidFree(error) => Some(error),
            ViolationKind::InvalidResult(error) => Some(error),
            ViolationKind::NotReady(error) => Some(error),
            _ => None,
        }
    }
}

impl fmt::Display for ViolationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(fault) => fault.fmt(f),
            Self::Unmapped { address, access } => write!(f, "{access} of {address:#x}, which is not mapped for that"),
            Self::StackOverflow { address } => write!(f, "stack overflow into the guard page at {address:#x}"),
            Self::GeneralProtection => f.write_str("no valid address, or a privileged instruction"),
            Self::Bus { address } => write!(f, "bus error at {address:#x}"),
            Self::IllegalInstruction => f.write_str("illegal instruction"),
            Self::Arithmetic => f.write_str("division by zero or overflow in a division"),
            Self::Breakpoint => f.write_str("breakpoint"),
            Self::Abort => f.write_str("abort"),
            Self::Raised { signal } => write!(f, "signal {signal} was sent"),
            Self::InvalidFree(error) => write!(f, "invalid free: {error}"),
            Self::InvalidResult(error) => write!(f, "invalid result: {error}"),
            Self::NotReady(error) => write!(f, "nothing ran: {error}"),
        }
    }
}
