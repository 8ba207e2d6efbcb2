//! A program that makes its first domain before its first thread, as the test harness would not: this suite has none.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use pkru_userspace::Domain;

/// A signal that the C library sends each thread, for all to change their user or group at once, does not disturb a
/// domain.
fn all_threads_change_their_user() {
    static IS_OVER: AtomicBool = AtomicBool::new(false);
    let mut domain = Domain::builder("first").build().unwrap();
    let thread = std::thread::spawn(move || {
        let wait = || {
            while !IS_OVER.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        domain.call(wait).unwrap();
        domain.call(|| 7).unwrap()
    });
    std::thread::sleep(std::time::Duration::from_millis(300));
    // SAFETY: the calls change nothing, in all threads.
    let result = unsafe { libc::setresuid(u32::MAX, u32::MAX, u32::MAX) };
    IS_OVER.store(true, Ordering::Relaxed);
    assert_eq!((result, thread.join().unwrap()), (0, 7));
}

fn main() -> ExitCode {
    const NAME: &str = "all_threads_change_their_user";
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let has = |argument: &str| arguments.iter().any(|given| given == argument);
    if has("--list") {
        if !has("--ignored") {
            println!("{NAME}: test");
        }
    } else if let Err(error) = pkru_userspace::capability::detect() {
        assert!(std::env::var_os("PKRU_TEST_FORCE").is_none(), "{error}");
        println!("skipped: {error}\n1 passed");
    } else {
        all_threads_change_their_user();
        println!("1 passed");
    }
    ExitCode::SUCCESS
}
