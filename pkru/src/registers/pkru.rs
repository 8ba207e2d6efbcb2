//! PKRU: the rights to the keys of user pages.

use crate::KeyRights;
use crate::cpuid::Features;
use crate::instructions::{rdpkru, wrpkru};

/// PKRU, the protection-key rights register for user pages, usable.
///
/// It rules accesses to pages with U/S=1 at every privilege level, so ring 0 is bound by it too. It is a register of
/// the logical CPU: Linux keeps it per thread.
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
    /// Returns the register if the system has switched it on.
    ///
    /// It goes by OSPKE, which mirrors CR4.PKE, and not by the vendor: both Intel's and AMD's CPUs have it.
    #[must_use]
    pub fn detect() -> Option<Self> {
        Features::of_this_cpu().ospke.then_some(Self(()))
    }

    /// Assumes that the register is usable.
    ///
    /// # Safety
    ///
    /// CR4.PKE is 1 on every CPU that this value is used on.
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

    /// Puts rights in force.
    ///
    /// # Safety
    ///
    /// Every access that follows is one that the new rights allow, down to the compiler's own to the stack; and no code
    /// relies on memory that they open being closed.
    #[inline]
    pub unsafe fn write(self, rights: KeyRights) {
        // SAFETY: a value of this type exists only where CR4.PKE is 1; the caller answers for the rights.
        unsafe { wrpkru(rights.bits()) }
    }
}
