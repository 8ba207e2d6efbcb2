//! Many threads, each with domains.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use pkru_userspace::Domain;
use support::{contain, domain, mistake, small, suite, works};

suite! {
    more_threads_than_keys_each_in_a_domain_at_the_same_time,
    a_fault_in_one_thread_disturbs_no_other,
    thread_locals_do_not_follow_a_domain_to_another_thread,
    a_domain_has_thread_specific_data_of_its_own,
    threads_leave_nothing_behind,
    threads_have_domains_of_their_own,
    a_domain_moves_between_threads,
    a_call_from_a_thread_locals_destructor,
}

fn more_threads_than_keys_each_in_a_domain_at_the_same_time() {
    drop(domain("first"));
    const THREADS: u64 = 40;
    let threads: Vec<_> = (0..THREADS)
        .map(|number| {
            std::thread::spawn(move || {
                let mut domain = small("threaded").build().unwrap();
                let word = domain.call(|| Box::leak(Box::new(number)) as *mut u64 as u64).unwrap();
                for round in 0..30 {
                    // SAFETY: the word is on the domain's heap.
                    let value = domain.call(|| unsafe { *(word as *const u64) });
                    assert_eq!(value.unwrap(), number, "round {round}");
                    std::thread::yield_now();
                }
                contain(&mut domain, mistake);
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn a_fault_in_one_thread_disturbs_no_other() {
    drop(domain("first"));
    static STOP: AtomicBool = AtomicBool::new(false);
    static FAULTS: AtomicU32 = AtomicU32::new(0);
    let faulty: Vec<_> = (0..2)
        .map(|_| {
            std::thread::spawn(|| {
                let mut domain = small("faulty").build().unwrap();
                while !STOP.load(Ordering::Relaxed) {
                    domain.call(mistake).unwrap_err();
                    FAULTS.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let mut domain = small("steady").build().unwrap();
    while FAULTS.load(Ordering::Relaxed) < 100 {
        let sum = domain.call(|| (0..100u64).map(std::hint::black_box).sum::<u64>());
        assert_eq!(sum.unwrap(), 4950);
    }
    STOP.store(true, Ordering::Relaxed);
    faulty.into_iter().for_each(|thread| thread.join().unwrap());
}

fn thread_locals_do_not_follow_a_domain_to_another_thread() {
    thread_local! { static NUMBER: std::cell::Cell<u32> = const { std::cell::Cell::new(0) } }
    // SAFETY: the lock is initialised before its use. An error-checking lock records the thread ID of its owner.
    let lock_owner = || unsafe {
        let mut lock: libc::pthread_mutex_t = std::mem::zeroed();
        let mut kind: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut kind);
        libc::pthread_mutexattr_settype(&raw mut kind, libc::PTHREAD_MUTEX_ERRORCHECK);
        libc::pthread_mutex_init(&raw mut lock, &raw const kind);
        libc::pthread_mutex_lock(&raw mut lock);
        // The owner's field follows the lock word and a counter.
        (&raw const lock).cast::<i32>().wrapping_add(2).read()
    };
    // SAFETY: the call touches no memory.
    let thread_id = || unsafe { libc::gettid() };
    let mut domain = domain("moved");
    let word = domain.call(|| Box::leak(Box::new(5u64)) as *mut u64 as u64).unwrap();
    domain.call(|| NUMBER.set(7)).unwrap();
    assert_eq!((domain.call(|| NUMBER.get()).unwrap(), domain.call(lock_owner).unwrap()), (7, thread_id()), "control");
    let mut domain = std::thread::spawn(move || {
        assert_eq!((domain.call(|| NUMBER.get()).unwrap(), domain.call(lock_owner).unwrap()), (0, thread_id()));
        // SAFETY: the word is on the domain's heap.
        assert_eq!(domain.call(|| unsafe { *(word as *const u64) }).unwrap(), 5, "the heap moves with the domain");
        domain.call(|| NUMBER.set(8)).unwrap();
        domain
    })
    .join()
    .unwrap();
    assert_eq!((domain.call(|| NUMBER.get()).unwrap(), domain.call(lock_owner).unwrap()), (0, thread_id()));
    contain(&mut domain, mistake);
    assert_eq!(domain.call(lock_owner).unwrap(), thread_id());
}

fn a_domain_has_thread_specific_data_of_its_own() {
    // More than the thread descriptor has room for.
    let keys: Vec<_> = (0..40)
        .map(|_| {
            let mut key = 0;
            // SAFETY: the key is writable.
            assert_eq!(unsafe { libc::pthread_key_create(&raw mut key, None) }, 0);
            key
        })
        .collect();
    let keys = &keys;
    // SAFETY: the keys exist.
    let get = || keys.iter().map(|key| unsafe { libc::pthread_getspecific(*key) } as u64).collect::<Vec<_>>();
    // SAFETY: as above.
    let set = |value: usize| keys.iter().all(|key| unsafe { libc::pthread_setspecific(*key, value as *const _) } == 0);
    let mut before = domain("before");
    assert!(set(7));
    assert_eq!(get(), [7; 40], "control");
    let mut after = domain("after");
    for domain in [&mut before, &mut after] {
        domain.call(|| ()).unwrap();
        assert_eq!(domain.call(get).unwrap(), [0; 40]);
        assert!(domain.call(|| set(8)).unwrap());
        assert_eq!(domain.call(get).unwrap(), [8; 40], "it stays from call to call");
        assert_eq!(get(), [7; 40]);
    }
    contain(&mut before, mistake);
    assert_eq!(before.call(get).unwrap(), [0; 40], "a discard clears it");
    assert_eq!(after.call(get).unwrap(), [8; 40]);
    assert_eq!(get(), [7; 40]);
}

fn threads_leave_nothing_behind() {
    drop(domain("first"));
    let mappings = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let round = || {
        let threads = (0..4).map(|_| std::thread::spawn(|| contain(&mut small("brief").build().unwrap(), mistake)));
        threads.collect::<Vec<_>>().into_iter().for_each(|thread| drop(thread.join().unwrap()));
    };
    (0..5).for_each(|_| round());
    let before = mappings();
    (0..40).for_each(|_| round());
    // The C library caches some stacks of ended threads.
    assert!(mappings() <= before + 8, "{before}, then {}", mappings());
}

fn threads_have_domains_of_their_own() {
    drop(domain("first"));
    let threads: Vec<_> = (0..4)
        .map(|number| {
            std::thread::spawn(move || {
                let mut domain = Domain::builder("thread").build().unwrap();
                for round in 0..500 {
                    assert_eq!(domain.call(|| number * 1000 + round).unwrap(), number * 1000 + round);
                    domain.call(mistake).unwrap_err();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn a_domain_moves_between_threads() {
    let mut domain = domain("mover");
    works(&mut domain);
    let mut domain = std::thread::spawn(move || {
        works(&mut domain);
        contain(&mut domain, mistake);
        domain
    })
    .join()
    .unwrap();
    works(&mut domain);
}

fn a_call_from_a_thread_locals_destructor() {
    struct Caller(std::cell::Cell<Option<Domain>>);
    impl Drop for Caller {
        fn drop(&mut self) {
            let mut domain = self.0.take().unwrap();
            works(&mut domain);
            contain(&mut domain, mistake);
        }
    }
    thread_local! { static CALLER: Caller = const { Caller(std::cell::Cell::new(None)) } }
    let domain = domain("late");
    std::thread::spawn(move || CALLER.with(|caller| caller.0.set(Some(domain)))).join().unwrap();
    works(&mut Domain::builder("after").build().unwrap());
}
