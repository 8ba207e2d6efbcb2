//! What a trap in a domain was.

#![expect(unsafe_code, reason = "it reads constants of loaded objects")]

use std::ffi::CStr;

use pkru::fault::{ErrorCode, KeyFault};
use pkru::heap::{Corruption, Damage};

use super::kind::ViolationKind;
use crate::backend::pku::Memory;
use crate::inside::abort::{AbortReason, corruption_of};
use crate::interpose::malloc;
use crate::keys::statics;
use crate::loader::landmarks::{ABORT, ABORT_MESSAGE, FAILED_CHECKS, LIBRARY_CODE, PROGRAM_DATA, TERMINATE};
use crate::signal::panics;
use crate::signal::trap::Trap;
use crate::sys;

/// Returns the kind of violation that a trap is, and the instruction to blame, if there is one. The calling thread has
/// rights to the domain's memory.
pub(crate) fn classify(memory: &Memory, trap: &Trap) -> (ViolationKind, Option<u64>) {
    match trap.reason {
        // The call instruction lies before its return address.
        Some(AbortReason::InvalidFree { error, caller }) => {
            (ViolationKind::InvalidFree(error), Some(caller.wrapping_sub(1)))
        }
        Some(reason @ AbortReason::HeapCorruption { caller, .. }) => (of_reason(memory, reason), caller.checked_sub(1)),
        Some(reason) => (of_reason(memory, reason), None),
        None if trap.is_deadline() => (ViolationKind::Deadline, None),
        // On its way to a hook that is not this crate's, or in that hook; or without a hook.
        None if trap.in_panic || panics::is_noted_by(trap) => {
            (ViolationKind::Panic { message: None }, Some(trap.at.instruction))
        }
        None => (of_signal(memory, trap), Some(trap.at.instruction)),
    }
}

/// Returns whether the state that a trap interrupted tells its kind: another trap with the same state is of the same.
pub(crate) fn is_told_by_its_state(trap: &Trap) -> bool {
    let is_plain = trap.reason.is_none() && !trap.in_panic;
    is_plain && !LIBRARY_CODE.contains(trap.at.instruction) && !PROGRAM_DATA.contains(trap.at.address)
}

fn of_signal(memory: &Memory, trap: &Trap) -> ViolationKind {
    /// The code of a fault for which the CPU raised no page fault.
    const SI_KERNEL: i32 = 0x80;
    /// Linux maps nothing below (`vm.mmap_min_addr`).
    const LOWEST: u64 = 64 * 1024;
    let access = ErrorCode::from_bits_retain(trap.at.error_code).access();
    let address = trap.at.address;
    match trap.at.signal {
        libc::SIGABRT => ViolationKind::Abort,
        // The kernel's own codes are positive.
        signal if trap.at.code <= 0 || sys::is_limit(signal) => ViolationKind::Raised { signal },
        // No access of the code's own: the heap's records have led the allocator astray.
        libc::SIGSEGV | libc::SIGBUS
            if malloc::is_quick_path(trap.at.instruction) && !is_overflow(memory, address, trap.at.stack) =>
        {
            let (damage, block) = (Damage::Records, memory.heap().start);
            ViolationKind::HeapCorruption(Corruption { damage, block, size: None, site: None })
        }
        libc::SIGBUS => ViolationKind::Bus { address },
        libc::SIGILL => ViolationKind::IllegalInstruction,
        libc::SIGFPE => ViolationKind::Arithmetic,
        libc::SIGTRAP => ViolationKind::Breakpoint,
        _ if trap.at.code == SI_KERNEL => ViolationKind::GeneralProtection,
        // A guard page has key 0, and the kernel reports the key before the missing access.
        _ if is_overflow(memory, address, trap.at.stack) => ViolationKind::StackOverflow { address },
        _ if address < LOWEST => ViolationKind::Null { address, access },
        // It has key 0 too.
        _ if memory.is_reserved(address as usize) => ViolationKind::Unmapped { address, access },
        _ => match trap.at.key {
            Some(key) => {
                let fault = KeyFault { address, access, key, rights: trap.at.rights };
                of_static(memory, &fault, trap).unwrap_or(ViolationKind::Key(fault))
            }
            None => ViolationKind::Unmapped { address, access },
        },
    }
}

fn of_reason(memory: &Memory, reason: AbortReason) -> ViolationKind {
    match reason {
        AbortReason::InvalidFree { error, .. } => ViolationKind::InvalidFree(error),
        AbortReason::HeapCorruption { words, .. } => {
            ViolationKind::HeapCorruption(corruption_of(&memory.stack_words(words as u64, 5)))
        }
        AbortReason::Abort => ViolationKind::Abort,
        AbortReason::OutOfMemory { size } => ViolationKind::OutOfMemory { size },
        AbortReason::Exit { status } => ViolationKind::Exit { status: Some(status) },
        AbortReason::StackSmashed => ViolationKind::StackSmashed,
        AbortReason::Assertion { words } => {
            let words = memory.stack_words(words as u64, 3);
            let text = |index: usize| constant_text(*words.get(index)? as usize);
            let message = || Some(format!("`{}` at {}:{}", text(0)?, text(1)?, words.get(2)?));
            ViolationKind::Assertion { message: message() }
        }
        AbortReason::Exception => ViolationKind::Exception,
        AbortReason::Jump { target } => ViolationKind::Jump { target: target as u64 },
        AbortReason::Panic { text, length } => ViolationKind::Panic { message: memory.text(text, length) },
        AbortReason::Callback { .. } => ViolationKind::Callback,
        AbortReason::Raised { signal } => ViolationKind::Raised { signal },
    }
}

/// Returns whether an access ran out of the domain's stack: it is near the stack pointer, which is below the stack's end
/// or almost so. A large local variable can take the stack pointer far beyond the guard.
fn is_overflow(memory: &Memory, address: u64, pointer: u64) -> bool {
    const NEAR: u64 = 64 * 1024;
    const FAR: u64 = 1 << 30;
    let stack = memory.stack();
    let (start, end) = (stack.start as u64, stack.end as u64);
    let below = start.saturating_sub(FAR)..start + NEAR;
    let in_guard = memory.is_guard(address as usize);
    let ran_out = below.contains(&pointer) && (in_guard || address < start) && address.abs_diff(pointer) < NEAR;
    // A call pushes below what `sub rsp` has reserved; and a function may touch its frame page by page before it moves
    // the pointer.
    ran_out || (in_guard && address < start && (start..end).contains(&pointer) && pointer.abs_diff(address) < FAR)
}

/// Returns what a write to the program's memory was about, if the C or C++ library made it on its way to abort.
fn of_static(memory: &Memory, fault: &KeyFault, trap: &Trap) -> Option<ViolationKind> {
    let instruction = trap.at.instruction;
    if !statics::is_programs(fault.key) {
        None
    } else if ABORT.contains(instruction) || ABORT_MESSAGE.contains(fault.address) {
        Some(ViolationKind::Abort)
    } else if TERMINATE.contains(instruction) {
        Some(ViolationKind::Exception)
    } else if LIBRARY_CODE.contains(instruction) || PROGRAM_DATA.contains(fault.address) {
        of_callers(memory, trap)
    } else {
        None
    }
}

/// Tells it by the functions whose frames are on the domain's stack.
fn of_callers(memory: &Memory, trap: &Trap) -> Option<ViolationKind> {
    /// In words, more than the frames of these functions take.
    const MOST: usize = 2048;
    let out_of_memory = std::alloc::handle_alloc_error as *const () as u64;
    let exit = std::process::exit as *const () as u64;
    memory.stack_words(trap.at.stack, MOST).into_iter().find_map(|word| {
        if FAILED_CHECKS.iter().any(|check| check.contains(word)) {
            return Some(ViolationKind::Abort);
        }
        // The return address of a call that does not return may be that of the next function.
        match sys::function_at(word.wrapping_sub(1))? {
            // It prints a message under locks that are statics of std.
            function if function == out_of_memory => {
                Some(ViolationKind::OutOfMemory { size: memory.failed_allocation() })
            }
            // It flushes standard output first.
            function if function == exit => Some(ViolationKind::Exit { status: None }),
            _ => None,
        }
    })
}

/// Copies a NUL-terminated text from the constants of a loaded object; `None` if there is none at the address.
fn constant_text(address: usize) -> Option<String> {
    const MOST: usize = 1024;
    let libraries = sys::libraries();
    let segment = libraries.iter().find_map(|library| library.constants_at(address))?;
    let length = (segment.end - address).min(MOST);
    // SAFETY: the object's constants are mapped, readable and never written while `libraries` holds it.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, length) };
    let text = CStr::from_bytes_until_nul(bytes).ok()?;
    Some(text.to_string_lossy().into_owned())
}
