//! A test suite that runs in one boot.
//!
//! The output has the format of cargo's test harness. Nothing unwinds, so the first failure ends the boot.

use crate::fence::Fence;
use crate::{exit, serial};

/// A test: its name and its function.
pub type Test = (&'static str, fn());

/// Defines the kernel's program as a list of tests: `test_suite!(first, second)`. A test takes and returns nothing.
#[macro_export]
macro_rules! test_suite {
    ($($test:ident),+ $(,)?) => {
        fn run_suite() {
            $crate::testing::run(&[$((stringify!($test), $test as fn())),+]);
        }
        $crate::program!(run_suite);
    };
}

/// Runs tests and ends the run as passed.
pub fn run(tests: &[Test]) -> ! {
    serial::print(format_args!("running {} tests\n", tests.len()));
    for (name, test) in tests {
        serial::print(format_args!("test {name} ... "));
        test();
        serial::print(format_args!("ok\n"));
    }
    serial::print(format_args!("test result: ok. {} passed; 0 failed\n", tests.len()));
    exit::pass(format_args!("{} tests", tests.len()))
}

/// Runs a check with each register as the fence.
///
/// # Panics
///
/// If the CPU lacks PKU or PKS. The suites need both.
pub fn with_each_fence(check: impl Fn()) {
    for fence in [Fence::Pku, Fence::Pks] {
        fence.select();
        check();
    }
}
