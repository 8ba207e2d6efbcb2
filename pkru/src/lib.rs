//! Memory protection keys for x86-64, and isolated domains built on them.
//!
//! A *domain* is an isolated part of an address space. Code in it can write only the domain's memory: the CPU checks
//! each access against the protection key of the page. A forbidden access traps. The domain is then discarded, and
//! execution *rewinds* to the call that entered it.
//!
//! This crate is the mechanism and needs no std. An operating-system kernel uses it with its own page tables and
//! interrupt handlers. `pkru-userspace` uses it on Linux.
//!
//! # Terms
//!
//! | term | meaning |
//! |---|---|
//! | leaf entry | the page-table entry that maps a page of 4 KiB, 2 MiB or 1 GiB |
//! | protection key | a number from 0 to 15 in bits 62:59 of a leaf entry; also "pkey", and as a feature "MPK" |
//! | access rights | two bits per key: access-disable and write-disable |
//! | PKU, PKRU | protection keys for user pages (U/S=1), and the register of their rights; any code can write it |
//! | PKS, PKRS | protection keys for supervisor pages (U/S=0), and the MSR of their rights; ring 0 can write it |
//! | tag | to write a key into the leaf entries of a range of pages |
//! | domain | memory under one protection key, and code that can write this memory alone |
//! | own key | the key of a domain's memory |
//! | caller | the code that calls into a domain |
//! | entry point | the function that a call runs in the domain |
//! | gate | the code that switches stack and rights on the way into a domain and out |
//! | enter, exit | to go through the gate into a domain, and out of it |
//! | context | the gate's record of a call: stack, FS base and rights of the domain, and the caller's saved state |
//! | trap | an exception that the CPU raises in a domain, such as a page fault |
//! | rewind | to resume the caller after a trap in the domain |
//! | discard | to drop everything that a domain's memory holds |
//! | violation | the outcome of a call that a trap ended |
//! | hostile | of data: code in a domain can have chosen it, so it must be verified before use |
//! | suspend, resume | to leave a domain in the middle of a call, and to continue that call |
//! | lease | proof that a domain's memory carries its key; the domain keeps the key while a lease exists |
//!
//! # Modules
//!
//! | module | subject | builds for |
//! |---|---|---|
//! | [`key`], [`KeySet`] | protection keys and sets of them | every target |
//! | [`rights`] | access rights, as PKRU and PKRS hold them | every target |
//! | [`cpuid`] | which features the CPU has | every target |
//! | [`allocator`] | which keys are free | every target |
//! | [`fault`] | decoding page faults | every target |
//! | [`xsave`] | PKRU in an XSAVE area | every target |
//! | [`model`] | the architecture's access check in software | every target |
//! | [`domain`] | the life cycle of a domain, over a [`Platform`](domain::Platform) | every target |
//! | [`heap`] | a domain's heap | every target, with its feature |
//! | [`instructions`], [`registers`] | reading and writing PKRU and PKRS | x86-64 |
//! | [`gate`] | the call gate | x86-64 |
//! | [`paging`] | tagging page-table entries | x86-64, with its feature |
//!
//! # Features
//!
//! | feature | default | adds |
//! |---|---|---|
//! | `heap` | yes | [`heap`] |
//! | `paging` | yes | [`paging`], over `x86_64` |
//!
//! # Examples
//!
//! A domain's rights: it reads memory under key 0, and reads and writes memory under its own key.
//!
//! ```
//! use pkru::{AccessRights, KeyRights, ProtectionKey};
//!
//! let own = ProtectionKey::new(5).expect("5 is a key");
//! let rights = KeyRights::NONE
//!     .with(ProtectionKey::DEFAULT, AccessRights::READ_ONLY)
//!     .with(own, AccessRights::READ_WRITE);
//! assert_eq!(rights.bits(), 0xffff_f3fe);
//! ```

#![no_std]

#[cfg(test)]
extern crate std;

pub mod allocator;
pub mod cpuid;
pub mod domain;
pub mod fault;
#[cfg(target_arch = "x86_64")]
pub mod gate;
#[cfg(feature = "heap")]
pub mod heap;
#[cfg(target_arch = "x86_64")]
pub mod instructions;
pub mod key;
mod key_set;
pub mod model;
#[cfg(all(feature = "paging", target_arch = "x86_64"))]
pub mod paging;
#[cfg(target_arch = "x86_64")]
pub mod registers;
pub mod rights;
pub mod xsave;

pub use key::ProtectionKey;
pub use key_set::KeySet;
pub use rights::{AccessRights, KeyRights};
