//! Run C and unsafe Rust in isolated domains of a Linux process.
//!
//! Code in a [`Domain`] can read the program's memory and write only its own. Memory protection keys (PKU) enforce that:
//! the CPU traps a wrong access, the domain is discarded, execution rewinds to the call, and the caller gets an `Err`.
//! The mechanism is the crate `pkru`; this crate brings it to Linux.
//!
//! # Examples
//!
//! ```
//! use pkru_userspace::Domain;
//!
//! # if pkru_userspace::capability::detect().is_err() { return }
//! let mut domain = Domain::builder("example").build().expect("this machine has protection keys");
//! assert_eq!(domain.call(|| 6 * 7).unwrap(), 42);
//! ```
//!
//! | item | subject |
//! |---|---|
//! | [`Domain`], [`Builder`] | making a domain and calling into it |
//! | [`Pool`] | domains that threads share |
//! | [`Violation`] | why a call ended |
//! | [`CallbackArguments`] | calling back from a domain |
//! | [`Region`], [`Vault`] | memory that domains share, and memory that none can read |
//! | [`transfer`] | how results leave a domain |
//! | [`capability`] | what this machine and kernel offer |
//! | [`Error`] | why there is no domain |
//!
//! # Terms
//!
//! | term | meaning |
//! |---|---|
//! | domain | a stack, a heap and thread-locals under one protection key, and code that runs with rights to write these alone |
//! | caller | the thread that calls into a domain, and its code outside |
//! | rights | what the PKRU register of a thread allows for each key |
//! | gate | the code that switches stack and rights on the way into a domain and out |
//! | rewind | resuming at the call, after a trap in the domain |
//! | discard | emptying a domain's memory |
//! | violation | the outcome of a call whose code misbehaved |
//! | pinned key | a key whose domain a call is using, so that no other domain can take it |
//! | closed key | the key of memory that no domain may access |
//! | wire | the plain words that a result crosses as |
//! | mailbox | the page at the top of a domain's stack where a call leaves its wire |
//! | callback | a closure of the caller's that code in a domain can call |
//! | service | a system call that the caller makes for code in its domain |
//! | transient | of a domain: discarded before each call |
//! | vault, region | memory that no domain can read; memory that named domains share |
//!
//! # Inside
//!
//! The modules stand on floors. A module imports from its own floor and from those below, and no imports form a loop;
//! `make lint` checks both by this table.
//!
//! | floor | modules | rule |
//! |---|---|---|
//! | 1 | `error`, `trusted`, `rights` | They know no other module. |
//! | 2 | `sys` | Every system call and every call of the dynamic loader; no policy. |
//! | 3 | `fork_lock`, `keys`, `memory`, `descriptors` | Keys, memory and descriptors; they know no threads and no domains. |
//! | 4 | `loader`, `capability` | What is loaded, and what the machine offers. |
//! | 5 | `inside`, `transfer` | `inside` runs with a domain's rights: it takes no lock and writes no static, and nothing outside relies on it. `transfer` checks what comes out. |
//! | 6 | `thread`, `signal` | The record of a thread; signals and faults. What runs in a handler is async-signal-safe. |
//! | 7 | `backend`, `interpose` | What isolates a domain; the C library's functions that this crate replaces, which only dispatch. |
//! | 8 | `setup`, `service`, `violation` | Making process and threads ready; system calls for code in a domain; what a trap was. |
//! | 9 | `shared`, `domain` | The public face. |
//!
//! # What linking this crate does
//!
//! It defines functions of the C library for the whole executable: the `malloc` family; `sigaction`, `signal`, `sigset`
//! and their variants, `sigaltstack`, `sigprocmask` and `pthread_sigmask`, `pthread_kill`; `abort`, `exit`, `longjmp` and
//! their variants, `__stack_chk_fail`, `__assert_fail`, C++'s `terminate`; `fork`, `posix_spawn`, `system`, `popen`;
//! `__cxa_thread_atexit_impl`; `mmap`, `mprotect` and others that change mappings; `open`, `close` and others that open and
//! close descriptors; `kill` and its variants; `chdir`, `setuid`, `setrlimit`, `alarm` and others that change attributes of
//! the process. Outside domains they act as before. A program with a sanitizer has no domains, and keeps its allocator.
//!
//! The first domain, vault or region takes over signal handling: the kernel then calls this crate, which calls the
//! program's handlers. It sets a panic hook that passes panics outside domains to the previous hook. Set your own hook
//! earlier, or panics in domains have no message. It registers fork handlers, and starts a thread that ends at once. A
//! thread that enters its first domain unblocks the signals of faults for good, gets an alternate signal stack, and
//! unregisters its restartable sequences.
//!
//! # Features
//!
//! `log`, on by default: each violation is an event of the `log` crate, with the target `pkru` and the level warn.

#![deny(unsafe_code)]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")))]
compile_error!("pkru-userspace needs x86-64 Linux with glibc");
#[cfg(target_feature = "crt-static")]
compile_error!(
    "pkru-userspace needs glibc linked dynamically: it replaces malloc, which a static glibc does not let it do"
);

mod backend;
pub mod capability;
mod descriptors;
mod domain;
mod error;
mod fork_lock;
mod inside;
mod interpose;
mod keys;
mod loader;
mod memory;
mod rights;
mod service;
mod setup;
mod shared;
mod signal;
mod sys;
mod thread;
pub mod transfer;
mod trusted;
mod violation;

pub use domain::{Builder, Callback, CallbackArguments, Callbacks, Domain, Pool, Pooled};
pub use error::Error;
pub use keys::statics::Globals;
pub use keys::{hand_in_key, set_key_limit};
pub use pkru::fault::KeyFault;
pub use pkru::heap::{Corruption, Damage, HeapChecks, HeapError};
pub use pkru::rights::Access;
pub use pkru::{AccessRights, KeyRights, ProtectionKey};
pub use shared::region::{Region, RegionAccess};
pub use shared::vault::Vault;
#[doc(hidden)]
pub use trusted::pages as trusted_pages;
pub use violation::{Symbol, Violation, ViolationKind};

/// Has the examples of this document tested.
#[cfg(doctest)]
#[doc = include_str!("../../docs/when-it-does-not-compile.md")]
struct WhenItDoesNotCompile;
