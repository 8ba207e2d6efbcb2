//! Isolated domains for ordinary Linux programs.
//!
//! A [`Domain`] runs C and unsafe Rust in the process, fenced by memory protection keys, so that a mistake there ends
//! one call and not the program. The mechanism is the crate `pkru`; this crate brings it to Linux.
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
//! | [`Domain`], [`Builder`] | making a domain and calling into it |
//! | [`Pool`] | domains that threads take turns with |
//! | [`Violation`] | what ended a call |
//! | [`CallbackArguments`] | calling back from a domain |
//! | [`Region`], [`Vault`] | memory that domains share, and memory that none can read |
//! | [`transfer`] | how results leave a domain |
//! | [`capability`] | what this machine and kernel can do |
//! | [`Error`] | why there is no domain |
//!
//! Inside: `platform` is Linux as `pkru`'s platform; `process` and `thread` get those two ready; `keys` says which
//! domain has which protection key; `signal` handles faults and hands other signals on; `mapping` maps memory; `tls`
//! lays out thread-locals; `interpose` has the functions of the C library that this crate replaces; `binding` binds
//! libraries, `library` gives their data away; `fork` keeps domains working in the program's children, `turn` is a lock
//! for that; `report`, `ending` and `symbol` say what went wrong; `sys` has every system call.
//!
//! # What linking this crate does
//!
//! It defines functions of the C library for the whole executable: `malloc` and its family; `sigaction`, `signal`,
//! `sigset` and their like, `sigaltstack`, `sigprocmask` and `pthread_sigmask`, `pthread_kill`; `abort`, `exit`,
//! `longjmp` and their like, `__stack_chk_fail`, `__assert_fail`, C++'s `terminate`; `fork`, `posix_spawn`, `system`,
//! `popen`; `__cxa_thread_atexit_impl`. Outside domains they do what they always do.
//!
//! The first domain, vault or region takes over the handling of signals: the kernel then calls this crate, which calls
//! the program's handlers. It sets a panic hook, which hands panics outside domains on to the hook before it; set your
//! own earlier, or panics in domains come without their message. It registers handlers of forks, and starts a thread
//! which ends at once. A thread that enters its first domain has the signals of faults unblocked for good, gets an
//! alternate signal stack, and gives up restartable sequences.
//!
//! # Features
//!
//! `log`, on by default: each violation is an event of the `log` crate, with the target `pkru` and the level warn.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")))]
compile_error!("pkru-userspace needs x86-64 Linux with glibc");
#[cfg(target_feature = "crt-static")]
compile_error!(
    "pkru-userspace needs glibc linked dynamically: it replaces malloc, which a static glibc does not let it do"
);

mod binding;
mod callback;
pub mod capability;
mod domain;
mod ending;
mod error;
mod fork;
mod globals;
mod interpose;
mod keys;
mod library;
mod mapping;
mod monitor;
mod platform;
mod pool;
mod process;
mod region;
mod report;
mod signal;
mod symbol;
mod sys;
mod thread;
mod tls;
pub mod transfer;
mod turn;
mod vault;
mod violation;

pub use callback::{Callback, CallbackArguments, Callbacks};
pub use domain::{Builder, Domain};
pub use error::Error;
pub use globals::Globals;
pub use keys::{hand_in_key, set_key_limit};
#[doc(hidden)]
pub use monitor::pages as monitor_pages;
pub use pkru::fault::KeyFault;
pub use pkru::heap::HeapError;
pub use pkru::rights::Access;
pub use pkru::{AccessRights, KeyRights, ProtectionKey};
pub use pool::{Pool, Pooled};
pub use region::{Region, RegionAccess};
pub use symbol::Symbol;
pub use vault::Vault;
pub use violation::{Violation, ViolationKind};
