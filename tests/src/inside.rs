//! The part that runs in a guest: one suite after the other.

use std::path::Path;
use std::process::{Command, ExitCode};

use crate::guest::SUITE;

/// Makes a suite run one test after the other, and print the name of each before it runs: so the output of a guest that
/// is killed names the test.
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
                println!("cannot run it: {error}");
                good = false;
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
