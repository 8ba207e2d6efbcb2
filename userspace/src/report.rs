//! How code of this crate that runs in a domain reports what it has found wrong there.
//!
//! It raises an invalid instruction at a place that the fault handler knows, with what was found in registers. Code in the
//! domain can do the same: then it only accuses itself.

use std::arch::naked_asm;

use pkru::heap::HeapError;

/// What was found wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Report {
    /// A free or resize of what is no live block of the domain's heap.
    InvalidFree(HeapError),
}

const FOREIGN: u64 = 1;
const NOT_A_BLOCK: u64 = 2;
const DOUBLE_FREE: u64 = 3;

/// Ends the call that is running in a domain.
#[cold]
pub(crate) fn invalid_free(error: HeapError) -> ! {
    let (code, address) = match error {
        HeapError::Foreign { address } => (FOREIGN, address),
        HeapError::DoubleFree { address } => (DOUBLE_FREE, address),
        // The type may grow; whatever it is, the pointer is no block.
        HeapError::NotABlock { address } => (NOT_A_BLOCK, address),
        _ => (NOT_A_BLOCK, 0),
    };
    // SAFETY: the exception that this raises does not return.
    unsafe { raise(code, address as u64) }
}

#[unsafe(naked)]
unsafe extern "C" fn raise(code: u64, address: u64) -> ! {
    naked_asm!("ud2")
}

impl Report {
    /// Reads a report from the registers of an invalid-instruction exception, if it is one.
    pub(crate) fn decode(instruction: u64, rdi: u64, rsi: u64) -> Option<Self> {
        if instruction != raise as *const () as usize as u64 {
            return None;
        }
        let address = rsi as usize;
        match rdi {
            FOREIGN => Some(Self::InvalidFree(HeapError::Foreign { address })),
            NOT_A_BLOCK => Some(Self::InvalidFree(HeapError::NotABlock { address })),
            DOUBLE_FREE => Some(Self::InvalidFree(HeapError::DoubleFree { address })),
            _ => None,
        }
    }
}
