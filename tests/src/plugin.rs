//! Runs a shared library that has domains of its own: in a program that knows nothing of them, and in Python.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use pkru_qemu::linux::{self, Guest};

use crate::build;
use crate::guest::machine;
use crate::tally::{Row, Tally};

/// The interpreter and the files that it needs, or why it is left out.
fn python(script: &Path) -> Result<(PathBuf, Vec<PathBuf>), String> {
    let run = |arguments: &[&str]| {
        let output = Command::new("python3").args(["-I", "-S"]).args(arguments).output();
        let output = output.map_err(|error| format!("python3: {error}"))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_string()),
            false => Err(format!("python3 has no ctypes, or ldd fails: {}", output.status)),
        }
    };
    let program = run(&["-c", "import os, sys; print(os.path.realpath(sys.executable))"])?;
    let files = run(&[&script.to_string_lossy(), "--files"])?;
    Ok((program.into(), files.lines().map(PathBuf::from).collect()))
}

pub(crate) fn run(tally: &mut Tally, kernel: &str) -> Result<(), String> {
    let package = build::binaries("cargo", &["build", "--release", "-p", "pkru-test-plugin"], "bin")?;
    let host = package.into_iter().next().ok_or("cargo has built no plugin-host")?.path;
    let library = host.with_file_name("libpkru_test_plugin.so");
    let copy = host.with_file_name("libpkru_test_plugin_copy.so");
    std::fs::copy(&library, &copy).map_err(|error| format!("{}: {error}", copy.display()))?;

    let mut row = Row { suite: format!("Linux {kernel}: a plugin"), ..Row::default() };
    let program = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    let mut boot = |what: &str, binary: PathBuf, arguments: Vec<OsString>, files: Vec<PathBuf>| {
        println!("\n== Linux {kernel}: {what} ==");
        let kernel = linux::kernel(kernel).map_err(|error| error.to_string())?;
        let guest = Guest { kernel, program: binary, arguments, environment: Vec::new(), files };
        match guest.run(&machine(), &program) {
            Ok(report) if report.outcome.status() == 0 => row.passed += 1,
            Ok(report) => {
                row.failed += 1;
                row.note = format!("{what}: {}", report.outcome);
            }
            Err(error) => {
                row.failed += 1;
                row.note = format!("{what}: {error}");
            }
        }
        Ok::<_, String>(())
    };
    boot("a program that opens a plugin", host, vec![library.clone().into(), copy.into()], Vec::new())?;
    let script = build::workspace().join("tests/plugin/host.py");
    match python(&script) {
        Ok((interpreter, mut files)) => {
            files.push(script.clone());
            let arguments = ["-I".into(), "-S".into(), script.into(), library.into()].to_vec();
            boot("Python opens a plugin", interpreter, arguments, files)?;
        }
        Err(reason) => {
            println!("skipped: Python opens a plugin: {reason}");
            row.skipped += 1;
        }
    }
    tally.add(row);
    Ok(())
}
