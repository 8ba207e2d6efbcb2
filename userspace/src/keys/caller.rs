//! The caller of a domain, as the key table knows it.

/// The thread that calls a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Caller {
    /// A number that no other thread of the process has had. Not 0.
    pub(crate) number: u64,
    /// The start of the thread's signal stack.
    pub(crate) signal_stack: usize,
}

/// The size of a thread's signal stack in bytes.
///
/// It has room for frames, of which the largest take some 11 KiB, and for handlers that the program wants on no stack
/// of its own.
pub(crate) const SIGNAL_STACK_SIZE: usize = 256 * 1024;
