//! Panics, aborts and exits are violations, and the domain works afterwards.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::hint::black_box;

use pkru_userspace::{Domain, ViolationKind};
use support::signals::{install, wait_in};
use support::{contain, domain, in_child, suite, works};

suite! {
    a_panic,
    a_panic_with_a_hook_of_the_programs,
    a_panic_on_another_thread,
    a_panic_that_is_resumed,
    a_deadline_that_strikes_in_a_panic,
    an_abort,
    an_exit,
    signals_that_end_a_program,
    a_write_to_a_closed_pipe,
    a_limit_on_the_size_of_files,
    a_limit_on_processor_time,
    a_thread_that_ends_within_a_handler,
    a_fork_without_handlers,
}

fn a_panic() {
    let mut domain = domain("panic");
    for number in 0..3 {
        let violation = contain(&mut domain, || panic!("number {number} in a domain"));
        let ViolationKind::Panic { message: Some(message) } = violation.kind() else { panic!("{violation}") };
        assert!(message.contains(&format!("number {number} in a domain")), "{message}");
        assert!(message.contains("panics_and_exits.rs"), "{message}");
    }
    // A panic that the compiler inserts.
    let index = black_box(7);
    let violation = contain(&mut domain, || {
        black_box([1, 2, 3][black_box(index)]);
    });
    let ViolationKind::Panic { message: Some(message) } = violation.kind() else { panic!("{violation}") };
    assert!(message.contains("index out of bounds"), "{message}");
    // Panics outside a domain work as before.
    assert!(std::panic::catch_unwind(|| panic!("as ever")).is_err());
    assert!(!std::thread::panicking());
}

fn a_panic_with_a_hook_of_the_programs() {
    let mut domain = domain("panic");
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    let violation = contain(&mut domain, || panic!("in a domain"));
    assert!(matches!(violation.kind(), ViolationKind::Panic { .. }), "{violation}");
}

fn a_panic_on_another_thread() {
    drop(domain("first"));
    let violation = std::thread::spawn(|| {
        let mut domain = Domain::builder("thread").build().unwrap();
        contain(&mut domain, || panic!("on a thread"))
    });
    let violation = violation.join().unwrap();
    assert!(violation.to_string().contains("on a thread"), "{violation}");
}

fn an_abort() {
    let mut domain = domain("abort");
    // SAFETY: deliberately unsound: the mistake under test.
    let ways: [&dyn Fn(); 3] = [&|| std::process::abort(), &|| unsafe { libc::abort() }, &|| unsafe {
        libc::raise(libc::SIGABRT);
    }];
    for way in ways {
        assert_eq!(*contain(&mut domain, way).kind(), ViolationKind::Abort);
    }
}

fn an_exit() {
    let mut domain = domain("exit");
    // SAFETY: deliberately unsound: the mistake under test.
    let ways: [&dyn Fn(); 2] = [&|| unsafe { libc::exit(3) }, &|| unsafe { libc::_exit(3) }];
    for way in ways {
        assert_eq!(*contain(&mut domain, way).kind(), ViolationKind::Exit { status: Some(3) });
    }
    // std first locks standard output, a static. The violation can occur there, with the status unknown.
    let violation = contain(&mut domain, || std::process::exit(3));
    assert!(matches!(violation.kind(), ViolationKind::Exit { .. }), "{violation}");
}

fn a_panic_that_is_resumed() {
    let mut domain = domain("panic");
    let resume = || std::panic::resume_unwind(Box::new(7));
    let ways: [&dyn Fn(); 3] = [&resume, &|| drop(std::panic::catch_unwind(resume)), &|| {
        drop(std::panic::catch_unwind(|| panic!("caught")));
    }];
    for way in ways {
        let violation = contain(&mut domain, way);
        assert!(matches!(violation.kind(), ViolationKind::Panic { .. }), "{violation}");
    }
    assert!(std::panic::catch_unwind(resume).is_err(), "control");
}

fn a_deadline_that_strikes_in_a_panic() {
    struct Endless;
    impl std::fmt::Display for Endless {
        fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            support::loop_forever();
            Ok(())
        }
    }
    let mut domain = support::build(Domain::builder("panic").deadline(std::time::Duration::from_millis(200)));
    for _ in 0..2 {
        assert_eq!(*contain(&mut domain, || panic!("{Endless}")).kind(), ViolationKind::Deadline);
    }
}

/// Checks that a function is a violation in a domain, and that outside it ends the process by the signal.
#[track_caller]
fn ends_by<R>(signal: i32, act: impl Fn() -> R) {
    let function = || {
        black_box(act());
    };
    let mut domain = domain("ended");
    assert_eq!(in_child(function), signal, "control");
    for _ in 0..2 {
        assert_eq!(*contain(&mut domain, function).kind(), ViolationKind::Raised { signal });
    }
    assert_eq!(in_child(function), signal, "with domains");
}

fn signals_that_end_a_program() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGALRM, libc::SIGKILL, 40] {
        // SAFETY: deliberately unsound: the mistake under test.
        ends_by(signal, || unsafe { libc::raise(signal) });
        // SAFETY: as above.
        ends_by(signal, || unsafe { libc::pthread_kill(libc::pthread_self(), signal) });
        // SAFETY: as above.
        ends_by(signal, || unsafe { libc::kill(libc::getpid(), signal) });
    }
    let mut domain = domain("harmless");
    // Outside a domain these stop the process.
    for signal in [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU] {
        let violation = contain(&mut domain, || {
            // SAFETY: deliberately unsound: the mistake under test.
            black_box(unsafe { libc::raise(signal) });
        });
        assert_eq!(*violation.kind(), ViolationKind::Raised { signal });
    }
    for signal in [libc::SIGCHLD, libc::SIGURG, libc::SIGWINCH, libc::SIGCONT] {
        // SAFETY: the signal does nothing.
        assert_eq!(domain.call(|| unsafe { libc::raise(signal) }).unwrap(), 0);
    }
}

fn a_write_to_a_closed_pipe() {
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors, and nothing else uses the first.
    unsafe {
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        libc::close(pipe[0]);
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
    // SAFETY: the byte is readable.
    let write = || unsafe { libc::write(pipe[1], b"x".as_ptr().cast(), 1) };
    ends_by(libc::SIGPIPE, write);
    let mut domain = domain("ignored");
    // SAFETY: `SIG_IGN` is no function.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    assert_eq!([domain.call(write).unwrap(), write()], [-1; 2], "it is ignored, as in any program with std's main");
    install(libc::SIGPIPE, support::signals::count, 0);
    assert_eq!([domain.call(write).unwrap(), write()], [-1; 2], "it is handled");
    assert_eq!(support::signals::COUNT.load(std::sync::atomic::Ordering::Relaxed), 2);
}

fn limit(resource: u32, soft: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is writable and readable.
    unsafe {
        assert_eq!(libc::getrlimit(resource, &raw mut limit), 0);
        limit.rlim_cur = soft.min(limit.rlim_max);
        assert_eq!(libc::setrlimit(resource, &raw const limit), 0);
    }
}

fn a_limit_on_the_size_of_files() {
    // SAFETY: the name is NUL-terminated.
    let file = unsafe { libc::memfd_create(c"file".as_ptr(), 0) };
    limit(libc::RLIMIT_FSIZE, 0);
    // SAFETY: the byte is readable.
    ends_by(libc::SIGXFSZ, || unsafe { libc::write(file, b"x".as_ptr().cast(), 1) });
    limit(libc::RLIMIT_FSIZE, u64::MAX);
}

fn a_limit_on_processor_time() {
    let spin = || while black_box(true) {};
    let status = in_child(|| {
        limit(libc::RLIMIT_CPU, 1);
        spin();
    });
    assert_eq!(status, libc::SIGXCPU, "control");
    let mut domain = domain("spinning");
    limit(libc::RLIMIT_CPU, 1);
    let violation = contain_once(&mut domain, spin);
    limit(libc::RLIMIT_CPU, u64::MAX);
    assert_eq!(*violation.kind(), ViolationKind::Raised { signal: libc::SIGXCPU });
    works(&mut domain);
}

/// Returns the violation of a call. The kernel repeats its signal each second of processor time.
fn contain_once(domain: &mut Domain, function: impl Fn()) -> pkru_userspace::Violation {
    domain.call(function).unwrap_err()
}

fn a_thread_that_ends_within_a_handler() {
    extern "C" fn end(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: no frame of this thread has anything to clean up.
        unsafe { libc::pthread_exit(std::ptr::null_mut()) };
    }
    extern "C" fn thread(_: *mut libc::c_void) -> *mut libc::c_void {
        let mut domain = std::mem::ManuallyDrop::new(domain("left"));
        wait_in(&mut domain);
        unreachable!("the handler ends the thread");
    }
    install(libc::SIGALRM, end, 0);
    // More than there are keys.
    for _ in 0..20 {
        let mut handle = 0;
        // SAFETY: the function expects no argument.
        unsafe {
            assert_eq!(libc::pthread_create(&raw mut handle, std::ptr::null(), thread, std::ptr::null_mut()), 0);
            assert_eq!(libc::pthread_join(handle, std::ptr::null_mut()), 0);
        }
    }
    let mut domain = domain("after");
    works(&mut domain);
    // SAFETY: deliberately unsound: the mistake under test.
    let violation = contain(&mut domain, || unsafe { libc::pthread_exit(std::ptr::null_mut()) });
    assert!(matches!(violation.kind(), ViolationKind::Exit { .. }), "{violation}");
}

fn a_fork_without_handlers() {
    unsafe extern "C" {
        fn _Fork() -> libc::pid_t;
    }
    let mut domain = domain("forked");
    works(&mut domain);
    // SAFETY: the process has one thread.
    let child = unsafe { _Fork() };
    if child == 0 {
        contain(&mut domain, || panic!("in the child"));
        works(&mut domain);
        // SAFETY: the call ends the child.
        unsafe { libc::_exit(7) };
    }
    let mut status = 0;
    // SAFETY: the status is writable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 7 << 8);
    // SAFETY: it fails.
    assert_eq!(domain.call(|| unsafe { _Fork() }).unwrap(), -1);
    works(&mut domain);
}
