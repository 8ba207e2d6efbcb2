//! What ended a call in a domain.

use std::fmt;
use std::sync::Arc;

use pkru::ProtectionKey;
use pkru::fault::{ErrorCode, KeyFault};
use pkru::heap::HeapError;
use pkru::rights::Access;

use crate::domain::is_entry;
use crate::platform::Memory;
use crate::report::Report;
use crate::signal::{self, Trap};
use crate::symbol::{self, Symbol};
use crate::transfer::InvalidResult;
use crate::{Error, ending, globals};

/// The outcome of a call whose code misbehaved.
///
/// Everything outside the domain is as it was, but for [regions](crate::Region) and what
/// [`Globals::Writable`](crate::Globals::Writable) opens, and the next call finds the domain empty and works. What code
/// in a domain had done with the outside world by system calls is not undone. `Debug` writes the same message as
/// `Display`, which `unwrap` shows.
#[derive(Clone)]
pub struct Violation(
    // Boxed, so that a result which may be one is small.
    Box<Details>,
);

#[derive(Clone)]
struct Details {
    domain: Arc<str>,
    kind: ViolationKind,
    instruction: Option<u64>,
    /// The closure that was called, as far as it is known.
    closure: Option<&'static str>,
}

/// How code in a domain misbehaved.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ViolationKind {
    /// It accessed memory whose protection key denies that: memory that is not the domain's.
    Key(KeyFault),
    /// It used a null pointer: an address below 64 KiB, where nothing is ever mapped.
    Null {
        /// The address.
        address: u64,
        /// The kind of access.
        access: Access,
    },
    /// It accessed an address where nothing is mapped, or in a way that the mapping does not allow.
    Unmapped {
        /// The address.
        address: u64,
        /// The kind of access.
        access: Access,
    },
    /// It ran out of its stack.
    StackOverflow {
        /// The address.
        address: u64,
    },
    /// It overwrote the canary in a stack frame of its own (`__stack_chk_fail`).
    StackSmashed,
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
    /// It aborted: by abort(3), by SIGABRT, or by a check of the C library's.
    Abort,
    /// It aborted after an allocation had failed. C code that handles a null pointer goes on; Rust code and C++ code
    /// end here.
    OutOfMemory {
        /// The bytes of the allocation.
        size: usize,
    },
    /// An assertion in C failed.
    Assertion {
        /// The expression with its place in the source, if they could be read.
        message: Option<String>,
    },
    /// It was about to end the process, by exit(3) or the like.
    Exit {
        /// The status, if it could be told.
        status: Option<i32>,
    },
    /// Rust code panicked.
    Panic {
        /// The message with its place in the source, if it could be had: a hook that the program sets after its first
        /// domain sees the panic instead, in the domain.
        message: Option<String>,
    },
    /// A C++ exception was about to leave the domain, or C++ code terminated.
    Exception,
    /// It was about to leave the domain by longjmp(3).
    Jump {
        /// The stack pointer to which the jump led.
        target: u64,
    },
    /// It took longer than the domain's [deadline](crate::Builder::deadline).
    Deadline,
    /// It was sent a signal, by its own process, that otherwise means a fault. (That may have been another thread of
    /// the program.)
    Raised {
        /// The signal's number.
        signal: i32,
    },
    /// It freed or resized what is no live block of the domain's heap.
    InvalidFree(HeapError),
    /// It used a callback that the call does not have, such as one of an earlier call.
    Callback,
    /// It returned what is no value of the result's type.
    InvalidResult(InvalidResult),
    /// Nothing ran: the domain is [retired](crate::Builder::retire_after).
    Retired,
    /// Nothing ran, or did not go on: the domain could not be made ready.
    NotReady(Error),
}

impl Violation {
    pub(crate) fn new(domain: Arc<str>, kind: ViolationKind) -> Self {
        Self(Box::new(Details { domain, kind, instruction: None, closure: None }))
    }

    /// Says what a trap was. The calling thread can read the domain's memory.
    pub(crate) fn of_trap(domain: &Arc<str>, memory: &Memory, trap: &Trap, closure: &'static str) -> Self {
        let (kind, instruction) = match trap.report {
            // The return address is that of the call.
            Some(Report::InvalidFree(error, caller)) => {
                (ViolationKind::InvalidFree(error), Some(caller.wrapping_sub(1)))
            }
            Some(report) => (ViolationKind::of_report(memory, report), None),
            // On its way to a hook that is not this crate's, or in it.
            None if trap.in_panic => (ViolationKind::Panic { message: None }, Some(trap.instruction)),
            None => (ViolationKind::of_signal(memory, trap), Some(trap.instruction)),
        };
        Self(Box::new(Details { domain: domain.clone(), kind, instruction, closure: Some(closure) }))
    }

    pub(crate) fn into_kind(self) -> ViolationKind {
        self.0.kind
    }

    /// Returns the name of the domain.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.0.domain
    }

    /// Returns how the code misbehaved.
    #[must_use]
    pub fn kind(&self) -> &ViolationKind {
        &self.0.kind
    }

    /// Returns the address that was accessed, if the violation is an access.
    #[must_use]
    pub fn address(&self) -> Option<u64> {
        match self.0.kind {
            ViolationKind::Key(KeyFault { address, .. })
            | ViolationKind::Null { address, .. }
            | ViolationKind::Unmapped { address, .. }
            | ViolationKind::StackOverflow { address }
            | ViolationKind::Bus { address } => Some(address),
            _ => None,
        }
    }

    /// Returns the kind of access, if a key or a mapping denied it.
    #[must_use]
    pub fn access(&self) -> Option<Access> {
        match self.0.kind {
            ViolationKind::Key(KeyFault { access, .. })
            | ViolationKind::Null { access, .. }
            | ViolationKind::Unmapped { access, .. } => Some(access),
            _ => None,
        }
    }

    /// Returns the key of the page, if a key denied the access.
    #[must_use]
    pub fn key(&self) -> Option<ProtectionKey> {
        match self.0.kind {
            ViolationKind::Key(KeyFault { key, .. }) => Some(key),
            _ => None,
        }
    }

    /// Returns the address of the instruction, if one was stopped.
    #[must_use]
    pub fn instruction(&self) -> Option<u64> {
        self.0.instruction
    }

    /// Returns the function that the instruction belongs to, if it can be told.
    ///
    /// It reads the symbol tables of the file that the code was loaded from, which takes a while.
    #[must_use]
    pub fn symbol(&self) -> Option<Symbol> {
        let symbol = symbol::find(self.0.instruction?)?;
        Some(match self.0.closure {
            // The compiler has made one function of the two.
            Some(closure) if symbol.name().is_some_and(is_entry) => symbol.with_name(closure),
            _ => symbol,
        })
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
        /// Linux maps nothing below (`vm.mmap_min_addr`).
        const LOWEST: u64 = 64 * 1024;
        let access = ErrorCode::from_bits_retain(trap.error_code).access();
        let address = trap.address;
        match trap.signal {
            signal::DEADLINE if trap.code == libc::SI_TIMER => Self::Deadline,
            libc::SIGABRT => Self::Abort,
            // The kernel's own codes are positive.
            signal if trap.code <= 0 => Self::Raised { signal },
            libc::SIGBUS => Self::Bus { address },
            libc::SIGILL => Self::IllegalInstruction,
            libc::SIGFPE => Self::Arithmetic,
            libc::SIGTRAP => Self::Breakpoint,
            _ if trap.code == SI_KERNEL => Self::GeneralProtection,
            // A guard page belongs to key 0, which the kernel blames first.
            _ if is_overflow(memory, address, trap.stack) => Self::StackOverflow { address },
            _ if address < LOWEST => Self::Null { address, access },
            _ => match trap.key {
                Some(key) => {
                    let fault = KeyFault { address, access, key, rights: trap.rights };
                    ending::of(memory, &fault, trap).unwrap_or(Self::Key(fault))
                }
                None => Self::Unmapped { address, access },
            },
        }
    }

    fn of_report(memory: &Memory, report: Report) -> Self {
        match report {
            Report::InvalidFree(error, _) => Self::InvalidFree(error),
            Report::Abort => Self::Abort,
            Report::OutOfMemory { size } => Self::OutOfMemory { size },
            Report::Exit { status } => Self::Exit { status: Some(status) },
            Report::StackSmashed => Self::StackSmashed,
            Report::Assertion { words } => {
                let words = memory.stack_words(words as u64, 3);
                let text = |index: usize| ending::text(*words.get(index)? as usize);
                let message = || Some(format!("`{}` at {}:{}", text(0)?, text(1)?, words.get(2)?));
                Self::Assertion { message: message() }
            }
            Report::Exception => Self::Exception,
            Report::Jump { target } => Self::Jump { target: target as u64 },
            Report::Panic { text, length } => Self::Panic { message: memory.text(text, length) },
            Report::Callback { .. } => Self::Callback,
        }
    }
}

/// Whether an access is one that code makes which has run out of its stack: near a stack pointer that is below the
/// stack's end or almost so. A large local variable can take the stack pointer far beyond the guard.
fn is_overflow(memory: &Memory, address: u64, pointer: u64) -> bool {
    const NEAR: u64 = 64 * 1024;
    const FAR: u64 = 1 << 30;
    let stack = memory.stack();
    let (start, end) = (stack.start as u64, stack.end as u64);
    let below = start.saturating_sub(FAR)..start + NEAR;
    let in_guard = memory.is_guard(address as usize);
    let ran_out = below.contains(&pointer) && (in_guard || address < start) && address.abs_diff(pointer) < NEAR;
    // A call pushes below what `sub rsp` has reserved; and a function may touch its frame page by page before it moves
    // the pointer.
    ran_out || (in_guard && address < start && (start..end).contains(&pointer) && pointer.abs_diff(address) < FAR)
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "domain `{}`: {}", Escaped(&self.0.domain), self.0.kind)?;
        let target = self.target();
        match (&target, &self.0.kind) {
            (Some(target), _) => write!(f, " ({target})")?,
            (None, ViolationKind::Key(fault)) if globals::is_of_the_program(fault.key) => {
                f.write_str(": the program's memory")?;
            }
            (None, ViolationKind::Key(_)) => f.write_str(": the memory of another domain, a vault or a region")?,
            (None, _) => {}
        }
        let symbol = self.symbol();
        match (self.0.instruction, &symbol) {
            (Some(instruction), Some(symbol)) => write!(f, ", at instruction {instruction:#x} in {symbol}")?,
            (Some(instruction), None) => write!(f, ", at instruction {instruction:#x}")?,
            (None, _) => {}
        }
        match &self.0.kind {
            ViolationKind::Key(KeyFault { access: Access::Write, key, .. }) if globals::is_of_the_program(*key) => {
                let function = symbol.as_ref().and_then(Symbol::name);
                way_out(function, target.as_ref()).map_or(Ok(()), |way| write!(f, "; {way}"))
            }
            _ => Ok(()),
        }
    }
}

/// Says what to do where code in a domain has to write the program's memory and nothing is wrong.
fn way_out(function: Option<&str>, target: Option<&Symbol>) -> Option<String> {
    if function == Some("pthread_create") {
        return Some("code in a domain starts no threads".into());
    }
    let Some(target) = target else {
        return Some(
            "what code in a domain writes it has to allocate there, and return; or use a `Region` or a callback".into(),
        );
    };
    if !target.is_variable {
        return None;
    }
    let mut ways = Vec::new();
    if !target.is_of_runtime {
        ways.push("fill it outside before, if it is filled once (Builder::warm_up)".into());
    }
    if target.can_be_given {
        let library = target.library().file_name().unwrap_or_default().display();
        ways.push(format!("give the domain {library}'s data (Builder::library)"));
    }
    ways.push("open all statics to it (Globals::Writable)".into());
    Some(format!("if code has to write that static and nothing is wrong: {}", ways.join(", or ")))
}

/// Writes a text that may come out of a domain on one line, without control characters.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|character| {
            if character.is_control() {
                character.escape_default().fmt(f)
            } else {
                fmt::Write::write_char(f, character)
            }
        })
    }
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Violation {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.kind {
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
            Self::Null { address, access } => write!(f, "{access} of {address:#x}: a null pointer, or near one"),
            Self::Unmapped { address, access } => write!(f, "{access} of {address:#x}, which is not mapped for that"),
            Self::StackOverflow { address } => write!(f, "stack overflow at {address:#x}"),
            Self::StackSmashed => f.write_str("a stack frame was overwritten (stack smashing detected)"),
            Self::GeneralProtection => {
                f.write_str("general protection fault: no valid address, or a privileged instruction")
            }
            Self::Bus { address } => write!(f, "bus error at {address:#x}"),
            Self::IllegalInstruction => f.write_str("illegal instruction"),
            Self::Arithmetic => f.write_str("division by zero or overflow in a division"),
            Self::Breakpoint => f.write_str("breakpoint"),
            Self::Abort => f.write_str("abort"),
            Self::OutOfMemory { size } => write!(f, "out of memory: it aborted after {size} bytes could not be had"),
            Self::Assertion { message: Some(message) } => write!(f, "failed assertion {}", Escaped(message)),
            Self::Assertion { message: None } => f.write_str("failed assertion"),
            Self::Exit { status: Some(status) } => write!(f, "exit with status {status}"),
            Self::Exit { status: None } => f.write_str("exit"),
            Self::Panic { message: Some(message) } => write!(f, "panic: {}", Escaped(message)),
            Self::Panic { message: None } => {
                f.write_str("panic (the message went to a hook that the program has set since its first domain)")
            }
            Self::Exception => f.write_str("an uncaught C++ exception, or std::terminate"),
            Self::Jump { target } => write!(f, "longjmp out of the domain, to a stack at {target:#x}"),
            Self::Deadline => f.write_str("it took longer than its deadline"),
            Self::Callback => f.write_str("a callback that this call does not have"),
            Self::Retired => f.write_str("nothing ran: the domain is retired after too many violations"),
            Self::Raised { signal } => write!(f, "signal {signal} was sent"),
            Self::InvalidFree(error) => write!(f, "invalid free: {error}"),
            Self::InvalidResult(error) => write!(f, "invalid result: {error}"),
            Self::NotReady(error) => write!(f, "nothing ran, or it did not go on: {error}"),
        }
    }
}
