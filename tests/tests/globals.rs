//! Domains that may write the program's statics, and their effect on other domains and threads.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::cell::UnsafeCell;
use std::hint::black_box;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use pkru_userspace::{Access, Domain, Vault, ViolationKind};
use support::{contain, domain, key_fault, mistake, open_domain, suite, works};

suite! {
    code_with_state_in_statics_works,
    the_c_librarys_own_state_works,
    other_domains_read_statics_and_do_not_write_them,
    everything_else_stays_closed,
    threads_that_were_there_before_go_on,
    a_thread_that_waits_for_signals,
    a_thread_that_blocks_every_signal,
    system_calls_with_statics_as_buffers,
    violations_are_what_they_were,
    a_violation_in_the_middle_of_a_stream,
    signals_and_children_afterwards,
    a_fork_while_statics_are_being_opened,
    standard_output_outlives_the_domain_that_used_it_first,
    #[child] prints_in_a_domain_and_after_it,
}

unsafe extern "C" {
    fn helper_count() -> u64;
    fn helper_table(index: u8) -> u32;
}

struct Buffer(UnsafeCell<[u8; 64]>);

// SAFETY: the tests use it from one thread at a time.
unsafe impl Sync for Buffer {}

static DATA: AtomicU64 = AtomicU64::new(7);
static BUFFER: Buffer = Buffer(UnsafeCell::new([0; 64]));

fn code_with_state_in_statics_works() {
    let mut closed = domain("closed");
    // SAFETY: the function has no preconditions.
    let count = || unsafe { helper_count() };
    closed.call(count).expect_err("control");

    let mut open = open_domain("open");
    let before = count();
    assert_eq!(open.call(count).unwrap(), before + 1);
    assert_eq!(open.call(count).unwrap(), before + 2);
    assert_eq!(count(), before + 3, "the program sees the domain's writes");
    // SAFETY: as above.
    assert_eq!(open.call(|| unsafe { helper_table(2) }).unwrap(), 2u32.wrapping_mul(2_654_435_761));
    // A violation does not undo it.
    contain(&mut open, mistake);
    assert_eq!(open.call(count).unwrap(), before + 4);
}

fn the_c_librarys_own_state_works() {
    let mut open = open_domain("libc");
    let numbers = open.call(|| {
        // SAFETY: the functions have no preconditions, and no other thread calls them.
        unsafe {
            libc::srand(5);
            [libc::rand(), libc::rand()]
        }
    });
    // SAFETY: as above.
    let expected = unsafe {
        libc::srand(5);
        [libc::rand(), libc::rand()]
    };
    assert_eq!(numbers.unwrap(), expected);
    let year = open.call(|| {
        // SAFETY: the struct is writable, and the time is readable.
        unsafe {
            let mut time: libc::tm = std::mem::zeroed();
            libc::localtime_r(&86_400_000, &raw mut time);
            time.tm_year
        }
    });
    assert_eq!(year.unwrap(), 72);
    open.call(|| println!("printed in a domain")).unwrap();
    let variable = open.call(|| std::env::var("PATH").map(|path| path.len() as u32).unwrap_or(0));
    assert!(variable.unwrap() > 0);
}

fn other_domains_read_statics_and_do_not_write_them() {
    let mut before = domain("before");
    let mut open = open_domain("open");
    let mut after = Domain::builder("after").build().unwrap();
    for closed in [&mut before, &mut after] {
        assert_eq!(closed.call(|| DATA.load(Ordering::Relaxed)).unwrap(), 7);
        let violation = contain(closed, || DATA.store(9, Ordering::Relaxed));
        let fault = key_fault(&violation);
        assert_eq!((fault.address, fault.access), (DATA.as_ptr() as u64, Access::Write));
        assert!(violation.to_string().contains("Globals::Writable"), "{violation}");
    }
    assert_eq!(DATA.load(Ordering::Relaxed), 7);
    open.call(|| DATA.store(8, Ordering::Relaxed)).unwrap();
    assert_eq!(DATA.load(Ordering::Relaxed), 8);
}

fn everything_else_stays_closed() {
    thread_local! { static LOCAL: std::cell::Cell<u64> = const { std::cell::Cell::new(1) } }
    let mut open = open_domain("open");
    let mut other = domain("other");
    let mut heap = Box::new(1u64);
    let mut stack = 1u64;
    let vault = Vault::new(1u64).unwrap();
    let in_other = other.call(|| Box::leak(Box::new(1u64)) as *mut u64 as u64).unwrap();
    let local = LOCAL.with(std::cell::Cell::as_ptr);
    for (what, target) in [
        ("heap", &raw mut *heap),
        ("stack", &raw mut stack),
        ("thread-local", local),
        ("vault", vault.as_ptr().cast_mut()),
        ("another domain", in_other as *mut u64),
    ] {
        // SAFETY: deliberately unsound: the mistake under test.
        let violation = contain(&mut open, || unsafe { target.write_volatile(2) });
        assert_eq!(key_fault(&violation).address, target as u64, "{what}");
    }
    // The pages that pkru-userspace relies on.
    let mut pages = 0;
    for target in pkru_userspace::trusted_pages().into_iter().flat_map(|range| range.step_by(4096)) {
        pages += 1;
        // SAFETY: deliberately unsound: the mistake under test.
        let violation = contain(&mut open, || unsafe { (target as *mut u8).write_volatile(0) });
        assert_eq!(key_fault(&violation).address, target as u64);
    }
    println!("figure: {pages} pages of the monitor and the gate stay closed");
    assert!(pages >= 5);
}

/// Returns a set of signals.
fn set(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: zeroed sets are valid, and the set is writable.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        signals.iter().for_each(|signal| assert_eq!(libc::sigaddset(&raw mut set, *signal), 0));
        set
    }
}

/// Starts a thread that blocks signals, waits for one of `awaited`, and then writes a static. Returns when it waits.
fn waiting_thread(blocked: Vec<i32>, awaited: Vec<i32>) -> (std::thread::JoinHandle<i32>, libc::pthread_t) {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let (blocked, awaited) = (set(&blocked), set(&awaited));
        let mut signal = 0;
        // SAFETY: the sets are readable, and the number is writable.
        unsafe {
            assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, &raw const blocked, std::ptr::null_mut()), 0);
            sender.send((libc::pthread_self(), libc::gettid())).unwrap();
            assert_eq!(libc::sigwait(&raw const awaited, &raw mut signal), 0);
        }
        DATA.fetch_add(1, Ordering::Relaxed);
        signal
    });
    let (handle, id) = receiver.recv().unwrap();
    while !std::fs::read_to_string(format!("/proc/self/task/{id}/stat")).unwrap().contains(") S ") {
        std::thread::yield_now();
    }
    (thread, handle)
}

fn a_thread_that_waits_for_signals() {
    drop(domain("first"));
    let most = [libc::SIGFPE, libc::SIGSEGV, libc::SIGUSR1, libc::SIGTERM];
    let (waiting, handle) = waiting_thread(most.to_vec(), most.to_vec());
    let start = std::time::Instant::now();
    let mut open = open_domain("open");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    works(&mut open);
    assert!(!waiting.is_finished(), "no stray signal has ended the wait");
    // SAFETY: the thread waits.
    assert_eq!(unsafe { libc::pthread_kill(handle, libc::SIGUSR1) }, 0);
    assert_eq!(waiting.join().unwrap(), libc::SIGUSR1);
    assert_eq!(DATA.load(Ordering::Relaxed), 8);
}

fn a_thread_that_blocks_every_signal() {
    drop(domain("first"));
    let all: Vec<_> = (1..32).collect();
    for awaited in [all.clone(), vec![libc::SIGUSR1]] {
        let (waiting, handle) = waiting_thread(all.clone(), awaited);
        let start = std::time::Instant::now();
        // SAFETY: nothing is called in the domain.
        let builder = unsafe { Domain::builder("open").globals(pkru_userspace::Globals::Writable) };
        let error = builder.build().unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        assert!(error.to_string().contains("blocks the signals"), "{error}");
        assert!(!waiting.is_finished(), "no stray signal has ended the wait");
        // SAFETY: the thread waits.
        assert_eq!(unsafe { libc::pthread_kill(handle, libc::SIGUSR1) }, 0);
        assert_eq!(waiting.join().unwrap(), libc::SIGUSR1, "and none is left");
    }
    works(&mut open_domain("without such a thread"));
}

fn threads_that_were_there_before_go_on() {
    drop(domain("first"));
    static STOP: AtomicBool = AtomicBool::new(false);
    static ROUNDS: AtomicU64 = AtomicU64::new(0);
    let ready = Arc::new(Barrier::new(4));
    let threads: Vec<_> = (0..3)
        .map(|number| {
            let ready = Arc::clone(&ready);
            std::thread::spawn(move || {
                // Only one of them calls a domain.
                let mut own = (number == 0).then(|| Domain::builder("own").build().unwrap());
                ready.wait();
                while !STOP.load(Ordering::Relaxed) {
                    ROUNDS.fetch_add(1, Ordering::Relaxed);
                    if let Some(own) = &mut own {
                        works(own);
                        contain(own, mistake);
                    }
                    std::thread::yield_now();
                }
            })
        })
        .collect();
    ready.wait();
    let mut open = open_domain("open");
    let before = ROUNDS.load(Ordering::Relaxed);
    for _ in 0..50 {
        open.call(|| DATA.fetch_add(1, Ordering::Relaxed)).unwrap();
        std::thread::yield_now();
    }
    while ROUNDS.load(Ordering::Relaxed) < before + 50 {
        std::thread::yield_now();
    }
    STOP.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    std::thread::spawn(|| DATA.store(1, Ordering::Relaxed)).join().unwrap();
}

fn system_calls_with_statics_as_buffers() {
    let waiting = Arc::new(Barrier::new(2));
    drop(domain("first"));
    let read = || {
        let zero = std::fs::File::open("/dev/zero").unwrap();
        // SAFETY: one thread uses the buffer at a time.
        unsafe { libc::read(zero.as_raw_fd(), BUFFER.0.get().cast(), 64) }
    };
    let other = Arc::clone(&waiting);
    let thread = std::thread::spawn(move || {
        other.wait();
        other.wait();
        read()
    });
    waiting.wait();
    let mut open = open_domain("open");
    assert_eq!(read(), 64);
    waiting.wait();
    assert_eq!(thread.join().unwrap(), 64, "a thread that is older than the open domain");
    assert_eq!(open.call(|| read() as i64).unwrap(), 64);
    let mut closed = Domain::builder("closed").build().unwrap();
    let zero = std::fs::File::open("/dev/zero").unwrap().as_raw_fd();
    // SAFETY: the kernel checks the target.
    let refused = closed.call(|| unsafe { libc::read(zero, BUFFER.0.get().cast(), 64) as i64 });
    assert_eq!(refused.unwrap(), -1);
}

fn a_violation_in_the_middle_of_a_stream() {
    unsafe extern "C" {
        fn printf(format: *const std::ffi::c_char, ...) -> i32;
        fn ftrylockfile(stream: *mut libc::FILE) -> i32;
        fn funlockfile(stream: *mut libc::FILE);
        static mut stdout: *mut libc::FILE;
    }
    // SAFETY: the format has a text for its argument.
    unsafe { printf(c"%s\n".as_ptr(), c"outside".as_ptr()) };
    let mut open = open_domain("printer");
    let mut closed = domain("closed");
    assert!(!contain(&mut closed, mistake).may_have_left_statics_changed());
    for _ in 0..3 {
        let text = black_box(0x123usize) as *const std::ffi::c_char;
        // SAFETY: deliberately unsound: the mistake under test.
        let print = || unsafe { printf(c"%s\n".as_ptr(), text) };
        let violation = contain(&mut open, || {
            black_box(print());
        });
        assert!(violation.may_have_left_statics_changed());
        assert!(violation.to_string().contains("half done"), "{violation}");
        // On another thread: the lock would be free to its owner.
        let is_free = || {
            // SAFETY: the stream exists.
            unsafe {
                ftrylockfile(stdout) == 0 && {
                    funlockfile(stdout);
                    true
                }
            }
        };
        assert!(std::thread::spawn(is_free).join().unwrap(), "the stream's lock is free");
        assert!(is_free());
    }
    // SAFETY: as above.
    unsafe { printf(c"%s\n".as_ptr(), c"and it prints".as_ptr()) };
}

fn violations_are_what_they_were() {
    let mut open = open_domain("open");
    let violation = contain(&mut open, || panic!("in an open domain"));
    assert!(violation.to_string().contains("in an open domain"), "{violation}");
    let mut closed = Domain::builder("closed").build().unwrap();
    let violation = contain(&mut closed, || panic!("in a closed one"));
    assert!(violation.to_string().contains("in a closed one"), "{violation}");
    let violation = contain(&mut closed, || {
        black_box(vec![1u8; 1 << 40]);
    });
    assert!(matches!(violation.kind(), ViolationKind::OutOfMemory { .. }), "{violation}");
    for _ in 0..20 {
        contain(&mut open, mistake);
        contain(&mut closed, mistake);
    }
    let mut text = String::new();
    std::fs::File::open("/proc/self/comm").unwrap().read_to_string(&mut text).unwrap();
    assert!(!text.is_empty());
}

fn signals_and_children_afterwards() {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: i32) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    let mut open = open_domain("open");
    // SAFETY: the handler only counts.
    unsafe { libc::signal(libc::SIGUSR1, count as *const () as usize) };
    // SAFETY: `raise` has no preconditions.
    open.call(|| unsafe { libc::raise(libc::SIGUSR1) }).unwrap();
    // SAFETY: as above.
    unsafe { libc::raise(libc::SIGUSR1) };
    assert_eq!(COUNT.load(Ordering::Relaxed), 2);
    let output = std::process::Command::new("/proc/self/exe").args(["--list"]).output().unwrap();
    assert!(output.status.success());
    let status = support::in_child(|| {
        works(&mut open);
        contain(&mut open, mistake);
    });
    assert_eq!(status, 0);
}

fn a_fork_while_statics_are_being_opened() {
    static IS_OVER: AtomicBool = AtomicBool::new(false);
    let mut busy = domain("busy");
    let mut other = domain("other");
    works(&mut other);
    let (mut begun, begins) = std::io::pipe().unwrap();
    let begins = begins.as_raw_fd();
    let caller = std::thread::spawn(move || {
        let wait = || {
            // SAFETY: the byte is readable.
            unsafe { libc::write(begins, b"x".as_ptr().cast(), 1) };
            while !IS_OVER.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        busy.call(wait).unwrap();
    });
    begun.read_exact(&mut [0]).unwrap();
    // The opener waits until the busy call ends. Until then no domain gets a key.
    let opener = std::thread::spawn(|| works(&mut open_domain("open")));
    std::thread::sleep(Duration::from_millis(500));
    assert!(!opener.is_finished());
    let status = support::in_child(|| {
        // SAFETY: the call has no preconditions. The alarm ends a child that hangs.
        unsafe { libc::alarm(300) };
        works(&mut other);
        works(&mut open_domain("of the child"));
        contain(&mut other, mistake);
    });
    IS_OVER.store(true, Ordering::Relaxed);
    assert_eq!(status, 0);
    caller.join().unwrap();
    opener.join().unwrap();
    works(&mut other);
}

fn standard_output_outlives_the_domain_that_used_it_first() {
    drop(domain("first"));
    // In a new process without capture, so that it prints to its real standard output.
    let child = std::process::Command::new("/proc/self/exe")
        .args(["--exact", "prints_in_a_domain_and_after_it", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && text.contains("in the domain") && text.contains("after it"), "{child:?}");
}

fn prints_in_a_domain_and_after_it() {
    let mut open = open_domain("open");
    open.call(|| println!("in the domain")).unwrap();
    drop(open);
    println!("after it");
}
