//! Which register fences domains, and the kernel's own rights.
//!
//! | fence | register | the kernel's pages | a domain may write |
//! |---|---|---|---|
//! | PKS | PKRS, by WRMSR | supervisor, key 0 | its own pages, and the exception stacks (key 1) |
//! | PKU | PKRU, by WRPKRU | user, key 0, though all code runs in ring 0 | its own pages, and the exception stacks, as supervisor pages |
//!
//! PKRU rules user pages at every privilege level, so it binds ring 0 too once the kernel's pages are user pages. Both
//! fences contain mistakes. Neither stops code in ring 0 that sets out to escape: it can write the register itself.

use core::sync::atomic::{AtomicU8, Ordering};

use pkru::cpuid::Features;
use pkru::gate::Gate;
use pkru::instructions::{rdpkrs, rdpkru, wrpkrs, wrpkru};
use pkru::{AccessRights, KeyRights, ProtectionKey};
use x86_64::registers::control::{Cr4, Cr4Flags};

use crate::{memory, segments};

/// A register that holds the rights of domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// PKRS, for supervisor pages.
    Pks,
    /// PKRU, for user pages.
    Pku,
}

/// The key of the exception stacks, where PKRS is the fence.
pub const TRAP_STACK_KEY: ProtectionKey = ProtectionKey::new(1).expect("1 is a key");

/// The values of both registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights {
    /// PKRU.
    pub pkru: KeyRights,
    /// PKRS, if the CPU has it; else all rights.
    pub pkrs: KeyRights,
}

const HAS_PKU: u8 = 1;
const HAS_PKS: u8 = 2;
const FENCE_IS_PKU: u8 = 4;

/// Which registers are on, and which of them is the fence.
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

    /// Makes this the fence, by making the kernel's pages user or supervisor pages. No domain may exist.
    ///
    /// # Panics
    ///
    /// If the CPU does not have the register.
    pub fn select(self) {
        assert!(self.is_supported(), "the CPU has no {self:?}");
        match self {
            Self::Pks => STATE.fetch_and(!FENCE_IS_PKU, Ordering::Relaxed),
            Self::Pku => STATE.fetch_or(FENCE_IS_PKU, Ordering::Relaxed),
        };
        memory::set_kernel_pages_user(self == Self::Pku);
    }

    /// Returns the gate that switches this register.
    #[must_use]
    pub const fn gate(self) -> Gate {
        match self {
            Self::Pks => Gate::Pkrs,
            Self::Pku => Gate::Pkru,
        }
    }

    /// Widens a domain's rights by what the CPU needs to deliver a trap.
    #[must_use]
    pub const fn grant(self, rights: KeyRights) -> KeyRights {
        match self {
            Self::Pks => rights.with(TRAP_STACK_KEY, AccessRights::READ_WRITE),
            // The exception stacks are supervisor pages, which PKRU does not rule.
            Self::Pku => rights,
        }
    }
}

impl Rights {
    /// Returns the value of the register that rules pages of this kind.
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
        // SAFETY: `init` has set CR4.PKE.
        rights.pkru = KeyRights::from_bits(unsafe { rdpkru() });
    }
    if state(HAS_PKS) {
        // SAFETY: the CPU has PKS, and the kernel runs in ring 0.
        rights.pkrs = KeyRights::from_bits(unsafe { rdpkrs() });
    }
    rights
}

/// Returns whether a domain is running, with its rights in force.
#[must_use]
pub fn in_domain() -> bool {
    let fence = Fence::current();
    fence.gate().running(read().behind(fence)).is_some()
}

/// Gives all rights, which are the kernel's, and returns those that were in force.
#[allow(clippy::must_use_candidate, reason = "it is called for what it does")]
pub fn open() -> Rights {
    let before = read();
    // SAFETY: no access needs more than all rights.
    unsafe { write(Rights { pkru: KeyRights::ALL, pkrs: KeyRights::ALL }) };
    before
}

/// Puts rights in force.
///
/// # Safety
///
/// Every access that follows is one that they allow.
pub unsafe fn write(rights: Rights) {
    if state(HAS_PKU) {
        // SAFETY: `init` has set CR4.PKE; the caller answers for the rights.
        unsafe { wrpkru(rights.pkru.bits()) };
    }
    if state(HAS_PKS) {
        // SAFETY: the CPU has PKS, and the kernel runs in ring 0; the caller answers for the rights.
        unsafe { wrpkrs(rights.pkrs.bits()) };
    }
}

/// Switches on what the CPU has.
pub(crate) fn init() {
    let features = Features::of_this_cpu();
    let (mut flags, mut has) = (Cr4Flags::empty(), 0);
    // The gate switches the FS base; no CPU has keys without the instructions for that, but an emulated one may.
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
    // SAFETY: the CPU has what is switched on, and both rights registers are 0 after reset, which gives all rights.
    unsafe { Cr4::update(|cr4| cr4.insert(flags)) };
    STATE.store(has, Ordering::Relaxed);
    memory::tag_trap_stacks(&segments::trap_stacks(), TRAP_STACK_KEY);
    if state(HAS_PKS) {
        Fence::Pks.select();
    } else if state(HAS_PKU) {
        Fence::Pku.select();
    }
}
