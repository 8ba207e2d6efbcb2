//! Runs the tests on this machine: unit tests, documentation tests, and the guest suites if the CPU has keys.

use std::process::Command;

use crate::build;
use crate::guest;
use crate::inside::ONE_BY_ONE;
use crate::stream::stream;
use crate::tally::{Row, Tally, count, count_suite};

pub(crate) fn run(tally: &mut Tally) -> Result<(), String> {
    for package in ["pkru", "pkru-qemu", "pkru-userspace", "pkru-tests"] {
        let has_library = package != "pkru-tests";
        let kinds: &[&str] = if has_library { &["--lib", "--bins"] } else { &["--bins"] };
        tally.add(cargo_test(&format!("host: {package}"), package, kinds)?);
        if has_library {
            tally.add(cargo_test(&format!("doc tests: {package}"), package, &["--doc"])?);
        }
    }
    tally.add(cargo_test("host: pkru-test-support", "pkru-test-support", &["--lib", "--tests"])?);
    native(tally)
}

/// The environment variable that controls the suites on this machine's CPU. `0` skips them.
const NATIVE: &str = "PKRU_TEST_NATIVE";

/// Runs the suites on this machine's CPU, except the one that counts instructions.
fn native(tally: &mut Tally) -> Result<(), String> {
    if let Some(row) = without_keys() {
        tally.add(row);
        return Ok(());
    }
    for binary in guest::suites()?.iter().filter(|binary| binary.name != guest::COST) {
        let mut command = Command::new(&binary.path);
        command.args(ONE_BY_ONE).env(pkru_qemu::init::FORCE, "1");
        tally.add(stream(&format!("this machine's CPU: {}", binary.name), &mut command, count_suite)?);
    }
    Ok(())
}

/// Returns a row for the table that says why the suites do not run on this machine's CPU; `None` if they do.
pub(crate) fn without_keys() -> Option<Row> {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let reason = runs_here(std::env::var(NATIVE).ok().as_deref(), &flags).err()?;
    let note = format!("skipped: {reason}");
    Some(Row { suite: "this machine's CPU".into(), skipped: 1, note, ..Row::default() })
}

/// Decides whether the suites run on this machine's CPU, from the variable's value and /proc/cpuinfo. Returns the
/// reason if they do not.
fn runs_here(variable: Option<&str>, flags: &str) -> Result<(), String> {
    if variable == Some("0") {
        Err(format!("{NATIVE}=0 is set; unset it to run the suites on this CPU"))
    } else if flags.split_whitespace().any(|flag| flag == "ospke") {
        Ok(())
    } else {
        Err("the CPU has no PKU, or the kernel has not enabled it; the suites run in QEMU".into())
    }
}

pub(crate) fn cargo_test(suite: &str, package: &str, kinds: &[&str]) -> Result<Row, String> {
    let mut command = Command::new("cargo");
    stream(suite, command.args(["test", "-p", package]).args(kinds).current_dir(build::workspace()), count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suites_run_here_where_there_are_keys_unless_that_is_switched_off() {
        let keys = "flags : fpu pku ospke fsgsbase";
        assert_eq!(runs_here(None, keys), Ok(()));
        assert_eq!(runs_here(Some("1"), keys), Ok(()));
        assert!(runs_here(Some("0"), keys).unwrap_err().contains("PKRU_TEST_NATIVE=0 is set"));
        assert!(runs_here(None, "flags : fpu pku fsgsbase").unwrap_err().contains("no PKU"));
    }
}
