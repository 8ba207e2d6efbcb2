//! The emulated machine: one QEMU process, its serial ports and its limits.
//!
//! A guest makes progress when it prints. A guest that makes no progress within a limit of QEMU's processor time is
//! killed. Elapsed time depends on the load of the host, so it has much higher limits.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Error;

/// The value that a guest writes to the `isa-debug-exit` device for an orderly end.
pub const DEBUG_EXIT_ORDERLY: u32 = 0x10;

/// QEMU's exit status after [`DEBUG_EXIT_ORDERLY`]: the device exits with `(value << 1) | 1`.
///
/// # References
///
/// QEMU 7.2, `hw/misc/debugexit.c`.
pub const EXIT_ORDERLY: i32 = ((DEBUG_EXIT_ORDERLY << 1) | 1) as i32;

/// The I/O port of the `isa-debug-exit` device.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// The limit of elapsed time without output, in multiples of [`Machine::timeout`].
pub const QUIET: u32 = 10;

/// The limit of elapsed time in total, in multiples of [`Machine::timeout`].
pub const TOTAL: u32 = 60;

/// The hardware to emulate.
#[derive(Debug, Clone)]
pub struct Machine {
    /// QEMU's name for the CPU model. `max` has PKU and PKS.
    pub cpu: String,
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u32,
    /// Advance virtual time by executed instructions, so that RDTSC counts them exactly. Requires one CPU.
    pub icount: bool,
    /// The limit of QEMU's processor time while the guest prints nothing.
    ///
    /// Two limits of elapsed time apply as well: [`QUIET`] times this value without output, because a guest that waits
    /// for ever uses no processor time, and [`TOTAL`] times this value in total.
    pub timeout: Duration,
    /// Print QEMU's command line, and show the console of a Linux guest.
    pub verbose: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            cpu: "max".into(),
            cpus: 1,
            memory: 1024,
            icount: false,
            timeout: Duration::from_secs(600),
            verbose: false,
        }
    }
}

/// Where the output of a serial port goes.
pub(crate) enum Sink {
    /// It is kept, and also copied to standard error if `show` is set.
    Keep { show: bool },
    /// It is kept, and also copied to standard output.
    Stdout,
    /// It is copied to standard error.
    Stderr,
}

/// The result of a QEMU process.
pub(crate) struct Finished {
    /// Its exit status, or the limit for which it was killed.
    pub(crate) ended: Result<ExitStatus, String>,
    /// The kept output, one entry for each port, in order. It is empty for [`Sink::Stderr`].
    pub(crate) kept: Vec<String>,
}

/// Kills QEMU when dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Both calls fail if QEMU has ended already, which is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine {
    /// Runs QEMU with `arguments` and one serial port per sink. Returns when QEMU exits or exceeds a limit.
    pub(crate) fn run(&self, arguments: &[&str], sinks: Vec<Sink>) -> Result<Finished, Error> {
        if self.icount && self.cpus != 1 {
            return Err(Error::Usage("--icount counts on one CPU only".into()));
        }
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-machine", "pc,accel=tcg", "-cpu", &self.cpu])
            .args(["-smp", &self.cpus.to_string(), "-m", &format!("{}M", self.memory)])
            .args(["-device", &format!("isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=4")]);
        if self.icount {
            command.args(["-icount", "shift=0,sleep=off"]);
        }

        // Each port is the write end of a pipe. QEMU opens it through /proc/PID/fd.
        let mut ports = Vec::new();
        for (number, sink) in sinks.into_iter().enumerate() {
            let (reader, writer) = io::pipe().map_err(Error::io("make a pipe"))?;
            let path = format!("/proc/{}/fd/{}", std::process::id(), writer.as_raw_fd());
            command.args(["-chardev", &format!("file,id=port{number},path={path}")]);
            command.args(["-serial", &format!("chardev:port{number}")]);
            ports.push((reader, writer, sink));
        }
        command.args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        if self.verbose {
            eprintln!("pkru-qemu: {command:?}");
        }
        die_with_parent(&mut command);

        let child = command.spawn().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::QemuMissing,
            _ => Error::Io { operation: "start QEMU", source },
        })?;
        let mut child = Guard(child);

        let mut writers = Vec::new();
        let mut readers = Vec::new();
        let printed = Arc::new(AtomicU64::new(0));
        for (reader, writer, sink) in ports {
            writers.push(writer);
            let printed = Arc::clone(&printed);
            readers.push(thread::spawn(move || drain(reader, &sink, &printed)));
        }
        let ended = wait(&mut child.0, self.timeout, &printed);
        drop(child);
        // These are the last write ends. The readers reach the end of the pipes once they are closed.
        drop(writers);
        let kept = readers.into_iter().map(JoinHandle::join).map(|kept| kept.unwrap_or_default()).collect();
        Ok(Finished { ended: ended?, kept })
    }
}

/// Waits until QEMU ends. Returns a reason if it exceeds a limit. `printed` counts the bytes of the guest's output.
fn wait(child: &mut Child, limit: Duration, printed: &AtomicU64) -> Result<Result<ExitStatus, String>, Error> {
    let start = Instant::now();
    let mut progress = (0, start, Duration::ZERO);
    loop {
        if let Some(status) = child.try_wait().map_err(Error::io("wait for QEMU"))? {
            return Ok(Ok(status));
        }
        let used = processor_time(child.id()).map_err(Error::io("read QEMU's processor time"))?;
        let count = printed.load(Ordering::Relaxed);
        if count != progress.0 {
            progress = (count, Instant::now(), used);
        }
        let (_, quiet_since, used_then) = progress;
        let seconds = limit.as_secs();
        if used.saturating_sub(used_then) >= limit {
            return Ok(Err(format!("it printed nothing while QEMU used {seconds} s of processor time")));
        }
        if quiet_since.elapsed() >= QUIET * limit {
            return Ok(Err(format!("it printed nothing for {} s", u64::from(QUIET) * seconds)));
        }
        if start.elapsed() >= TOTAL * limit {
            return Ok(Err(format!("it did not end within {} s", u64::from(TOTAL) * seconds)));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Returns the processor time that a process has used. The process must not have been waited for.
///
/// # Errors
///
/// The error of `clock_getcpuclockid(3)` if there is no such process.
pub fn processor_time(process: u32) -> io::Result<Duration> {
    let mut clock = 0;
    // SAFETY: the clock number is writable.
    let error = unsafe { libc::clock_getcpuclockid(process as libc::pid_t, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the struct is writable.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// Copies a port to its sink until the end of the pipe, and counts the bytes. Returns what the sink keeps.
fn drain(mut port: PipeReader, sink: &Sink, printed: &AtomicU64) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = port.read(&mut buffer) {
        let bytes = &buffer[..length];
        printed.fetch_add(length as u64, Ordering::Relaxed);
        // Errors are ignored: the guest's result counts even if this process's output is closed.
        let _ = match sink {
            Sink::Keep { show: true } | Sink::Stderr => io::stderr().write_all(bytes),
            Sink::Stdout => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
            Sink::Keep { show: false } => Ok(()),
        };
        if !matches!(sink, Sink::Stderr) {
            kept.extend_from_slice(bytes);
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Makes the kernel kill the child when this process ends, even by a signal.
fn die_with_parent(command: &mut Command) {
    let arrange = || {
        // SAFETY: prctl with these arguments touches no memory.
        match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: `arrange` makes one system call, which is allowed between fork and exec.
    unsafe { command.pre_exec(arrange) };
}

/// Checks that QEMU can read a file, so that a missing one is reported before QEMU starts.
pub(crate) fn readable(path: &std::path::Path) -> io::Result<()> {
    File::open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(100);

    fn sleeper() -> Guard {
        Guard(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    #[test]
    fn a_guest_that_waits_for_ever_is_not_waited_for() {
        let reason = wait(&mut sleeper().0, LIMIT, &AtomicU64::new(0)).unwrap().unwrap_err();
        assert!(reason.starts_with("it printed nothing for "), "{reason}");
    }

    #[test]
    fn a_guest_that_prints_for_ever_is_not_waited_for() {
        let printed = Arc::new(AtomicU64::new(0));
        let printing = Arc::downgrade(&printed);
        let printer = thread::spawn(move || {
            while let Some(printed) = printing.upgrade() {
                printed.fetch_add(1, Ordering::Relaxed);
            }
        });
        let reason = wait(&mut sleeper().0, LIMIT, &printed).unwrap().unwrap_err();
        assert!(reason.starts_with("it did not end within "), "{reason}");
        drop(printed);
        printer.join().unwrap();
    }
}
