//! Vaults, which no domain can read, and regions, which selected domains can access.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::hint::black_box;

use pkru_userspace::{Access, Domain, Error, Region, RegionAccess, Vault, ViolationKind};
use support::{contain, domain, key_fault, mistake, suite, works};

suite! {
    a_vault_is_closed_to_domains,
    a_vault_is_closed_to_a_domain_while_it_is_open_in_the_caller,
    what_a_vault_lends_can_be_used_on_other_threads,
    a_thread_has_no_rights_to_a_vault_that_nobody_has_opened,
    a_region_is_shared_with_those_who_are_named,
    a_region_outlives_its_handle_and_gives_its_key_back,
    safe_functions_open_nothing_in_a_domain,
    regions_leave_keys_for_domains,
}

fn a_vault_is_closed_to_domains() {
    let mut domain = domain("curious");
    let mut vault = Vault::new([0x5e_u8; 64]).unwrap();
    let address = vault.as_ptr().cast::<u8>();
    // SAFETY: deliberately unsound: the mistake under test.
    let read = || unsafe { address.read_volatile() };
    let violation = domain.call(read).unwrap_err();
    assert_eq!(key_fault(&violation).access, Access::Read);
    // SAFETY: deliberately unsound: the mistake under test.
    contain(&mut domain, || unsafe { address.cast_mut().write_volatile(0) });
    assert_eq!(vault.with(|bytes| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>()), 64 * 0x5e, "control");
    vault.with_mut(|bytes| bytes[0] = 1);
    assert_eq!(vault.with(|bytes| bytes[0]), 1);
    // Through the kernel, from a domain and outside.
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    // SAFETY: the kernel checks the source.
    let send = || unsafe { libc::write(pipe[1], address.cast(), 64) as i64 };
    assert_eq!(domain.call(send).unwrap(), -1);
    assert_eq!(vault.with(|_| send()), 64, "control");
    // On a thread that has not called a domain.
    let other = std::thread::spawn(move || vault.with(|bytes| bytes[1]));
    assert_eq!(other.join().unwrap(), 0x5e);
}

fn a_vault_is_closed_to_a_domain_while_it_is_open_in_the_caller() {
    let mut domain = domain("curious");
    let vault = Vault::new(7u64).unwrap();
    let address = vault.as_ptr();
    // SAFETY: deliberately unsound: the mistake under test.
    let violation = vault.with(|_| domain.call(|| unsafe { address.read_volatile() })).unwrap_err();
    assert_eq!(key_fault(&violation).address, address as u64);
    assert_eq!(vault.with(|value| *value), 7);
}

fn what_a_vault_lends_can_be_used_on_other_threads() {
    use rayon::prelude::*;
    // The pool's threads exist before the vault does.
    assert_eq!((0..1000u32).into_par_iter().map(|number| number % 3).sum::<u32>(), 999);
    let mut vault = Vault::new([7u8; 4096]).unwrap();
    let sum = vault.with(|secret| secret.par_iter().map(|byte| u64::from(*byte)).sum::<u64>());
    assert_eq!(sum, 7 * 4096);
    vault.with_mut(|secret| secret.par_iter_mut().for_each(|byte| *byte += 1));
    assert!(vault.with(|secret| secret.par_iter().all(|byte| *byte == 8)));
    // A domain called from such a thread has no rights.
    let address = vault.as_ptr().addr();
    vault.with(|_| {
        (0..64).into_par_iter().for_each(|_| {
            contain(&mut domain("curious"), || {
                // SAFETY: deliberately unsound: the mistake under test.
                black_box(unsafe { (address as *const u8).read_volatile() });
            });
        });
    });
}

fn a_thread_has_no_rights_to_a_vault_that_nobody_has_opened() {
    let vault = Vault::new(7u64).unwrap();
    let address = vault.as_ptr().addr();
    // SAFETY: deliberately unsound: the mistake under test.
    let read = move || unsafe { (address as *const u64).read_volatile() };
    let open = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            open.wait();
            read()
        });
        vault.with(|_| {
            open.wait();
            assert_eq!(reader.join().unwrap(), 7, "control: while it is open");
        });
    });
    let status = support::in_child(|| {
        black_box(std::thread::spawn(read).join().unwrap());
    });
    assert_eq!(status, libc::SIGSEGV);
}

fn a_region_is_shared_with_those_who_are_named() {
    drop(domain("first"));
    let region = Region::new(8192).unwrap();
    let mut writer = Domain::builder("writer").region(&region, RegionAccess::ReadWrite).build().unwrap();
    let mut reader = Domain::builder("reader").region(&region, RegionAccess::ReadOnly).build().unwrap();
    let mut stranger = Domain::builder("stranger").build().unwrap();
    let place = region.as_ptr();
    // SAFETY: the address is in the region.
    writer.call(|| unsafe { place.write_bytes(0x33, 100) }).unwrap();
    // SAFETY: as above.
    assert_eq!(reader.call(|| unsafe { place.add(99).read() }).unwrap(), 0x33);
    // SAFETY: deliberately unsound: the mistake under test.
    let write = || unsafe { place.write_volatile(1) };
    let read = || {
        // SAFETY: deliberately unsound: the mistake under test.
        black_box(unsafe { place.read_volatile() });
    };
    assert_eq!(key_fault(&contain(&mut reader, write)).access, Access::Write);
    assert_eq!(key_fault(&contain(&mut stranger, read)).access, Access::Read);
    let mut bytes = [0; 101];
    region.read(0, &mut bytes);
    assert_eq!((bytes[0], bytes[99], bytes[100]), (0x33, 0x33, 0));
    region.write(8190, &[1, 2]);
    // SAFETY: the address is in the region.
    assert_eq!(reader.call(|| unsafe { place.add(8191).read() }).unwrap(), 2);
    assert!(std::panic::catch_unwind(|| region.write(8191, &[1, 2])).is_err(), "beyond its end");
    // A violation discards the domain's own memory, but not the region.
    contain(&mut writer, mistake);
    region.read(0, &mut bytes);
    assert_eq!(bytes[0], 0x33);
}

fn a_region_outlives_its_handle_and_gives_its_key_back() {
    drop(domain("first"));
    for _ in 0..40 {
        let region = Region::new(4096).unwrap();
        let place = region.as_ptr();
        let mut domain = Domain::builder("holder").region(&region, RegionAccess::ReadWrite).build().unwrap();
        drop(region);
        // SAFETY: the domain keeps the region.
        domain.call(|| unsafe { place.write(1) }).unwrap();
    }
    let mut regions = Vec::new();
    let error = loop {
        match Region::new(4096) {
            Ok(region) => regions.push(region),
            Err(error) => break error,
        }
        assert!(regions.len() < 16);
    };
    assert!(matches!(error, Error::KeysExhausted { .. }), "{error}");
    assert!(regions.len() >= 10, "{}", regions.len());
    regions.clear();
    works(&mut Domain::builder("again").build().unwrap());
}

fn safe_functions_open_nothing_in_a_domain() {
    let mut domain = domain("insider");
    let vault = Vault::new(std::cell::Cell::new(7u64)).unwrap();
    let violation = domain.call(|| vault.with(std::cell::Cell::get)).unwrap_err();
    assert_eq!(key_fault(&violation).address, vault.as_ptr() as u64);
    contain(&mut domain, || vault.with(|value| value.set(666)));
    assert_eq!(vault.with(std::cell::Cell::get), 7, "control");

    let region = Region::new(4096).unwrap();
    let violation = contain(&mut domain, || region.write(0, b"written"));
    assert_eq!(key_fault(&violation).address, region.as_ptr() as u64);
    let mut bytes = [1; 7];
    region.read(0, &mut bytes);
    assert_eq!(bytes, [0; 7]);
    region.write(0, b"written");
    region.read(0, &mut bytes);
    assert_eq!(&bytes, b"written", "control");
}

fn regions_leave_keys_for_domains() {
    let mut domain = domain("owner");
    let mut regions = Vec::new();
    let result = domain.call_with(
        &mut [&mut |_| {
            while let Ok(region) = Region::new(4096) {
                regions.push(region);
            }
            1
        }],
        |callbacks| {
            // SAFETY: a callback takes up to six words and returns one.
            let ask: extern "C" fn() -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
            ask()
        },
    );
    // The call returns, unless its key went to a region. Then it fails with `NotReady`.
    match result {
        Ok(answer) => assert_eq!(answer, 1),
        Err(violation) => assert!(matches!(violation.kind(), ViolationKind::NotReady(_)), "{violation}"),
    }
    assert!(regions.len() >= 10, "{}", regions.len());
    works(&mut domain);
    works(&mut Domain::builder("another").build().unwrap());
    works(&mut domain);
    for size in [usize::MAX, usize::MAX - 8192, 1 << 60] {
        assert!(matches!(Region::new(size), Err(Error::Size { .. })));
    }
}
