//! A program that makes its first domain before it starts a thread.

use std::sync::atomic::{AtomicBool, Ordering};

use pkru_userspace::Domain;
use support::suite;

suite! {
    #[on_first_thread] all_threads_change_their_user,
}

/// The C library changes the user or group of all threads by a signal to each. The signal does not disturb a domain.
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
    // SAFETY: the arguments -1 leave all users unchanged.
    let result = unsafe { libc::setresuid(u32::MAX, u32::MAX, u32::MAX) };
    IS_OVER.store(true, Ordering::Relaxed);
    assert_eq!((result, thread.join().unwrap()), (0, 7));
}
