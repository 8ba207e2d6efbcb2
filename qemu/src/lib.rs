//! Runs a bare-metal kernel, or a program in a Linux guest, in QEMU.
//!
//! QEMU's software emulation (TCG) implements protection keys for user pages and for supervisor pages. It needs no
//! support from the host's CPU, so tests that use keys run on any x86-64 machine.
//!
//! | module | subject |
//! |---|---|
//! | [`machine`] | the emulated machine: one QEMU process, its serial ports, its limits |
//! | [`kernel`] | boots a bare-metal ELF |
//! | [`linux`] | boots a Linux guest that runs one program of the host |
//! | [`initramfs`] | the guest's file system: the program, its libraries, other files |
//! | [`init`] | the first process in the guest |
//! | [`error`] | the errors, and the exit status of each |
//!
//! # What counts as a pass
//!
//! A run passes only if both of these hold:
//!
//! - QEMU exited through the `isa-debug-exit` device with [`machine::EXIT_ORDERLY`].
//! - The console has the sentinel line.
//!
//! A guest that resets, hangs or is killed does not pass. Neither does one that prints the line and then fails.

pub mod error;
pub mod init;
pub mod initramfs;
pub mod kernel;
pub mod linux;
pub mod machine;

pub use error::Error;
