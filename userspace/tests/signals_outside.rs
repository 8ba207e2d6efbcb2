//! Signals that interrupt the program's own code are delivered as the kernel would deliver them without this crate.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::cell::Cell;
use std::ffi::c_void;
use std::hint::black_box;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pkru_userspace::Domain;
use support::signals::{COUNT, Timer, install, leave, with_a_way_out};
use support::{contain, domain, in_child, mistake, suite, works};

suite! {
    nested_signals_in_a_thread_without_domains,
    a_handler_finds_what_it_finds_without_domains,
    a_small_alternate_stack_is_left_to_those_that_asked_for_it,
    a_stack_without_room_for_a_frame,
    a_handler_changes_what_it_has_interrupted,
    jumps_out_of_handlers,
    a_thread_that_becomes_ready_within_nested_handlers,
    two_timers_beside_domains,
    a_backtrace_in_a_handler_reaches_the_interrupted_code,
}

type Info = *mut libc::siginfo_t;

thread_local! {
    /// What a handler has found on this thread: its place on the stack, its frame, and its mask.
    static FOUND: Cell<[u64; 3]> = const { Cell::new([0; 3]) };
}

extern "C" fn look(_: i32, _: Info, context: *mut c_void) {
    let here = 0u8;
    let mut mask = 0u64;
    // SAFETY: the set is as large as the kernel's.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, 0, &raw mut mask, 8) };
    FOUND.set([(&raw const here).addr() as u64, context.addr() as u64, mask]);
    COUNT.fetch_add(1, Ordering::Relaxed);
}

fn send(signal: i32) {
    // SAFETY: a thread may send itself a signal.
    assert_eq!(unsafe { libc::pthread_kill(libc::pthread_self(), signal) }, 0);
}

/// Runs a function on a new thread. Its alternate stack is larger than std's, which has room for small handlers only.
fn on_a_thread(function: impl FnOnce() + Send + 'static) {
    let function = || {
        alternate_stack(1 << 20);
        function();
    };
    std::thread::spawn(function).join().unwrap();
}

/// Sets an alternate stack of `size` bytes with a guard page below, and returns its addresses.
fn alternate_stack(size: usize) -> Range<usize> {
    const GUARD: usize = 4096;
    // SAFETY: the pages are new, and stay mapped.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let start = libc::mmap(std::ptr::null_mut(), size + GUARD, libc::PROT_NONE, flags, -1, 0);
        let start = start.wrapping_byte_add(GUARD);
        assert_eq!(libc::mprotect(start, size, libc::PROT_READ | libc::PROT_WRITE), 0);
        let stack = libc::stack_t { ss_sp: start, ss_flags: 0, ss_size: size };
        assert_eq!(libc::sigaltstack(&raw const stack, std::ptr::null_mut()), 0);
        start.addr()..start.addr() + size
    }
}

fn nested_signals_in_a_thread_without_domains() {
    static FIRST: AtomicU64 = AtomicU64::new(0);
    static SECOND: AtomicU64 = AtomicU64::new(0);
    extern "C" fn first(_: i32, _: Info, _: *mut c_void) {
        let before = SECOND.load(Ordering::SeqCst);
        send(libc::SIGUSR2);
        assert_eq!(SECOND.load(Ordering::SeqCst), before + 1);
        FIRST.fetch_add(1, Ordering::SeqCst);
    }
    extern "C" fn second(_: i32, _: Info, _: *mut c_void) {
        let mut filler = [0u64; 2048];
        black_box(&mut filler).fill(0x4141_4141_4141_4141);
        SECOND.fetch_add(1, Ordering::SeqCst);
    }
    for flags in [0, libc::SA_ONSTACK] {
        install(libc::SIGUSR1, first, flags);
        install(libc::SIGUSR2, second, 0);
        let mut domain = domain("elsewhere");
        on_a_thread(|| {
            let guard = [0x5555_5555u64; 64];
            for _ in 0..1000 {
                send(libc::SIGUSR1);
            }
            assert!(black_box(&guard).iter().all(|word| *word == 0x5555_5555));
        });
        contain(&mut domain, mistake);
    }
    assert_eq!((FIRST.load(Ordering::SeqCst), SECOND.load(Ordering::SeqCst)), (2000, 2000));
}

/// Sends this thread a signal from a place that is the same each time. Returns what the handler found.
#[inline(never)]
fn found(signal: i32) -> [u64; 3] {
    send(signal);
    FOUND.get()
}

fn a_handler_finds_what_it_finds_without_domains() {
    for flags in [0, libc::SA_ONSTACK, libc::SA_NODEFER] {
        let status = in_child(|| {
            install(libc::SIGUSR1, look, flags);
            // A thread that keeps running while the first domain is made, and two that are like it in that they never
            // call one: with an alternate stack of std's, and with none.
            static MADE: AtomicBool = AtomicBool::new(false);
            let look_twice = |prepare: fn()| {
                std::thread::spawn(move || {
                    prepare();
                    let mut rounds = [found(libc::SIGUSR1), [0; 3]];
                    COUNT.fetch_add(1000, Ordering::Relaxed);
                    while !MADE.load(Ordering::Relaxed) {
                        std::thread::yield_now();
                    }
                    for round in &mut rounds[1..] {
                        *round = found(libc::SIGUSR1);
                    }
                    let (before, after) = (rounds[0], rounds[1]);
                    assert_eq!(before, after, "stack, frame and mask of the handler");
                })
            };
            let none = || {
                let stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
                // SAFETY: std's own stack is not in use.
                assert_eq!(unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) }, 0);
            };
            let own = || {
                alternate_stack(1 << 16);
            };
            let threads = [look_twice(|| ()), look_twice(none), look_twice(own)];
            while COUNT.load(Ordering::Relaxed) < 3000 {
                std::thread::yield_now();
            }
            let mut domain = domain("elsewhere");
            contain(&mut domain, mistake);
            MADE.store(true, Ordering::Relaxed);
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
        assert_eq!(status, 0, "flags {flags:#x}");
    }
}

fn a_small_alternate_stack_is_left_to_those_that_asked_for_it() {
    extern "C" fn large(_: i32, _: Info, _: *mut c_void) {
        let mut room = [0u8; 64 * 1024];
        black_box(&mut room).fill(1);
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    install(libc::SIGUSR1, large, 0);
    install(libc::SIGUSR2, look, libc::SA_ONSTACK);
    on_a_thread(|| {
        let stack = alternate_stack(64 * 1024);
        // How much of the alternate stack a signal uses, in bytes.
        let used = |signal: i32| {
            // SAFETY: the alternate stack is not in use.
            let bytes = unsafe { std::slice::from_raw_parts_mut(stack.start as *mut u8, stack.len()) };
            bytes.fill(0x77);
            send(signal);
            bytes.len() - black_box(&*bytes).iter().take_while(|byte| **byte == 0x77).count()
        };
        // The loader takes a lot of stack when it binds what the handler calls.
        used(libc::SIGUSR2);
        let before = [libc::SIGUSR1, libc::SIGUSR2].map(used);
        std::thread::spawn(|| contain(&mut domain("elsewhere"), mistake)).join().unwrap();
        let [large, small] = [libc::SIGUSR1, libc::SIGUSR2].map(used);
        assert_eq!(before[0], 0, "control");
        assert!(before[1] > 1000 && small <= before[1], "{small} bytes for the one that asked, {} before", before[1]);
        assert!(large <= small, "{large} bytes for the one that did not ask: the kernel's frame");
        assert_eq!(COUNT.load(Ordering::Relaxed), 5);
    });
}

/// Sends this thread a signal with the stack pointer at an address.
fn send_at(stack: usize, signal: i32) {
    // SAFETY: the code uses no stack while the pointer is changed, and restores it.
    unsafe {
        std::arch::asm!(
            "xchg rsp, {stack}",
            "syscall",
            "mov rsp, {stack}",
            stack = inout(reg) stack => _,
            inout("rax") libc::SYS_tgkill => _,
            in("rdi") libc::getpid(),
            in("rsi") libc::gettid(),
            in("rdx") i64::from(signal),
            out("rcx") _,
            out("r11") _,
        );
    }
}

fn a_stack_without_room_for_a_frame() {
    extern "C" fn segv(_: i32, info: Info, _: *mut c_void) {
        // SAFETY: the kernel passes a valid pointer.
        let code = unsafe { (*info).si_code };
        // SAFETY: the call ends the process.
        unsafe { libc::_exit(if code == 0x80 { 7 } else { 8 }) };
    }
    for (with_domain, flags, expected) in [
        (false, libc::SA_ONSTACK, 7 << 8),
        (true, libc::SA_ONSTACK, 7 << 8),
        (false, 0, libc::SIGSEGV),
        (true, 0, libc::SIGSEGV),
    ] {
        for recorded in [false, true] {
            if recorded && !with_domain {
                continue;
            }
            let status = in_child(|| {
                install(libc::SIGUSR1, look, 0);
                install(libc::SIGSEGV, segv, flags);
                let domain = with_domain.then(|| domain("elsewhere"));
                std::thread::scope(|scope| {
                    scope.spawn(move || {
                        alternate_stack(1 << 16);
                        if recorded {
                            domain.into_iter().for_each(|mut domain| works(&mut domain));
                        }
                        let page = vec![0u8; 4096 * 3].leak().as_mut_ptr();
                        let page = page.wrapping_add(page.align_offset(4096));
                        // SAFETY: the page is the test's.
                        assert_eq!(unsafe { libc::mprotect(page.cast(), 4096, libc::PROT_NONE) }, 0);
                        send_at(page.addr() + 4096 + 512, libc::SIGUSR1);
                        // SAFETY: the call ends the process.
                        unsafe { libc::_exit(9) };
                    });
                });
            });
            assert_eq!(status, expected, "domain {with_domain}, flags {flags:#x}, recorded {recorded}");
        }
    }
}

fn a_handler_changes_what_it_has_interrupted() {
    extern "C" fn skip(_: i32, _: Info, context: *mut c_void) {
        // SAFETY: the kernel passes a valid context.
        let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        // UD2 has two bytes.
        registers[libc::REG_RIP as usize] += 2;
        registers[libc::REG_RAX as usize] = 42;
    }
    fn trap() -> u64 {
        let value;
        // SAFETY: the handler resumes after the instruction.
        unsafe { std::arch::asm!("ud2", out("rax") value) };
        value
    }
    let mut domain = domain("elsewhere");
    works(&mut domain);
    for flags in [0, libc::SA_ONSTACK] {
        install(libc::SIGILL, skip, flags);
        assert_eq!(trap(), 42, "in a thread that enters domains");
        on_a_thread(|| assert_eq!(trap(), 42, "in one that does not"));
    }
}

fn jumps_out_of_handlers() {
    let mut domain = domain("elsewhere");
    for flags in [0, libc::SA_ONSTACK] {
        install(libc::SIGUSR1, leave, flags);
        on_a_thread(|| (0..200).for_each(|_| with_a_way_out(|| send(libc::SIGUSR1))));
        for _ in 0..200 {
            with_a_way_out(|| send(libc::SIGUSR1));
        }
        contain(&mut domain, mistake);
    }
    assert_eq!(COUNT.load(Ordering::Relaxed), 800);
}

fn a_thread_that_becomes_ready_within_nested_handlers() {
    static CALLED: std::sync::Mutex<Option<Domain>> = std::sync::Mutex::new(None);
    extern "C" fn outer(_: i32, _: Info, _: *mut c_void) {
        send(libc::SIGUSR2);
    }
    extern "C" fn inner(_: i32, _: Info, _: *mut c_void) {
        works(CALLED.lock().unwrap().as_mut().unwrap());
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    *CALLED.lock().unwrap() = Some(domain("called"));
    for flags in [[0, 0], [libc::SA_ONSTACK, 0], [0, libc::SA_ONSTACK], [libc::SA_ONSTACK; 2]] {
        install(libc::SIGUSR1, outer, flags[0]);
        install(libc::SIGUSR2, inner, flags[1]);
        on_a_thread(|| {
            send(libc::SIGUSR1);
            // The kernel uses the signal stack of this crate now, or this fault would end the program.
            contain(CALLED.lock().unwrap().as_mut().unwrap(), mistake);
            send(libc::SIGUSR1);
        });
    }
    assert_eq!(COUNT.load(Ordering::Relaxed), 8);
}

fn two_timers_beside_domains() {
    extern "C" fn count(_: i32, _: Info, _: *mut c_void) {
        let mut filler = [0u64; 256];
        black_box(&mut filler).fill(0x4141_4141_4141_4141);
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    static STOP: AtomicBool = AtomicBool::new(false);
    for signal in [libc::SIGALRM, libc::SIGUSR1] {
        install(signal, count, 0);
    }
    let mut domain = domain("beside");
    // Both signals go to this thread, which calls no domain.
    let victim = std::thread::spawn(|| {
        let timers = [libc::SIGALRM, libc::SIGUSR1].map(Timer::of_this_thread);
        timers.iter().for_each(|timer| timer.start(1000, 300));
        let mut words = [0u64; 64];
        while !STOP.load(Ordering::Relaxed) {
            for word in &mut words {
                *word = word.wrapping_add(1);
            }
            assert!(black_box(&words).iter().all(|word| *word == words[0]));
        }
    });
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) || COUNT.load(Ordering::Relaxed) < 1000 {
        contain(&mut domain, mistake);
    }
    STOP.store(true, Ordering::Relaxed);
    victim.join().unwrap();
}

fn a_backtrace_in_a_handler_reaches_the_interrupted_code() {
    static SEEN: std::sync::Mutex<String> = std::sync::Mutex::new(String::new());
    extern "C" fn trace(_: i32, _: Info, _: *mut c_void) {
        *SEEN.lock().unwrap() = std::backtrace::Backtrace::force_capture().to_string();
    }
    #[inline(never)]
    fn interrupted_code(signal: i32) -> u64 {
        send(signal);
        black_box(1)
    }
    #[inline(never)]
    fn outer_code(signal: i32) -> u64 {
        interrupted_code(signal) + black_box(1)
    }
    #[track_caller]
    fn check(what: &str, names: &[&str]) {
        let seen = SEEN.lock().unwrap();
        for name in names {
            assert!(seen.contains(name), "{what}: no {name} in\n{seen}");
        }
    }
    alternate_stack(1 << 20);
    let ours: &[&str] = &["interrupted_code", "outer_code", "a_backtrace_in_a_handler"];
    for flags in [0, libc::SA_ONSTACK] {
        install(libc::SIGUSR1, trace, flags);
        outer_code(libc::SIGUSR1);
        check("before the first domain", ours);
        let mut domain = domain("elsewhere");
        on_a_thread(|| assert_eq!(outer_code(libc::SIGUSR1), 2));
        check("in a thread without domains", ours);
        works(&mut domain);
        outer_code(libc::SIGUSR1);
        check("in a thread with domains", ours);
        domain.call(|| outer_code(libc::SIGUSR1)).unwrap();
        check("in a domain", &["interrupted_code", "outer_code"]);
    }
}
