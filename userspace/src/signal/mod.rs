//! Signals. A fault in a domain ends the call. All other signals go to the program's handlers.
//!
//! | module | subject |
//! |---|---|
//! | [`handler`] | the handler that the kernel calls |
//! | [`trap`] | an interrupted state and a trap, as plain data |
//! | [`decide`] | what to do about a signal, as a pure function |
//! | [`frame`] | reading and writing the kernel's signal frames |
//! | [`stacks`] | stacks for the handler in threads that enter no domains |
//! | [`forward`] | the program's handlers |
//! | [`delivery`] | calling a handler as the kernel would |
//! | [`actions`] | the program's signal actions |
//! | [`on_demand`] | faults about which the program's handler is asked |
//! | [`panics`] | the writes with which std records a panic, which the handler skips |
//!
//! On a fault in a domain, the handler writes the caller's state to the signal frame. sigreturn(2) then restores
//! registers, rights and signal mask in one step.
//!
//! The address of the frame tells whether the signal interrupted a domain. Each thread has a signal stack of its own,
//! and the slot of a key records the thread that has pinned the key. No register that a domain can set is used for
//! this.
//!
//! Everything here is async-signal-safe.
//!
//! # References
//!
//! Linux 6.12, `arch/x86/kernel/signal.c`.

#![expect(unsafe_code, reason = "it installs the signal handler")]

pub(crate) mod actions;
mod decide;
mod delivery;
mod forward;
mod frame;
mod handler;
mod on_demand;
pub(crate) mod panics;
pub(crate) mod stacks;
pub(crate) mod trap;

use crate::Error;

/// Installs the handler in place of the program's handlers.
///
/// # Errors
///
/// [`Error::System`] if a system call fails.
pub(crate) fn install(pkru_offset: usize) -> Result<(), Error> {
    frame::set_pkru_offset(pkru_offset);
    stacks::map()?;
    // SAFETY: the entry assumes nothing about the code that it interrupts.
    unsafe { actions::take_over(handler::entry as *const () as usize) }
        .map_err(Error::system("install the signal handlers"))
}
