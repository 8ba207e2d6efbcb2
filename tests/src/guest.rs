//! Runs the suites that need Linux with protection keys. Each kernel boots once for most suites, and once more to count
//! instructions.

use std::ffi::OsString;
use std::process::Command;
use std::time::Duration;

use pkru_qemu::linux::{self, Guest};
use pkru_qemu::machine::Machine;

use crate::build::{self, Binary};
use crate::plugin;
use crate::stream::stream;
use crate::tally::{Row, Tally, count, count_suite};

/// The suite that counts instructions. Its guest runs with `icount`.
pub(crate) const COST: &str = "cost";

/// The prefix of the line that `inside` prints before each suite.
pub(crate) const SUITE: &str = "== suite ";

pub(crate) fn suites() -> Result<Vec<Binary>, String> {
    let packages = ["-p", "pkru-userspace", "-p", "pkru-tests"];
    build::binaries("cargo", &[&["test", "--release"], &packages[..], &["--tests", "--no-run"]].concat(), "test")
}

pub(crate) fn run(tally: &mut Tally) -> Result<(), String> {
    let (counted, others): (Vec<_>, Vec<_>) = suites()?.into_iter().partition(|binary| binary.name == COST);
    for kernel in linux::KERNELS {
        boot(tally, kernel, &others, &Machine { cpus: 2, ..machine() })?;
        boot(tally, kernel, &counted, &Machine { icount: true, ..machine() })?;
        examples(tally, kernel)?;
    }
    plugins(tally)?;
    doc_tests(tally)
}

pub(crate) fn plugins(tally: &mut Tally) -> Result<(), String> {
    linux::KERNELS.into_iter().try_for_each(|kernel| plugin::run(tally, kernel))
}

/// Runs the documentation tests on the newest kernel, with `pkru-qemu` as cargo's runner. On a host without keys they
/// return early.
fn doc_tests(tally: &mut Tally) -> Result<(), String> {
    let program = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    let mut runner = program.with_file_name("pkru-qemu").into_os_string();
    runner.push(" linux");
    let mut command = Command::new("cargo");
    command.args(["test", "--release", "--doc", "-p", "pkru-userspace"]).current_dir(build::workspace());
    command.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", runner);
    let newest = linux::KERNELS[linux::KERNELS.len() - 1];
    tally.add(stream(&format!("Linux {newest}: doc tests"), &mut command, count)?);
    Ok(())
}

/// Runs the examples. Each exits with 0 if it worked.
fn examples(tally: &mut Tally, kernel: &str) -> Result<(), String> {
    let binaries = build::binaries("cargo", &["build", "--release", "-p", "pkru-userspace", "--examples"], "example")?;
    let images = build::workspace().join("userspace/examples/data");
    let images = std::fs::read_dir(&images).map_err(|error| format!("{}: {error}", images.display()))?;
    let images: Vec<OsString> = images.flatten().map(|entry| entry.path().into_os_string()).collect();
    let program = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;

    let mut row = Row { suite: format!("Linux {kernel}: examples"), ..Row::default() };
    for binary in binaries {
        println!("\n== Linux {kernel}: example {} ==", binary.name);
        let guest = Guest {
            kernel: linux::kernel(kernel).map_err(|error| error.to_string())?,
            program: binary.path,
            arguments: images.clone(),
            environment: Vec::new(),
            files: Vec::new(),
        };
        match guest.run(&machine(), &program) {
            Ok(report) if report.outcome.status() == 0 => row.passed += 1,
            Ok(report) => {
                row.failed += 1;
                row.note = format!("{}: {}", binary.name, report.outcome);
            }
            Err(error) => {
                row.failed += 1;
                row.note = format!("{}: {error}", binary.name);
            }
        }
    }
    tally.add(row);
    Ok(())
}

/// The timeout allows for the soak test, which takes about 300 s of QEMU's processor time and prints nothing meanwhile.
/// The binaries of all suites must fit in half of the memory: Linux limits the initial file system to that.
pub(crate) fn machine() -> Machine {
    Machine { memory: 2048, timeout: Duration::from_secs(1000), ..Machine::default() }
}

fn boot(tally: &mut Tally, kernel: &str, binaries: &[Binary], machine: &Machine) -> Result<(), String> {
    println!("\n== Linux {kernel}{} ==", if machine.icount { ", counting instructions" } else { "" });
    let program = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    let paths = binaries.iter().map(|binary| binary.path.clone().into_os_string());
    let guest = Guest {
        kernel: linux::kernel(kernel).map_err(|error| error.to_string())?,
        program: program.clone(),
        arguments: [OsString::from("inside")].into_iter().chain(paths).collect(),
        environment: Vec::new(),
        files: Vec::new(),
    };
    let (output, problem) = match guest.run(machine, &program) {
        Ok(report) if report.outcome.status() == 0 => (report.stdout, None),
        Ok(report) => (report.stdout, Some(report.outcome.to_string())),
        Err(error) => (error.stdout().to_string(), Some(error.to_string())),
    };
    let names: Vec<_> = binaries.iter().map(|binary| binary.name.as_str()).collect();
    rows(&format!("Linux {kernel}"), &names, &output, problem.as_deref()).into_iter().for_each(|row| tally.add(row));
    Ok(())
}

/// Counts the results in a guest's output. Returns a row for each suite that started, and one for all that did not.
///
/// A problem with the guest counts as a failure of the last suite that started, unless a failed test explains it.
fn rows(guest: &str, suites: &[&str], output: &str, problem: Option<&str>) -> Vec<Row> {
    let sections = output.split(SUITE).skip(1);
    let mut rows: Vec<_> = suites
        .iter()
        .zip(sections)
        .map(|(suite, section)| count_suite(&format!("{guest}: {suite}"), section))
        .collect();
    let missing = suites[rows.len()..].join(", ");
    let is_explained = missing.is_empty() && rows.iter().any(|row| row.failed > 0 && !row.did_not_end());
    if let (Some(problem), false) = (problem, is_explained) {
        let row = rows.pop().unwrap_or_else(|| Row { suite: guest.into(), ..Row::default() });
        rows.push(row.fail(problem));
    }
    if !missing.is_empty() {
        rows.push(Row { suite: guest.into(), ..Row::default() }.fail(&format!("not run: {missing}")));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_killed_keeps_what_it_had() {
        let output = "== suite a-1 ==\ntest one ... ok\n== suite b-2 ==\ntest two ... ok\ntest three ... ";
        let rows = rows("guest", &["a", "b", "c", "d"], output, Some("killed"));
        let rows: Vec<_> =
            rows.iter().map(|row| (row.suite.as_str(), row.passed, row.failed, row.note.as_str())).collect();
        let expected = [
            ("guest: a", 1, 0, ""),
            ("guest: b", 1, 1, "did not end: three (killed)"),
            ("guest", 0, 1, "not run: c, d"),
        ];
        assert_eq!(rows, expected);
    }

    #[test]
    fn a_guest_that_does_not_boot_fails() {
        let rows = rows("guest", &["a"], "", Some("killed"));
        assert_eq!(rows.iter().map(|row| row.failed).collect::<Vec<_>>(), [1, 1]);
    }
}
