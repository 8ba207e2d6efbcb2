//! The fence, which is the register that restricts domains, and the rights in force.
//!
//! | fence | register | the kernel's pages | a domain may write |
//! |---|---|---|---|
//! | PKS | PKRS, by WRMSR | supervisor pages, key 0 | its own pages, and the trap stacks (key 1) |
//! | PKU | PKRU, by WRPKRU | user pages, key 0 | its own pages, and the trap stacks (supervisor pages) |
//!
//! All code runs in ring 0. PKRU restricts accesses to user pages at every privilege level, so it restricts ring 0 too
//! once the kernel's pages are user pages.
//!
//! Both fences contain mistakes, not attackers: code in ring 0 can write the register itself.

#![expect(unsafe_code, reason = "new rights decide which accesses trap")]

use core::sync::atomic::{AtomicU8, Ordering};

use pkru::cpuid::Features;
use pkru::gate::Gate;
use pkru::instructions::{rdpkrs, rdpkru, wrpkrs, wrpkru};
use pkru::{AccessRights, KeyRights, ProtectionKey};
use x86_64::registers::control::{Cr4, Cr4Flags};

use crate::memory;

/// A register that restricts domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// PKRS, which restricts accesses to supervisor pages.
    Pks,
    /// PKRU, which restricts accesses to user pages.
    Pku,
}

/// The key of the trap stacks. Only PKRS restricts accesses by it.
pub const TRAP_STACK_KEY: ProtectionKey = ProtectionKey::new(1).expect("1 is a key");

/// The values of both registers. A register that the CPU lacks reads as all rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights {
    /// PKRU.
    pub pkru: KeyRights,
    /// PKRS.
    pub pkrs: KeyRights,
}

const HAS_PKU: u8 = 1;
const HAS_PKS: u8 = 2;
const FENCE_IS_PKU: u8 = 4;

/// Which registers are enabled, and which is the fence.
static STATE: AtomicU8 = AtomicU8::new(0);

fn state(bit: u8) -> bool {
    STATE.load(Ordering::Relaxed) & bit != 0
}

impl Fence {
    /// Returns whether the CPU has the register.
    #[must_use]
    pub fn is_supported(self) -> bool {
        state(match self {
            Self::Pks => HAS_PKS,
            Self::Pku => HAS_PKU,
        })
    }

    /// Returns the fence in use.
    #[must_use]
    pub fn current() -> Self {
        if state(FENCE_IS_PKU) { Self::Pku } else { Self::Pks }
    }

    /// Makes this register the fence, and the kernel's pages user or supervisor pages accordingly. Domains that exist
    /// are no longer contained, so there must be none.
    ///
    /// # Panics
    ///
    /// If the CPU lacks the register.
    pub fn select(self) {
        assert!(self.is_supported(), "the CPU has no {self:?}");
        match self {
            Self::Pks => STATE.fetch_and(!FENCE_IS_PKU, Ordering::Relaxed),
            Self::Pku => STATE.fetch_or(FENCE_IS_PKU, Ordering::Relaxed),
        };
        memory::set_kernel_pages_user(self == Self::Pku);
    }

    /// Returns the gate that switches the register.
    #[must_use]
    pub const fn gate(self) -> Gate {
        match self {
            Self::Pks => Gate::Pkrs,
            Self::Pku => Gate::Pkru,
        }
    }

    /// Adds to a domain's rights those that the CPU needs to deliver a trap.
    #[must_use]
    pub const fn grant(self, rights: KeyRights) -> KeyRights {
        match self {
            Self::Pks => rights.with(TRAP_STACK_KEY, AccessRights::READ_WRITE),
            // The trap stacks are supervisor pages, so PKRU does not apply.
            Self::Pku => rights,
        }
    }
}

impl Rights {
    /// Returns the value of the register that applies to user or to supervisor pages.
    #[must_use]
    pub const fn of(self, user_page: bool) -> KeyRights {
        if user_page { self.pkru } else { self.pkrs }
    }

    /// Returns the value of a fence's register.
    #[must_use]
    pub const fn behind(self, fence: Fence) -> KeyRights {
        self.of(matches!(fence, Fence::Pku))
    }

    /// Replaces the value of a fence's register.
    pub const fn set_behind(&mut self, fence: Fence, rights: KeyRights) {
        match fence {
            Fence::Pku => self.pkru = rights,
            Fence::Pks => self.pkrs = rights,
        }
    }
}

/// Reads both registers.
#[must_use]
pub fn read() -> Rights {
    let mut rights = Rights { pkru: KeyRights::ALL, pkrs: KeyRights::ALL };
    if state(HAS_PKU) {
        // SAFETY: the bit is set only after `init` has set CR4.PKE.
        rights.pkru = KeyRights::from_bits(unsafe { rdpkru() });
    }
    if state(HAS_PKS) {
        // SAFETY: the bit is set only where the CPU has PKS, and all code runs in ring 0.
        rights.pkrs = KeyRights::from_bits(unsafe { rdpkrs() });
    }
    rights
}

/// Returns whether a domain's rights are in force.
#[must_use]
pub fn in_domain() -> bool {
    let fence = Fence::current();
    // SAFETY: the rights are in force, and the kernel has one CPU.
    unsafe { fence.gate().running(read().behind(fence)) }.is_some()
}

/// Puts all rights in force and returns the rights that were in force before.
#[allow(clippy::must_use_candidate, reason = "most callers want the effect alone")]
pub fn open() -> Rights {
    let before = read();
    // SAFETY: all rights allow every access.
    unsafe { write(Rights { pkru: KeyRights::ALL, pkrs: KeyRights::ALL }) };
    before
}

/// Puts rights in force.
///
/// # Safety
///
/// The rights allow every access that follows, the compiler's own accesses to the stack included.
pub unsafe fn write(rights: Rights) {
    if state(HAS_PKU) {
        // SAFETY: the bit is set only after `init` has set CR4.PKE, and the caller promises that the rights suffice.
        unsafe { wrpkru(rights.pkru.bits()) };
    }
    if state(HAS_PKS) {
        // SAFETY: the bit is set only where the CPU has PKS, all code runs in ring 0, and the caller promises that the
        // rights suffice.
        unsafe { wrpkrs(rights.pkrs.bits()) };
    }
}

/// Enables the registers that the CPU has, tags the trap stacks, and selects a fence.
pub(crate) fn init() {
    let features = Features::of_this_cpu();
    let (mut flags, mut has) = (Cr4Flags::empty(), 0);
    // The gate needs the FSGSBASE instructions. Every CPU with keys has them, but an emulator's model may not.
    if features.fsgsbase {
        flags |= Cr4Flags::FSGSBASE;
        if features.pku {
            flags |= Cr4Flags::PROTECTION_KEY_USER;
            has |= HAS_PKU;
        }
        if features.pks {
            flags |= Cr4Flags::PROTECTION_KEY_SUPERVISOR;
            has |= HAS_PKS;
        }
    }
    // SAFETY: CPUID reports each feature that is set here, and both registers are 0 after reset, which is all rights.
    unsafe { Cr4::update(|cr4| cr4.insert(flags)) };
    STATE.store(has, Ordering::Relaxed);
    // SAFETY: all rights are in force, and `grant` gives every domain the rights to this key.
    unsafe { memory::tag_trap_stacks(TRAP_STACK_KEY) };
    if state(HAS_PKS) {
        Fence::Pks.select();
    } else if state(HAS_PKU) {
        Fence::Pku.select();
    }
}
