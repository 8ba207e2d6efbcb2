//! Why there is no domain.

use std::fmt;
use std::io;

/// Why a domain, region or vault could not be made.
///
/// Misbehaviour of code in a domain is a [`Violation`](crate::Violation), not an error. `Debug` writes the same message
/// as `Display`, for a `main` that returns it.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The CPU has no protection keys.
    NoPku,
    /// The CPU has protection keys, but the kernel has not enabled them.
    PkuOff,
    /// The kernel does not let programs write the FS base. Domains need it for their thread-locals.
    NoFsgsbase,
    /// The kernel kills a process that gets a signal in a domain, on every kind of signal stack.
    NoSignalFrame,
    /// The kernel refuses to allocate a protection key.
    KeysRefused {
        /// The error number.
        errno: i32,
    },
    /// The process has a shadow stack of the CPU's (CET). A domain has none, and its calls would fault.
    ShadowStack,
    /// A sanitizer is part of the program. It writes memory that no domain may write, and replaces the C library's
    /// allocator.
    Sanitizer {
        /// The sanitizer's name, such as `AddressSanitizer`.
        name: &'static str,
    },
    /// `malloc` or Rust's global allocator does not resolve to this crate's functions, so code in a domain could not
    /// allocate.
    MallocNotRouted,
    /// Another shared library in this process links this crate too, and has domains. Only one copy can route the C library's
    /// functions to itself.
    AnotherCopy {
        /// The library's path.
        name: String,
    },
    /// A trial call in the new domain ended in a violation.
    TrialCall {
        /// The violation, as [`Violation`](crate::Violation) displays it.
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
        /// The name.
        name: String,
    },
    /// The data of this library cannot be given to a domain: another domain owns it, or the program depends on it.
    LibraryInUse {
        /// The name.
        name: String,
    },
    /// A size is out of range.
    Size {
        /// What the size is of: a domain's `stack` or `heap`, or a `region`.
        part: &'static str,
        /// The size, in bytes.
        requested: usize,
        /// The smallest possible size, in bytes.
        minimum: usize,
        /// The largest possible size, in bytes: the machine's memory and swap, and for a heap at most 16 GiB.
        limit: usize,
    },
    /// The thread-local variables of the loaded libraries do not fit into the domain.
    ThreadLocals {
        /// Their size in bytes.
        needed: usize,
        /// The space for them in bytes.
        limit: usize,
    },
    /// A system call failed.
    System {
        /// The operation, as in "cannot …".
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
                "this CPU has no protection keys (PKU). Domains need Intel Skylake-SP or AMD Zen 3 or later; in a virtual machine, \
                 the hypervisor must expose the feature. QEMU emulates it: `pkru-qemu linux -- PROGRAM`. valgrind hides it",
            ),
            Self::PkuOff => f.write_str(
                "the kernel has not enabled protection keys (OSPKE): remove `nopku` from its command line",
            ),
            Self::NoFsgsbase => f.write_str(
                "the kernel does not let programs write the FS base: use Linux 5.9 or later, without `nofsgsbase`",
            ),
            Self::NoSignalFrame => {
                f.write_str("this kernel kills a process that gets a signal in a domain, so faults there cannot be handled")
            }
            Self::KeysRefused { errno } => write!(
                f,
                "the kernel refuses to allocate a protection key: {}. A policy may deny pkey_alloc(2), such as the seccomp filter of a \
                 container: allow pkey_alloc, pkey_mprotect and pkey_free there",
                io::Error::from_raw_os_error(*errno)
            ),
            Self::ShadowStack => f.write_str(
                "this process has a shadow stack, which domains do not support: start it with GLIBC_TUNABLES=glibc.cpu.hwcaps=-SHSTK",
            ),
            Self::Sanitizer { name } => write!(
                f,
                "{name} is part of this program. It checks accesses in memory that no domain may write, and has its own allocator: run \
                 domains in a build without it. What the program does outside domains can be tested with it"
            ),
            Self::MallocNotRouted => f.write_str(
                "the program's allocator is not pkru-userspace's malloc: link the crate into the executable, or into a shared library that \
                 is opened or preloaded (LD_PRELOAD), without another library that replaces malloc and without a `#[global_allocator]` \
                 other than the system's",
            ),
            Self::AnotherCopy { name } => write!(
                f,
                "`{}` has domains already, and only one copy of pkru-userspace can be active in a process: link the crate into the executable, \
                 or have both use one shared library",
                name.escape_debug()
            ),
            Self::TrialCall { violation } => write!(
                f,
                "a trial call in the new domain failed: {violation}. (Programs built with -C instrument-coverage write statics \
                 everywhere: give their domains Globals::Writable.)"
            ),
            Self::InDomain => f.write_str("code in a domain cannot make or call another domain: its caller can"),
            Self::KeysExhausted { limit } => {
                write!(
                    f,
                    "no protection key is left: this process has {limit}, the most that the kernel or `set_key_limit` allows. Any number of \
                     domains need two; each region needs one more, `Globals::Writable` one, and signals before Linux 6.12 one"
                )
            }
            Self::NoLibrary { name } => write!(
                f,
                "no library with the file name `{}` is loaded: load it before you build the domain, and name it like `libfoo.so`",
                name.escape_debug()
            ),
            Self::LibraryInUse { name } => write!(
                f,
                "the data of `{}` cannot be given to a domain: another domain owns it, or the whole program uses it",
                name.escape_debug()
            ),
            Self::Size { part, requested, minimum, limit } => {
                write!(f, "a {part} of {requested} bytes is out of range: {minimum} to {limit}")
            }
            Self::ThreadLocals { needed, limit } => {
                write!(f, "the loaded libraries' thread-locals need {needed} bytes, and the domain has room for {limit} (Builder::thread_locals_size)")
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
