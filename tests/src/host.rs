//! Runs the tests on this machine: unit tests, documentation tests, and the guest suites if the CPU has keys.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::build;
use crate::guest;
use crate::inside::ONE_BY_ONE;
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
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if let Err(reason) = runs_here(std::env::var(NATIVE).ok().as_deref(), &flags) {
        let note = format!("skipped: {reason}");
        tally.add(Row { suite: "this machine's CPU".into(), skipped: 1, note, ..Row::default() });
        return Ok(());
    }
    for binary in guest::suites()?.iter().filter(|binary| binary.name != guest::COST) {
        let mut command = Command::new(&binary.path);
        command.args(ONE_BY_ONE).env(pkru_qemu::init::FORCE, "1");
        tally.add(stream(&format!("this machine's CPU: {}", binary.name), &mut command, count_suite)?);
    }
    Ok(())
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

/// Runs a command, prints its output, and counts the results. A command that fails without a failed test counts as a
/// failure.
fn stream(suite: &str, command: &mut Command, count: impl Fn(&str, &str) -> Row) -> Result<Row, String> {
    println!("\n== {suite} ==");
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let mut output = String::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            println!("{line}");
            output.push_str(&line);
            output.push('\n');
        }
    }
    let status = child.wait().map_err(|error| format!("cannot wait for {command:?}: {error}"))?;
    let row = count(suite, &output);
    // The status is added unless a failed test explains it.
    if status.success() || row.failed > 0 && !row.did_not_end() { Ok(row) } else { Ok(row.fail(&status.to_string())) }
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

    #[test]
    fn a_command_that_fails_without_a_failed_test_is_a_failure() {
        let mut command = Command::new("sh");
        let row = stream("suite", command.args(["-c", "echo 'test a ... ok'; printf 'test b ... '; exit 3"]), count);
        let row = row.unwrap();
        assert_eq!((row.passed, row.failed, row.note.as_str()), (1, 1, "did not end: b (exit status: 3)"));
        let row = stream("suite", Command::new("sh").args(["-c", "echo 'test a ... ok'; exit 3"]), count).unwrap();
        assert_eq!((row.passed, row.failed, row.note.as_str()), (1, 1, "exit status: 3"));
    }
}
