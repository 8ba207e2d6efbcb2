//! Runs a bare kernel, or a program in a Linux guest, in QEMU.
//!
//! QEMU's software emulation (TCG) has protection keys for user pages and for supervisor pages, whatever the CPU
//! underneath; so this is where the project's tests meet real keys on any x86-64 machine.
//!
//! | module | subject |
//! |---|---|
//! | [`machine`] | the emulated machine: one QEMU process, its serial ports, its time limit |
//! | [`kernel`] | booting a bare-metal ELF |
//! | [`linux`] | booting a Linux guest that runs one program of the host |
//! | [`initramfs`] | the guest's file system: the program, the libraries it loads, named files |
//! | [`init`] | the first process in the guest |
//! | [`error`] | what can go wrong, and the exit status of each |
//!
//! # What counts as a pass
//!
//! A run ends well only if two independent signs agree: QEMU left through the `isa-debug-exit` device with
//! [`machine::EXIT_ORDERLY`], and the console carried a sentinel line. A guest that resets, hangs, is killed or prints
//! the line and then fails does not pass.

pub mod error;
pub mod init;
pub mod initramfs;
pub mod kernel;
pub mod linux;
pub mod machine;

pub use error::Error;
