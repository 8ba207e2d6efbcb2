//! The emulated machine: one QEMU process, its serial ports and its limits.
//!
//! A guest is killed if it makes no progress, which is output. The limit is QEMU's processor time, because elapsed time
//! on a busy host says nothing about the guest.

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

/// The value a guest writes to the `isa-debug-exit` device when it ends in order.
pub const DEBUG_EXIT_ORDERLY: u32 = 0x10;

/// QEMU's exit status after [`DEBUG_EXIT_ORDERLY`]: the device exits with `(value << 1) | 1`.
///
/// # References
///
/// QEMU 7.2, `hw/misc/debugexit.c`.
pub const EXIT_ORDERLY: i32 = ((DEBUG_EXIT_ORDERLY << 1) | 1) as i32;

/// The I/O port of the `isa-debug-exit` device.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// The clock's limit without output, in multiples of [`Machine::timeout`].
pub const QUIET: u32 = 10;

/// The clock's limit altogether, in multiples of [`Machine::timeout`].
pub const TOTAL: u32 = 60;

/// The hardware to emulate.
#[derive(Debug, Clone)]
pub struct Machine {
    /// QEMU's name of the CPU model; `max` has PKU and PKS.
    pub cpu: String,
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u32,
    /// Let virtual time follow executed instructions, so that RDTSC counts them exactly. Needs one CPU.
    pub icount: bool,
    /// The processor time that QEMU may use while the guest prints nothing; then it is killed.
    ///
    /// It is also killed if the guest prints nothing for [`QUIET`] times as long by the clock, because a guest that waits
    /// for ever uses no processor time, and after [`TOTAL`] times as long altogether.
    pub timeout: Duration,
    /// Show the command, and the console while it runs.
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

/// Where the bytes of one serial port go as they arrive.
pub(crate) enum Sink {
    /// Kept, and shown at once on standard error if the flag is set.
    Keep { show: bool },
    /// To standard output, and kept.
    Stdout,
    /// To standard error.
    Stderr,
}

/// What came of QEMU.
pub(crate) struct Finished {
    /// How it ended, or by which limit it was killed.
    pub(crate) ended: Result<ExitStatus, String>,
    /// What came out of the ports whose sink keeps it, in the order of the ports.
    pub(crate) kept: Vec<String>,
}

/// Kills QEMU when dropped, on every way out.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill and nothing to report.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine {
    /// Runs QEMU with `arguments` and one serial port per sink until it exits.
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

        // Each port is the write end of a pipe of ours, which QEMU opens by its name under /proc.
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
        // Ours were the last write ends: now the readers see the end.
        drop(writers);
        let kept = readers.into_iter().map(JoinHandle::join).map(|kept| kept.unwrap_or_default()).collect();
        Ok(Finished { ended: ended?, kept })
    }
}

/// Waits until QEMU ends, or says which limit it is beyond. `printed` counts the guest's output.
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

/// Returns the processor time that a process has used. It has not been waited for.
///
/// # Errors
///
/// Those of `clock_getcpuclockid(3)`, if there is no such process.
pub fn processor_time(process: u32) -> io::Result<Duration> {
    let mut clock = 0;
    // SAFETY: the number is writable.
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

/// Copies a port to its sink until its end, and counts the bytes; returns what the sink keeps.
fn drain(mut port: PipeReader, sink: &Sink, printed: &AtomicU64) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = port.read(&mut buffer) {
        let bytes = &buffer[..length];
        printed.fetch_add(length as u64, Ordering::Relaxed);
        // A closed output of ours must not stop the guest: its result still counts.
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

/// Has the kernel kill the child when this process dies, however it dies.
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

/// Opens a file that QEMU is to load, so that a missing one is reported before QEMU starts.
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
