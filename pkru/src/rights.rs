//! Access rights: the two bits for one key, and the 32-bit value for all 16 keys.

use core::fmt;

use bitflags::bitflags;

use crate::ProtectionKey;

bitflags! {
    /// The rights to the pages of one key, in the hardware's encoding: a set bit denies accesses.
    ///
    /// If access-disable is set, write-disable has no effect. Protection keys do not affect instruction fetches.
    ///
    /// # References
    ///
    /// Intel SDM volume 3, section "Protection Keys".
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct AccessRights: u8 {
        /// AD: denies all data accesses.
        const ACCESS_DISABLE = 1;
        /// WD: denies writes. It applies to supervisor accesses only if CR0.WP is 1.
        const WRITE_DISABLE = 2;
    }
}

impl AccessRights {
    /// Allows reads and writes.
    pub const READ_WRITE: Self = Self::empty();
    /// Allows reads.
    pub const READ_ONLY: Self = Self::WRITE_DISABLE;
    /// Allows neither. Only AD is set, as in Linux's initial PKRU.
    pub const NONE: Self = Self::ACCESS_DISABLE;

    /// Returns whether these rights allow an access, for user accesses and for supervisor accesses with CR0.WP=1.
    #[must_use]
    pub const fn allow(self, access: Access) -> bool {
        match access {
            Access::Execute => true,
            Access::Read => !self.contains(Self::ACCESS_DISABLE),
            Access::Write => self.is_empty(),
        }
    }
}

impl fmt::Display for AccessRights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.allow(Access::Read), self.allow(Access::Write)) {
            (false, _) => "none",
            (true, false) => "read-only",
            (true, true) => "read-write",
        })
    }
}

/// The kind of a memory access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction fetch.
    Execute,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Execute => "execute",
        })
    }
}

/// The rights to all sixteen keys: the value of PKRU, and of the low half of PKRS.
///
/// ```text
///  31 30  29 28              5 4   3 2   1 0
/// ┌─────┬─────┬─ ─ ─ ─ ─ ─┬─────┬─────┬─────┐
/// │ 15  │ 14  │           │  2  │  1  │  0  │   of each pair: WD, AD
/// └─────┴─────┴─ ─ ─ ─ ─ ─┴─────┴─────┴─────┘
/// ```
///
/// # References
///
/// Intel SDM volume 3, section "Protection Keys"; for PKRS, section "IA32_PKRS".
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct KeyRights(u32);

impl KeyRights {
    /// Reads and writes under all keys.
    pub const ALL: Self = Self(0);

    /// No access under any key: AD and WD are set for each.
    pub const NONE: Self = Self(u32::MAX);

    /// Linux's initial value for a new program and for signal handlers: reads and writes under key 0, no access under
    /// any other key.
    ///
    /// # References
    ///
    /// Linux 6.12, `arch/x86/mm/pkeys.c`, `init_pkru_value`.
    pub const LINUX_INITIAL: Self = Self(0x5555_5554);

    /// Creates the value from the register's bits.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// Returns the value as the register's bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Returns the rights to one key.
    #[must_use]
    pub const fn get(self, key: ProtectionKey) -> AccessRights {
        AccessRights::from_bits_truncate((self.0 >> Self::shift(key)) as u8)
    }

    /// Returns this value with the rights to one key replaced.
    #[must_use]
    pub const fn with(self, key: ProtectionKey, rights: AccessRights) -> Self {
        Self(self.0 & !(3 << Self::shift(key)) | (rights.bits() as u32) << Self::shift(key))
    }

    /// Returns whether this value allows everything that `other` allows.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        ProtectionKey::all().all(|key| {
            [Access::Read, Access::Write]
                .into_iter()
                .all(|access| self.get(key).allow(access) || !other.get(key).allow(access))
        })
    }

    const fn shift(key: ProtectionKey) -> u32 {
        key.number() as u32 * 2
    }
}

impl fmt::Debug for KeyRights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyRights({:#010x})", self.0)
    }
}

/// Writes the value in hexadecimal.
impl fmt::Display for KeyRights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> ProtectionKey {
        ProtectionKey::new(number).unwrap()
    }

    #[test]
    fn access_disable_dominates() {
        let both = AccessRights::ACCESS_DISABLE | AccessRights::WRITE_DISABLE;
        assert!(!both.allow(Access::Read));
        assert!(!AccessRights::NONE.allow(Access::Write));
        assert!(AccessRights::READ_ONLY.allow(Access::Read));
        assert!(!AccessRights::READ_ONLY.allow(Access::Write));
        assert!(both.allow(Access::Execute), "keys do not affect fetches");
    }

    #[test]
    fn each_key_has_its_own_two_bits() {
        for one in ProtectionKey::all() {
            let rights = KeyRights::ALL.with(one, AccessRights::NONE);
            assert_eq!(rights.bits(), 1 << (2 * one.number()));
            for other in ProtectionKey::all() {
                let expected = if other == one { AccessRights::NONE } else { AccessRights::READ_WRITE };
                assert_eq!(rights.get(other), expected);
            }
        }
    }

    #[test]
    fn linux_initial_allows_key_zero_alone() {
        let expected = ProtectionKey::all().skip(1).fold(KeyRights::ALL, |all, key| all.with(key, AccessRights::NONE));
        assert_eq!(KeyRights::LINUX_INITIAL, expected);
    }

    #[test]
    fn covers_compares_rights_and_not_bits() {
        let none = KeyRights::ALL.with(key(1), AccessRights::NONE);
        let none_twice = KeyRights::ALL.with(key(1), AccessRights::ACCESS_DISABLE | AccessRights::WRITE_DISABLE);
        assert!(none.covers(none_twice) && none_twice.covers(none));
        assert!(KeyRights::ALL.covers(KeyRights::NONE));
        assert!(!none.covers(KeyRights::ALL));
        let read_only = KeyRights::ALL.with(key(1), AccessRights::READ_ONLY);
        assert!(read_only.covers(none) && !none.covers(read_only));
    }
}
