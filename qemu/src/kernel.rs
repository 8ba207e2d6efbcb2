//! Boots a bare-metal ELF through PVH.

use std::path::Path;

use crate::Error;
use crate::machine::{EXIT_ORDERLY, Machine, Sink, readable};

/// The beginning of the console line with which a bare-metal kernel reports success.
pub const SENTINEL: &str = "pkru-kernel: passed";

/// Boots `elf`, copies its serial port to standard output, and returns that output if the kernel passed.
///
/// `arguments` is the kernel's command line.
///
/// # Errors
///
/// [`Error::KernelMissing`] if there is no such file, [`Error::Input`] if it is not an ELF for x86-64, and
/// [`Error::Disorderly`] if a sign of a pass is missing: the exit code or the sentinel. Also [`Error::Usage`],
/// [`Error::QemuMissing`], [`Error::TimedOut`] and [`Error::Io`].
pub fn run(machine: &Machine, elf: &Path, arguments: &str) -> Result<String, Error> {
    readable(elf).map_err(|_| Error::KernelMissing { path: elf.into() })?;
    crate::initramfs::check_elf(elf)?;
    let elf = elf.to_str().ok_or_else(|| Error::input(elf, "the path is not UTF-8"))?;
    let finished = machine.run(&["-kernel", elf, "-append", arguments], vec![Sink::Stdout])?;
    let console = finished.kept.into_iter().next().unwrap_or_default();
    let sentinel = console.lines().any(|line| line.starts_with(SENTINEL));
    let reason = match finished.ended {
        Err(reason) => return Err(Error::TimedOut { reason, stdout: console }),
        Ok(status) => match (status.code(), sentinel) {
            (Some(EXIT_ORDERLY), true) => return Ok(console),
            (Some(EXIT_ORDERLY), false) => format!("it exited in order but did not print `{SENTINEL}`"),
            (_, true) => format!("it printed `{SENTINEL}`, but QEMU ended with {status}"),
            _ => format!("it failed: QEMU ended with {status}"),
        },
    };
    Err(Error::Disorderly { reason, stdout: console })
}
