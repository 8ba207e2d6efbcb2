//! Signal handlers that call domains, need their keys, or leave a call by a jump.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pkru_userspace::Domain;
use support::signals::{COUNT, Timer, install, leave, wait_in, with_a_way_out};
use support::{Notice, contain, domain, loop_forever, mistake, suite, works};

suite! {
    a_handler_may_call_a_domain_that_faults,
    the_first_call_of_a_thread_in_a_handler,
    a_deadline_survives_a_handler_that_calls_domains,
    a_handler_that_needs_the_key_of_the_call_it_has_interrupted,
    a_jump_out_of_a_handler,
    a_jump_out_of_a_call_gives_its_key_back,
    a_call_from_a_signal_handler,
    signals_that_are_pending_when_a_handler_begins,
}

static WRONG: AtomicU64 = AtomicU64::new(0);
static CALLED: std::sync::Mutex<Option<Domain>> = std::sync::Mutex::new(None);

/// A handler that calls a domain.
extern "C" fn call_a_domain(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let sum = || (0..black_box(3_000_000u64)).map(black_box).sum::<u64>();
    let result = CALLED.lock().unwrap().as_mut().unwrap().call(sum);
    WRONG.fetch_add(u64::from(result.is_err()), Ordering::Relaxed);
    COUNT.fetch_add(1, Ordering::Relaxed);
}

fn a_handler_may_call_a_domain_that_faults() {
    static INNER: std::sync::Mutex<Option<Domain>> = std::sync::Mutex::new(None);
    extern "C" fn call(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let mut inner = INNER.lock().unwrap();
        let inner = inner.as_mut().unwrap();
        contain(inner, mistake);
        contain(inner, || {
            #[allow(unconditional_recursion, reason = "overflowing the stack is the point")]
            fn recurse(depth: u64) -> u64 {
                black_box(&[depth; 16])[3] + recurse(depth + 1)
            }
            black_box(recurse(0));
        });
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    let mut domain = domain("outer");
    *INNER.lock().unwrap() = Some(support::domain("inner"));
    install(libc::SIGALRM, call, 0);
    for _ in 0..10 {
        wait_in(&mut domain);
        contain(&mut domain, mistake);
    }
    install(libc::SIGALRM, call, libc::SA_ONSTACK);
    wait_in(&mut domain);
    works(&mut domain);
}

fn the_first_call_of_a_thread_in_a_handler() {
    let mut other = domain("other");
    *CALLED.lock().unwrap() = Some(domain("called"));
    install(libc::SIGUSR1, call_a_domain, 0);
    std::thread::spawn(move || {
        // SAFETY: `raise` has no preconditions.
        unsafe { libc::raise(libc::SIGUSR1) };
        contain(&mut other, mistake);
        works(&mut other);
    })
    .join()
    .unwrap();
    assert_eq!((COUNT.load(Ordering::Relaxed), WRONG.load(Ordering::Relaxed)), (1, 0));
}

/// Sends SIGUSR1 to this thread after [`Notice::give`].
fn signal_at(notice: &Arc<Notice>) {
    // SAFETY: the call touches no memory.
    let thread = unsafe { libc::pthread_self() };
    let notice = Arc::clone(notice);
    std::thread::spawn(move || {
        notice.wait();
        // SAFETY: the thread is alive, because it waits in a domain.
        unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
    });
}

fn give_and_loop(notice: &Notice) {
    notice.give();
    loop_forever();
}

fn a_deadline_survives_a_handler_that_calls_domains() {
    for inner in [None, Some(Duration::from_secs(20))] {
        let builder = Domain::builder("called");
        let builder = inner.map_or(builder.clone(), |time| builder.deadline(time));
        *CALLED.lock().unwrap() = Some(support::build(builder));
        let mut outer = support::build(Domain::builder("outer").deadline(Duration::from_secs(2)));
        install(libc::SIGUSR1, call_a_domain, 0);
        let notice = Notice::new();
        signal_at(&notice);
        let violation = outer.call(|| give_and_loop(&notice)).unwrap_err();
        assert_eq!(*violation.kind(), pkru_userspace::ViolationKind::Deadline);
        assert_eq!(WRONG.load(Ordering::Relaxed), 0, "the outer deadline does not apply to the handler's call");
    }
    assert_eq!(COUNT.load(Ordering::Relaxed), 2);
}

fn a_handler_that_needs_the_key_of_the_call_it_has_interrupted() {
    use pkru_userspace::capability::{SignalFrame, detect};
    // One key for domains, plus those that pkru-userspace itself needs.
    let extra = usize::from(detect().is_ok_and(|found| found.signal_frame == SignalFrame::OnWritableStack));
    pkru_userspace::set_key_limit(2 + extra);
    *CALLED.lock().unwrap() = Some(domain("called"));
    let mut outer = support::build(Domain::builder("outer").deadline(Duration::from_secs(2)));
    install(libc::SIGUSR1, call_a_domain, 0);
    let notice = Notice::new();
    signal_at(&notice);
    let violation = outer.call(|| give_and_loop(&notice)).unwrap_err();
    assert_eq!(*violation.kind(), pkru_userspace::ViolationKind::Deadline);
    assert_eq!(WRONG.load(Ordering::Relaxed), 1, "the handler's call fails instead of waiting for ever");
    works(&mut outer);
    works(CALLED.lock().unwrap().as_mut().unwrap());
}

fn a_jump_out_of_a_handler() {
    let mut domain = domain("left");
    install(libc::SIGALRM, leave, 0);
    let timer = Timer::for_this_thread();
    for round in 1..=30 {
        let wait = || {
            timer.start(1000, 0);
            while black_box(true) {}
        };
        with_a_way_out(|| drop(domain.call(wait)));
        assert_eq!(COUNT.load(Ordering::Relaxed), round);
        works(&mut domain);
        contain(&mut domain, mistake);
    }
}

fn a_jump_out_of_a_call_gives_its_key_back() {
    let mut domain = domain("left");
    install(libc::SIGUSR1, leave, 0);
    // SAFETY: `raise` has no preconditions.
    with_a_way_out(|| drop(domain.call(|| unsafe { libc::raise(libc::SIGUSR1) })));
    // Opening statics waits until no call pins a key.
    let mut open = support::open_domain("open");
    works(&mut open);
    works(&mut domain);
}

fn a_call_from_a_signal_handler() {
    use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
    static DOMAIN: AtomicPtr<Domain> = AtomicPtr::new(std::ptr::null_mut());
    static ANSWER: AtomicU32 = AtomicU32::new(0);
    extern "C" fn handler(_: i32) {
        // SAFETY: nothing else uses the domain while the handler runs.
        let domain = unsafe { &mut *DOMAIN.load(Ordering::Relaxed) };
        ANSWER.store(domain.call(|| 7u32).unwrap_or(0), Ordering::Relaxed);
    }
    let mut domain = domain("handler");
    works(&mut domain);
    DOMAIN.store(&raw mut domain, Ordering::Relaxed);
    // The kernel starts a handler with rights to key 0 only.
    // SAFETY: the handler runs during `raise`, on this thread, while nothing else uses the domain.
    unsafe {
        libc::signal(libc::SIGUSR1, handler as *const () as usize);
        libc::raise(libc::SIGUSR1);
    }
    assert_eq!(ANSWER.load(Ordering::Relaxed), 7);
    works(&mut domain);
}

fn signals_that_are_pending_when_a_handler_begins() {
    const SIGNALS: [i32; 3] = [41, 42, 43];
    static LOWEST: AtomicU64 = AtomicU64::new(u64::MAX);
    extern "C" fn note(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let local = 0u8;
        LOWEST.fetch_min(black_box(&raw const local).addr() as u64, Ordering::Relaxed);
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    let mut domain = domain("interrupted");
    works(&mut domain);
    for signal in SIGNALS {
        install(signal, note, 0);
    }
    let here = 0u8;
    let here = black_box(&raw const here).addr() as u64;
    let raise_all = || {
        // SAFETY: the set is valid, and the handlers count.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            SIGNALS.iter().for_each(|signal| _ = libc::sigaddset(&raw mut set, *signal));
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            SIGNALS.iter().for_each(|signal| _ = libc::raise(*signal));
            libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        }
    };
    for round in 1..=10 {
        domain.call(raise_all).unwrap();
        assert_eq!(COUNT.load(Ordering::Relaxed), 3 * round);
    }
    let lowest = LOWEST.load(Ordering::Relaxed);
    assert!((here - (64 << 10)..here).contains(&lowest), "{lowest:#x} is not on the stack below {here:#x}");
}
