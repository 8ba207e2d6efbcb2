//! Ending the call that runs in a domain.
//!
//! [`abort_call`] executes an invalid instruction at an address that the fault handler knows, with the reason in
//! registers. Code in the domain can do the same, and then misreports only itself.

#![expect(unsafe_code, reason = "it raises an exception that the fault handler knows")]

use std::arch::naked_asm;

use pkru::heap::{Corruption, Damage, HeapError};

/// Why code of this crate ends a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AbortReason {
    /// A free or resize of what is no live block of the domain's heap. `caller` is the return address of the call.
    InvalidFree { error: HeapError, caller: u64 },
    /// The domain's heap is damaged. `words` is the address, on the domain's stack, of [`corruption_words`]. `caller` is
    /// the return address of the call that found it, or 0.
    HeapCorruption { words: usize, caller: u64 },
    /// abort(3).
    Abort,
    /// abort(3) after an allocation of `size` bytes failed.
    OutOfMemory { size: usize },
    /// exit(3) and its variants.
    Exit { status: i32 },
    /// A function's stack canary has changed.
    StackSmashed,
    /// A failed assert(3). `words` is the address, on the domain's stack, of three words: the addresses of the
    /// expression and of the file name, and the line.
    Assertion { words: usize },
    /// A C++ exception that nothing caught.
    Exception,
    /// longjmp(3) to a stack pointer outside the domain's stack.
    Jump { target: usize },
    /// A Rust panic. The message lies in the domain's memory.
    Panic { text: usize, length: usize },
    /// A callback that the call does not have.
    Callback { index: usize },
    /// A signal that it has sent itself, which would end the program.
    Raised { signal: i32 },
}

/// Ends the call that runs in the domain.
#[cold]
pub(crate) fn abort_call(reason: AbortReason) -> ! {
    let (code, a, b) = match reason {
        AbortReason::InvalidFree { error, caller } => {
            let (code, address) = match error {
                HeapError::Foreign { address } => (0, address),
                HeapError::DoubleFree { address } => (1, address),
                HeapError::NotABlock { address } => (2, address),
                // The type may grow. Whatever the error, the pointer is no block.
                _ => (2, 0),
            };
            (code, address, caller as usize)
        }
        AbortReason::Abort => (3, 0, 0),
        AbortReason::OutOfMemory { size } => (4, size, 0),
        AbortReason::Exit { status } => (5, status as u32 as usize, 0),
        AbortReason::StackSmashed => (6, 0, 0),
        AbortReason::Assertion { words } => (7, words, 0),
        AbortReason::Exception => (8, 0, 0),
        AbortReason::Jump { target } => (9, target, 0),
        AbortReason::Panic { text, length } => (10, text, length),
        AbortReason::Callback { index } => (11, index, 0),
        AbortReason::Raised { signal } => (12, signal as u32 as usize, 0),
        AbortReason::HeapCorruption { words, caller } => (13, words, caller as usize),
    };
    // SAFETY: the instruction raises an exception and does not return.
    unsafe { raise(code, a, b) }
}

#[unsafe(naked)]
unsafe extern "C" fn raise(code: u64, a: usize, b: usize) -> ! {
    naked_asm!("ud2")
}

/// Encodes a corruption, to be left on the domain's stack.
pub(crate) fn corruption_words(corruption: &Corruption) -> [u64; 5] {
    let Corruption { damage, block, size, site } = *corruption;
    let damage = match damage {
        Damage::Behind => 0,
        Damage::Before => 1,
        Damage::Freed => 2,
        _ => 3,
    };
    [damage, block as u64, u64::from(size.is_some()), size.unwrap_or(0) as u64, site.unwrap_or(0) as u64]
}

/// Decodes [`corruption_words`] from the domain's stack. Any words are a corruption.
pub(crate) fn corruption_of(words: &[u64]) -> Corruption {
    let word = |index: usize| words.get(index).map_or(0, |word| *word as usize);
    let damage = match word(0) {
        0 => Damage::Behind,
        1 => Damage::Before,
        2 => Damage::Freed,
        _ => Damage::Records,
    };
    // The call instruction lies before its return address.
    let site = word(4).checked_sub(1);
    Corruption { damage, block: word(1), size: (word(2) == 1).then(|| word(3)), site }
}

impl AbortReason {
    /// Returns the address of the instruction that ends a call.
    pub(crate) fn instruction() -> u64 {
        raise as *const () as usize as u64
    }

    /// Decodes the values that RDI, RSI and RDX had at that instruction; `None` if they are no reason.
    pub(crate) fn decode([code, a, b]: [u64; 3]) -> Option<Self> {
        let address = a as usize;
        let invalid_free = |error| Self::InvalidFree { error, caller: b };
        Some(match code {
            0 => invalid_free(HeapError::Foreign { address }),
            1 => invalid_free(HeapError::DoubleFree { address }),
            2 => invalid_free(HeapError::NotABlock { address }),
            3 => Self::Abort,
            4 => Self::OutOfMemory { size: address },
            5 => Self::Exit { status: a as i32 },
            6 => Self::StackSmashed,
            7 => Self::Assertion { words: address },
            8 => Self::Exception,
            9 => Self::Jump { target: address },
            10 => Self::Panic { text: address, length: b as usize },
            11 => Self::Callback { index: address },
            12 => Self::Raised { signal: a as i32 },
            13 => Self::HeapCorruption { words: address, caller: b },
            _ => return None,
        })
    }
}
