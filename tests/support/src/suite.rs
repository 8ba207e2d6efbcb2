//! A test harness that runs each test in its own process.
//!
//! A domain changes the state of its process: protection keys, signal handlers, the allocator. Tests in one process
//! would affect each other.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use pkru_qemu::init::{FORCE, ICOUNT};
use pkru_qemu::machine::processor_time;
use pkru_userspace::capability::detect;

/// The argument that makes a process run one test itself. The test's name follows.
const IN_THIS_PROCESS: &str = "--in-this-process";

/// The exit status of a process whose test passed. It is not 0, because the tested code may exit with 0.
const PASSED: u8 = 86;

/// The mark of output lines that are shown even if the test passes.
const FIGURE: &str = "figure: ";

/// A test's name and its figures.
type Figures = (&'static str, Vec<String>);

/// The limits after which a test's process is killed.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Processor time. In a guest this includes time that the host spends on other processes.
    processor_time: Duration,
    /// Elapsed time without processor time: the test waits for an event that does not come.
    idle: Duration,
    /// Elapsed time in total.
    elapsed: Duration,
}

const LIMITS: Limits = Limits {
    processor_time: Duration::from_secs(3600),
    idle: Duration::from_secs(600),
    elapsed: Duration::from_secs(7200),
};

/// A test: its name and what it runs.
///
/// Without a mark, a test needs protection keys and runs on its own thread, as in the standard harness.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    name: &'static str,
    function: fn(),
    needs: Needs,
    on_first_thread: bool,
    is_child: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    Keys,
    KeysAndInstructionCounter,
}

impl Test {
    /// Creates a test without marks.
    #[must_use]
    pub const fn new(name: &'static str, function: fn()) -> Self {
        Self { name, function, needs: Needs::Keys, on_first_thread: false, is_child: false }
    }

    /// The mark `anywhere`: the test also runs on machines without protection keys.
    #[must_use]
    pub const fn anywhere(self) -> Self {
        Self { needs: Needs::Nothing, ..self }
    }

    /// The mark `counts_instructions`: the test needs keys and a time-stamp counter that counts instructions.
    #[must_use]
    pub const fn counts_instructions(self) -> Self {
        Self { needs: Needs::KeysAndInstructionCounter, ..self }
    }

    /// The mark `on_first_thread`: the test runs on the only thread of its process.
    #[must_use]
    pub const fn on_first_thread(self) -> Self {
        Self { on_first_thread: true, ..self }
    }

    /// The mark `child`: another test runs this one. It is listed as ignored.
    #[must_use]
    pub const fn child(self) -> Self {
        Self { is_child: true, ..self }
    }

    /// Runs the test in this process.
    fn run_here(self) -> ExitCode {
        let good = if self.on_first_thread {
            (self.function)();
            true
        } else {
            let thread = std::thread::Builder::new().name(self.name.into()).spawn(self.function);
            thread.expect("the thread starts").join().is_ok()
        };
        ExitCode::from(if good { PASSED } else { 101 })
    }
}

/// Defines a suite: `suite! { first, #[mark] second, … }`. Each test is a function without arguments or result. The
/// marks are the methods of [`Test`].
///
/// The suite's target sets `harness = false`. Its command line is that of the standard harness.
#[macro_export]
macro_rules! suite {
    ($($(#[$mark:ident])* $test:path),+ $(,)?) => {
        fn main() -> std::process::ExitCode {
            $crate::suite::main(&[$($crate::suite::Test::new(stringify!($test), $test) $(.$mark())*),+])
        }
    };
}

/// Runs the tests that the command line selects.
#[must_use]
pub fn main(tests: &[Test]) -> ExitCode {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(IN_THIS_PROCESS) {
        let name = words.next();
        let test = tests.iter().find(|test| Some(test.name) == name.as_deref());
        return test.expect("the suite has the test").run_here();
    }

    let arguments = Arguments::from_args();
    let no_keys = detect().err().map(|error| error.to_string());
    let no_counter = std::env::var_os(ICOUNT).is_none().then(|| {
        String::from(
            "the time-stamp counter does not count instructions; run in a guest with `pkru-qemu linux --icount`",
        )
    });
    let figures = Arc::new(Mutex::new(Vec::new()));
    let trials = tests.iter().map(|test| {
        let test = *test;
        let lacking = match test.needs {
            Needs::Nothing => None,
            Needs::Keys => no_keys.clone(),
            Needs::KeysAndInstructionCounter => no_keys.clone().or(no_counter.clone()),
        };
        let is_forced = no_keys.is_some() && std::env::var_os(FORCE).is_some();
        // Runners such as nextest report tests that are listed as ignored as skipped. When run, the test gives the
        // reason.
        let lists_ignored = arguments.list || arguments.ignored || arguments.include_ignored;
        let listed_as_ignored = lacking.is_some() && !is_forced && (arguments.list || arguments.ignored);
        let waits_for_its_parent = test.is_child && !lists_ignored;
        let (nocapture, figures) = (arguments.nocapture, Arc::clone(&figures));
        let run = move || match lacking {
            _ if waits_for_its_parent => Ok(Completion::ignored_with("another test runs it")),
            Some(reason) if is_forced => Err(format!("{FORCE} is set, but {reason}").into()),
            // The rest of the error is advice. It is printed once, at the end.
            Some(reason) => Ok(Completion::ignored_with(reason.split([':', ';']).next().unwrap_or(&reason))),
            None => run_apart(test.name, nocapture, &figures).map(|()| Completion::Completed),
        };
        Trial::ignorable_test(test.name, run).with_ignored_flag(test.is_child && lists_ignored || listed_as_ignored)
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    for (test, lines) in figures.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        println!("{test}:");
        lines.iter().for_each(|line| println!("    {line}"));
    }
    let need_keys = tests.iter().any(|test| test.needs != Needs::Nothing && test.is_child == arguments.ignored);
    if let (Some(reason), true, 1..) = (no_keys, need_keys, conclusion.num_ignored) {
        println!("skipped: {reason}");
    }
    conclusion.exit_code()
}

/// Runs a test in its own process. Captures its output unless `nocapture` is set.
fn run_apart(name: &'static str, nocapture: bool, figures: &Mutex<Vec<Figures>>) -> Result<(), Failed> {
    let mut output = memory_file()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args([IN_THIS_PROCESS, name]).stdin(Stdio::null());
    if !nocapture {
        command.stdout(output.try_clone()?).stderr(output.try_clone()?);
    }
    let ended = wait(&mut command.spawn()?, LIMITS)?;

    let mut bytes = Vec::new();
    output.rewind()?;
    output.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    match ended {
        Ok(status) if status.code() == Some(PASSED.into()) => {
            let lines = text.lines().filter_map(|line| line.split_once(FIGURE));
            let lines: Vec<_> = lines.map(|(_, figure)| figure.to_string()).collect();
            if !lines.is_empty() {
                figures.lock().unwrap_or_else(PoisonError::into_inner).push((name, lines));
            }
            Ok(())
        }
        Ok(status) => Err(format!("{}\nits process ended: {status}", text.trim_end()).into()),
        Err(reason) => Err(format!("{}\nkilled: {reason}", text.trim_end()).into()),
    }
}

/// Makes an anonymous file for a test's output. A pipe would need a reader, and a leftover process could keep it open.
fn memory_file() -> io::Result<File> {
    // SAFETY: the name is NUL-terminated.
    let descriptor = unsafe { libc::memfd_create(c"output".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }.into())
}

/// Waits for a test's process, and kills it if it exceeds a limit.
fn wait(child: &mut Child, limits: Limits) -> io::Result<Result<ExitStatus, String>> {
    // SAFETY: the call touches no memory.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nothing else owns it.
    let ended = unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
    let start = Instant::now();
    let (mut used, mut used_at) = (Duration::ZERO, start);
    loop {
        let mut poll = libc::pollfd { fd: ended.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the struct is writable. A signal may end the wait early, which is harmless.
        unsafe { libc::poll(&raw mut poll, 1, 1000) };
        if let Some(status) = child.try_wait()? {
            return Ok(Ok(status));
        }
        let now = processor_time(child.id()).unwrap_or(used);
        if now != used {
            (used, used_at) = (now, Instant::now());
        }
        let reason = if used > limits.processor_time {
            format!("it has used more than {} s of processor time", limits.processor_time.as_secs())
        } else if used_at.elapsed() > limits.idle {
            format!("it has used no processor time for {} s", limits.idle.as_secs())
        } else if start.elapsed() > limits.elapsed {
            format!("it has run for more than {} s", limits.elapsed.as_secs())
        } else {
            continue;
        };
        child.kill()?;
        child.wait()?;
        return Ok(Err(reason));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: Duration = Duration::from_secs(3600);
    const SOON: Duration = Duration::from_secs(1);

    fn run(script: &str, limits: Limits) -> Result<ExitStatus, String> {
        wait(&mut Command::new("/bin/sh").args(["-c", script]).spawn().unwrap(), limits).unwrap()
    }

    #[test]
    fn a_process_that_ends_is_within_its_limits() {
        assert_eq!(run("exit 3", LIMITS).unwrap().code(), Some(3));
    }

    #[test]
    fn a_process_that_goes_beyond_a_limit_is_killed() {
        let none = Limits { processor_time: NEVER, idle: NEVER, elapsed: NEVER };
        let reason = run("while :; do :; done", Limits { processor_time: SOON, ..none }).unwrap_err();
        assert!(reason.contains("more than 1 s of processor time"), "{reason}");
        let reason = run("exec sleep 1000", Limits { idle: SOON, ..none }).unwrap_err();
        assert!(reason.contains("no processor time for 1 s"), "{reason}");
        let reason = run("while :; do :; done", Limits { elapsed: SOON, ..none }).unwrap_err();
        assert!(reason.contains("run for more than 1 s"), "{reason}");
    }
}
