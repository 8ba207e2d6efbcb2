//! Errors of a run in QEMU, and the exit status of the command for each.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why a run has no result from the guest.
///
/// Each variant has its own exit status: see [`Error::status`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The command line is wrong.
    Usage(String),
    /// A binary or file to run or pack is missing or unsuitable.
    Input {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no `qemu-system-x86_64` in `PATH`.
    QemuMissing,
    /// The kernel to boot does not exist.
    KernelMissing {
        /// Where it was expected.
        path: PathBuf,
    },
    /// The guest panicked.
    Panicked {
        /// The panic message on the console.
        message: String,
        /// The guest's standard output so far.
        stdout: String,
    },
    /// The guest exceeded a limit and was killed.
    TimedOut {
        /// Which limit.
        reason: String,
        /// The guest's standard output so far.
        stdout: String,
    },
    /// QEMU exited without both signs of an orderly end.
    Disorderly {
        /// Which sign is missing.
        reason: String,
        /// The guest's standard output so far.
        stdout: String,
    },
    /// An operation on the host failed.
    Io {
        /// The operation.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// Returns the exit status of the command for this error.
    ///
    /// | status | meaning |
    /// |---|---|
    /// | 118 | wrong command line |
    /// | 119 | a binary or file is missing or unsuitable |
    /// | 120 | QEMU is missing |
    /// | 121 | the kernel is missing |
    /// | 122 | the guest panicked |
    /// | 123 | the guest ended without both signs of an orderly end |
    /// | 124 | the guest timed out (the status that `timeout(1)` uses) |
    /// | 125 | an operation on the host failed |
    #[must_use]
    pub const fn status(&self) -> u8 {
        match self {
            Self::Usage(_) => 118,
            Self::Input { .. } => 119,
            Self::QemuMissing => 120,
            Self::KernelMissing { .. } => 121,
            Self::Panicked { .. } => 122,
            Self::Disorderly { .. } => 123,
            Self::TimedOut { .. } => 124,
            Self::Io { .. } => 125,
        }
    }

    /// Returns the guest's standard output up to the failure.
    #[must_use]
    pub fn stdout(&self) -> &str {
        match self {
            Self::Panicked { stdout, .. } | Self::TimedOut { stdout, .. } | Self::Disorderly { stdout, .. } => stdout,
            _ => "",
        }
    }

    pub(crate) fn io(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, source }
    }

    pub(crate) fn input(path: impl Into<PathBuf>, reason: impl fmt::Display) -> Self {
        Self::Input { path: path.into(), reason: reason.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(message) => write!(f, "{message}; see --help"),
            Self::Input { path, reason } => write!(f, "{}: {reason}", path.display()),
            Self::QemuMissing => write!(f, "qemu-system-x86_64 is not installed: run `make setup`"),
            Self::KernelMissing { path } => {
                write!(f, "no kernel at {} (`make setup` downloads the kernels of Linux guests)", path.display())
            }
            Self::Panicked { message, .. } => write!(f, "the guest panicked: {message}"),
            Self::TimedOut { reason, .. } => write!(f, "the guest was killed: {reason}"),
            Self::Disorderly { reason, .. } => write!(f, "the guest ended out of order: {reason}"),
            Self::Io { operation, source } => write!(f, "cannot {operation}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
