//! Tags and splits pages of the page tables in force.

#![no_main]
#![cfg(target_os = "none")]
#![no_std]

use core::ops::Range;

use kernel_demo::fence::{self, Fence, Rights};
use kernel_demo::{memory, probe, segments};
use pkru::paging::PagingError;
use pkru::rights::Access;
use pkru::{AccessRights, KeyRights, ProtectionKey};
use x86_64::{PhysAddr, VirtAddr};

kernel_demo::test_suite!(
    a_tag_takes_effect_at_once,
    a_large_leaf_is_tagged_whole_or_not_at_all,
    tagging_an_unmapped_page_is_an_error,
    the_trap_stacks_have_their_key,
    the_first_page_is_not_mapped,
);

const KEY: ProtectionKey = ProtectionKey::new(6).expect("6 is a key");
const SMALL: VirtAddr = VirtAddr::new(0x400_0000_0000);
const LARGE: VirtAddr = VirtAddr::new(0x400_4000_0000);
const LARGE_FRAME: PhysAddr = PhysAddr::new(512 << 20);
const LARGE_SIZE: u64 = 2 << 20;

/// Returns whether the CPU allows a write while PKRS denies every access by `KEY`.
fn writable(address: VirtAddr) -> bool {
    let rights = Rights { pkru: KeyRights::ALL, pkrs: KeyRights::ALL.with(KEY, AccessRights::NONE) };
    // SAFETY: the kernel's pages have keys 0 and 1, to which all rights stay.
    unsafe { fence::write(rights) };
    // SAFETY: only this suite uses the pages.
    let result = unsafe { probe::access(address.as_u64(), Access::Write) };
    fence::open();
    result.is_ok()
}

/// Tags pages.
fn tag(range: Range<VirtAddr>, key: ProtectionKey) -> Result<(), PagingError> {
    // SAFETY: only the probes use the pages, and they run without rights to `KEY` on purpose.
    unsafe { memory::tag(range, key) }
}

fn a_tag_takes_effect_at_once() {
    memory::map(SMALL..SMALL + 3 * 4096, memory::FLAGS).expect("the pages can be mapped");
    let pages = || [0, 4096, 8192].map(|offset| writable(SMALL + offset));
    assert_eq!(pages(), [true, true, true]);
    tag(SMALL + 4096..SMALL + 8192, KEY).expect("the page is mapped");
    assert_eq!(pages(), [true, false, true]);
    tag(SMALL + 4096..SMALL + 8192, ProtectionKey::DEFAULT).expect("the page is mapped");
    assert_eq!(pages(), [true, true, true]);
}

fn a_large_leaf_is_tagged_whole_or_not_at_all() {
    // SAFETY: nothing else uses the physical memory: the frame allocator hands out frames from the bottom, and this suite
    // allocates few.
    unsafe { memory::map_large(LARGE, LARGE_FRAME, memory::FLAGS) }.expect("the page can be mapped");
    let error = PagingError::PartlyInsideLargeLeaf { start: LARGE, size: LARGE_SIZE };
    assert_eq!(tag(LARGE..LARGE + 4096, KEY), Err(error));
    assert!(writable(LARGE));
    tag(LARGE..LARGE + LARGE_SIZE, KEY).expect("the page is mapped");
    assert!(!writable(LARGE) && !writable(LARGE + LARGE_SIZE - 1));
}

fn tagging_an_unmapped_page_is_an_error() {
    let hole = SMALL + 3 * 4096;
    assert_eq!(tag(SMALL..hole + 4096, KEY), Err(PagingError::NotMapped { address: hole }));
    assert!(writable(SMALL), "no page was tagged");
}

fn the_trap_stacks_have_their_key() {
    let stacks = segments::trap_stacks();
    for address in [stacks.start, stacks.end - 1] {
        assert_eq!(memory::leaf(address).expect("they are mapped").key(), fence::TRAP_STACK_KEY);
    }
    for address in [stacks.start - 1, stacks.end] {
        assert_eq!(memory::leaf(address).expect("it is mapped").key(), ProtectionKey::DEFAULT);
    }
    Fence::Pku.select();
    assert!(!memory::leaf(stacks.start).expect("they are mapped").is_user());
    assert!(memory::leaf(stacks.end).expect("it is mapped").is_user());
    Fence::Pks.select();
}

fn the_first_page_is_not_mapped() {
    // SAFETY: the probe only reads, and the page holds no device.
    assert!(unsafe { probe::access(8, Access::Read) }.is_err());
}
