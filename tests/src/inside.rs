//! The part that runs in a guest: each test of each binary in a process of its own, so that one that dies fails alone.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use crate::guest::SUITE;

pub(crate) fn run(binaries: &[&str]) -> ExitCode {
    let mut good = true;
    for binary in binaries {
        println!("{SUITE}{} ==", Path::new(binary).file_name().unwrap_or_default().display());
        match tests(binary) {
            Ok(tests) => tests.iter().for_each(|test| good &= run_one(binary, test)),
            Err(error) => {
                println!("test listing ... {error}\nFAILED");
                good = false;
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Asks a test binary for the names of its tests.
fn tests(binary: &str) -> Result<Vec<String>, String> {
    let output =
        Command::new(binary).args(["--list", "--format", "terse"]).output().map_err(|error| error.to_string())?;
    let listing = String::from_utf8_lossy(&output.stdout);
    let names: Vec<_> = listing.lines().filter_map(|line| line.strip_suffix(": test")).map(String::from).collect();
    if names.is_empty() { Err(format!("it lists no tests: {}", output.status)) } else { Ok(names) }
}

/// Runs one test; returns whether it did not fail.
fn run_one(binary: &str, test: &str) -> bool {
    let arguments = ["--exact", test, "--nocapture", "--test-threads", "1"];
    let output = match Command::new(binary).args(arguments).output() {
        Ok(output) => output,
        Err(error) => {
            println!("test {test} ... {error}\nFAILED");
            return false;
        }
    };
    let stdout = String::from_utf8_lossy(&output.stdout);
    let own = || stdout.lines().filter(|line| !is_harness(line));
    let good = output.status.success() && stdout.contains("1 passed");
    match own().find_map(|line| line.split_once("skipped: ")) {
        Some((_, reason)) if good => println!("test {test} ... skipped: {reason}"),
        _ if good => {
            // What a test prints is worth reading: figures, tables.
            let figures: Vec<_> =
                own().filter_map(|line| line.split_once("figure: ")).map(|(_, figure)| figure).collect();
            println!("test {test} ... ok");
            figures.iter().for_each(|figure| println!("    {figure}"));
        }
        _ => {
            println!("test {test} ... {}", output.status);
            own().for_each(|line| println!("    {line}"));
            String::from_utf8_lossy(&output.stderr).lines().for_each(|line| println!("    {line}"));
            if let Some(signal) = output.status.signal() {
                println!("    killed by signal {signal}");
            }
            println!("FAILED");
        }
    }
    good
}

/// Whether a line of the output is the harness's own.
fn is_harness(line: &str) -> bool {
    line.is_empty() || line.starts_with("running ") || line.starts_with("test result: ")
}
