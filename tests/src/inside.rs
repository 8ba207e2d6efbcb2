//! Runs the suites in a guest, one after the other.

use std::path::Path;
use std::process::{Command, ExitCode};

use crate::guest::SUITE;

/// Arguments that make a suite run one test at a time and print its name first. If the guest is killed, its output
/// names the test that was running.
pub(crate) const ONE_BY_ONE: [&str; 2] = ["--test-threads", "1"];

pub(crate) fn run(binaries: &[&str]) -> ExitCode {
    let mut good = true;
    for binary in binaries {
        println!("{SUITE}{} ==", Path::new(binary).file_name().unwrap_or_default().display());
        match Command::new(binary).args(ONE_BY_ONE).status() {
            Ok(status) if status.success() => {}
            Ok(status) => {
                println!("{status}");
                good = false;
            }
            Err(error) => {
                println!("cannot run the suite: {error}");
                good = false;
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
