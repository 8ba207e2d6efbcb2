//! A kernel that QEMU boots directly: `pkru` on bare metal.
//!
//! The kernel runs on one CPU, in ring 0 throughout. The first 4 GiB are mapped to themselves.
//!
//! # Floors
//!
//! A module imports only from its own floor or from a lower one, and no imports form a loop.
//!
//! | floor | modules | rule |
//! |---|---|---|
//! | 1 | `ports`, `serial`, `exit`, `segments`, `memory` | The machine: these modules read and write no rights register. |
//! | 2 | `fence` | The rights registers: no other module of this crate reads or writes them. |
//! | 3 | `trap` | Plain data: it executes no privileged instruction and has no state. |
//! | 4 | `probe`, `timer` | Each handles one kind of trap, and `traps` calls it with all rights in force. |
//! | 5 | `traps` | The entry of every trap: it starts with the interrupted code's rights, and puts all rights in force before it handles the trap. |
//! | 6 | `domain` | The platform of `pkru`'s domains: what it reads in a domain's memory is hostile. |
//! | 7 | `start`, `boot` | The set-up: only these modules know the whole kernel. |
//! | 8 | `testing` | Test suites: nothing in the kernel uses them. |
//!
//! The assembly is in three modules: `boot` switches to long mode, `traps` has the entry stubs, and `probe` the single
//! accesses. Unsafe code is denied, except in the modules that allow it with a reason.
//!
//! # Programs
//!
//! A program is a binary or a test of this package. It begins with these attributes and calls
//! `program!` or `test_suite!`:
//!
//! ```text
//! #![no_main]
//! #![cfg(target_os = "none")]
//! #![no_std]
//! ```
//!
//! Their order matters. A build for the host keeps `no_main`, stops at `cfg`, and so compiles an empty program; `host.c`
//! is its `main`.

#![no_std]
#![cfg(target_os = "none")]
#![deny(unsafe_code)]

mod boot;
pub mod domain;
pub mod exit;
pub mod fence;
pub mod memory;
mod ports;
pub mod probe;
pub mod segments;
pub mod serial;
mod start;
pub mod testing;
pub mod timer;
pub mod trap;
pub mod traps;
