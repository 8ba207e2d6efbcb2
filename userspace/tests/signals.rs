//! The program's signal handlers work as without domains, even if a signal arrives while a domain runs.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::cell::Cell;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pkru_userspace::Domain;
use support::signals::{COUNT, install, timer, wait_in};
use support::{contain, domain, in_child, mistake, suite, works};

suite! {
    a_timer_at_one_kilohertz_for_a_minute_on_the_alternate_stack,
    a_timer_at_one_kilohertz_for_a_minute_on_the_callers_stack,
    a_handler_installed_before_the_first_domain,
    the_handlers_stack_is_the_one_that_was_asked_for,
    a_handler_may_use_a_lot_of_stack,
    signals_within_handlers,
    system_calls_are_interrupted_or_restarted_as_asked,
    one_shot_handlers,
    signal_and_its_answers,
    handlers_are_not_for_code_in_a_domain_to_set,
    many_threads_with_timers,
    children_of_a_program_that_sets_handlers_all_the_time,
    other_threads_system_calls_are_not_interrupted_when_statics_are_opened,
}

/// How many handler runs saw a wrong state, and the stack and instruction pointers of the last run.
static WRONG: AtomicU64 = AtomicU64::new(0);
static STACK: AtomicUsize = AtomicUsize::new(0);
static WHERE: AtomicUsize = AtomicUsize::new(0);

thread_local! { static MARK: Cell<u32> = const { Cell::new(0) } }

/// Checks that the handler has the program's thread-locals and rights, and records its stack.
extern "C" fn look(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let here = 0u8;
    STACK.store((&raw const here).addr(), Ordering::Relaxed);
    // SAFETY: the kernel passes valid pointers.
    WHERE.store(
        unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] } as usize,
        Ordering::Relaxed,
    );
    // SAFETY: as above.
    let number = unsafe { (*info).si_signo };
    let good = number != 0 && MARK.get() == 7 && ALLOCATED.with(|word| **word == 11);
    WRONG.fetch_add(u64::from(!good), Ordering::Relaxed);
    COUNT.fetch_add(1, Ordering::Relaxed);
}

thread_local! { static ALLOCATED: Box<u32> = Box::new(11) }

fn begin() {
    MARK.set(7);
    ALLOCATED.with(|word| assert_eq!(**word, 11));
}

/// Calls the domain for at least `time` and until `signals` signals were handled. Some calls fault. Returns the number
/// of calls.
fn run_for(time: Duration, signals: u64, domain: &mut Domain) -> u64 {
    let start = Instant::now();
    let mut calls = 0;
    while start.elapsed() < time || COUNT.load(Ordering::Relaxed) <= signals {
        for _ in 0..50 {
            let sum = domain.call(|| (0..black_box(20_000u64)).map(black_box).sum::<u64>());
            assert_eq!(sum.unwrap(), 199_990_000);
        }
        contain(domain, mistake);
        calls += 52;
    }
    calls
}

fn a_kilohertz(flags: i32, time: Duration) {
    begin();
    let mut domain = domain("timed");
    install(libc::SIGALRM, look, flags);
    timer(1000);
    let calls = run_for(time, time.as_secs() * 100, &mut domain);
    timer(0);
    let (count, wrong) = (COUNT.load(Ordering::Relaxed), WRONG.load(Ordering::Relaxed));
    println!("figure: {count} signals in {calls} calls over {} s", time.as_secs());
    assert_eq!(wrong, 0, "of {count} signals");
    assert!(count > time.as_secs() * 100, "{count} signals");
}

fn a_timer_at_one_kilohertz_for_a_minute_on_the_alternate_stack() {
    a_kilohertz(libc::SA_ONSTACK, Duration::from_secs(60));
}

fn a_timer_at_one_kilohertz_for_a_minute_on_the_callers_stack() {
    a_kilohertz(0, Duration::from_secs(60));
}

fn a_handler_installed_before_the_first_domain() {
    begin();
    install(libc::SIGALRM, look, libc::SA_RESTART);
    let mut domain = domain("later");
    timer(1000);
    run_for(Duration::from_secs(2), 100, &mut domain);
    timer(0);
    assert!(COUNT.load(Ordering::Relaxed) > 100);
    assert_eq!(WRONG.load(Ordering::Relaxed), 0);
    // `sigaction` returns the program's action, not the one in the kernel.
    let old = install(libc::SIGALRM, look, 0);
    assert_eq!((old.sa_sigaction, old.sa_flags & libc::SA_RESTART), (look as *const () as usize, libc::SA_RESTART));
}

fn the_handlers_stack_is_the_one_that_was_asked_for() {
    begin();
    let mut domain = domain("stack");
    let own = vec![0u8; 128 * 1024].leak();
    let own = own.as_ptr().addr()..own.as_ptr().addr() + own.len();
    let new = libc::stack_t { ss_sp: own.start as *mut _, ss_flags: 0, ss_size: own.len() };
    // SAFETY: the stack is leaked.
    assert_eq!(unsafe { libc::sigaltstack(&raw const new, std::ptr::null_mut()) }, 0);
    let mut told = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: the struct is writable.
    assert_eq!(unsafe { libc::sigaltstack(std::ptr::null(), &raw mut told) }, 0);
    assert_eq!((told.ss_sp.addr(), told.ss_size, told.ss_flags), (own.start, own.len(), 0));

    install(libc::SIGALRM, look, libc::SA_ONSTACK);
    wait_in(&mut domain);
    assert!(own.contains(&STACK.load(Ordering::Relaxed)), "with SA_ONSTACK it is the program's alternate stack");
    // SAFETY: `raise` has no preconditions.
    unsafe { libc::raise(libc::SIGALRM) };
    assert!(own.contains(&STACK.load(Ordering::Relaxed)), "the same outside a domain");

    install(libc::SIGALRM, look, 0);
    wait_in(&mut domain);
    let here = (&raw const told).addr();
    let distance = here.wrapping_sub(STACK.load(Ordering::Relaxed));
    assert!(distance < 64 * 1024, "without SA_ONSTACK it is the caller's stack: {distance} bytes below");
    // SAFETY: as above.
    unsafe { libc::raise(libc::SIGALRM) };
    let distance = here.wrapping_sub(STACK.load(Ordering::Relaxed));
    assert!(distance < 64 * 1024, "the same outside a domain: {distance}");
    assert_eq!(WRONG.load(Ordering::Relaxed), 0);
}

fn a_handler_may_use_a_lot_of_stack() {
    extern "C" fn large(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let mut room = [0u8; 1 << 20];
        black_box(&mut room).fill(1);
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    let mut domain = domain("large");
    install(libc::SIGALRM, large, 0);
    for _ in 0..5 {
        wait_in(&mut domain);
    }
}

fn signals_within_handlers() {
    extern "C" fn outer(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: `raise` has no preconditions.
        unsafe { libc::raise(libc::SIGUSR1) };
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    begin();
    let mut domain = domain("nested");
    install(libc::SIGUSR1, look, 0);
    install(libc::SIGALRM, outer, 0);
    for _ in 0..5 {
        wait_in(&mut domain);
    }
    assert_eq!(WRONG.load(Ordering::Relaxed), 0);
    assert!(COUNT.load(Ordering::Relaxed) >= 10);
}

fn system_calls_are_interrupted_or_restarted_as_asked() {
    begin();
    let mut domain = domain("sleeper");
    let sleep = || {
        let time = libc::timespec { tv_sec: 10, tv_nsec: 0 };
        // SAFETY: the struct lives across the call.
        let result = unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
        (result, std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    };
    install(libc::SIGALRM, look, 0);
    timer(5000);
    let result = domain.call(sleep).unwrap();
    timer(0);
    assert_eq!(result, (-1, libc::EINTR));
    works(&mut domain);
}

fn one_shot_handlers() {
    begin();
    let mut domain = domain("once");
    install(libc::SIGUSR1, look, libc::SA_RESETHAND);
    // SAFETY: `raise` has no preconditions.
    domain.call(|| unsafe { libc::raise(libc::SIGUSR1) }).unwrap();
    assert_eq!(COUNT.load(Ordering::Relaxed), 1);
    let old = install(libc::SIGUSR1, look, 0);
    assert_eq!(old.sa_sigaction, libc::SIG_DFL);
}

fn signal_and_its_answers() {
    extern "C" fn simple(signal: i32) {
        COUNT.fetch_add(signal as u64, Ordering::Relaxed);
    }
    let mut domain = domain("signal");
    let handler = simple as *const () as usize;
    // SAFETY: the handler only does what handlers may do.
    unsafe {
        assert_eq!(libc::signal(libc::SIGUSR2, handler), libc::SIG_DFL);
        domain.call(|| libc::raise(libc::SIGUSR2)).unwrap();
        assert_eq!(COUNT.load(Ordering::Relaxed), libc::SIGUSR2 as u64);
        assert_eq!(libc::signal(libc::SIGUSR2, libc::SIG_IGN), handler);
        domain.call(|| libc::raise(libc::SIGUSR2)).unwrap();
        assert_eq!(libc::signal(libc::SIGUSR2, libc::SIG_DFL), libc::SIG_IGN);
        assert_eq!(libc::signal(libc::SIGKILL, handler), libc::SIG_ERR);
        assert_eq!(libc::signal(99, handler), libc::SIG_ERR);
    }
}

fn handlers_are_not_for_code_in_a_domain_to_set() {
    let mut domain = domain("setter");
    // SAFETY: `SIG_IGN` is not a function.
    let set = || unsafe { libc::signal(libc::SIGUSR2, libc::SIG_IGN) == libc::SIG_ERR };
    assert!(domain.call(set).unwrap());
    assert!(!set(), "control");
}

fn many_threads_with_timers() {
    begin();
    let first = domain("first");
    install(libc::SIGALRM, look, 0);
    extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    install(libc::SIGALRM, count, 0);
    drop(first);
    static STOP: AtomicBool = AtomicBool::new(false);
    static ROUNDS: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];
    let threads: Vec<_> = ROUNDS
        .iter()
        .map(|rounds| {
            std::thread::spawn(|| {
                timer(1000);
                let mut domain = Domain::builder("threaded").build().unwrap();
                while !STOP.load(Ordering::Relaxed) {
                    works(&mut domain);
                    contain(&mut domain, mistake);
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                timer(0);
            })
        })
        .collect();
    std::thread::sleep(Duration::from_secs(5));
    // A busy machine needs longer.
    while COUNT.load(Ordering::Relaxed) <= 1000 || ROUNDS.iter().any(|rounds| rounds.load(Ordering::Relaxed) <= 10) {
        std::thread::sleep(Duration::from_millis(10));
    }
    STOP.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn children_of_a_program_that_sets_handlers_all_the_time() {
    static STOP: AtomicBool = AtomicBool::new(false);
    let mut domain = support::build(Domain::builder("timed").deadline(Duration::from_millis(500)));
    works(&mut domain);
    let setter = std::thread::spawn(|| {
        while !STOP.load(Ordering::Relaxed) {
            install(libc::SIGUSR2, look, 0);
        }
    });
    for _ in 0..20 {
        let status = in_child(|| {
            // SAFETY: the call has no preconditions. The alarm ends a child that hangs.
            unsafe { libc::alarm(300) };
            install(libc::SIGUSR1, look, 0);
            // A fork does not copy timers, so the child needs its own.
            let violation = domain.call(|| while black_box(true) {}).unwrap_err();
            assert_eq!(*violation.kind(), pkru_userspace::ViolationKind::Deadline);
        });
        assert_eq!(status, 0);
    }
    STOP.store(true, Ordering::Relaxed);
    setter.join().unwrap();
}

fn other_threads_system_calls_are_not_interrupted_when_statics_are_opened() {
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    drop(domain("first"));
    let reader = std::thread::spawn(move || {
        let mut byte = 0u8;
        // SAFETY: the byte is writable.
        unsafe { libc::read(pipe[0], (&raw mut byte).cast(), 1) }
    });
    std::thread::sleep(Duration::from_millis(100));
    let mut open = support::open_domain("open");
    works(&mut open);
    // SAFETY: the byte is readable.
    assert_eq!(unsafe { libc::write(pipe[1], b"x".as_ptr().cast(), 1) }, 1);
    assert_eq!(reader.join().unwrap(), 1);
}
