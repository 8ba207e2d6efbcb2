//! Isolated domains for ordinary Linux programs.
//!
//! A [`Domain`] runs C and unsafe Rust in the process, fenced by memory protection keys, so that a mistake there ends one call
//! and not the program. The mechanism is the crate `pkru`; this crate brings it to Linux.
//!
//! ```
//! use pkru_userspace::Domain;
//!
//! # if pkru_userspace::capability::detect().is_err() { return }
//! let mut domain = Domain::builder("example").build().expect("this machine has protection keys");
//! assert_eq!(domain.call(|| 6 * 7).unwrap(), 42);
//! ```
//!
//! | module | subject |
//! |---|---|
//! | [`Domain`] | making a domain and calling into it |
//! | [`Violation`] | what ended a call |
//! | [`transfer`] | how results leave a domain |
//! | [`capability`] | what this machine and kernel can do |
//! | [`Error`] | why there is no domain |
//!
//! Inside: `platform` is Linux as `pkru`'s platform; `process` and `thread` get those two ready; `signal` handles faults;
//! `region` maps memory; `tls` lays out thread-locals; `malloc` routes allocation, `thread_exit` destructors; `binding` binds
//! libraries; `keys` hands out protection keys; `report` and `symbol` say what went wrong; `sys` has every system call.
//!
//! # What linking this crate does
//!
//! It defines `malloc` and its family, and `__cxa_thread_atexit_impl`, for the whole executable. Outside domains they forward to
//! the C library. The first domain installs handlers for SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP and SIGABRT, which pass on
//! what did not happen in a domain; a thread that enters its first domain has these signals unblocked, gets an alternate signal
//! stack, and gives up restartable sequences.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")))]
compile_error!("pkru-userspace needs x86-64 Linux with glibc");
#[cfg(target_feature = "crt-static")]
compile_error!(
    "pkru-userspace needs glibc linked dynamically: it replaces malloc, which a static glibc does not let it do"
);

mod binding;
pub mod capability;
mod domain;
mod error;
mod keys;
mod malloc;
mod platform;
mod process;
mod region;
mod report;
mod signal;
mod symbol;
mod sys;
mod thread;
mod thread_exit;
mod tls;
pub mod transfer;
mod violation;

pub use domain::{Builder, Domain};
pub use error::Error;
pub use pkru::fault::KeyFault;
pub use pkru::heap::HeapError;
pub use pkru::rights::Access;
pub use pkru::{AccessRights, KeyRights, ProtectionKey};
pub use symbol::Symbol;
pub use violation::{Violation, ViolationKind};
