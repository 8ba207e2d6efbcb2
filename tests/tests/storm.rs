//! A storm: signals that take half the time, on threads with and without domains, amid faults, deadlines, forks, callbacks
//! and moves of keys. Nothing is lost.
//!
//! `make soak` runs it for longer.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a few C calls read better as one block")]

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pkru_userspace::{Domain, Pool, ViolationKind};
use support::signals::{Timer, install};
use support::{build, in_child, loop_forever, mistake, small, suite, works};

suite! {
    a_storm,
}

/// The environment variable that says how many seconds the storm takes.
const SECONDS: &str = "PKRU_STORM_SECONDS";

/// Runs on the stack that it has interrupted.
const PLAIN: i32 = libc::SIGALRM;
/// Runs on the alternate stack.
const ON_STACK: i32 = libc::SIGUSR2;
/// Interrupts itself, too.
const NESTED: i32 = 40;
/// Calls a domain. It is blocked except where the program may allocate memory.
const CALLING: i32 = 41;
/// Carries a number, which is added up.
const QUEUED: i32 = 42;
/// The first call of a new thread.
const FIRST: i32 = libc::SIGUSR1;

const TIMED: [i32; 3] = [PLAIN, ON_STACK, CALLING];

static STOP: AtomicBool = AtomicBool::new(false);
static SIGNALS: AtomicU64 = AtomicU64::new(0);
static CALLS_IN_HANDLERS: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The domain that the handler calls.
    static CALLED: RefCell<Option<Domain>> = const { RefCell::new(None) };
    /// How many handlers have run on this thread, and the sum of the numbers that were queued.
    static HANDLED: Cell<u64> = const { Cell::new(0) };
    static SUM: Cell<u64> = const { Cell::new(0) };
    /// How many handlers of [`NESTED`] are running on this thread, one within the other.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    /// The timers of this thread.
    static STORM: Cell<*const Storm> = const { Cell::new(std::ptr::null()) };
}

/// Fills a part of the stack, and returns whether it stays as it is while a function runs.
#[inline(never)]
fn guarded(seed: u64, function: impl FnOnce()) -> bool {
    let words: [u64; 64] = std::array::from_fn(|index| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64);
    let words = black_box(words);
    function();
    let words = black_box(words);
    (0..64).all(|index| words[index] == seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64)
}

/// Computes with integers and floating-point numbers. The result depends on the seed alone.
#[inline(never)]
fn compute(seed: u64) -> u64 {
    let (mut word, mut number) = (seed | 1, 1.0f64);
    for round in 0..500u32 {
        word = black_box(word.wrapping_mul(0x5851_f42d_4c95_7f2d).rotate_left(13));
        number = black_box(number * 1.000_1 + f64::from(round));
    }
    word ^ number.to_bits()
}

extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    HANDLED.set(HANDLED.get() + 1);
    SIGNALS.fetch_add(1, Ordering::Relaxed);
    let good = guarded(signal as u64, || match signal {
        // SAFETY: the signal was sent with a value.
        QUEUED => SUM.set(SUM.get() + unsafe { (*info).si_value() }.sival_ptr.addr() as u64),
        CALLING => call_in_handler(),
        NESTED => nest(),
        _ => drop(black_box(compute(1))),
    });
    if !good {
        WRONG.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the timers are there until the thread resets the pointer.
    if let Some(storm) = unsafe { STORM.get().as_ref() } {
        storm.calm();
    }
}

/// Interrupts itself some times. A timer would do it without end where handlers are slower than it.
fn nest() {
    const MOST: u32 = 4;
    DEPTH.set(DEPTH.get() + 1);
    if DEPTH.get() < MOST {
        // SAFETY: the handler may run here.
        assert_eq!(unsafe { libc::raise(NESTED) }, 0);
    }
    black_box(compute(1));
    DEPTH.set(DEPTH.get() - 1);
}

fn call_in_handler() {
    CALLED.with(|called| {
        // Another handler of this thread may be calling it.
        let Ok(mut called) = called.try_borrow_mut() else { return };
        let Some(domain) = called.as_mut() else { return };
        match domain.call(|| compute(7)) {
            Ok(result) if result == compute(7) => {}
            // The interrupted call has the only key that is left.
            Err(violation) if matches!(violation.kind(), ViolationKind::NotReady(_)) => {}
            other => {
                eprintln!("in a handler: {other:?}");
                WRONG.fetch_add(1, Ordering::Relaxed);
            }
        }
        CALLS_IN_HANDLERS.fetch_add(1, Ordering::Relaxed);
    });
}

/// The first call of a thread is made in a handler.
extern "C" fn first_call(_: i32, _: *mut libc::siginfo_t, _: *mut c_void) {
    call_in_handler();
}

/// The timers of one thread, which leave about half of its time.
struct Storm {
    timers: [Timer; 3],
    /// Expires once in a round: handlers that are slower than this timer would interrupt each other without end.
    nested: Timer,
    /// What one signal costs, in microseconds.
    cost: f64,
    interval: Cell<f64>,
    since: Instant,
    handled: u64,
    /// How many handlers have run when the thread came round last.
    round: Cell<u64>,
}

impl Storm {
    /// The bounds of the interval of a timer in microseconds.
    const BOUNDS: [f64; 2] = [20.0, 100_000.0];

    /// Prepares the calling thread: it gets an alternate stack, and blocks the signal whose handler allocates memory.
    fn begin() -> Box<Self> {
        const STACK: usize = 512 * 1024;
        let stack = Vec::leak(vec![0u8; STACK]);
        let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK };
        // SAFETY: the stack is never freed.
        assert_eq!(unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) }, 0);
        mask(libc::SIG_BLOCK, CALLING);
        let start = Instant::now();
        const TRIES: u32 = 50;
        // SAFETY: the handler may run here.
        (0..TRIES).for_each(|_| assert_eq!(unsafe { libc::raise(PLAIN) }, 0));
        let cost = start.elapsed().as_secs_f64() * 1e6 / f64::from(TRIES);
        let (timers, nested) = (TIMED.map(Timer::of_this_thread), Timer::of_this_thread(NESTED));
        let interval = Cell::new((8.0 * cost).clamp(Self::BOUNDS[0], Self::BOUNDS[1]));
        let (since, handled) = (Instant::now(), HANDLED.get());
        let storm = Box::new(Self { timers, nested, cost, interval, since, handled, round: Cell::new(handled) });
        STORM.set(&raw const *storm);
        storm.start();
        storm
    }

    /// In a handler: sends fewer signals if the thread does not get anywhere.
    fn calm(&self) {
        const MOST: u64 = 2000;
        if HANDLED.get() - self.round.get() > MOST {
            self.round.set(HANDLED.get());
            self.set_interval(2.0 * self.interval.get());
        }
    }

    fn set_interval(&self, interval: f64) {
        self.interval.set(interval.clamp(Self::BOUNDS[0], Self::BOUNDS[1]));
        self.start();
    }

    fn start(&self) {
        // Not in step with each other.
        for (timer, factor) in self.timers.iter().zip([1.0, 1.13, 1.27]) {
            let interval = (self.interval.get() * factor) as libc::c_long;
            timer.start(interval, interval);
        }
    }

    fn start_nested(&self) {
        self.nested.start(self.interval.get() as libc::c_long, 0);
    }

    /// Changes the rate so that signals take half of the time.
    fn adapt(&mut self) {
        let (elapsed, handled) = (self.since.elapsed(), HANDLED.get());
        self.round.set(handled);
        self.start_nested();
        if elapsed < Duration::from_millis(100) {
            return;
        }
        let share = (handled - self.handled) as f64 * self.cost / (elapsed.as_secs_f64() * 1e6);
        (self.since, self.handled) = (Instant::now(), handled);
        self.set_interval(self.interval.get() * (share / 0.5).clamp(0.5, 2.0));
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        STORM.set(std::ptr::null());
    }
}

fn mask(how: i32, signal: i32) {
    // SAFETY: zero is a valid set, and the set lives across the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, signal);
        assert_eq!(libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut()), 0);
    }
}

/// Runs a function that does not allocate memory while the handler that does may run.
fn open<R>(function: impl FnOnce() -> R) -> R {
    mask(libc::SIG_UNBLOCK, CALLING);
    let result = function();
    mask(libc::SIG_BLOCK, CALLING);
    result
}

/// Sends numbers to this thread, and checks that all arrive.
fn queue() {
    let before = SUM.get();
    for number in 1..=10usize {
        let value = libc::sigval { sival_ptr: std::ptr::without_provenance_mut(number) };
        // SAFETY: the thread is this one, and the handler takes any value.
        assert_eq!(unsafe { libc::pthread_sigqueue(libc::pthread_self(), QUEUED, value) }, 0);
    }
    assert_eq!(SUM.get(), before + 55, "signals are lost");
}

/// A thread that enters domains.
fn with_domains(pool: &Pool, rounds: &AtomicU64) {
    let mut domains: Vec<_> = (0..6).map(|_| build(small("in the storm"))).collect();
    let mut limited = build(small("limited").deadline(Duration::from_millis(30)));
    CALLED.set(Some(build(small("called in handlers"))));
    let mut storm = Storm::begin();
    for round in 0u64.. {
        let expected = compute(round);
        let good = guarded(round, || {
            let domain = &mut domains[round as usize % 6];
            // Few enough results to need no memory.
            assert_eq!(open(|| domain.call(|| compute(round)).unwrap()), expected);
            domain.call(mistake).unwrap_err();
            works(domain);
            queue();
        });
        assert!(good, "the stack has changed");
        if round % 8 == 0 {
            let result = limited.call(loop_forever).unwrap_err();
            assert_eq!(*result.kind(), ViolationKind::Deadline);
        }
        if round % 4 == 1 {
            call_back(&mut domains);
            works(&mut pool.get().unwrap());
        }
        storm.adapt();
        rounds.fetch_add(1, Ordering::Relaxed);
        if STOP.load(Ordering::Relaxed) {
            break;
        }
    }
    drop(storm);
    drop(CALLED.take());
}

fn call_back(domains: &mut [Domain]) {
    let (first, others) = domains.split_first_mut().unwrap();
    let result = first.call_with(
        &mut [&mut |arguments| {
            others.iter_mut().for_each(works);
            arguments.word(0) + 1
        }],
        |callbacks| {
            // SAFETY: the pointer is that of a function with up to six words.
            let next: extern "C" fn(u64) -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
            next(next(1))
        },
    );
    assert_eq!(result.unwrap(), 3);
}

/// A thread that enters none.
fn without_domains(rounds: &AtomicU64) {
    let mut storm = Storm::begin();
    for round in 0u64.. {
        let expected = compute(round);
        assert!(guarded(round, || assert_eq!(open(|| compute(round)), expected)), "the stack has changed");
        queue();
        storm.adapt();
        rounds.fetch_add(1, Ordering::Relaxed);
        if STOP.load(Ordering::Relaxed) {
            break;
        }
    }
}

/// Makes threads whose first call is within a handler, and processes.
fn begin_anew(rounds: &AtomicU64) {
    while !STOP.load(Ordering::Relaxed) {
        let mut domain = build(small("of a new thread"));
        std::thread::spawn(move || {
            works(&mut domain);
        })
        .join()
        .unwrap();
        let before = CALLS_IN_HANDLERS.load(Ordering::Relaxed);
        let domain = build(small("of a handler"));
        std::thread::spawn(move || {
            CALLED.set(Some(domain));
            // SAFETY: the handler may run here.
            assert_eq!(unsafe { libc::raise(FIRST) }, 0);
            drop(CALLED.take());
        })
        .join()
        .unwrap();
        assert!(CALLS_IN_HANDLERS.load(Ordering::Relaxed) > before);
        let status = in_child(|| {
            let mut domain = build(small("of a child"));
            domain.call(mistake).unwrap_err();
            works(&mut domain);
        });
        assert_eq!(status, 0);
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

fn a_storm() {
    let seconds = std::env::var(SECONDS).map_or(5, |seconds| seconds.parse().expect("a number of seconds"));
    for (signal, flags) in [
        (PLAIN, libc::SA_RESTART),
        (ON_STACK, libc::SA_RESTART | libc::SA_ONSTACK),
        (NESTED, libc::SA_RESTART | libc::SA_NODEFER),
        (CALLING, libc::SA_RESTART | libc::SA_ONSTACK),
        (QUEUED, libc::SA_RESTART),
    ] {
        install(signal, handle, flags);
    }
    install(FIRST, first_call, libc::SA_RESTART);
    let pool = Pool::new(small("pooled"), 2);
    let rounds: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
    std::thread::scope(|scope| {
        let threads = [
            scope.spawn(|| with_domains(&pool, &rounds[0])),
            scope.spawn(|| with_domains(&pool, &rounds[1])),
            scope.spawn(|| without_domains(&rounds[2])),
            scope.spawn(|| begin_anew(&rounds[3])),
        ];
        let start = Instant::now();
        // Each thread gets somewhere, however slow the machine is.
        let is_over = || {
            start.elapsed() > Duration::from_secs(seconds)
                && rounds.iter().all(|rounds| rounds.load(Ordering::Relaxed) > 0)
        };
        while !is_over() && !threads.iter().any(std::thread::ScopedJoinHandle::is_finished) {
            std::thread::sleep(Duration::from_millis(20));
        }
        STOP.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    assert_eq!(WRONG.load(Ordering::Relaxed), 0);
    let rounds = rounds.map(AtomicU64::into_inner);
    println!(
        "figure: {} signals, {} calls in handlers, rounds of the threads: {rounds:?}",
        SIGNALS.load(Ordering::Relaxed),
        CALLS_IN_HANDLERS.load(Ordering::Relaxed)
    );
}
