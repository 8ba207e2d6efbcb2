//! PKRU: the rights to the keys of user pages.

use crate::KeyRights;
use crate::cpuid::Features;
use crate::instructions::{rdpkru, wrpkru};

/// Proof that PKRU, the rights register for user pages, is usable.
///
/// PKRU applies to accesses to pages with U/S=1 at every privilege level, ring 0 included. Each logical CPU has one.
/// Linux saves and restores it for each thread.
///
/// # Examples
///
/// ```
/// use pkru::registers::Pkru;
///
/// match Pkru::detect() {
///     Some(pkru) => println!("PKRU = {}", pkru.read()),
///     None => println!("this system does not offer protection keys"),
/// }
/// ```
///
/// # References
///
/// Intel SDM volume 2, RDPKRU and WRPKRU; AMD APM volume 2, section "Memory Protection Keys (MPK) Bit".
#[derive(Debug, Clone, Copy)]
pub struct Pkru(());

impl Pkru {
    /// Returns the register if the operating system has enabled it.
    ///
    /// This reads OSPKE from CPUID, which mirrors CR4.PKE. Intel's and AMD's CPUs both report it.
    #[must_use]
    pub fn detect() -> Option<Self> {
        Features::of_this_cpu().ospke.then_some(Self(()))
    }

    /// Returns the register without checking the CPU.
    ///
    /// # Safety
    ///
    /// CR4.PKE is 1 on each CPU on which this value is used.
    #[must_use]
    pub const unsafe fn assume() -> Self {
        Self(())
    }

    /// Reads the rights in force.
    #[must_use]
    #[inline]
    pub fn read(self) -> KeyRights {
        // SAFETY: a value of this type exists only where CR4.PKE is 1.
        KeyRights::from_bits(unsafe { rdpkru() })
    }

    /// Writes the rights. They take effect at once.
    ///
    /// # Safety
    ///
    /// - The new rights allow every access that follows, including the compiler's accesses to the stack.
    /// - No code relies on the new rights denying an access that they allow.
    #[inline]
    pub unsafe fn write(self, rights: KeyRights) {
        // SAFETY: a value of this type exists only where CR4.PKE is 1, and the rights suffice by this function's
        // contract.
        unsafe { wrpkru(rights.bits()) }
    }
}
