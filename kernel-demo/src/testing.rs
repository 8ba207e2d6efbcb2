//! A test suite in one boot.
//!
//! Tests print as cargo's own do. There is no unwinding: the first failure ends the boot.

use crate::fence::Fence;
use crate::{exit, println};

/// A test: its name and what it runs.
pub type Test = (&'static str, fn());

/// Defines a kernel that runs tests: `test_suite!(first, second, …)`, each a function that takes and returns nothing.
#[macro_export]
macro_rules! test_suite {
    ($($test:ident),+ $(,)?) => {
        fn run_suite() {
            $crate::testing::run(&[$((stringify!($test), $test as fn())),+]);
        }
        $crate::program!(run_suite);
    };
}

/// Runs tests and ends the run.
pub fn run(tests: &[Test]) -> ! {
    println!("running {} tests", tests.len());
    for (name, test) in tests {
        crate::serial::print(format_args!("test {name} ... "));
        test();
        println!("ok");
    }
    println!("test result: ok. {} passed; 0 failed", tests.len());
    exit::pass(format_args!("{} tests", tests.len()))
}

/// Runs a check with each register as the fence.
///
/// # Panics
///
/// If the CPU lacks one of them: the suites run where both are.
pub fn with_each_fence(check: impl Fn()) {
    for fence in [Fence::Pku, Fence::Pks] {
        fence.select();
        check();
    }
}
