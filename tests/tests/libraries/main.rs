//! Debian's libraries, unmodified, in a domain. Each does real work, is stopped by a mistake, and works again.
//!
//! The tests compare each result with that of the same work outside a domain. Each mistake happens with the library's
//! code on the stack: in a write of the library itself, or in a callback. The control is the same mistake outside.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

mod libffi;
mod libpng;
mod libwebp;
mod pcre2;
mod snappy;
mod sqlite;
mod zlib;

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::fmt::Debug;
use std::mem::ManuallyDrop;
use std::ptr::{self, null, null_mut};

use pkru_userspace::transfer::Transfer;
use pkru_userspace::{Access, Domain, Globals, ProtectionKey, Violation, ViolationKind};
use support::{build, domain, key_fault, suite};

suite! {
    libffi::makes_closures,
    libpng::decodes_and_encodes,
    libpng::reads_by_a_callback,
    libwebp::without_its_data_it_cannot_work,
    libwebp::with_its_data_it_encodes_and_decodes,
    pcre2::compiles_patterns_to_machine_code,
    snappy::compresses_and_uncompresses,
    snappy::reads_beyond_its_input,
    sqlite::fills_and_queries_a_table,
    sqlite::a_database_lasts_from_call_to_call_until_a_violation,
    sqlite::fifty_mistakes_leave_nothing_behind,
    zlib::compresses_and_inflates,
    zlib::allocates_by_a_callback,
}

/// Memory of the caller that the mistakes write. It is never freed.
struct Target(*mut u8);

impl Target {
    /// Enough for all mistakes, so that the controls write only here.
    const ROOM: usize = 512 * 1024;
    const FILL: u8 = 0x5a;

    fn new() -> Self {
        Self(Vec::leak(vec![Self::FILL; Self::ROOM]).as_mut_ptr())
    }

    fn is_untouched(&self) -> bool {
        // SAFETY: the block has `ROOM` bytes, and nothing writes them meanwhile.
        unsafe { std::slice::from_raw_parts(self.0, Self::ROOM) }.iter().all(|byte| *byte == Self::FILL)
    }
}

/// Makes a mistake in a domain. Checks that its write to the target is stopped.
#[track_caller]
fn is_stopped(domain: &mut Domain, target: &Target, mistake: impl Fn(*mut u8)) -> Violation {
    let violation = domain.call(|| mistake(target.0)).expect_err("the call must end with a violation");
    let fault = key_fault(&violation);
    assert_eq!((fault.access, fault.key), (Access::Write, ProtectionKey::DEFAULT), "{violation}");
    let start = target.0 as u64;
    assert!((start..start + Target::ROOM as u64).contains(&fault.address), "{violation}");
    assert!(target.is_untouched(), "{violation}");
    let place = violation.symbol().expect("the instruction is in loaded code");
    println!("figure: stopped in {place}, at byte {} of the caller's memory", fault.address - start);
    violation
}

/// The control: makes a mistake outside a domain. Checks that its write succeeds.
#[track_caller]
fn lands(mistake: impl Fn(*mut u8)) {
    let target = Target::new();
    mistake(target.0);
    assert!(!target.is_untouched(), "the control did not write");
}

/// Checks that work in a domain has the same result as outside.
#[track_caller]
fn works_as_outside<R: Transfer + PartialEq + Debug>(domain: &mut Domain, expected: &R, work: impl Fn() -> R) {
    let result = domain.call(work).expect("the work succeeds");
    assert!(result == *expected, "the result differs from the one outside");
}

/// The mistake that callbacks make.
#[inline(never)]
fn scribble(target: *mut u8) {
    // SAFETY: deliberately unsound: the mistake under test.
    unsafe { target.write_volatile(0) };
}

/// Checks that the stopped instruction is in a library whose file name begins with `name`.
#[track_caller]
fn assert_in_library(violation: &Violation, name: &str) {
    let symbol = violation.symbol().expect("the instruction is in a library");
    let file = symbol.library().file_name().unwrap().to_string_lossy();
    assert!(file.starts_with(name), "{violation}");
}

#[track_caller]
fn assert_in_scribble(violation: &Violation) {
    let symbol = violation.symbol().expect("the instruction is in the program");
    assert!(symbol.name().unwrap().contains("scribble"), "{violation}");
}

/// Returns pseudo-random numbers (xorshift) with a fixed seed.
fn numbers() -> impl Iterator<Item = u32> {
    let mut state = 0x2545_f491_u32;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    })
}

/// Returns text that compresses about as well as prose.
fn prose(size: usize) -> Vec<u8> {
    const WORDS: &str = "key domain the rewind a page of fault register in heap stack is caller write thread";
    let words: Vec<_> = WORDS.split_inclusive(' ').collect();
    let mut text: Vec<u8> = numbers().flat_map(|n| words[n as usize % words.len()].bytes()).take(size).collect();
    // Some random bytes, which do not compress.
    text.iter_mut().zip(numbers()).step_by(37).for_each(|(byte, n)| *byte = n as u8);
    text
}
