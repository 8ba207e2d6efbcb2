//! What a signal has interrupted and what the handler notes of it: plain data.

use std::cell::Cell;
use std::ffi::c_int;
use std::ops::Range;

use pkru::gate::Context;
use pkru::{KeyRights, ProtectionKey};

use crate::inside::abort::AbortReason;
use crate::trusted::trusted;

/// The signal by which a call ends at its deadline: one of those that are never blocked in a domain.
pub(crate) const DEADLINE: c_int = libc::SIGFPE;

trusted! { static DEADLINE_MARK: u8 = 0; }

/// The value that a deadline's timer sends: an address, which nothing else sends.
pub(crate) fn deadline_value() -> usize {
    (&raw const DEADLINE_MARK).addr()
}

/// A signal, and the state of the code that it has interrupted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Interrupted {
    pub(crate) signal: c_int,
    /// `si_code`: the kernel's reason, or who sent it.
    pub(crate) code: c_int,
    /// This process sent it: kill(2) and its like.
    pub(crate) is_own: bool,
    /// The value that it was sent with, if it was sent with one.
    pub(crate) value: usize,
    /// The address of the fault, if the signal has one.
    pub(crate) address: u64,
    /// The key of the page, if a key denied the access.
    pub(crate) key: Option<ProtectionKey>,
    /// The error code, if it is a page fault.
    pub(crate) error_code: u32,
    pub(crate) instruction: u64,
    /// The stack pointer.
    pub(crate) stack: u64,
    /// RDI, RSI and RDX.
    pub(crate) arguments: [u64; 3],
    /// The rights in force.
    pub(crate) rights: KeyRights,
}

/// Why a call ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trap {
    pub(crate) at: Interrupted,
    /// The reason, if code of this crate in the domain ended the call.
    pub(crate) reason: Option<AbortReason>,
    /// Code in the domain was panicking.
    pub(crate) in_panic: bool,
}

/// A call that runs in a domain, as the handler sees it. Domains can read it and not write it.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Running {
    /// First, so that the gate's pointer to it leads to the whole.
    pub(crate) context: Context,
    /// The domain's own stack.
    pub(crate) stack: Range<usize>,
    /// Set by the handler when it ends the call.
    pub(crate) trap: Cell<Option<Trap>>,
    /// Set by the handler while code in the domain panics.
    pub(crate) in_panic: Cell<bool>,
    /// The call is a trial that panics, from which the handler learns std's writes.
    pub(crate) learning: Cell<bool>,
}
