//! The bare-metal suites: each is a kernel that boots and runs its tests.

use std::time::Duration;

use pkru_qemu::kernel;
use pkru_qemu::machine::Machine;

use crate::build::{self, Binary};
use crate::tally::{Row, Tally, count};

/// Suites whose name begins like this must fail, and are seen to: otherwise a pass of the others would mean nothing.
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
    let machine = Machine { memory: 1024, timeout: Duration::from_secs(120), ..Machine::default() };
    let result = kernel::run(&machine, &binary.path, "");
    if binary.name.starts_with(MUST_FAIL) {
        return match result {
            Err(pkru_qemu::Error::Disorderly { reason }) => {
                Row { suite, passed: 1, note: format!("as it must: {reason}"), ..Row::default() }
            }
            other => {
                Row { suite, failed: 1, note: format!("it was to fail, and did not: {other:?}"), ..Row::default() }
            }
        };
    }
    match result {
        Ok(output) => count(&suite, &output),
        Err(error) => Row { suite, failed: 1, note: error.to_string(), ..Row::default() },
    }
}
