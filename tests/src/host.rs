//! What runs on this machine itself: unit tests, documentation tests, and the guest suites where the CPU has keys.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::build;
use crate::guest;
use crate::tally::{Row, Tally, count};

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

/// Runs the guest suites on this CPU.
fn native(tally: &mut Tally) -> Result<(), String> {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let suite = "native: guest suites".to_string();
    if !flags.split_whitespace().any(|flag| flag == "ospke") {
        tally.add(Row {
            suite,
            skipped: 1,
            note: "skipped: this CPU has no PKU; they run in QEMU".into(),
            ..Row::default()
        });
        return Ok(());
    }
    let binaries = guest::suites()?;
    let paths = binaries.iter().filter(|binary| binary.name != guest::COST).map(|binary| binary.path.as_os_str());
    let program = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    let mut command = Command::new(program);
    command.arg("inside").args(paths).env(pkru_qemu::init::FORCE, "1");
    tally.add(stream(&suite, &mut command)?);
    Ok(())
}

pub(crate) fn cargo_test(suite: &str, package: &str, kinds: &[&str]) -> Result<Row, String> {
    stream(suite, Command::new("cargo").args(["test", "-p", package]).args(kinds).current_dir(build::workspace()))
}

/// Runs a command, passes its output on, and counts it. A command that fails without a failed test is a failure of its
/// own.
fn stream(suite: &str, command: &mut Command) -> Result<Row, String> {
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
    let mut row = count(suite, &output);
    if !status.success() && row.failed == 0 {
        row.failed = 1;
        row.note = format!("it ended with {status}");
    }
    Ok(row)
}
