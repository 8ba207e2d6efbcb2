//! Compares the software model with the CPU, access by access.

#![no_main]
#![cfg(target_os = "none")]
#![no_std]

use kernel_demo::fence::{self, Rights};
use kernel_demo::trap::Cause;
use kernel_demo::{memory, println, probe};
use pkru::fault::{ErrorCode, PageFault};
use pkru::model::{self, Mode};
use pkru::rights::Access;
use pkru::{AccessRights, KeyRights, ProtectionKey};
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};
use x86_64::structures::paging::PageTableFlags;
use x86_64::{PhysAddr, VirtAddr};

kernel_demo::test_suite!(
    every_combination_on_a_small_page,
    every_combination_on_a_large_page,
    translations_of_the_kernels_own_pages,
);

const KEY: ProtectionKey = ProtectionKey::new(9).expect("9 is a key");
const SMALL: VirtAddr = VirtAddr::new(0x300_0000_0000);
const LARGE: VirtAddr = VirtAddr::new(0x300_4000_0000);
/// Physical memory that nothing uses: the frame allocator hands out frames from the bottom, and this suite allocates few.
const LARGE_FRAME: PhysAddr = PhysAddr::new(512 << 20);

fn every_combination_on_a_small_page() {
    memory::map(SMALL..SMALL + 4096, memory::FLAGS).expect("the page can be mapped");
    compare_all(SMALL + 0x88);
}

fn every_combination_on_a_large_page() {
    // SAFETY: nothing else uses the physical memory.
    unsafe { memory::map_large(LARGE, LARGE_FRAME, memory::FLAGS) }.expect("the page can be mapped");
    compare_all(LARGE + 0x12_3456);
}

const RIGHTS: [AccessRights; 4] = [
    AccessRights::READ_WRITE,
    AccessRights::READ_ONLY,
    AccessRights::NONE,
    AccessRights::ACCESS_DISABLE.union(AccessRights::WRITE_DISABLE),
];

fn compare_all(address: VirtAddr) {
    // SAFETY: only this suite uses the page. 0xc3 is the opcode of `ret`, for the probes that execute it.
    unsafe { address.as_mut_ptr::<u8>().write(0xc3) };
    let (mut count, mut denied) = (0, 0);
    for bits in 0..16 {
        let mut flags = PageTableFlags::from_bits_retain(KEY.in_entry(PageTableFlags::PRESENT.bits()));
        flags.set(PageTableFlags::USER_ACCESSIBLE, bits & 1 != 0);
        flags.set(PageTableFlags::WRITABLE, bits & 2 != 0);
        flags.set(PageTableFlags::NO_EXECUTE, bits & 4 != 0);
        // SAFETY: only the probes use the page, and the flags deny accesses on purpose.
        unsafe { memory::set_flags(address, flags) };
        for of_user in RIGHTS {
            for of_supervisor in RIGHTS {
                let rights =
                    Rights { pkru: KeyRights::ALL.with(KEY, of_user), pkrs: KeyRights::ALL.with(KEY, of_supervisor) };
                for access in [Access::Read, Access::Write, Access::Execute] {
                    denied += usize::from(!compare(address, access, rights, bits & 8 == 0));
                    count += 1;
                }
            }
        }
    }
    assert!(denied > 100 && count - denied > 100, "{denied} of {count} denied");
    println!("{count} accesses, {denied} of them denied, as the model says");
}

/// Compares one access, and returns whether it was allowed.
fn compare(address: VirtAddr, access: Access, rights: Rights, wp: bool) -> bool {
    let mode = Mode { wp, pkru: Some(rights.pkru), pkrs: Some(rights.pkrs), ..Mode::default() };
    assert!(!Cr4::read().intersects(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION), "`Mode::default` has no SMAP");
    let translation = memory::model_walk(address.as_u64()).expect("the page is mapped");
    let expected = model::check(&translation, access, &mode);

    // SAFETY: nothing in this suite relies on read-only pages.
    unsafe { Cr0::update(|flags| flags.set(Cr0Flags::WRITE_PROTECT, wp)) };
    // SAFETY: the kernel's pages have keys 0 and 1, to which all rights stay.
    unsafe { fence::write(rights) };
    // SAFETY: only this suite uses the page, and it holds the opcode of `ret`.
    let actual = unsafe { probe::access(address.as_u64(), access) };
    fence::open();
    // SAFETY: the boot code has set WP, so the kernel runs with it.
    unsafe { Cr0::update(|flags| flags.insert(Cr0Flags::WRITE_PROTECT)) };

    let flags = memory::leaf(address).map(|leaf| leaf.entry);
    match (expected, actual) {
        (Ok(()), Ok(())) => true,
        (Err(code), Err(trap)) => {
            let by_key = matches!(trap.cause, Cause::PageFault(PageFault::Key(_)));
            assert_eq!(
                code.contains(ErrorCode::PROTECTION_KEY),
                by_key,
                "{access} with {rights:?}, leaf {flags:#x?}: model {code:?}, CPU {trap}"
            );
            false
        }
        (expected, actual) => {
            panic!("{access} with {rights:?}, wp {wp}, leaf {flags:#x?}: model {expected:?}, CPU {actual:?}")
        }
    }
}

static PLACE: u8 = 0;

fn translations_of_the_kernels_own_pages() {
    let here = &raw const PLACE as u64;
    for address in [here, 0x10_0000, 0x1234_5678, 0xfee0_0000] {
        let translation = memory::model_walk(address).expect("the identity map covers it");
        assert_eq!(translation.physical, address);
    }
    assert_eq!(memory::model_walk(0).unwrap_err(), ErrorCode::empty(), "the first page is not mapped");
}
