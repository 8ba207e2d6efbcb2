//! PKRS: the rights to the keys of supervisor pages.

use crate::KeyRights;
use crate::cpuid::Features;
use crate::instructions::{rdpkrs, wrpkrs};

/// IA32_PKRS, the protection-key rights register for supervisor pages, usable.
///
/// It rules accesses to pages with U/S=0. Only ring 0 can read or write it; `detect` cannot see the privilege level,
/// and so is unsafe.
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
    /// Returns the register if the CPU has it. It takes effect once CR4.PKS is 1.
    ///
    /// # Safety
    ///
    /// The CPU runs in ring 0, now and wherever this value is used.
    #[must_use]
    pub unsafe fn detect() -> Option<Self> {
        Features::of_this_cpu().pks.then_some(Self(()))
    }

    /// Assumes that the register is usable.
    ///
    /// # Safety
    ///
    /// Every CPU that this value is used on has PKS and runs in ring 0.
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

    /// Puts rights in force.
    ///
    /// # Safety
    ///
    /// Every access that follows is one that the new rights allow, down to the compiler's own to the stack and the
    /// CPU's to the stacks that it delivers interrupts on.
    #[inline]
    pub unsafe fn write(self, rights: KeyRights) {
        // SAFETY: a value of this type exists only in ring 0 of a CPU with PKS; the caller answers for the rights.
        unsafe { wrpkrs(rights.bits()) }
    }
}
