//! The kinds of violation.

use std::fmt;

use pkru::fault::KeyFault;
use pkru::heap::{Corruption, HeapError};
use pkru::rights::Access;

use crate::Error;
use crate::transfer::InvalidResult;

/// How code in a domain misbehaved.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ViolationKind {
    /// It accessed memory whose protection key denies that: memory that is not the domain's.
    Key(KeyFault),
    /// It used a null pointer: an address below 64 KiB, where Linux maps nothing.
    Null {
        /// The address.
        address: u64,
        /// The kind of access.
        access: Access,
    },
    /// It accessed an unmapped address, or accessed a mapping in a way that its protection denies.
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
    /// It used a non-canonical address, or a privileged instruction.
    GeneralProtection,
    /// It accessed a mapping beyond the end of its file, or one whose memory failed.
    Bus {
        /// The address.
        address: u64,
    },
    /// It executed an invalid instruction. Compilers put one where a program aborts.
    IllegalInstruction,
    /// It divided by zero, or overflowed in a division.
    Arithmetic,
    /// It hit a breakpoint.
    Breakpoint,
    /// It aborted: by abort(3), by SIGABRT, or by a failed check of the C library's.
    Abort,
    /// It aborted after an allocation failed. C code that handles a null pointer continues; Rust and C++ code aborts.
    OutOfMemory {
        /// The bytes of the allocation.
        size: usize,
    },
    /// An assertion in C failed.
    Assertion {
        /// The expression and its place in the source, if they are readable.
        message: Option<String>,
    },
    /// It called exit(3), one of its variants, or pthread_exit(3).
    Exit {
        /// The status, if it is known.
        status: Option<i32>,
    },
    /// Rust code panicked.
    Panic {
        /// The message with its place in the source. `None` if there is none, as with `resume_unwind`, or if the program has
        /// set a panic hook after its first domain: that hook gets the message instead, in the domain.
        message: Option<String>,
    },
    /// A C++ exception was not caught in the domain, or C++ code called `std::terminate`.
    Exception,
    /// It called longjmp(3) to leave the domain.
    Jump {
        /// The stack pointer that the jump would have set.
        target: u64,
    },
    /// It exceeded the domain's [deadline](crate::Builder::deadline).
    Deadline,
    /// It got a signal that would have ended or stopped the program: one that it sent itself, a signal of faults that another thread
    /// sent it, SIGPIPE, SIGXCPU or SIGXFSZ.
    Raised {
        /// The signal's number.
        signal: i32,
    },
    /// It freed or resized a pointer that is no live block of the domain's heap.
    InvalidFree(HeapError),
    /// It overwrote memory that its heap has not given it, or used the heap's own. This is found when the heap is next used, or
    /// when the call ends.
    HeapCorruption(Corruption),
    /// It called a callback that the call does not have, such as one of an earlier call.
    Callback,
    /// Its result is no value of the result's type.
    InvalidResult(InvalidResult),
    /// Nothing ran: the domain is [retired](crate::Builder::retire_after).
    Retired,
    /// Nothing ran, or the call was not resumed: the domain could not be made ready.
    NotReady(Error),
}

impl ViolationKind {
    /// Returns the address that was accessed, if it is an access.
    pub(crate) const fn address(&self) -> Option<u64> {
        match *self {
            Self::Key(KeyFault { address, .. })
            | Self::Null { address, .. }
            | Self::Unmapped { address, .. }
            | Self::StackOverflow { address }
            | Self::Bus { address } => Some(address),
            _ => None,
        }
    }

    /// Returns the code address that a damaged block is known by.
    pub(super) fn site(&self) -> Option<u64> {
        match self {
            Self::HeapCorruption(corruption) => corruption.site.map(|site| site as u64),
            _ => None,
        }
    }
}

impl fmt::Display for ViolationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(fault) => fault.fmt(f),
            Self::Null { address, access } => write!(f, "{access} of {address:#x}: null pointer access"),
            Self::Unmapped { address, access } => {
                write!(f, "{access} of {address:#x}, an unmapped address, or one whose mapping denies the access")
            }
            Self::StackOverflow { address } => write!(f, "stack overflow at {address:#x}"),
            Self::StackSmashed => f.write_str("a stack frame was overwritten (stack smashing detected)"),
            Self::GeneralProtection => {
                f.write_str("general protection fault (non-canonical address or privileged instruction)")
            }
            Self::Bus { address } => write!(f, "bus error at {address:#x}"),
            Self::IllegalInstruction => f.write_str("illegal instruction"),
            Self::Arithmetic => f.write_str("division by zero, or overflow in a division"),
            Self::Breakpoint => f.write_str("breakpoint"),
            Self::Abort => f.write_str("abort"),
            Self::OutOfMemory { size } => {
                write!(f, "out of memory: aborted after an allocation of {size} bytes failed (Builder::heap_size)")
            }
            Self::Assertion { message: Some(message) } => write!(f, "failed assertion {}", Escaped(message)),
            Self::Assertion { message: None } => f.write_str("failed assertion"),
            Self::Exit { status: Some(status) } => write!(f, "exit with status {status}"),
            Self::Exit { status: None } => f.write_str("exit, with a status that is not known"),
            // std writes the place and the message on two lines.
            Self::Panic { message: Some(message) } => match message.split_once(":\n") {
                Some((place, text)) => write!(f, "{}: {}", Escaped(place), Escaped(text)),
                None => write!(f, "panicked: {}", Escaped(message)),
            },
            Self::Panic { message: None } => {
                f.write_str("panic (without a message, or the message went to a panic hook that the program set after its first domain)")
            }
            Self::Exception => f.write_str("uncaught C++ exception, or std::terminate"),
            Self::Jump { target } => write!(f, "longjmp out of the domain, to stack pointer {target:#x}"),
            Self::Deadline => f.write_str("deadline exceeded"),
            Self::Callback => f.write_str("call of a callback that this call does not have"),
            Self::Retired => {
                f.write_str("nothing ran: the domain is retired after too many violations (Domain::reinstate)")
            }
            Self::Raised { signal } => write!(f, "signal {signal}{}, which would have ended or stopped the program", name(*signal)),
            Self::HeapCorruption(corruption) => write!(f, "heap corruption: {corruption}"),
            Self::InvalidFree(error) => write!(f, "invalid free or resize: {error}"),
            Self::InvalidResult(error) => write!(f, "invalid result: {error}"),
            Self::NotReady(error) => write!(f, "nothing ran, or the call was not resumed: {error}"),
        }
    }
}

/// Returns the name of a signal that ends a call, in brackets.
const fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGPIPE => " (SIGPIPE, a write to a closed pipe or socket)",
        libc::SIGXCPU => " (SIGXCPU, a limit on processor time)",
        libc::SIGHUP => " (SIGHUP)",
        libc::SIGINT => " (SIGINT)",
        libc::SIGQUIT => " (SIGQUIT)",
        libc::SIGKILL => " (SIGKILL)",
        libc::SIGUSR1 => " (SIGUSR1)",
        libc::SIGUSR2 => " (SIGUSR2)",
        libc::SIGALRM => " (SIGALRM)",
        libc::SIGTERM => " (SIGTERM)",
        libc::SIGSTOP => " (SIGSTOP)",
        libc::SIGXFSZ => " (SIGXFSZ, a limit on the size of files)",
        _ => "",
    }
}

/// Writes a text that may come from a domain on one line, without control characters.
pub(super) struct Escaped<'a>(pub(super) &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.contains(char::is_control) {
            return f.write_str(self.0);
        }
        self.0.chars().try_for_each(|character| {
            if character.is_control() {
                character.escape_default().fmt(f)
            } else {
                fmt::Write::write_char(f, character)
            }
        })
    }
}
