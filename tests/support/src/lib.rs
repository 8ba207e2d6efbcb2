//! The harness of the suites that use domains, and helpers for their tests.

#![allow(clippy::missing_panics_doc, clippy::must_use_candidate, reason = "helpers panic to fail their test")]

pub mod failing;
pub mod signals;
pub mod suite;

use std::io::{PipeReader, PipeWriter, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use pkru_userspace::{Builder, Domain, Globals, KeyFault, Violation, ViolationKind};

/// Makes a domain.
#[track_caller]
pub fn domain(name: &str) -> Domain {
    build(Domain::builder(name))
}

/// Makes a domain that may write statics.
#[track_caller]
pub fn open_domain(name: &str) -> Domain {
    // SAFETY: the tests leave valid values in statics, and read no pointers into the domain from them.
    build(unsafe { Domain::builder(name).globals(Globals::Writable) })
}

/// Builds a domain.
#[track_caller]
pub fn build(builder: Builder) -> Domain {
    builder.build().unwrap_or_else(|error| panic!("cannot build the domain: {error}"))
}

/// Returns a builder for a domain with little memory.
pub fn small(name: &str) -> Builder {
    Domain::builder(name).stack_size(64 * 1024).heap_size(256 * 1024)
}

/// Returns the key fault of a violation.
pub fn key_fault(violation: &Violation) -> KeyFault {
    match violation.kind() {
        ViolationKind::Key(fault) => *fault,
        other => panic!("not a key fault: {other:?}"),
    }
}

/// Checks that a domain works.
pub fn works(domain: &mut Domain) {
    let answer = domain.call(|| (1..=10).map(|n| n * n).collect::<Vec<u32>>());
    assert_eq!(answer.expect("the domain works").iter().sum::<u32>(), 385);
}

/// Checks that a call ends with a violation and that the domain works afterwards.
pub fn contain(domain: &mut Domain, function: impl Fn()) -> Violation {
    let violation = domain.call(&function).expect_err("the call must end with a violation");
    works(domain);
    violation
}

/// Writes to an unmapped address.
pub fn mistake() {
    // SAFETY: deliberately unsound: the mistake under test.
    unsafe { std::hint::black_box(NOWHERE as *mut u64).write_volatile(1) };
}

/// Loops for ever.
pub fn loop_forever() {
    loop {
        std::hint::spin_loop();
    }
}

/// A one-time event, given by code in a domain and awaited by another thread. It is a pipe, because a domain cannot
/// write memory outside itself.
#[derive(Debug)]
pub struct Notice {
    reader: PipeReader,
    writer: PipeWriter,
}

impl Notice {
    /// Creates the event.
    pub fn new() -> Arc<Self> {
        let (reader, writer) = std::io::pipe().unwrap();
        Arc::new(Self { reader, writer })
    }

    /// Wakes the thread that waits.
    pub fn give(&self) {
        // SAFETY: the byte is readable.
        assert_eq!(unsafe { libc::write(self.writer.as_raw_fd(), b"x".as_ptr().cast(), 1) }, 1);
    }

    /// Waits until another thread calls [`give`](Self::give).
    pub fn wait(&self) {
        (&self.reader).read_exact(&mut [0]).unwrap();
    }
}

/// An address at which nothing is mapped.
pub const NOWHERE: usize = 0x120;

/// Runs a function in a forked child. Returns the child's wait status: 0 if the function returned, 256 if it panicked.
pub fn in_child(function: impl FnOnce()) -> i32 {
    // SAFETY: the child runs the function and exits.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "cannot fork: {}", std::io::Error::last_os_error());
    if child == 0 {
        let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(function)).is_ok();
        // SAFETY: `_exit` runs none of the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!good)) };
    }
    let mut status = 0;
    // SAFETY: the status is writable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    status
}
