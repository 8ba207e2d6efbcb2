//! More domains than protection keys.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use pkru_userspace::transfer::{DomainMemory, InvalidResult, Transfer};
use pkru_userspace::{Domain, Error, ProtectionKey, Region, ViolationKind};
use support::{build, contain, domain, key_fault, mistake, small, suite, works};

suite! {
    a_thousand_domains,
    the_one_that_was_called_longest_ago_loses_its_key,
    the_programs_own_keys_are_respected,
    two_keys_make_for_any_number_of_domains_and_one_for_one,
    a_domain_that_waits_for_a_key,
    threads_in_the_middle_of_calls_do_not_wait_for_each_other_for_ever,
    a_key_that_only_this_call_could_give,
    statics_are_opened_while_a_call_needs_another,
}

fn a_thousand_domains() {
    drop(domain("first"));
    let mut domains: Vec<_> = (0..1000).map(|_| small("one of many").build().unwrap()).collect();
    let words: Vec<_> = (0u64..)
        .zip(&mut domains)
        .map(|(number, domain)| domain.call(|| Box::leak(Box::new(number)) as *mut u64 as u64).unwrap())
        .collect();
    // These orders make most domains lose and regain their keys.
    for step in [1, 7, 333] {
        for index in 0..domains.len() {
            let index = index * step % domains.len();
            let word = words[index];
            // SAFETY: the word is on this domain's heap.
            assert_eq!(domains[index].call(|| unsafe { *(word as *const u64) }).unwrap(), index as u64);
        }
    }
    let with_key = domains.iter().filter(|domain| domain.key().is_some()).count();
    assert!((12..=14).contains(&with_key), "{with_key} have keys");

    // A domain without a key is closed to other domains, for reads and for writes.
    let (parked, word) = domains.iter().zip(&words).find(|(domain, _)| domain.key().is_none()).unwrap();
    let (word, number) = (*word as *mut u64, parked.name().len());
    assert_eq!(number, "one of many".len());
    let mut other = small("other").build().unwrap();
    // SAFETY: deliberately unsound: the mistakes under test.
    let fault = key_fault(&contain(&mut other, || unsafe { word.write_volatile(99) }));
    assert_eq!(fault.address, word as u64);
    // SAFETY: as above.
    other.call(|| unsafe { word.read_volatile() }).unwrap_err();
    for (index, domain) in domains.iter_mut().enumerate() {
        let word = words[index];
        // SAFETY: the word is on this domain's heap.
        assert_eq!(domain.call(|| unsafe { *(word as *const u64) }).unwrap(), index as u64);
        if index % 100 == 0 {
            contain(domain, mistake);
        }
    }
}

fn the_one_that_was_called_longest_ago_loses_its_key() {
    drop(domain("first"));
    let mut domains: Vec<_> = (0..12).map(|_| small("idle").build().unwrap()).collect();
    let mut busy = small("busy").build().unwrap();
    for _ in 0..30 {
        domains.push(small("new").build().unwrap());
        works(&mut busy);
        assert!(busy.key().is_some());
    }
    let key = busy.key();
    works(&mut busy);
    assert_eq!(busy.key(), key);
}

fn the_programs_own_keys_are_respected() {
    // SAFETY: the calls touch no memory.
    let own: Vec<_> = (0..3).map(|_| unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) }).collect();
    if own[0] < 0 {
        drop(domain("none"));
    }
    pkru_userspace::set_key_limit(4);
    drop(domain("first"));
    let mut domains: Vec<_> = (0..20).map(|_| small("limited").build().unwrap()).collect();
    domains.iter_mut().for_each(works);
    assert!(domains.iter().filter(|domain| domain.key().is_some()).count() <= 3);
    assert!(domains.iter().filter_map(Domain::key).all(|key| !own.contains(&i64::from(key.number()))));
    // The program can allocate the keys beyond the limit.
    // SAFETY: as above.
    let mut more: Vec<_> = (0..16).map(|_| unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) }).collect();
    more.retain(|key| *key >= 0);
    assert!(more.len() >= 7, "{more:?}");
    // Once handed in, domains use them.
    for key in &more {
        let key = ProtectionKey::new(u8::try_from(*key).unwrap()).unwrap();
        // SAFETY: the key was just allocated and tags nothing.
        unsafe { pkru_userspace::hand_in_key(key) };
    }
    domains.iter_mut().for_each(works);
    assert!(domains.iter().filter(|domain| domain.key().is_some()).count() > 4);
}

fn two_keys_make_for_any_number_of_domains_and_one_for_one() {
    let taken: Vec<_> = (0..16)
        .map(|_| {
            // SAFETY: the call touches no memory.
            unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) }
        })
        .filter(|key| *key > 0)
        .collect();
    if taken.is_empty() {
        drop(domain("none"));
    }
    let error = Domain::builder("none").build().unwrap_err();
    assert!(matches!(error, Error::KeysExhausted { .. }), "{error}");
    let mut keys = taken.into_iter().map(|key| ProtectionKey::new(u8::try_from(key).unwrap()).unwrap());
    let mut hand_in = || {
        // SAFETY: the key was just allocated and tags nothing.
        unsafe { pkru_userspace::hand_in_key(keys.next().unwrap()) }
    };
    hand_in();
    use pkru_userspace::capability::{SignalFrame, detect};
    if detect().unwrap().signal_frame == SignalFrame::OnWritableStack {
        // The signal stacks need one more.
        hand_in();
    }
    let mut first = small("first").build().unwrap();
    works(&mut first);
    let error = small("second").build().unwrap_err();
    assert!(matches!(error, Error::KeysExhausted { .. }), "{error}");
    works(&mut first);
    hand_in();
    let mut many: Vec<_> = (0..5).map(|_| small("many").build().unwrap()).collect();
    for domain in many.iter_mut().chain([&mut first]) {
        works(domain);
        contain(domain, mistake);
    }
}

/// A result that runs the function in [`MIDDLE`] when it is received, which is during the call.
struct InTheMiddle;

thread_local! { static MIDDLE: std::cell::RefCell<Option<Box<dyn FnOnce()>>> = const { std::cell::RefCell::new(None) } }

impl Transfer for InTheMiddle {
    type Wire = u8;

    fn into_wire(self) -> u8 {
        0
    }

    fn from_wire(_: &u8, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        let function = MIDDLE.take();
        function.into_iter().for_each(|function| function());
        Ok(Self)
    }
}

/// Limits the keys to `count` for domains, plus those that pkru-userspace itself needs.
fn keys_for_domains(count: usize) {
    pkru_userspace::set_key_limit(match pkru_userspace::capability::detect() {
        Ok(found) if found.signal_frame == pkru_userspace::capability::SignalFrame::OnAnyStack => count + 1,
        _ => count + 2,
    });
}

fn threads_in_the_middle_of_calls_do_not_wait_for_each_other_for_ever() {
    keys_for_domains(2);
    drop(domain("first"));
    let barrier = Arc::new(Barrier::new(2));
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let barrier = barrier.clone();
            std::thread::spawn(move || {
                let (mut outer, mut inner) = (small("outer").build().unwrap(), small("inner").build().unwrap());
                MIDDLE.set(Some(Box::new(move || {
                    barrier.wait();
                    let refused = inner.call(|| ());
                    barrier.wait();
                    let kind = refused.unwrap_err().kind().clone();
                    assert!(matches!(kind, ViolationKind::NotReady(Error::KeysExhausted { .. })), "{kind:?}");
                })));
                assert!(outer.call(|| InTheMiddle).is_ok());
                works(&mut outer);
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn a_key_that_only_this_call_could_give() {
    keys_for_domains(1);
    let mut outer = domain("outer");
    MIDDLE.set(Some(Box::new(|| {
        assert!(matches!(Region::new(1), Err(Error::KeysExhausted { .. })));
    })));
    assert!(outer.call(|| InTheMiddle).is_ok());
    works(&mut outer);
}

fn statics_are_opened_while_a_call_needs_another() {
    drop(domain("first"));
    let (begun, begins) = std::sync::mpsc::channel();
    let caller = std::thread::spawn(move || {
        let (mut outer, mut inner) = (small("outer").build().unwrap(), small("inner").build().unwrap());
        MIDDLE.set(Some(Box::new(move || {
            begun.send(()).unwrap();
            std::thread::sleep(Duration::from_millis(500));
            works(&mut inner);
        })));
        assert!(outer.call(|| InTheMiddle).is_ok());
    });
    begins.recv().unwrap();
    works(&mut support::open_domain("open"));
    caller.join().unwrap();
}

fn a_domain_that_waits_for_a_key() {
    // One key for domains, plus those that pkru-userspace itself needs.
    pkru_userspace::set_key_limit(match pkru_userspace::capability::detect() {
        Ok(found) if found.signal_frame == pkru_userspace::capability::SignalFrame::OnAnyStack => 2,
        _ => 3,
    });
    let mut first = build(small("first").deadline(Duration::from_millis(300)));
    let mut second = small("second").build().unwrap();
    static INSIDE: AtomicBool = AtomicBool::new(false);
    let running = std::thread::spawn(move || {
        INSIDE.store(true, Ordering::Relaxed);
        let violation = first.call(|| while std::hint::black_box(true) {});
        violation.unwrap_err().kind().clone()
    });
    while !INSIDE.load(Ordering::Relaxed) {
        std::thread::yield_now();
    }
    works(&mut second);
    assert_eq!(running.join().unwrap(), ViolationKind::Deadline);
    works(&mut second);
}
