//! Memory protection keys for x86-64, and isolated domains built on them.
//!
//! A *domain* is a compartment of an address space: code running in it can write only its own memory, because the CPU
//! checks every access against the protection key of the page. When such code misbehaves the CPU traps, the domain is
//! discarded, and execution *rewinds* to the call that entered it. This crate is the mechanism, without std: the same
//! code serves an operating-system kernel (with its own page tables and interrupt handlers) and the Linux adapter
//! `pkru-userspace`.
//!
//! # Terms
//!
//! | term | meaning |
//! |---|---|
//! | protection key | a number from 0 to 15 in bits 62:59 of a leaf page-table entry; also "pkey", and as a feature "MPK" |
//! | access rights | two bits per key: access-disable and write-disable |
//! | PKU, PKRU | protection keys for user pages (U/S=1), and the register that holds their rights; any code may write it |
//! | PKS, PKRS | protection keys for supervisor pages (U/S=0), and the MSR that holds their rights |
//! | tag | to write a key into the leaf entries of a range of pages |
//! | gate | the code that switches stack and rights on the way into a domain and out |
//! | enter, exit | the two directions through the gate |
//! | rewind | to resume at the call that entered a domain, after a trap in it |
//! | discard | to drop everything that a domain's memory holds |
//! | violation | the outcome of a call that ended by a trap |
//!
//! # Modules
//!
//! Values, which build for every target: [`key`], [`rights`], [`cpuid`], [`allocator`], [`fault`], [`model`], and with
//! its feature [`heap`]. Parts that execute instructions, for x86-64: [`registers`], [`instructions`], [`gate`],
//! [`domain`], and with its feature [`paging`].
//!
//! # Features
//!
//! | feature | default | adds |
//! |---|---|---|
//! | `heap` | yes | [`heap`], over `linked_list_allocator` |
//! | `paging` | yes | [`paging`], over `x86_64` |
//!
//! # Examples
//!
//! The rights of a domain that may read everything under key 0 and write only its own memory:
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
