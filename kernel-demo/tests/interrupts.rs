//! Interrupts in a domain: the handler runs with all rights, and the domain keeps its own.

#![no_main]
#![cfg(target_os = "none")]
#![no_std]

use core::sync::atomic::{AtomicU64, Ordering};

use kernel_demo::domain::{Domain, Kernel};
use kernel_demo::fence::{self, Fence, Rights};
use kernel_demo::testing::with_each_fence;
use kernel_demo::{timer, traps};
use pkru::KeyRights;
use pkru::domain::{Entry, Failure, Sizes};

kernel_demo::test_suite!(
    a_handler_has_all_rights,
    a_domain_has_its_own_rights_after_an_interrupt,
    the_timer_interrupts_a_domain,
    rewinds_work_under_timer_interrupts,
);

static SEEN: AtomicU64 = AtomicU64::new(0);

fn new() -> Domain {
    let sizes = Sizes { stack: 16 * 1024, heap: 8 * 1024 };
    Domain::new(Kernel, sizes).unwrap_or_else(|error| panic!("cannot create a domain: {error:?}"))
}

fn call(domain: &mut Domain, entry: Entry, argument: u64) -> Result<u64, ()> {
    // SAFETY: the entry points write only their stack and what the domain may not write, which traps.
    unsafe { domain.enter(&(), entry, argument) }.map_err(|failure| match failure {
        Failure::Trap(_) => (),
        Failure::NotReady(error) => panic!("cannot prepare the domain: {error:?}"),
    })
}

/// Checks that all rights are in force, and stores the interrupted rights in the kernel's memory.
fn handler(interrupted: Rights) {
    assert_eq!(fence::read(), Rights { pkru: KeyRights::ALL, pkrs: KeyRights::ALL });
    SEEN.store(u64::from(interrupted.behind(Fence::current()).bits()), Ordering::Relaxed);
}

unsafe extern "C" fn interrupt(_: u64) -> u64 {
    traps::software_interrupt();
    7
}

unsafe extern "C" fn interrupt_then_write(address: u64) -> u64 {
    traps::software_interrupt();
    // SAFETY: this is the violation. The write traps, so it changes nothing.
    unsafe { (address as *mut u64).write_volatile(0xbad) };
    0
}

fn a_handler_has_all_rights() {
    traps::on_software_interrupt(handler);
    with_each_fence(|| {
        let mut domain = new();
        SEEN.store(0, Ordering::Relaxed);
        assert_eq!(call(&mut domain, interrupt, 0), Ok(7));
        let seen = KeyRights::from_bits(SEEN.load(Ordering::Relaxed) as u32);
        assert!(seen.get(domain.memory().key()).is_empty(), "{seen} are not the domain's rights");
        assert!(!seen.get(pkru::ProtectionKey::DEFAULT).is_empty(), "{seen} are not the domain's rights");
    });
}

fn a_domain_has_its_own_rights_after_an_interrupt() {
    traps::on_software_interrupt(handler);
    with_each_fence(|| {
        assert_eq!(call(&mut new(), interrupt_then_write, SEEN.as_ptr() as u64), Err(()));
        assert_ne!(SEEN.load(Ordering::Relaxed), 0xbad);
    });
}

unsafe extern "C" fn spin(rounds: u64) -> u64 {
    (0..rounds).fold(1, |sum, round| core::hint::black_box(sum ^ round))
}

fn the_timer_interrupts_a_domain() {
    timer::start();
    with_each_fence(|| {
        let mut domain = new();
        let (_, before) = timer::ticks();
        for _ in 0..10_000 {
            assert!(call(&mut domain, spin, 10_000).is_ok());
            if timer::ticks().1 >= before + 3 {
                return;
            }
        }
        panic!("only {} ticks interrupted the domain", timer::ticks().1 - before);
    });
    timer::stop();
}

fn rewinds_work_under_timer_interrupts() {
    traps::on_software_interrupt(handler);
    timer::start();
    with_each_fence(|| {
        let mut domain = new();
        let (before, _) = timer::ticks();
        while timer::ticks().0 < before + 20 {
            for _ in 0..50 {
                assert_eq!(call(&mut domain, interrupt_then_write, SEEN.as_ptr() as u64), Err(()));
            }
        }
    });
    timer::stop();
}
