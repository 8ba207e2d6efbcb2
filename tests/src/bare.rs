//! The bare-metal suites. Each is a kernel that boots and runs its tests.

use std::time::Duration;

use pkru_qemu::kernel;
use pkru_qemu::machine::Machine;

use crate::build::{self, Binary};
use crate::tally::{Row, Tally, count_suite};

/// The name prefix of suites that must fail. They show that the harness detects failures.
const MUST_FAIL: &str = "must_fail";

pub(crate) fn run(tally: &mut Tally) -> Result<(), String> {
    let script = build::workspace().join("scripts/cargo-none");
    let script = script.to_str().ok_or("the workspace's path is not UTF-8")?;
    for binary in build::binaries(script, &["test", "-p", "kernel-demo", "--no-run"], "test")? {
        tally.add(boot(&binary));
    }
    Ok(())
}

fn boot(binary: &Binary) -> Row {
    let suite = format!("bare metal: {}", binary.name);
    println!("\n== {suite} ==");
    let machine = Machine { timeout: Duration::from_secs(120), ..Machine::default() };
    if binary.name.starts_with(MUST_FAIL) {
        println!("expected to fail: this suite shows that failures are detected");
        let result = kernel::run(&machine, &binary.path, "");
        return match result {
            Err(pkru_qemu::Error::Disorderly { reason, .. }) => {
                println!("expected to fail, and did: {reason}");
                Row { suite, passed: 1, note: format!("expected to fail, and did: {reason}"), ..Row::default() }
            }
            other => {
                Row { suite, failed: 1, note: format!("expected to fail, and did not: {other:?}"), ..Row::default() }
            }
        };
    }
    match kernel::run(&machine, &binary.path, "") {
        Ok(output) => count_suite(&suite, &output),
        Err(error) => count_suite(&suite, error.stdout()).fail(&error.to_string()),
    }
}
