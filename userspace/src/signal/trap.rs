//! Plain data of the handler: the state that a signal interrupted, and the trap that ended a call.

use std::cell::Cell;
use std::ffi::c_int;
use std::ops::Range;

use pkru::gate::Context;
use pkru::{KeyRights, ProtectionKey};

use crate::inside::abort::AbortReason;
use crate::trusted::trusted;

/// The signal that ends a call at its deadline. It is never blocked in a domain.
pub(crate) const DEADLINE: c_int = libc::SIGFPE;

trusted! { static DEADLINE_MARK: u8 = 0; }

/// The value that a deadline's timer sends. It is an address of this crate, so nothing else sends it.
pub(crate) fn deadline_value() -> usize {
    (&raw const DEADLINE_MARK).addr()
}

/// A signal, and the state of the code that it interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interrupted {
    pub(crate) signal: c_int,
    /// `si_code`: the kernel's reason, or how the signal was sent.
    pub(crate) code: c_int,
    /// This process sent the signal, as by kill(2).
    pub(crate) is_own: bool,
    /// The value that the signal was sent with, if any.
    pub(crate) value: usize,
    /// The address of the fault, if a fault raised the signal.
    pub(crate) address: u64,
    /// The key of the page, if a key denied the access.
    pub(crate) key: Option<ProtectionKey>,
    /// The error code, if a page fault raised the signal.
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

impl Trap {
    /// Returns whether the call has exceeded its deadline.
    pub(crate) const fn is_deadline(&self) -> bool {
        self.at.signal == DEADLINE && self.at.code == libc::SI_TIMER
    }
}

/// A call that runs in a domain, as the handler sees it. Domains can read it and not write it.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Running {
    /// The first field, so that a pointer to the context is a pointer to all of this.
    pub(crate) context: Context,
    /// The domain's own stack.
    pub(crate) stack: Range<usize>,
    /// Set by the handler when it ends the call.
    pub(crate) trap: Cell<Option<Trap>>,
    /// Set by the handler while code in the domain panics.
    pub(crate) in_panic: Cell<bool>,
    /// The call is a trial call that panics. From it the handler learns std's writes.
    pub(crate) learning: Cell<bool>,
    /// All addresses of the domain's own memory, guard pages included.
    pub(crate) memory: Range<usize>,
    /// Addresses that the program fills on demand, as the builder was told.
    pub(crate) on_demand: Box<[Range<usize>]>,
    /// The instruction and the address of the last fault of this call about which the program's handler was asked. The
    /// instruction is 0 when a call begins.
    pub(crate) asked: (Cell<u64>, Cell<u64>),
}
