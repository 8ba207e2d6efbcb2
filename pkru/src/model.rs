//! A software model of the architecture's page walk and access check.
//!
//! Host tests use it on CPUs without protection keys. The bare-metal tests of `kernel-demo` compare it with the CPU,
//! access by access.
//!
//! # References
//!
//! Intel SDM volume 3, sections "4-Level Paging and 5-Level Paging" (four levels here), "Determination of Access
//! Rights" and "Protection Keys".

use crate::fault::ErrorCode;
use crate::rights::Access;
use crate::{AccessRights, KeyRights, ProtectionKey};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const PAGE_SIZE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The control bits and registers that affect an access.
///
/// [`Mode::default`] is ring 0 with CR0.WP, EFER.NXE, CR4.PKE and CR4.PKS set, CR4.SMEP and CR4.SMAP clear, and all
/// rights to all keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    /// The access is a user access: made at privilege level 3.
    pub user: bool,
    /// CR0.WP.
    pub wp: bool,
    /// EFER.NXE.
    pub nxe: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP is 1 and EFLAGS.AC is 0.
    pub smap: bool,
    /// The value of PKRU; `None` if CR4.PKE is 0.
    pub pkru: Option<KeyRights>,
    /// The value of PKRS; `None` if CR4.PKS is 0.
    pub pkrs: Option<KeyRights>,
}

impl Default for Mode {
    fn default() -> Self {
        Self {
            user: false,
            wp: true,
            nxe: true,
            smep: false,
            smap: false,
            pkru: Some(KeyRights::ALL),
            pkrs: Some(KeyRights::ALL),
        }
    }
}

/// The result of a page walk: the physical address, and the rights that the paging structures give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The physical address.
    pub physical: u64,
    /// The size of the page in bytes: 4 KiB, 2 MiB or 1 GiB.
    pub size: u64,
    /// U/S is 1 at every level.
    pub user: bool,
    /// R/W is 1 at every level.
    pub writable: bool,
    /// XD is 1 at one level at least.
    pub no_execute: bool,
    /// The key in the leaf entry.
    pub key: ProtectionKey,
}

/// Walks four levels of page tables from `cr3`. `read` returns the eight bytes at a physical address.
///
/// The walk assumes that EFER.NXE is 1 and that physical addresses have 52 bits. With EFER.NXE=0 the CPU treats XD as
/// reserved, and with fewer bits the address bits above them. The walk reports neither.
///
/// # Errors
///
/// Returns the bits of the error code that the walk determines: none if an entry is not present, [`ErrorCode::PRESENT`]
/// and [`ErrorCode::RESERVED`] if a reserved bit is set.
pub fn walk(read: impl Fn(u64) -> u64, cr3: u64, address: u64) -> Result<Translation, ErrorCode> {
    let (mut user, mut writable, mut no_execute) = (true, true, false);
    let mut table = cr3 & ADDRESS;
    for level in (0..4).rev() {
        let shift = 12 + 9 * level;
        let entry = read(table + (address >> shift & 0x1ff) * 8);
        if entry & PRESENT == 0 {
            return Err(ErrorCode::empty());
        }
        user &= entry & USER != 0;
        writable &= entry & WRITABLE != 0;
        no_execute |= entry & NO_EXECUTE != 0;
        let leaf = level == 0 || entry & PAGE_SIZE != 0;
        if !leaf {
            table = entry & ADDRESS;
            continue;
        }
        let size = 1 << shift;
        // In a large leaf, bit 12 is PAT and the other address bits below its size are reserved. Level 4 has no leaves.
        let reserved = entry & ADDRESS & (size - 1) & if level == 0 { 0 } else { !(1 << 12) };
        if level == 3 || reserved != 0 {
            return Err(ErrorCode::PRESENT | ErrorCode::RESERVED);
        }
        let physical = (entry & ADDRESS & !(size - 1)) | (address & (size - 1));
        return Ok(Translation { physical, size, user, writable, no_execute, key: ProtectionKey::of_entry(entry) });
    }
    unreachable!("the loop returns at level 0")
}

/// Checks an access to a page.
///
/// # Errors
///
/// Returns the error code of the page fault if the access is denied.
///
/// # Examples
///
/// ```
/// use pkru::model::{Mode, Translation, check};
/// use pkru::rights::Access;
/// use pkru::{AccessRights, KeyRights, ProtectionKey};
///
/// let key = ProtectionKey::new(4).expect("4 is a key");
/// let page = Translation { physical: 0, size: 4096, user: true, writable: true, no_execute: true, key };
/// let pkru = KeyRights::ALL.with(key, AccessRights::READ_ONLY);
/// let mode = Mode { pkru: Some(pkru), ..Mode::default() };
/// assert!(check(&page, Access::Read, &mode).is_ok());
/// assert!(check(&page, Access::Write, &mode).is_err(), "PKRU applies to ring 0 too");
/// ```
pub fn check(page: &Translation, access: Access, mode: &Mode) -> Result<(), ErrorCode> {
    let by_flags = if mode.user {
        page.user
            && match access {
                Access::Read => true,
                Access::Write => page.writable,
                Access::Execute => !(mode.nxe && page.no_execute),
            }
    } else {
        match access {
            Access::Read => !(page.user && mode.smap),
            Access::Write => !(page.user && mode.smap) && (page.writable || !mode.wp),
            Access::Execute => !(page.user && mode.smep || mode.nxe && page.no_execute),
        }
    };
    let by_key = allowed_by_key(page, access, mode);
    if by_flags && by_key {
        return Ok(());
    }

    let mut code = ErrorCode::PRESENT;
    code.set(ErrorCode::USER, mode.user);
    code.set(ErrorCode::PROTECTION_KEY, !by_key);
    match access {
        Access::Read => {}
        Access::Write => code |= ErrorCode::WRITE,
        Access::Execute => code.set(ErrorCode::FETCH, mode.nxe || mode.smep),
    }
    Err(code)
}

fn allowed_by_key(page: &Translation, access: Access, mode: &Mode) -> bool {
    let register = if page.user {
        mode.pkru
    } else if mode.user {
        // PKRS applies to supervisor accesses only. The U/S flag denies user accesses to a supervisor page.
        None
    } else {
        mode.pkrs
    };
    let Some(rights) = register.map(|rights| rights.get(page.key)) else { return true };
    match access {
        Access::Execute => true,
        Access::Read => rights.allow(Access::Read),
        Access::Write if mode.user || mode.wp => rights.allow(Access::Write),
        // With CR0.WP=0, access-disable applies to supervisor writes and write-disable does not.
        Access::Write => !rights.contains(AccessRights::ACCESS_DISABLE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::vec::Vec;

    fn key(number: u8) -> ProtectionKey {
        ProtectionKey::new(number).unwrap()
    }

    fn page(user: bool) -> Translation {
        Translation { physical: 0, size: 4096, user, writable: true, no_execute: true, key: key(3) }
    }

    fn mode(rights: AccessRights) -> Mode {
        let rights = KeyRights::ALL.with(key(3), rights);
        Mode { pkru: Some(rights), pkrs: Some(rights), ..Mode::default() }
    }

    const DATA: [Access; 2] = [Access::Read, Access::Write];

    #[test]
    fn access_disable_denies_data_accesses_and_allows_fetches() {
        for user in [false, true] {
            for access in DATA {
                let code = check(&page(user), access, &mode(AccessRights::NONE)).unwrap_err();
                assert!(code.contains(ErrorCode::PROTECTION_KEY | ErrorCode::PRESENT));
            }
            let executable = Translation { no_execute: false, ..page(user) };
            assert_eq!(check(&executable, Access::Execute, &mode(AccessRights::NONE)), Ok(()));
        }
    }

    #[test]
    fn write_disable_applies_to_ring_0_only_with_wp() {
        let read_only = mode(AccessRights::READ_ONLY);
        assert!(check(&page(true), Access::Write, &read_only).is_err());
        assert!(check(&page(true), Access::Write, &Mode { wp: false, ..read_only }).is_ok());
        assert!(check(&page(true), Access::Write, &Mode { wp: false, user: true, ..read_only }).is_err());
        assert!(check(&page(true), Access::Write, &Mode { wp: false, ..mode(AccessRights::NONE) }).is_err());
    }

    #[test]
    fn each_register_applies_to_its_own_pages() {
        let closed = Some(KeyRights::NONE);
        let open = Some(KeyRights::ALL);
        let pkru_closed = Mode { pkru: closed, pkrs: open, ..Mode::default() };
        let pkrs_closed = Mode { pkru: open, pkrs: closed, ..Mode::default() };
        assert!(check(&page(true), Access::Read, &pkru_closed).is_err());
        assert!(check(&page(false), Access::Read, &pkru_closed).is_ok());
        assert!(check(&page(true), Access::Read, &pkrs_closed).is_ok());
        assert!(check(&page(false), Access::Read, &pkrs_closed).is_err());
    }

    #[test]
    fn a_user_access_to_a_supervisor_page_is_no_key_fault() {
        let user = Mode { user: true, ..mode(AccessRights::NONE) };
        let code = check(&page(false), Access::Read, &user).unwrap_err();
        assert_eq!(code, ErrorCode::PRESENT | ErrorCode::USER);
    }

    #[test]
    fn disabled_registers_have_no_effect() {
        let off = Mode { pkru: None, pkrs: None, ..Mode::default() };
        assert!([true, false].into_iter().all(|user| check(&page(user), Access::Write, &off).is_ok()));
    }

    /// Returns a function that reads physical memory holding these page-table entries: (table, index, entry).
    fn tables(entries: &[(u64, usize, u64)]) -> impl Fn(u64) -> u64 + use<> {
        let entries: HashMap<u64, u64> =
            entries.iter().map(|(table, index, entry)| (table + *index as u64 * 8, *entry)).collect();
        move |address| entries.get(&address).copied().unwrap_or(0)
    }

    #[test]
    fn a_walk_ends_at_leaves_of_three_sizes() {
        let flags = PRESENT | WRITABLE | USER;
        let read = tables(&[
            (0x1000, 0, 0x2000 | flags),
            (0x2000, 0, 0x3000 | flags),
            (0x2000, 1, key(1).in_entry(0x4000_0000 | flags | PAGE_SIZE)),
            (0x3000, 0, 0x4000 | flags),
            (0x3000, 1, key(2).in_entry(0x20_0000 | flags | PAGE_SIZE | NO_EXECUTE)),
            (0x4000, 5, key(15).in_entry(0x9000 | PRESENT | USER)),
        ]);
        let found: Vec<_> = [0x5123, 0x20_1234, 0x4000_5678]
            .into_iter()
            .map(|address| walk(&read, 0x1000, address).unwrap())
            .map(|page| (page.physical, page.size, page.key.number(), page.writable, page.no_execute))
            .collect();
        assert_eq!(
            found,
            [
                (0x9123, 1 << 12, 15, false, false),
                (0x20_1234, 1 << 21, 2, true, true),
                (0x4000_5678, 1 << 30, 1, true, false)
            ]
        );
        assert_eq!(walk(&read, 0x1000, 0x6000), Err(ErrorCode::empty()));
    }

    #[test]
    fn reserved_bits_are_reported() {
        let misaligned = tables(&[(0x1000, 0, 0x2000 | PRESENT), (0x2000, 0, 0x2000 | PRESENT | PAGE_SIZE)]);
        assert_eq!(walk(misaligned, 0x1000, 0), Err(ErrorCode::PRESENT | ErrorCode::RESERVED));
        let leaf_at_top = tables(&[(0x1000, 0, PRESENT | PAGE_SIZE)]);
        assert_eq!(walk(leaf_at_top, 0x1000, 0), Err(ErrorCode::PRESENT | ErrorCode::RESERVED));
    }
}
