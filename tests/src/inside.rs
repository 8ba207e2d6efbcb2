//! The part that runs in a guest: each test of each binary in a process of its own, so that one that dies fails alone.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::guest::SUITE;

/// The longest that a test may take. The soak takes most.
const LIMIT: Duration = Duration::from_secs(300);

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

/// Asks a test binary for the names of its tests, but for those that other tests run.
fn tests(binary: &str) -> Result<Vec<String>, String> {
    let list = |more: &[&str]| {
        let arguments = ["--list", "--format", "terse"];
        let output = Command::new(binary).args(arguments).args(more).output().map_err(|error| error.to_string())?;
        let listing = String::from_utf8_lossy(&output.stdout).into_owned();
        let names = listing.lines().filter_map(|line| line.strip_suffix(": test")).map(String::from);
        Ok::<_, String>((names.collect::<Vec<_>>(), output.status))
    };
    let (ignored, _) = list(&["--ignored"])?;
    let (mut names, status) = list(&[])?;
    names.retain(|name| !ignored.contains(name));
    if names.is_empty() { Err(format!("it lists no tests: {status}")) } else { Ok(names) }
}

/// Runs one test; returns whether it did not fail.
fn run_one(binary: &str, test: &str) -> bool {
    let arguments = ["--exact", test, "--nocapture", "--test-threads", "1"];
    let output = match run_bounded(Command::new(binary).args(arguments)) {
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

/// Runs a command as [`Command::output`] does, and kills it if it takes too long.
fn run_bounded(command: &mut Command) -> io::Result<Output> {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let process = child.id();
    let (done, expired) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if expired.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            println!("killed after {} s", LIMIT.as_secs());
            // SAFETY: the call touches no memory. The child is not reaped before this thread has ended, unless it ends
            // just now.
            unsafe { libc::kill(process as libc::pid_t, libc::SIGKILL) };
        }
    });
    let output = child.wait_with_output();
    drop(done);
    let _ = watchdog.join();
    output
}

/// Whether a line of the output is the harness's own.
fn is_harness(line: &str) -> bool {
    line.is_empty() || line.starts_with("running ") || line.starts_with("test result: ")
}
