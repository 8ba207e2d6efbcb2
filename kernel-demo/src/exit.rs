//! The verdict for QEMU. A pass needs both a sentinel line and an exit code.

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{ports, serial};

// `pkru-qemu` expects these values.
const PASSED: u32 = 0x10;
const SENTINEL: &str = "pkru-kernel: passed";

/// Whether this run must fail.
static MUST_FAIL: AtomicBool = AtomicBool::new(false);

/// Declares that this run must fail. The failure's message then says so.
pub fn expect_failure() {
    MUST_FAIL.store(true, Ordering::Relaxed);
}

/// Ends the run as passed.
pub fn pass(what: impl fmt::Display) -> ! {
    serial::print(format_args!("{SENTINEL}: {what}\n"));
    ports::exit(PASSED)
}

/// Ends the run as failed.
pub fn fail(why: impl fmt::Display) -> ! {
    let verdict = if MUST_FAIL.load(Ordering::Relaxed) { "failed, as it must" } else { "failed" };
    serial::print_from_panic(format_args!("pkru-kernel: {verdict}: {why}\n"));
    ports::exit(PASSED + 1)
}
