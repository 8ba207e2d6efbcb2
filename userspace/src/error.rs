//! What keeps a domain from being made.

use std::fmt;
use std::io;

/// Why a domain could not be made.
///
/// That code in a domain misbehaved is no error but a [`Violation`](crate::Violation). `Debug` writes the same message
/// as `Display`, for a `main` that returns it.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The CPU has no protection keys.
    NoPku,
    /// The CPU has protection keys, but the system has not switched them on.
    PkuOff,
    /// The system does not let programs write the FS base, which domains need for their thread-locals.
    NoFsgsbase,
    /// No way was found to take a signal in a domain: neither on a stack that domains cannot write nor on one that they
    /// can.
    NoSignalFrame,
    /// The program's `malloc`, or Rust's global allocator, does not lead to this crate, so code in a domain could not
    /// allocate.
    MallocNotRouted,
    /// A trial call in the new domain ended in a violation.
    TrialCall {
        /// What [`Violation`](crate::Violation) says of it.
        violation: String,
    },
    /// The calling code runs in a domain, which cannot make or call another.
    InDomain,
    /// No protection key is left: the program, [regions](crate::Region) and the [limit](crate::set_key_limit) leave too
    /// few.
    KeysExhausted {
        /// How many keys there are for domains and regions.
        limit: usize,
    },
    /// No shared library of this name is loaded.
    NoLibrary {
        /// The name that was asked for.
        name: String,
    },
    /// The data of this library cannot be given to a domain: another has it, or the whole program needs it.
    LibraryInUse {
        /// The name that was asked for.
        name: String,
    },
    /// A size is below the least that works, or beyond what the machine has.
    Size {
        /// What it was asked for: a domain's `stack` or `heap`, or a `region`.
        part: &'static str,
        /// The bytes asked for.
        requested: usize,
        /// The fewest bytes that it can have.
        minimum: usize,
        /// The most bytes that it can have: the machine's memory and swap.
        limit: usize,
    },
    /// The thread-local variables of the loaded libraries do not fit into the domain.
    ThreadLocals {
        /// The bytes they need.
        needed: usize,
        /// The bytes there are.
        limit: usize,
    },
    /// A system call failed.
    System {
        /// What was being done.
        operation: &'static str,
        /// The error number.
        errno: i32,
    },
}

impl Error {
    pub(crate) fn system(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::System { operation, errno: error.raw_os_error().unwrap_or(0) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPku => f.write_str(
                "the CPU says that it has no protection keys (PKU): domains need Intel Skylake-SP or AMD Zen 3 and later, with a hypervisor \
                 that passes the feature on if there is one, or QEMU's -cpu max; `pkru-qemu linux -- PROGRAM` runs a program there",
            ),
            Self::PkuOff => f.write_str(
                "the system has not switched protection keys on (OSPKE): check that the kernel runs without `nopku`",
            ),
            Self::NoFsgsbase => f.write_str(
                "the kernel does not let programs write the FS base: Linux 5.9 or later without `nofsgsbase` is needed",
            ),
            Self::NoSignalFrame => {
                f.write_str("on this kernel a signal that arrives in a domain kills the process: none of the known ways works")
            }
            Self::MallocNotRouted => f.write_str(
                "the program's allocator does not lead to pkru-userspace's malloc: link the crate into the executable, with no other \
                 library that replaces malloc and no `#[global_allocator]` but the system's",
            ),
            Self::TrialCall { violation } => write!(f, "a trial call in the new domain failed: {violation}"),
            Self::InDomain => f.write_str("code in a domain cannot make or call another domain: let its caller do that"),
            Self::KeysExhausted { limit } => {
                write!(
                    f,
                    "no protection key is left: this process has {limit}, as many as the kernel or `set_key_limit` lets it. Two make for \
                     any number of domains; a region takes one more, and so do `Globals::Writable` and the signals of Linux before 6.12"
                )
            }
            Self::NoLibrary { name } => write!(
                f,
                "no library with the file name `{}` is loaded: load it before the domain is built, and name it as `libfoo.so`",
                name.escape_debug()
            ),
            Self::LibraryInUse { name } => write!(
                f,
                "the data of `{}` cannot be given away: a domain has it, or is about to, or the whole program uses it",
                name.escape_debug()
            ),
            Self::Size { part, requested, minimum, limit } => {
                write!(f, "a {part} of {requested} bytes: it must be {minimum} to {limit} (this machine's memory and swap)")
            }
            Self::ThreadLocals { needed, limit } => {
                write!(f, "the libraries' thread-locals need {needed} bytes, and a domain has {limit} for them")
            }
            Self::System { operation, errno } => {
                write!(f, "cannot {operation}: {}", io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}
