//! Pages that the program fills on demand, in its own handler of SIGSEGV.
//!
//! Garbage collectors, checkpointing and lazy loading do that: a page has no access until its first use. The handler is
//! asked for a domain's first use as for any other. If it does nothing, the instruction faults again, and that is a
//! violation.

use std::ffi::c_int;

use pkru::fault::ErrorCode;
use pkru::rights::Access;

use super::actions;
use super::trap::{Interrupted, Running};

/// Returns whether the program's handler is to be asked about a fault in a domain. Async-signal-safe.
///
/// `own_stack` is the start of the stack of the calling thread. What lies right below is its guard.
pub(super) fn is_asked(at: &Interrupted, call: &Running, own_stack: usize) -> bool {
    /// The mapping denies the access (Linux 6.12, `include/uapi/asm-generic/siginfo.h`).
    const SEGV_ACCERR: c_int = 2;
    /// The size in bytes of the guard below a stack, twice: the start may be counted without it (see `sys::own_stack`).
    const GUARD: usize = 2 * 4096;
    // A jump to data is a mistake of the code's own: nothing that a handler fills would make it right.
    let is_fetch = ErrorCode::from_bits_retain(at.error_code).access() == Access::Execute;
    if at.key.is_some() || is_fetch {
        return false;
    }
    let address = at.address as usize;
    let is_told = || call.on_demand.iter().any(|range| range.contains(&address));
    match (at.signal, at.code) {
        (libc::SIGSEGV, SEGV_ACCERR) => {}
        // Beyond the end of a file, which the handler may extend.
        (libc::SIGBUS, 1..) if is_told() => {}
        _ => return false,
    }
    let action = actions::get(at.signal);
    if !action.is_function() || (call.asked.0.get(), call.asked.1.get()) == (at.instruction, at.address) {
        return false;
    }
    let is_guard = (own_stack.saturating_sub(GUARD)..own_stack).contains(&address);
    let is_programs = !call.memory.contains(&address) && !is_guard;
    is_told() || (is_programs && action.handler != actions::first_handler())
}
