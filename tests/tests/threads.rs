//! Any number of threads, more domains than keys, pools, and forks.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a sequence of C calls is one thing here")]

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use pkru_userspace::transfer::{DomainMemory, InvalidResult, Transfer};
use pkru_userspace::{Builder, Domain, Error, Pool, ProtectionKey, Region, ViolationKind};
use support::{build, contain, domain, key_fault, mistake, suite, works};

suite! {
    more_threads_than_keys_each_in_a_domain_at_the_same_time,
    a_fault_in_one_thread_disturbs_no_other,
    a_thousand_domains,
    the_one_that_was_called_longest_ago_loses_its_key,
    the_programs_own_keys_are_respected,
    two_keys_make_for_any_number_of_domains_and_one_for_one,
    thread_locals_do_not_follow_a_domain_to_another_thread,
    threads_in_the_middle_of_calls_do_not_wait_for_each_other_for_ever,
    a_key_that_only_this_call_could_give,
    statics_are_opened_while_a_call_needs_another,
    forks_in_the_middle_of_other_things,
    a_pool_hands_domains_to_threads,
    a_pool_that_cannot_make_a_domain,
    a_childs_domains_work,
    forks_while_other_threads_run_in_domains,
    a_fork_in_a_callback,
    threads_leave_nothing_behind,
    a_domain_that_waits_for_a_key,
    a_pool_replaces_what_is_retired,
}

fn small(name: &str) -> Builder {
    Domain::builder(name).stack_size(64 * 1024).heap_size(256 * 1024)
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

fn a_thousand_domains() {
    drop(domain("first"));
    let mut domains: Vec<_> = (0..1000).map(|_| small("one of many").build().unwrap()).collect();
    let words: Vec<_> = (0u64..)
        .zip(&mut domains)
        .map(|(number, domain)| domain.call(|| Box::leak(Box::new(number)) as *mut u64 as u64).unwrap())
        .collect();
    // In an order that makes most of them lose and get keys.
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

    // One that has none is closed to the others: to read, and to write.
    let (parked, word) = domains.iter().zip(&words).find(|(domain, _)| domain.key().is_none()).unwrap();
    let (word, number) = (*word as *mut u64, parked.name().len());
    assert_eq!(number, "one of many".len());
    let mut other = small("other").build().unwrap();
    // SAFETY: none: these are the mistakes.
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
    // What the limit leaves is the program's.
    // SAFETY: as above.
    let mut more: Vec<_> = (0..16).map(|_| unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) }).collect();
    more.retain(|key| *key >= 0);
    assert!(more.len() >= 7, "{more:?}");
    // Handed in, they serve domains.
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
        // One more, for the signal stacks.
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

fn thread_locals_do_not_follow_a_domain_to_another_thread() {
    thread_local! { static NUMBER: std::cell::Cell<u32> = const { std::cell::Cell::new(0) } }
    // SAFETY: the C library's descriptor of the thread has its number; the call reads that.
    let lock_owner = || unsafe {
        let mut lock: libc::pthread_mutex_t = std::mem::zeroed();
        let mut kind: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut kind);
        libc::pthread_mutexattr_settype(&raw mut kind, libc::PTHREAD_MUTEX_ERRORCHECK);
        libc::pthread_mutex_init(&raw mut lock, &raw const kind);
        libc::pthread_mutex_lock(&raw mut lock);
        // Its owner stands after the lock itself and a counter.
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
        assert_eq!(domain.call(|| unsafe { *(word as *const u64) }).unwrap(), 5, "what is on the heap does");
        domain.call(|| NUMBER.set(8)).unwrap();
        domain
    })
    .join()
    .unwrap();
    assert_eq!((domain.call(|| NUMBER.get()).unwrap(), domain.call(lock_owner).unwrap()), (0, thread_id()));
    contain(&mut domain, mistake);
    assert_eq!(domain.call(lock_owner).unwrap(), thread_id());
}

/// Has a function run while a result is received, which is in the middle of a call.
struct InTheMiddle;

thread_local! { static MIDDLE: std::cell::RefCell<Option<Box<dyn FnOnce()>>> = const { std::cell::RefCell::new(None) } }

impl Transfer for InTheMiddle {
    type Wire = u8;

    fn lend(self) -> u8 {
        0
    }

    fn receive(_: u8, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        let function = MIDDLE.take();
        function.into_iter().for_each(|function| function());
        Ok(Self)
    }
}

/// One key for what is closed, and so many for domains.
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

fn forks_in_the_middle_of_other_things() {
    unsafe extern "C" {
        fn pthread_atfork(before: Option<Handler>, parent: Option<Handler>, child: Option<Handler>) -> i32;
    }
    type Handler = extern "C" fn();
    extern "C" fn set_a_handler() {
        // SAFETY: it is none.
        unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
    }
    // Before the first domain: called after this crate's before a fork, and before this crate's after it.
    let handler = Some(set_a_handler as Handler);
    // SAFETY: the handler does little.
    assert_eq!(unsafe { pthread_atfork(handler, handler, handler) }, 0);
    struct Forks;
    impl Drop for Forks {
        fn drop(&mut self) {
            in_child(|| ());
            let mut mask = 0u64;
            // SAFETY: the kernel writes eight bytes.
            unsafe { libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, &raw mut mask, 8) };
            assert_eq!(mask, 0, "no signal is left blocked");
            contain(&mut small("late").build().unwrap(), mistake);
        }
    }
    thread_local! { static LATE: Forks = const { Forks } }
    let mut domain = domain("first");
    std::thread::spawn(|| {
        LATE.with(|_| ());
        in_child(|| ());
    })
    .join()
    .unwrap();
    in_child(|| drop(contain(&mut domain, mistake)));
    contain(&mut domain, mistake);
}

fn a_pool_hands_domains_to_threads() {
    drop(domain("first"));
    let made = Arc::new(AtomicU64::new(0));
    let pool = Pool::new(small("pooled"), 3);
    std::thread::scope(|scope| {
        for number in 0..12u64 {
            let (pool, made) = (&pool, &made);
            scope.spawn(move || {
                for _ in 0..20 {
                    let mut domain = pool.get().unwrap();
                    assert_eq!(domain.call(|| number * 3).unwrap(), number * 3);
                    if number % 4 == 0 {
                        contain(&mut domain, mistake);
                    }
                    made.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(made.load(Ordering::Relaxed), 240);
    let out: Vec<_> = (0..3).map(|_| pool.try_get().unwrap().unwrap()).collect();
    assert!(pool.try_get().unwrap().is_none());
    let waiting = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            drop(pool.get().unwrap());
            waiting.store(false, Ordering::Relaxed);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(waiting.load(Ordering::Relaxed), "all are out");
        drop(out);
    });
    assert!(!waiting.load(Ordering::Relaxed));
}

fn a_pool_that_cannot_make_a_domain() {
    drop(domain("first"));
    let pool = Pool::new(Domain::builder("too big").heap_size(usize::MAX / 2), 1);
    for _ in 0..3 {
        assert!(matches!(pool.get(), Err(Error::Size { .. })));
    }
}

/// Runs something in a child, and checks that it ends well.
fn in_child(function: impl FnOnce()) {
    assert_eq!(support::in_child(function), 0);
}

fn a_childs_domains_work() {
    let mut domain = domain("parent");
    let word = domain.call(|| Box::leak(Box::new(5u64)) as *mut u64 as u64).unwrap();
    let mut parked: Vec<_> = (0..20).map(|_| small("parked").build().unwrap()).collect();
    in_child(|| {
        // SAFETY: the word is on the domain's heap.
        assert_eq!(domain.call(|| unsafe { *(word as *const u64) }).unwrap(), 5);
        contain(&mut domain, mistake);
        parked.iter_mut().for_each(works);
        let more: Vec<_> = (0..20).map(|_| small("of the child").build().unwrap()).collect();
        drop(more);
        std::thread::spawn(|| contain(&mut small("thread").build().unwrap(), mistake)).join().unwrap();
    });
    // SAFETY: as above.
    assert_eq!(domain.call(|| unsafe { *(word as *const u64) }).unwrap(), 5, "the parent's is its own");
    parked.iter_mut().for_each(works);
}

fn forks_while_other_threads_run_in_domains() {
    drop(domain("first"));
    static STOP: AtomicBool = AtomicBool::new(false);
    let barrier = Arc::new(Barrier::new(5));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let barrier = Arc::clone(&barrier);
            std::thread::spawn(move || {
                let mut domains: Vec<_> = (0..6).map(|_| small("busy").build().unwrap()).collect();
                barrier.wait();
                while !STOP.load(Ordering::Relaxed) {
                    domains.iter_mut().for_each(works);
                    domains[0].call(mistake).unwrap_err();
                }
            })
        })
        .collect();
    barrier.wait();
    for _ in 0..20 {
        in_child(|| {
            // Calls of threads that are not here pin keys no more.
            let mut domains: Vec<_> = (0..30).map(|_| small("of the child").build().unwrap()).collect();
            domains.iter_mut().for_each(works);
            contain(&mut domains[7], mistake);
        });
    }
    STOP.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn a_fork_in_a_callback() {
    let mut domain = domain("forker");
    let mut child_status = 1;
    let result = domain.call_with(
        &mut [&mut |_| {
            in_child(|| works(&mut small("of the child").build().unwrap()));
            child_status = 0;
            3
        }],
        |callbacks| {
            // SAFETY: a callback takes up to six words and returns one.
            let ask: extern "C" fn() -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
            ask()
        },
    );
    assert_eq!((result.unwrap(), child_status), (3, 0));
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
    // The C library keeps some of its threads' stacks.
    assert!(mappings() <= before + 8, "{before}, then {}", mappings());
}

fn a_domain_that_waits_for_a_key() {
    // Two keys: one for what is closed, and one for domains.
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

fn a_pool_replaces_what_is_retired() {
    drop(domain("first"));
    let pool = Pool::new(small("pooled").retire_after(1), 2);
    for _ in 0..5 {
        let mut domain = pool.get().unwrap();
        domain.call(mistake).unwrap_err();
        assert!(domain.is_retired());
    }
    let (mut one, mut two) = (pool.get().unwrap(), pool.get().unwrap());
    works(&mut one);
    works(&mut two);
}
