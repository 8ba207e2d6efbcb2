//! Building, using, discarding and dropping domains.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use pkru_userspace::{Domain, Error};
use support::{build, contain, domain, mistake, suite, works};

suite! {
    state_lasts_until_a_violation,
    discard_leaves_nothing_to_read,
    impossible_sizes_are_refused,
    the_smallest_domain_works,
    nothing_leaks_over_many_lives,
    ten_thousand_rewinds,
    locked_memory_is_discarded_from_any_thread,
    a_domain_cannot_make_or_call_another,
}

fn state_lasts_until_a_violation() {
    let mut domain = domain("state");
    let place = domain.call(|| std::ptr::from_mut(Box::leak(Box::new(0u64))) as usize).unwrap();
    let count = || {
        let place = place as *mut u64;
        // SAFETY: the word is on the domain's heap until a discard.
        unsafe { place.write(place.read() + 1) };
        // SAFETY: as above.
        unsafe { place.read() }
    };
    assert_eq!([domain.call(count).unwrap(), domain.call(count).unwrap()], [1, 2]);
    contain(&mut domain, mistake);
    // SAFETY: the address is on the domain's heap. The word is zero, or newly allocated.
    let word = domain.call(|| unsafe { (place as *const u64).read() }).unwrap();
    assert_ne!(word, 2, "the state is gone");
}

fn discard_leaves_nothing_to_read() {
    let mut domain = domain("secret");
    let secret = |byte: u8| domain_secret(byte);
    fn domain_secret(byte: u8) -> usize {
        vec![byte; 1 << 20].leak().as_ptr() as usize
    }
    let place = domain.call(|| secret(0x77)).unwrap();
    let look = || {
        // SAFETY: the range is in the domain's heap.
        unsafe { std::slice::from_raw_parts(place as *const u8, 1 << 20) }.iter().filter(|byte| **byte == 0x77).count()
            as u64
    };
    assert_eq!(domain.call(look).unwrap(), 1 << 20, "control");
    domain.discard();
    assert_eq!(domain.call(look).unwrap(), 0);
}

fn impossible_sizes_are_refused() {
    let _ = domain("control");
    for (builder, part) in [
        (Domain::builder("none").heap_size(0), "heap"),
        (Domain::builder("none").stack_size(0), "stack"),
        (Domain::builder("huge").heap_size(usize::MAX), "heap"),
        (Domain::builder("huge").heap_size(1 << 45), "heap"),
        (Domain::builder("huge").stack_size(1 << 45), "stack"),
    ] {
        match builder.build() {
            Err(error @ Error::Size { part: found, limit, .. }) => {
                assert_eq!(found, part);
                assert!(error.to_string().contains(&limit.to_string()), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
}

fn the_smallest_domain_works() {
    let mut domain = build(Domain::builder("small").stack_size(16384).heap_size(16384));
    works(&mut domain);
}

/// Returns the number of mappings of this process.
fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

fn nothing_leaks_over_many_lives() {
    let live = || {
        let mut domain = Domain::builder("short").build().unwrap();
        contain(&mut domain, mistake);
    };
    drop(domain("first"));
    live();
    let before = mappings();
    for _ in 0..300 {
        live();
    }
    assert!(mappings() <= before + 2, "{before} mappings before, {} after", mappings());
}

fn ten_thousand_rewinds() {
    let mut domain = domain("rewind");
    for _ in 0..10_000 {
        domain.call(mistake).unwrap_err();
    }
    works(&mut domain);
}

fn locked_memory_is_discarded_from_any_thread() {
    let mut domain = build(Domain::builder("locked").heap_size(1 << 20));
    // SAFETY: the call does not change memory contents.
    assert_eq!(unsafe { libc::mlockall(libc::MCL_CURRENT) }, 0);
    contain(&mut domain, mistake);
    let place = domain.call(|| vec![0x77_u8; 1000].leak().as_ptr() as usize).unwrap();
    let mut domain = std::thread::spawn(move || {
        domain.discard();
        domain
    })
    .join()
    .unwrap();
    // SAFETY: the block is in the domain's heap.
    let read = || unsafe { std::slice::from_raw_parts(place as *const u8, 1000) }.contains(&0x77);
    assert!(!domain.call(read).unwrap());
    contain(&mut domain, mistake);
}

fn a_domain_cannot_make_or_call_another() {
    let mut outer = domain("outer");
    let inner = std::sync::Mutex::new(Domain::builder("inner").build().unwrap());
    let refused = outer.call(|| Domain::builder("nested").build().is_err_and(|error| error == Error::InDomain));
    assert!(refused.unwrap());
    let refused = outer.call(|| pkru_userspace::capability::detect().is_err_and(|error| error == Error::InDomain));
    assert!(refused.unwrap());
    // Locking would write the caller's memory. A pointer bypasses the lock.
    let place = inner.lock().unwrap().key().unwrap().number();
    let pointer = std::ptr::from_ref(&inner) as usize;
    let nested = outer.call(|| {
        // SAFETY: deliberately unsound: it accesses the domain without the lock.
        let inner = unsafe { &mut *(*(pointer as *mut std::sync::Mutex<Domain>)).get_mut().unwrap() };
        let violation = inner.call(|| 7u8).unwrap_err();
        (violation.to_string(), inner.key().unwrap().number())
    });
    let (message, key) = nested.unwrap();
    assert!(message.contains("cannot make or call another"), "{message}");
    assert_eq!(key, place);
    works(&mut outer);
    contain(&mut outer, mistake);
    works(&mut inner.into_inner().unwrap());
}
