//! What the suites share.
#![allow(dead_code, reason = "each suite uses a part")]

pub(crate) mod signals;

use pkru_userspace::{Builder, Domain, Globals, KeyFault, Violation, ViolationKind};

/// The variable that says that keys are there, so that a skip is a failure.
const FORCE: &str = "PKRU_TEST_FORCE";

/// Makes a domain, or says why the test is skipped.
pub(crate) fn domain(name: &str) -> Option<Domain> {
    build(Domain::builder(name))
}

/// Makes a domain that may write statics.
pub(crate) fn open_domain(name: &str) -> Option<Domain> {
    // SAFETY: what the tests leave in statics is whole, and no longer looked at where it lies in the domain.
    build(unsafe { Domain::builder(name).globals(Globals::Writable) })
}

pub(crate) fn build(builder: Builder) -> Option<Domain> {
    match builder.build() {
        Ok(domain) => Some(domain),
        Err(error) => {
            assert!(std::env::var_os(FORCE).is_none(), "{FORCE} is set, but there is no domain: {error}");
            println!("skipped: {error}");
            None
        }
    }
}

/// Returns from a test that cannot run here.
#[macro_export]
macro_rules! need {
    ($domain:expr) => {
        match $domain {
            Some(domain) => domain,
            None => return,
        }
    };
}

/// Unwraps a violation by a key.
pub(crate) fn key_fault(violation: &Violation) -> KeyFault {
    match violation.kind() {
        ViolationKind::Key(fault) => *fault,
        other => panic!("no key fault: {other:?}"),
    }
}

/// Checks that a domain works.
pub(crate) fn works(domain: &mut Domain) {
    let answer = domain.call(|| (1..=10).map(|n| n * n).collect::<Vec<u32>>());
    assert_eq!(answer.expect("the domain works").iter().sum::<u32>(), 385);
}

/// Checks that a call is stopped by a violation and that the domain works afterwards.
pub(crate) fn contain(domain: &mut Domain, function: impl Fn()) -> Violation {
    let violation = domain.call(&function).expect_err("it must be stopped");
    works(domain);
    violation
}

/// Writes where nothing is mapped.
pub(crate) fn mistake() {
    // SAFETY: none: this is the mistake.
    unsafe { std::hint::black_box(NOWHERE as *mut u64).write_volatile(1) };
}

/// An address at which nothing is mapped.
pub(crate) const NOWHERE: usize = 0x120;

/// Runs something in a child that the C library forks, and returns its wait status: 0 if it came to an end, 256 if it
/// panicked.
pub(crate) fn in_child(function: impl FnOnce()) -> i32 {
    // SAFETY: the child runs the function and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(function)).is_ok();
        // SAFETY: leaves without running anything of the parent's.
        unsafe { libc::_exit(i32::from(!good)) };
    }
    let mut status = 0;
    // SAFETY: the status is writable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    status
}
