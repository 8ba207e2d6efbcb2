//! Keys and rights on the CPU: the values of the registers, and the accesses that they deny.

#![no_main]
#![cfg(target_os = "none")]
#![no_std]

use core::arch::asm;

use kernel_demo::fence::{self, Rights};
use kernel_demo::trap::Cause;
use kernel_demo::{memory, probe};
use pkru::cpuid::Features;
use pkru::fault::{KeyFault, PageFault};
use pkru::registers::{Pkrs, Pkru};
use pkru::rights::Access;
use pkru::{AccessRights, KeyRights, ProtectionKey};
use x86_64::VirtAddr;
use x86_64::registers::control::{Cr0, Cr0Flags};
use x86_64::structures::paging::PageTableFlags;

kernel_demo::test_suite!(
    cpuid_reports_the_enabled_features,
    pkru_reads_back_what_was_written,
    pkrs_reads_back_what_was_written,
    pkru_restricts_ring_0_on_user_pages,
    pkrs_restricts_supervisor_pages,
    a_register_does_not_restrict_the_others_pages,
    write_disable_allows_reads,
    write_disable_restricts_ring_0_only_with_wp,
    fetches_are_not_checked,
    a_fault_names_address_key_access_and_rights,
    nonzero_ecx_is_a_general_protection_fault,
);

const KEY: ProtectionKey = ProtectionKey::new(5).expect("5 is a key");
const USER_PAGE: u64 = 0x200_0000_0000;
const SUPERVISOR_PAGE: u64 = USER_PAGE + 0x10_0000;

/// Returns the address of a page with the key, which the first call maps.
fn page(user: bool) -> u64 {
    let start = if user { USER_PAGE } else { SUPERVISOR_PAGE };
    let start = VirtAddr::new(start);
    if memory::leaf(start).is_none() {
        let mut flags = PageTableFlags::from_bits_retain(KEY.in_entry(memory::FLAGS.bits()));
        flags.set(PageTableFlags::USER_ACCESSIBLE, user);
        flags.remove(PageTableFlags::NO_EXECUTE);
        memory::map(start..start + 4096, flags).expect("the page can be mapped");
        // SAFETY: the page was just mapped. 0xc3 is the opcode of `ret`, for the probes that execute it.
        unsafe { start.as_mut_ptr::<u8>().write(0xc3) };
    }
    start.as_u64()
}

/// Makes an access with the given rights to `KEY` in PKRU and PKRS.
fn access(address: u64, access: Access, pkru: AccessRights, pkrs: AccessRights) -> Result<(), Cause> {
    let rights = Rights { pkru: KeyRights::ALL.with(KEY, pkru), pkrs: KeyRights::ALL.with(KEY, pkrs) };
    // SAFETY: the kernel's pages have keys 0 and 1, to which all rights stay.
    unsafe { fence::write(rights) };
    // SAFETY: only this suite uses the page, and it holds the opcode of `ret`.
    let result = unsafe { probe::access(address, access) };
    fence::open();
    result.map_err(|trap| trap.cause)
}

const ALL: AccessRights = AccessRights::READ_WRITE;
const READ_ONLY: AccessRights = AccessRights::READ_ONLY;
const NONE: AccessRights = AccessRights::NONE;

fn is_key_fault(result: Result<(), Cause>) -> bool {
    matches!(result, Err(Cause::PageFault(PageFault::Key(_))))
}

fn cpuid_reports_the_enabled_features() {
    let features = Features::of_this_cpu();
    assert!(features.pku && features.ospke && features.pks && features.fsgsbase, "{features:?}");
    assert!(Pkru::detect().is_some());
}

fn pkru_reads_back_what_was_written() {
    let register = Pkru::detect().expect("the kernel has enabled PKU");
    for bits in [0xffff_fffc, 0x5555_5554, 0x1234_5670, 0] {
        // SAFETY: the kernel's pages are supervisor pages, which PKRU does not restrict.
        unsafe { register.write(KeyRights::from_bits(bits)) };
        assert_eq!(register.read().bits(), bits);
    }
}

fn pkrs_reads_back_what_was_written() {
    // SAFETY: all code runs in ring 0.
    let register = unsafe { Pkrs::detect() }.expect("the CPU has PKS");
    for bits in [0xffff_fff0, 0x5555_5550, 0x1234_5670, 0] {
        // SAFETY: the kernel's pages have key 0, the trap stacks key 1, and all rights to both stay.
        unsafe { register.write(KeyRights::from_bits(bits)) };
        assert_eq!(register.read().bits(), bits);
    }
}

fn pkru_restricts_ring_0_on_user_pages() {
    assert_eq!(access(page(true), Access::Write, ALL, ALL), Ok(()), "control");
    assert!(is_key_fault(access(page(true), Access::Write, NONE, ALL)));
    assert!(is_key_fault(access(page(true), Access::Read, NONE, ALL)));
    assert!(is_key_fault(access(page(true), Access::Write, READ_ONLY, ALL)));
}

fn pkrs_restricts_supervisor_pages() {
    assert_eq!(access(page(false), Access::Write, ALL, ALL), Ok(()), "control");
    assert!(is_key_fault(access(page(false), Access::Write, ALL, NONE)));
    assert!(is_key_fault(access(page(false), Access::Read, ALL, NONE)));
    assert!(is_key_fault(access(page(false), Access::Write, ALL, READ_ONLY)));
}

fn a_register_does_not_restrict_the_others_pages() {
    assert_eq!(access(page(true), Access::Write, ALL, NONE), Ok(()));
    assert_eq!(access(page(false), Access::Write, NONE, ALL), Ok(()));
}

fn write_disable_allows_reads() {
    assert_eq!(access(page(true), Access::Read, READ_ONLY, ALL), Ok(()));
    assert_eq!(access(page(false), Access::Read, ALL, READ_ONLY), Ok(()));
}

fn write_disable_restricts_ring_0_only_with_wp() {
    for user in [true, false] {
        assert!(is_key_fault(access(page(user), Access::Write, READ_ONLY, READ_ONLY)));
        // SAFETY: nothing in this suite relies on read-only pages.
        unsafe { Cr0::update(|flags| flags.remove(Cr0Flags::WRITE_PROTECT)) };
        let without = access(page(user), Access::Write, READ_ONLY, READ_ONLY);
        let disabled = access(page(user), Access::Write, NONE, NONE);
        // SAFETY: the boot code has set WP, so the kernel runs with it.
        unsafe { Cr0::update(|flags| flags.insert(Cr0Flags::WRITE_PROTECT)) };
        assert_eq!(without, Ok(()));
        assert!(is_key_fault(disabled), "access-disable applies without WP");
    }
}

fn fetches_are_not_checked() {
    assert_eq!(access(page(true), Access::Execute, NONE, NONE), Ok(()));
    assert_eq!(access(page(false), Access::Execute, NONE, NONE), Ok(()));
}

fn a_fault_names_address_key_access_and_rights() {
    let address = page(true) + 123;
    let fault = KeyFault { address, access: Access::Write, key: KEY, rights: KeyRights::ALL.with(KEY, READ_ONLY) };
    assert_eq!(access(address, Access::Write, READ_ONLY, ALL), Err(Cause::PageFault(PageFault::Key(fault))));
    let unmapped = SUPERVISOR_PAGE + 4096;
    let fault = PageFault::NotPresent { address: unmapped, access: Access::Read };
    assert_eq!(access(unmapped, Access::Read, NONE, NONE), Err(Cause::PageFault(fault)));
}

fn nonzero_ecx_is_a_general_protection_fault() {
    #[unsafe(naked)]
    unsafe extern "C" fn rdpkru_with_ecx_1(_: u64) -> u64 {
        core::arch::naked_asm!("mov ecx, 1", "rdpkru", "ret")
    }
    let mut domain =
        kernel_demo::domain::Domain::new(kernel_demo::domain::Kernel, pkru::domain::Sizes { stack: 8192, heap: 8192 })
            .expect("a domain can be created");
    // SAFETY: the function only raises an exception, which rewinds the domain.
    let result = unsafe { domain.enter(&(), rdpkru_with_ecx_1, 0) };
    let Err(pkru::domain::Failure::Trap(trap)) = result else { panic!("{result:?}") };
    assert_eq!(trap.cause, Cause::Exception(13));
    // SAFETY: CR4.PKE is 1, so RDPKRU with ECX = 0 raises no exception.
    unsafe { asm!("xor ecx, ecx", "rdpkru", out("eax") _, out("ecx") _, out("edx") _) };
}
