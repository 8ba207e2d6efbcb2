//! Signals: faults in domains end their call, and all other signals go to the program's own handlers.
//!
//! | module | subject |
//! |---|---|
//! | [`handler`] | the handler that the kernel calls |
//! | [`trap`] | what it reads and what it notes: plain data |
//! | [`decide`] | what to do about a signal: a pure function |
//! | [`frame`] | reading and writing the kernel's signal frames |
//! | [`forward`] | running the program's handlers |
//! | [`actions`] | what the program wants on each signal |
//! | [`panics`] | std's writes about a panic, which the handler skips |
//!
//! For a fault in a domain the handler writes the caller's state into the signal frame. sigreturn then restores
//! registers, rights and signal mask in one step.
//!
//! The stack that the frame lies on tells whether a domain was interrupted: each thread has one that the kernel uses for
//! nothing else, and the slot of a key says on which thread it was pinned. No register that the domain could have set is
//! asked.
//!
//! Everything here is async-signal-safe.
//!
//! # References
//!
//! Linux 6.12, `arch/x86/kernel/signal.c`.

#![expect(unsafe_code, reason = "it installs the signal handler")]

pub(crate) mod actions;
mod decide;
mod forward;
mod frame;
mod handler;
pub(crate) mod panics;
pub(crate) mod trap;

use crate::Error;

/// Installs the handler, in the place of the program's own. Called once.
///
/// # Errors
///
/// [`Error::System`] if the kernel refuses it.
pub(crate) fn install(pkru_offset: usize) -> Result<(), Error> {
    frame::set_pkru_offset(pkru_offset);
    // SAFETY: the entry makes no assumption about what it interrupts.
    unsafe { actions::take_over(handler::entry as *const () as usize) }
        .map_err(Error::system("install the signal handlers"))
}
