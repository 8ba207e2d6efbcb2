//! The suites that need Linux with protection keys, run in a guest: one boot for each kernel, and one in which
//! instructions are counted.

use std::ffi::OsString;
use std::time::Duration;

use pkru_qemu::linux::{self, Guest};
use pkru_qemu::machine::Machine;

use crate::build::{self, Binary};
use crate::tally::{Row, Tally, count};

/// The suite that counts instructions, for which the guest needs a clock that does.
pub(crate) const COST: &str = "cost";

/// What begins the line by which `inside` announces a suite.
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
    Ok(())
}

/// Runs the examples, which say by their exit status whether they saw what they show.
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

fn machine() -> Machine {
    Machine { timeout: Duration::from_secs(600), ..Machine::default() }
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
        Ok(report) if report.outcome.status() <= 1 => (report.stdout, None),
        Ok(report) => (report.stdout, Some(report.outcome.to_string())),
        Err(error) => (String::new(), Some(error.to_string())),
    };
    for (section, binary) in output.split(SUITE).skip(1).zip(binaries) {
        tally.add(count(&format!("Linux {kernel}: {}", binary.name), section));
    }
    if let Some(note) = problem {
        tally.add(Row { suite: format!("Linux {kernel}"), failed: 1, note, ..Row::default() });
    } else if output.split(SUITE).count() != binaries.len() + 1 {
        tally.add(Row {
            suite: format!("Linux {kernel}"),
            failed: 1,
            note: "suites are missing".into(),
            ..Row::default()
        });
    }
    Ok(())
}
