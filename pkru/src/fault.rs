//! Page faults: decoding the error code, and describing an access that a protection key denied.

use core::fmt;

use bitflags::bitflags;

use crate::rights::Access;
use crate::{KeyRights, ProtectionKey};

bitflags! {
    /// The error code of a page fault (#PF).
    ///
    /// ```text
    ///  31        15 14      6   5    4    3    2    1    0
    /// ┌───┬──────┬────┬─ ─ ─┬────┬────┬────┬────┬────┬────┐
    /// │   │ SGX  │    │     │ PK │I/D │RSVD│U/S │W/R │ P  │
    /// └───┴──────┴────┴─ ─ ─┴────┴────┴────┴────┴────┴────┘
    /// ```
    ///
    /// # References
    ///
    /// Intel SDM volume 3, section "Page-Fault Exceptions"; AMD APM volume 2, section "#PF—Page-Fault Exception (Vector
    /// 14)".
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct ErrorCode: u32 {
        /// The page is present. If this bit is clear, a paging-structure entry was not present.
        const PRESENT = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access was made at privilege level 3.
        const USER = 1 << 2;
        /// A reserved bit is set in a paging structure.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch.
        const FETCH = 1 << 4;
        /// The page's protection key denied the access.
        const PROTECTION_KEY = 1 << 5;
        /// The access was a shadow-stack access.
        const SHADOW_STACK = 1 << 6;
        /// The access violated SGX's access-control rules.
        const SGX = 1 << 15;
    }
}

impl ErrorCode {
    /// Returns the kind of access that faulted.
    ///
    /// The CPU sets [`FETCH`](Self::FETCH) only if EFER.NXE or CR4.SMEP is 1. Without both, a fetch reads as
    /// [`Access::Read`].
    #[must_use]
    pub const fn access(self) -> Access {
        if self.contains(Self::FETCH) {
            Access::Execute
        } else if self.contains(Self::WRITE) {
            Access::Write
        } else {
            Access::Read
        }
    }
}

/// A page fault, decoded from its error code and the leaf entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageFault {
    /// The page's protection key denied the access.
    Key(KeyFault),
    /// No page is mapped there.
    NotPresent {
        /// The address accessed.
        address: u64,
        /// The kind of access.
        access: Access,
    },
    /// The page is mapped, but its flags deny the access.
    Protection {
        /// The address accessed.
        address: u64,
        /// The kind of access.
        access: Access,
    },
    /// A paging structure has a reserved bit set. The page tables are corrupt.
    Reserved {
        /// The address accessed.
        address: u64,
    },
}

impl PageFault {
    /// Decodes a fault.
    ///
    /// `code` and `address` are the fault's error code and CR2. `entry` is the leaf entry that maps `address`. `rights`
    /// is the value of the rights register at the fault: PKRU for a user page, PKRS for a supervisor page. `entry` and
    /// `rights` are used only if a key denied the access.
    ///
    /// # Examples
    ///
    /// ```
    /// use pkru::fault::{ErrorCode, PageFault};
    /// use pkru::{AccessRights, KeyRights, ProtectionKey};
    ///
    /// let key = ProtectionKey::new(2).expect("2 is a key");
    /// let rights = KeyRights::ALL.with(key, AccessRights::READ_ONLY);
    /// let code = ErrorCode::PRESENT | ErrorCode::WRITE | ErrorCode::PROTECTION_KEY;
    /// let fault = PageFault::decode(code, 0x7000, key.in_entry(0x67), rights);
    /// assert_eq!(fault.to_string(), "write of 0x7000 denied by key 2 (read-only, rights 0x00000020)");
    /// ```
    #[must_use]
    pub const fn decode(code: ErrorCode, address: u64, entry: u64, rights: KeyRights) -> Self {
        let access = code.access();
        if code.contains(ErrorCode::RESERVED) {
            Self::Reserved { address }
        } else if !code.contains(ErrorCode::PRESENT) {
            Self::NotPresent { address, access }
        } else if code.contains(ErrorCode::PROTECTION_KEY) {
            Self::Key(KeyFault { address, access, key: ProtectionKey::of_entry(entry), rights })
        } else {
            Self::Protection { address, access }
        }
    }
}

impl fmt::Display for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(fault) => fault.fmt(f),
            Self::NotPresent { address, access } => write!(f, "{access} of {address:#x}, where nothing is mapped"),
            Self::Protection { address, access } => write!(f, "{access} of {address:#x} denied by the page's flags"),
            Self::Reserved { address } => write!(f, "reserved bit in the page tables for {address:#x}"),
        }
    }
}

/// An access that a page's protection key denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyFault {
    /// The address accessed.
    pub address: u64,
    /// The kind of access.
    pub access: Access,
    /// The key of the page.
    pub key: ProtectionKey,
    /// The rights in force at the fault.
    pub rights: KeyRights,
}

impl fmt::Display for KeyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, access, key, rights } = self;
        write!(f, "{access} of {address:#x} denied by key {key} ({}, rights {rights})", rights.get(*key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(code: ErrorCode) -> PageFault {
        PageFault::decode(code, 0x1000, ProtectionKey::new(9).unwrap().in_entry(0), KeyRights::NONE)
    }

    #[test]
    fn the_key_is_read_from_the_leaf_entry() {
        let PageFault::Key(fault) = decode(ErrorCode::PRESENT | ErrorCode::PROTECTION_KEY) else { panic!() };
        assert_eq!((fault.key.number(), fault.access), (9, Access::Read));
    }

    #[test]
    fn without_the_pk_bit_the_fault_is_no_key_fault() {
        assert!(matches!(decode(ErrorCode::WRITE), PageFault::NotPresent { access: Access::Write, .. }));
        assert!(matches!(decode(ErrorCode::PRESENT | ErrorCode::WRITE), PageFault::Protection { .. }));
        assert!(matches!(
            decode(ErrorCode::PRESENT | ErrorCode::FETCH),
            PageFault::Protection { access: Access::Execute, .. }
        ));
    }

    #[test]
    fn a_reserved_bit_takes_precedence() {
        let all = ErrorCode::PRESENT | ErrorCode::RESERVED | ErrorCode::PROTECTION_KEY;
        assert_eq!(decode(all), PageFault::Reserved { address: 0x1000 });
    }
}
