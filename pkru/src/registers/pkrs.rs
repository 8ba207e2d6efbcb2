//! PKRS: the rights to the keys of supervisor pages.

use crate::KeyRights;
use crate::cpuid::Features;
use crate::instructions::{rdpkrs, wrpkrs};

/// Proof that IA32_PKRS, the rights register for supervisor pages, is usable.
///
/// PKRS applies to accesses to pages with U/S=0. Only ring 0 can read or write it. [`detect`](Self::detect) is unsafe
/// because it does not check the privilege level.
///
/// ```text
///  63                    32 31                          0
/// ┌────────────────────────┬─────────────────────────────┐
/// │       reserved, 0      │  KeyRights                  │
/// └────────────────────────┴─────────────────────────────┘
/// ```
///
/// # References
///
/// Intel SDM volume 3, section "Protection Keys"; volume 4, IA32_PKRS (6E1H).
#[derive(Debug, Clone, Copy)]
pub struct Pkrs(());

impl Pkrs {
    /// Returns the register if the CPU has it. It has an effect only while CR4.PKS is 1.
    ///
    /// # Safety
    ///
    /// The CPU runs in ring 0 wherever this value is used.
    #[must_use]
    pub unsafe fn detect() -> Option<Self> {
        Features::of_this_cpu().pks.then_some(Self(()))
    }

    /// Returns the register without checking the CPU.
    ///
    /// # Safety
    ///
    /// Each CPU on which this value is used has PKS and runs in ring 0.
    #[must_use]
    pub const unsafe fn assume() -> Self {
        Self(())
    }

    /// Reads the rights in force.
    #[must_use]
    #[inline]
    pub fn read(self) -> KeyRights {
        // SAFETY: a value of this type exists only in ring 0 of a CPU with PKS.
        KeyRights::from_bits(unsafe { rdpkrs() })
    }

    /// Writes the rights. They take effect at once.
    ///
    /// # Safety
    ///
    /// - The new rights allow every access that follows, including the compiler's accesses to the stack and the CPU's
    ///   accesses to the stacks of interrupts.
    /// - No code relies on the new rights denying an access that they allow.
    #[inline]
    pub unsafe fn write(self, rights: KeyRights) {
        // SAFETY: a value of this type exists only in ring 0 of a CPU with PKS, and the rights suffice by this
        // function's contract.
        unsafe { wrpkrs(rights.bits()) }
    }
}
