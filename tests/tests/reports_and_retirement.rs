//! Reports of violations to hooks and loggers, and retirement of domains after many violations.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use pkru_userspace::{Domain, ViolationKind};
use support::{build, contain, mistake, suite, works};

suite! {
    violations_are_told_to_a_hook_and_a_logger,
    a_domain_is_retired_and_reinstated,
}

fn violations_are_told_to_a_hook_and_a_logger() {
    struct Logger(Mutex<Vec<String>>);
    impl log::Log for Logger {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            self.0.lock().unwrap().push(format!("{} {}: {}", record.level(), record.target(), record.args()));
        }
        fn flush(&self) {}
    }
    static LOGGER: Logger = Logger(Mutex::new(Vec::new()));
    log::set_logger(&LOGGER).unwrap();
    log::set_max_level(log::LevelFilter::Info);
    let told = Arc::new(AtomicU32::new(0));
    let hook = Arc::clone(&told);
    let builder = Domain::builder("watched").on_violation(move |violation| {
        assert_eq!(violation.domain(), "watched");
        hook.fetch_add(1, Ordering::Relaxed);
    });
    let mut domain = build(builder);
    assert!(LOGGER.0.lock().unwrap().is_empty(), "the trial calls report no violations");
    contain(&mut domain, mistake);
    contain(&mut domain, mistake);
    assert_eq!(told.load(Ordering::Relaxed), 2);
    let lines = LOGGER.0.lock().unwrap();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].starts_with("WARN pkru: domain `watched`: write of 0x120"), "{}", lines[0]);
}

fn a_domain_is_retired_and_reinstated() {
    let mut domain = build(Domain::builder("old").retire_after(3));
    for _ in 0..2 {
        domain.call(mistake).unwrap_err();
    }
    assert_eq!(domain.violations(), 2);
    works(&mut domain);
    assert_eq!(domain.violations(), 0, "a successful call resets the count");
    for _ in 0..3 {
        domain.call(mistake).unwrap_err();
    }
    let ran = AtomicU32::new(0);
    for _ in 0..3 {
        let violation = domain.call(|| ran.load(Ordering::Relaxed)).unwrap_err();
        assert_eq!(*violation.kind(), ViolationKind::Retired);
    }
    domain.reinstate();
    works(&mut domain);
    // Domains do not retire by default.
    let mut other = domain_named("tireless");
    for _ in 0..50 {
        other.call(mistake).unwrap_err();
    }
    works(&mut other);
}

fn domain_named(name: &str) -> Domain {
    Domain::builder(name).build().unwrap()
}
