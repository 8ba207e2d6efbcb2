//! Code in a domain that starts processes, sends signals to other threads, or blocks signals.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::ffi::CStr;
use std::process::Command;
use std::ptr::{self, null};

use pkru_userspace::{Domain, ViolationKind, set_key_limit};
use support::{build, contain, domain, mistake, open_domain, suite, works};

suite! {
    programs_are_not_started_from_domains,
    code_in_a_domain_does_not_fork,
    a_child_that_shares_memory_ends_as_it_wants_to,
    a_safe_function_that_takes_the_lock_on_keys,
    another_thread_is_not_signalled,
    threads_are_cancelled_as_before,
    older_functions_leave_the_signals_of_faults_open,
    older_functions_set_handlers,
    an_exit_of_code_that_has_lost_its_thread_locals,
}

const PROGRAM: &CStr = c"/proc/self/exe";

unsafe extern "C" {
    fn sighold(signal: i32) -> i32;
    fn sigblock(mask: i32) -> i32;
    fn sigset(signal: i32, handler: libc::sighandler_t) -> libc::sighandler_t;
    fn system(command: *const libc::c_char) -> i32;
    static environ: *const *mut libc::c_char;
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

/// Starts this program to list its tests. Returns the error number and the wait status.
fn spawn() -> (i32, i32) {
    let arguments = [PROGRAM.as_ptr().cast_mut(), c"--list".as_ptr().cast_mut(), ptr::null_mut()];
    let (mut child, mut status) = (0, -1);
    // SAFETY: all pointers are valid.
    unsafe {
        let (no_actions, no_attributes) = (null(), null());
        let error =
            libc::posix_spawn(&raw mut child, PROGRAM.as_ptr(), no_actions, no_attributes, arguments.as_ptr(), environ);
        if error == 0 {
            libc::waitpid(child, &raw mut status, 0);
        }
        (error, status)
    }
}

/// Executes a program that exits with 0.
fn execute(what: usize) -> i32 {
    let (path, name) = (c"/proc/self/exe".as_ptr(), c"again".as_ptr());
    let option = c"--list".as_ptr();
    let arguments = [name, option, null()];
    let environment = [null()];
    let end = null::<std::ffi::c_char>();
    // SAFETY: the arguments are C strings, and the lists end with null.
    unsafe {
        match what {
            0 => libc::execve(path, arguments.as_ptr(), environment.as_ptr()),
            1 => libc::execv(path, arguments.as_ptr()),
            2 => libc::execvp(path, arguments.as_ptr()),
            3 => libc::execvpe(path, arguments.as_ptr(), environment.as_ptr()),
            4 => libc::fexecve(libc::open(path, libc::O_RDONLY), arguments.as_ptr(), environment.as_ptr()),
            5 => libc::execl(path, name, option, end),
            6 => libc::execlp(path, name, option, end),
            _ => libc::execle(path, name, option, end, environment.as_ptr()),
        }
    }
}

fn programs_are_not_started_from_domains() {
    assert_eq!(spawn(), (0, 0), "control");
    for mut domain in [domain("closed"), open_domain("open")] {
        assert_eq!(domain.call(|| spawn().0).unwrap(), libc::EPERM);
        // SAFETY: both are C strings.
        let popen = || unsafe { (libc::popen(c"true".as_ptr(), c"r".as_ptr()).is_null(), errno()) };
        assert_eq!(domain.call(popen).unwrap(), (true, libc::EPERM));
        // SAFETY: the command is a C string.
        assert_eq!(domain.call(|| unsafe { (system(c"true".as_ptr()), errno()) }).unwrap(), (-1, libc::EPERM));
        works(&mut domain);
    }
    for mut domain in [domain("closed"), open_domain("open")] {
        for what in 0..8 {
            assert_eq!(domain.call(|| (execute(what), errno())).unwrap(), (-1, libc::EPERM), "way {what}");
        }
        works(&mut domain);
    }
    for what in 0..8 {
        let status = support::in_child(|| {
            execute(what);
            // SAFETY: the call ends the process.
            unsafe { libc::_exit(9) };
        });
        assert_eq!(status, 0, "control: way {what}");
    }
    let mut open = open_domain("open");
    let status = || i64::from(Command::new("/proc/self/exe").arg("--list").status().is_ok());
    assert_eq!(status(), 1, "control");
    assert_eq!(open.call(status).unwrap(), 0);
    works(&mut open);
}

/// Starts a child that shares its parent's memory and exits with 3. Returns its wait status.
fn vforked() -> i32 {
    unsafe extern "C" {
        fn helper_vfork(status: i32) -> i32;
    }
    // SAFETY: the child exits at once.
    unsafe { helper_vfork(3) }
}

fn code_in_a_domain_does_not_fork() {
    assert_eq!(support::in_child(|| ()), 0, "control");
    for mut domain in [domain("closed"), open_domain("open")] {
        // SAFETY: the fork is refused, so there is no child.
        assert_eq!(domain.call(|| unsafe { (libc::fork(), errno()) }).unwrap(), (-1, libc::EPERM));
        works(&mut domain);
    }
}

fn a_child_that_shares_memory_ends_as_it_wants_to() {
    assert_eq!(vforked(), 3 << 8, "control");
    for mut domain in [domain("closed"), open_domain("open")] {
        assert_eq!(domain.call(vforked).unwrap(), 3 << 8);
        contain(&mut domain, mistake);
        assert_eq!(domain.call(vforked).unwrap(), 3 << 8);
    }
}

fn a_safe_function_that_takes_the_lock_on_keys() {
    let mut domain = domain("limit");
    let violation = contain(&mut domain, || set_key_limit(3));
    assert!(matches!(violation.kind(), ViolationKind::Key(_)), "{violation}");
    let mut other = Domain::builder("other").build().unwrap();
    works(&mut other);
}

fn another_thread_is_not_signalled() {
    // SAFETY: signal 0 only checks that the thread exists.
    let poke = |thread| unsafe { libc::pthread_kill(thread, 0) };
    // SAFETY: the call touches no memory.
    let here = unsafe { libc::pthread_self() };
    assert_eq!(poke(here), 0);
    for mut domain in [domain("closed"), open_domain("open")] {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(poke(here), 0, "control");
                assert_eq!(domain.call(|| poke(here)).unwrap(), libc::EPERM);
                // SAFETY: as above.
                assert_eq!(domain.call(|| poke(unsafe { libc::pthread_self() })).unwrap(), 0, "its own thread");
                works(&mut domain);
            });
        });
    }
}

fn threads_are_cancelled_as_before() {
    unsafe extern "C" {
        fn helper_cancel() -> i32;
    }
    let mut domain = domain("bystander");
    works(&mut domain);
    // SAFETY: the function has no preconditions.
    assert_eq!(unsafe { helper_cancel() }, 1);
    contain(&mut domain, mistake);
}

fn older_functions_leave_the_signals_of_faults_open() {
    let mut domain = domain("holder");
    // SAFETY: the functions take a signal number and a mask.
    let hold = || unsafe { (sighold(libc::SIGSEGV), sigblock(-1)) };
    assert_eq!(domain.call(hold).unwrap().0, 0);
    contain(&mut domain, mistake);
    contain(&mut domain, || {
        hold();
        mistake();
    });
    assert_eq!(hold().0, 0);
    contain(&mut domain, mistake);
}

fn older_functions_set_handlers() {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: i32) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    let handler = count as *const () as usize;
    let mut domain = domain("raiser");
    // SAFETY: the handler only counts.
    assert_eq!(unsafe { sigset(libc::SIGUSR1, handler) }, libc::SIG_DFL);
    // SAFETY: `raise` has no preconditions.
    let raise = || unsafe { libc::raise(libc::SIGUSR1) };
    raise();
    domain.call(raise).unwrap();
    assert_eq!(COUNT.load(Ordering::Relaxed), 2);
    const HOLD: usize = 2;
    // SAFETY: as above.
    assert_eq!(unsafe { sigset(libc::SIGUSR1, HOLD) }, handler);
    raise();
    assert_eq!(COUNT.load(Ordering::Relaxed), 2, "it is held");
    // SAFETY: as above.
    assert_eq!(unsafe { sigset(libc::SIGUSR1, handler) }, HOLD);
    assert_eq!(COUNT.load(Ordering::Relaxed), 3);
    works(&mut domain);
}

fn an_exit_of_code_that_has_lost_its_thread_locals() {
    let mut domain = build(Domain::builder("wiped"));
    // SAFETY: deliberately unsound: the mistake under test.
    let violation = contain(&mut domain, || unsafe {
        let pointer: usize;
        std::arch::asm!("mov {}, fs:0", out(reg) pointer);
        // Clears the thread-locals below the thread pointer, in its page.
        ((pointer & !4095) as *mut u8).write_bytes(0, pointer & 4095);
        libc::_exit(3)
    });
    assert_eq!(*violation.kind(), ViolationKind::Exit { status: Some(3) });
}
