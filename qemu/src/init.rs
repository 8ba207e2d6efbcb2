//! The first process in the guest. It runs the task and reports the outcome.

use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use qemu_exit::QEMUExit;

use crate::machine::{DEBUG_EXIT_ORDERLY, DEBUG_EXIT_PORT, EXIT_ORDERLY};

/// The path of the first process, which the kernel runs.
pub(crate) const INIT_PATH: &str = "/init";

/// The path of the file with the task.
pub(crate) const TASK_PATH: &str = "/task";

/// The environment variable that makes a skipped test a failure. The guest sets it.
pub const FORCE: &str = "PKRU_TEST_FORCE";

/// The environment variable that says that the time-stamp counter counts instructions.
pub const ICOUNT: &str = "PKRU_ICOUNT";

/// The prefix of the console line that reports the outcome.
const SENTINEL: &str = "pkru-guest: ";

/// What the guest runs.
#[derive(Debug, PartialEq)]
pub(crate) struct Task {
    pub(crate) directory: PathBuf,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    pub(crate) environment: Vec<(OsString, OsString)>,
}

/// How the program in the guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with this status.
    Exited(u8),
    /// A signal of this number killed it.
    Killed(u8),
    /// It did not start, with this error number.
    NotStarted(u8),
}

impl Outcome {
    /// Returns the exit status of the command: the program's own, 128 plus the signal number, or 127.
    #[must_use]
    pub const fn status(self) -> u8 {
        match self {
            Self::Exited(status) => status,
            Self::Killed(signal) => 128 | signal,
            Self::NotStarted(_) => 127,
        }
    }

    /// Parses a line of the console. Returns `None` if it does not report the outcome.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (verdict, number) = line.trim_end().strip_prefix(SENTINEL)?.rsplit_once(' ')?;
        let number = number.parse().ok()?;
        match verdict {
            "exited with" => Some(Self::Exited(number)),
            "killed by signal" => Some(Self::Killed(number)),
            "not started, error" => Some(Self::NotStarted(number)),
            _ => None,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with {status}"),
            Self::Killed(signal) => write!(f, "killed by signal {signal}"),
            Self::NotStarted(error) => write!(f, "not started, error {error}"),
        }
    }
}

/// Runs as the guest's init, and does not return, if this process is the first in a guest.
pub fn enter_if_first() {
    if std::process::id() == 1 && fs::exists(TASK_PATH).unwrap_or(false) {
        init();
    }
}

fn init() -> ! {
    let outcome = prepare().and_then(|task| run(&task));
    let verdict = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            report(&format!("pkru-guest init: {error}"));
            Outcome::NotStarted(error.raw_os_error().unwrap_or(0) as u8)
        }
    };
    report(&format!("{SENTINEL}{verdict}"));
    // SAFETY: the call touches no memory, and init accesses no port but the one below.
    unsafe { libc::iopl(3) };
    // SAFETY: this is the port of the machine's `isa-debug-exit` device.
    let device = unsafe { qemu_exit::X86::new(DEBUG_EXIT_PORT, EXIT_ORDERLY as u32) };
    device.exit(DEBUG_EXIT_ORDERLY)
}

/// Prints a line on the console, and waits until it is transmitted.
fn report(line: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/ttyS0") {
        // A failure cannot be reported anywhere. The host notices the missing line.
        let _ = writeln!(console, "\n{line}");
        flush(&console);
    }
}

fn prepare() -> io::Result<Task> {
    mount("devtmpfs", "/dev")?;
    mount("proc", "/proc")?;
    mount("sysfs", "/sys")?;
    Task::from_bytes(&fs::read(TASK_PATH)?).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

fn run(task: &Task) -> io::Result<Outcome> {
    let (stdout, stderr) = (raw_port("/dev/ttyS1")?, raw_port("/dev/ttyS2")?);
    let mut program = Command::new(&task.program)
        .args(&task.arguments)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env(FORCE, "1")
        .envs(task.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(&task.directory)
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .spawn()?;
    let status = program.wait()?;
    flush(&stdout);
    flush(&stderr);
    Ok(outcome(status))
}

fn outcome(status: ExitStatus) -> Outcome {
    match (status.code(), status.signal()) {
        (Some(code), _) => Outcome::Exited(code as u8),
        (None, signal) => Outcome::Killed(signal.unwrap_or(0) as u8),
    }
}

fn mount(kind: &str, place: &str) -> io::Result<()> {
    let (kind, place) = (CString::new(kind)?, CString::new(place)?);
    // SAFETY: both strings are NUL-terminated and live across the call; the data may be null.
    let result = unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Opens a serial port in raw mode: the terminal driver does not change the output.
fn raw_port(path: &str) -> io::Result<File> {
    let port = OpenOptions::new().write(true).open(path)?;
    // SAFETY: termios is a C struct of integers, for which zero is valid.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `settings` is writable.
    if unsafe { libc::tcgetattr(port.as_raw_fd(), &raw mut settings) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `settings` was filled in above.
    unsafe { libc::cfmakeraw(&raw mut settings) };
    // SAFETY: the descriptor is open and `settings` is filled in.
    if unsafe { libc::tcsetattr(port.as_raw_fd(), libc::TCSANOW, &raw const settings) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(port)
}

fn flush(port: &File) {
    // SAFETY: the descriptor is open. A failure is ignored: the output is lost either way.
    unsafe { libc::tcdrain(port.as_raw_fd()) };
}

impl Task {
    /// Parses what [`Task::to_bytes`] wrote.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.strip_suffix(&[0])?;
        let mut strings = bytes.split(|byte| *byte == 0).map(|string| OsStr::from_bytes(string).to_owned());
        let directory = strings.next()?.into();
        let program = strings.next()?.into();
        let count = strings.next()?.to_str()?.parse().ok()?;
        let arguments = (0..count).map(|_| strings.next()).collect::<Option<_>>()?;
        let mut environment = Vec::new();
        while let Some(name) = strings.next() {
            environment.push((name, strings.next()?));
        }
        Some(Self { directory, program, arguments, environment })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_survives_the_trip() {
        let task = Task {
            directory: "/work dir".into(),
            program: "/bin/x".into(),
            arguments: vec!["".into(), "a b".into()],
            environment: vec![("K".into(), "".into()), ("L".into(), "v=w".into())],
        };
        assert_eq!(Task::from_bytes(&task.to_bytes()), Some(task));
    }

    #[test]
    fn a_verdict_survives_the_console() {
        for outcome in [Outcome::Exited(0), Outcome::Exited(255), Outcome::Killed(11), Outcome::NotStarted(2)] {
            assert_eq!(Outcome::parse(&format!("{SENTINEL}{outcome}\r\n")), Some(outcome));
        }
        assert_eq!(Outcome::parse("pkru-guest: exited with 256"), None);
        assert_eq!(Outcome::parse("exited with 0"), None);
    }
}
