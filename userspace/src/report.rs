//! How code of this crate that runs in a domain reports what it has found wrong there.
//!
//! It raises an invalid instruction at a place that the fault handler knows, with what was found in registers. Code in
//! the domain can do the same: then it only accuses itself.

use std::arch::naked_asm;

use pkru::heap::HeapError;

/// What was found wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Report {
    /// A free or resize of what is no live block of the domain's heap, by the code before this address.
    InvalidFree(HeapError, u64),
    /// abort(3).
    Abort,
    /// abort(3), after an allocation of this many bytes had failed.
    OutOfMemory { size: usize },
    /// exit(3) and the like.
    Exit { status: i32 },
    /// A function's stack canary has changed.
    StackSmashed,
    /// A failed assert(3), with the address, on the domain's stack, of the addresses of its text and of its file's name,
    /// and the line.
    Assertion { words: usize },
    /// A C++ exception that nothing caught.
    Exception,
    /// longjmp(3) to a stack pointer that is not on the domain's stack.
    Jump { target: usize },
    /// A Rust panic, with the address of its message in the domain's memory.
    Panic { text: usize, length: usize },
    /// A callback that the call does not have.
    Callback { index: usize },
}

/// Ends the call that is running in a domain.
#[cold]
pub(crate) fn end_call(report: Report) -> ! {
    let (code, a, b) = match report {
        Report::InvalidFree(HeapError::Foreign { address }, caller) => (0, address, caller as usize),
        Report::InvalidFree(HeapError::DoubleFree { address }, caller) => (1, address, caller as usize),
        Report::InvalidFree(HeapError::NotABlock { address }, caller) => (2, address, caller as usize),
        // The type may grow; whatever it is, the pointer is no block.
        Report::InvalidFree(_, caller) => (2, 0, caller as usize),
        Report::Abort => (3, 0, 0),
        Report::OutOfMemory { size } => (4, size, 0),
        Report::Exit { status } => (5, status as u32 as usize, 0),
        Report::StackSmashed => (6, 0, 0),
        Report::Assertion { words } => (7, words, 0),
        Report::Exception => (8, 0, 0),
        Report::Jump { target } => (9, target, 0),
        Report::Panic { text, length } => (10, text, length),
        Report::Callback { index } => (11, index, 0),
    };
    // SAFETY: the exception that this raises does not return.
    unsafe { raise(code, a, b) }
}

#[unsafe(naked)]
unsafe extern "C" fn raise(code: u64, a: usize, b: usize) -> ! {
    naked_asm!("ud2")
}

impl Report {
    /// Reads a report from RDI, RSI and RDX as an invalid-instruction exception found them, if it is one.
    pub(crate) fn decode(instruction: u64, [code, a, b]: [u64; 3]) -> Option<Self> {
        if instruction != raise as *const () as usize as u64 {
            return None;
        }
        let address = a as usize;
        Some(match code {
            0 => Self::InvalidFree(HeapError::Foreign { address }, b),
            1 => Self::InvalidFree(HeapError::DoubleFree { address }, b),
            2 => Self::InvalidFree(HeapError::NotABlock { address }, b),
            3 => Self::Abort,
            4 => Self::OutOfMemory { size: address },
            5 => Self::Exit { status: a as i32 },
            6 => Self::StackSmashed,
            7 => Self::Assertion { words: address },
            8 => Self::Exception,
            9 => Self::Jump { target: address },
            10 => Self::Panic { text: address, length: b as usize },
            11 => Self::Callback { index: address },
            _ => return None,
        })
    }
}
