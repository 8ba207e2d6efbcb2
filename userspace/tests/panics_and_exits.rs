//! Panics, aborts and exits are violations, and the domain works afterwards.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::hint::black_box;

use pkru_userspace::{Domain, ViolationKind};
use support::{contain, domain, suite};

suite! {
    a_panic,
    a_panic_with_a_hook_of_the_programs,
    a_panic_on_another_thread,
    an_abort,
    an_exit,
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
