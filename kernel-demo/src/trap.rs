//! What a trap is: vectors, the saved registers, the decoded exception.

use core::fmt;

use pkru::fault::PageFault;
use pkru::gate::Rewind;

use crate::fence::Rights;

/// The vector of a page fault.
pub(crate) const PAGE_FAULT: u64 = 14;

/// The vector of the timer's interrupt.
pub(crate) const TIMER: u8 = 0x20;

/// The vector of the software interrupt.
pub(crate) const SOFTWARE: u8 = 0x40;

/// The registers at a trap, in the order in which the CPU and the entry stub push them.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rbp: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rbx: u64,
    rax: u64,
    pub(crate) vector: u64,
    pub(crate) error: u64,
    /// RIP.
    pub(crate) instruction: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

impl Frame {
    /// Makes the trap return to the caller of the domain that raised it.
    pub(crate) const fn rewind(&mut self, rewind: &Rewind) {
        self.instruction = rewind.instruction;
        self.rsp = rewind.stack;
        self.r10 = rewind.r10;
        self.rflags &= !Rewind::CLEARED_FLAGS;
    }
}

/// A decoded exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trap {
    /// The kind of exception.
    pub cause: Cause,
    /// The address of the instruction that raised it.
    pub instruction: u64,
    /// The rights that were in force.
    pub rights: Rights,
}

/// The kind of an exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// A page fault.
    PageFault(PageFault),
    /// Another exception, by its vector.
    Exception(u8),
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::PageFault(fault) => fault.fmt(f)?,
            Cause::Exception(0) => f.write_str("division by zero")?,
            Cause::Exception(6) => f.write_str("invalid instruction")?,
            Cause::Exception(8) => f.write_str("double fault")?,
            Cause::Exception(13) => f.write_str("general protection fault")?,
            Cause::Exception(vector) => write!(f, "exception {vector}")?,
        }
        write!(f, ", at instruction {:#x}", self.instruction)
    }
}
