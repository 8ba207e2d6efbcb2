//! Runs the storm again and again, a minute each time, on each kernel and on this machine's CPU if that has keys.

use std::process::Command;

use pkru_qemu::linux::{self, Guest};
use pkru_qemu::machine::Machine;

use crate::stream::stream;
use crate::tally::{Row, Tally, count_suite};
use crate::{build, guest, host};

/// The suite.
const STORM: &str = "storm";

/// The variable that says how long it takes, and the time in seconds.
const TIME: (&str, &str) = ("PKRU_STORM_SECONDS", "60");

pub(crate) fn run(tally: &mut Tally, runs: usize) -> Result<(), String> {
    let arguments = ["test", "--release", "-p", "pkru-tests", "--test", STORM, "--no-run"];
    let binaries = build::binaries("cargo", &arguments, "test")?;
    let storm = binaries.first().ok_or("cargo built no suite")?;
    for kernel in linux::KERNELS {
        let mut row = Row { suite: format!("Linux {kernel}: {STORM}"), ..Row::default() };
        for run in 1..=runs {
            println!("\n== Linux {kernel}: run {run} of {runs} ==");
            let program = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
            let guest = Guest {
                kernel: linux::kernel(kernel).map_err(|error| error.to_string())?,
                program: storm.path.clone(),
                arguments: Vec::new(),
                environment: vec![(TIME.0.into(), TIME.1.into())],
                files: Vec::new(),
            };
            match guest.run(&Machine { cpus: 2, ..guest::machine() }, &program) {
                Ok(report) if report.outcome.status() == 0 => row.passed += 1,
                Ok(report) => row = row.fail(&format!("run {run}: {}", report.outcome)),
                Err(error) => row = row.fail(&format!("run {run}: {error}")),
            }
        }
        tally.add(row);
    }
    if let Some(row) = host::without_keys() {
        tally.add(row);
        return Ok(());
    }
    for run in 1..=runs {
        let mut command = Command::new(&storm.path);
        command.env(pkru_qemu::init::FORCE, "1").env(TIME.0, TIME.1);
        tally.add(stream(&format!("this machine's CPU: {STORM}, run {run}"), &mut command, count_suite)?);
    }
    Ok(())
}
