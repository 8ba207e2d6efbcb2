//! The harness of the suites that use domains, and what their tests share.

#![allow(clippy::missing_panics_doc, clippy::must_use_candidate, reason = "parts of tests panic where the test fails")]

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
    // SAFETY: what the tests leave in statics is whole, and no longer looked at where it lies in the domain.
    build(unsafe { Domain::builder(name).globals(Globals::Writable) })
}

/// Makes the domain that a builder describes.
#[track_caller]
pub fn build(builder: Builder) -> Domain {
    builder.build().unwrap_or_else(|error| panic!("there is no domain: {error}"))
}

/// Describes a domain with little memory.
pub fn small(name: &str) -> Builder {
    Domain::builder(name).stack_size(64 * 1024).heap_size(256 * 1024)
}

/// Unwraps a violation by a key.
pub fn key_fault(violation: &Violation) -> KeyFault {
    match violation.kind() {
        ViolationKind::Key(fault) => *fault,
        other => panic!("no key fault: {other:?}"),
    }
}

/// Checks that a domain works.
pub fn works(domain: &mut Domain) {
    let answer = domain.call(|| (1..=10).map(|n| n * n).collect::<Vec<u32>>());
    assert_eq!(answer.expect("the domain works").iter().sum::<u32>(), 385);
}

/// Checks that a call is stopped by a violation and that the domain works afterwards.
pub fn contain(domain: &mut Domain, function: impl Fn()) -> Violation {
    let violation = domain.call(&function).expect_err("it must be stopped");
    works(domain);
    violation
}

/// Writes where nothing is mapped.
pub fn mistake() {
    // SAFETY: none: this is the mistake.
    unsafe { std::hint::black_box(NOWHERE as *mut u64).write_volatile(1) };
}

/// Code that does not end.
pub fn loop_forever() {
    loop {
        std::hint::spin_loop();
    }
}

/// What code in a domain tells another thread: that it runs. A pipe, for a domain writes nobody else's memory.
#[derive(Debug)]
pub struct Notice {
    reader: PipeReader,
    writer: PipeWriter,
}

impl Notice {
    /// Makes a notice that has not been given.
    pub fn new() -> Arc<Self> {
        let (reader, writer) = std::io::pipe().unwrap();
        Arc::new(Self { reader, writer })
    }

    /// Gives it.
    pub fn give(&self) {
        // SAFETY: the byte is readable.
        assert_eq!(unsafe { libc::write(self.writer.as_raw_fd(), b"x".as_ptr().cast(), 1) }, 1);
    }

    /// Waits until it is given.
    pub fn wait(&self) {
        (&self.reader).read_exact(&mut [0]).unwrap();
    }
}

/// An address at which nothing is mapped.
pub const NOWHERE: usize = 0x120;

/// Runs something in a child that the C library forks, and returns its wait status: 0 if it came to an end, 256 if it
/// panicked.
pub fn in_child(function: impl FnOnce()) -> i32 {
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
