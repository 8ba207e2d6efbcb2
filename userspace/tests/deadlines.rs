//! Calls that exceed their deadline.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::time::Duration;

use pkru_userspace::{Domain, ViolationKind};
use support::{contain, loop_forever, suite};

suite! {
    a_loop_that_does_not_end,
    deadlines_that_have_passed_at_once,
}

fn a_loop_that_does_not_end() {
    let deadline = Duration::from_secs(1);
    let mut domain = support::build(Domain::builder("loop").deadline(deadline));
    for _ in 0..3 {
        let start = std::time::Instant::now();
        let violation = contain(&mut domain, loop_forever);
        assert_eq!(*violation.kind(), ViolationKind::Deadline);
        assert!(start.elapsed() >= deadline, "{:?}", start.elapsed());
    }
    // A call that waits in the kernel.
    let violation = contain(&mut domain, || {
        // SAFETY: the call touches no memory.
        unsafe { libc::pause() };
    });
    assert_eq!(*violation.kind(), ViolationKind::Deadline);
    for _ in 0..200 {
        support::works(&mut domain);
    }
}

fn deadlines_that_have_passed_at_once() {
    for time in [Duration::ZERO, Duration::from_nanos(1), Duration::from_micros(1), Duration::from_micros(50)] {
        let mut domain = support::build(Domain::builder("late").deadline(time));
        assert_eq!(*domain.call(loop_forever).unwrap_err().kind(), ViolationKind::Deadline, "{time:?}");
    }
}
