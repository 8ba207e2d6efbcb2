//! The command line: `pkru-qemu linux … -- BINARY ARGS…` and `pkru-qemu kernel ELF`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use lexopt::prelude::*;
use pkru_qemu::init::Outcome;
use pkru_qemu::linux::{self, Guest};
use pkru_qemu::machine::Machine;
use pkru_qemu::{Error, init, kernel};

const HELP: &str = "\
Runs a program in a Linux guest, or a bare-metal kernel, in QEMU.

    pkru-qemu linux [OPTIONS] [--] BINARY [ARGS]...
    pkru-qemu kernel [OPTIONS] ELF [ARGS]...

The guest gets BINARY, its libraries, and the files that ARGS name. Paths in the guest are the same as here. BINARY
runs in the current folder, with empty standard input. This command prints its output and exits with its status.

Options of both:
    --cpu MODEL      QEMU's CPU model [default: max, which has PKU and PKS]
    --cpus N         number of CPUs [default: 1]
    --icount         make RDTSC count instructions; requires one CPU
    --memory MIB     memory in MiB [default: 1024]
    --timeout S      kill the guest if it prints nothing for S seconds of QEMU's processor time or 10*S seconds of
                     elapsed time, or runs longer than 60*S seconds [default: 600]
    --verbose        show the QEMU command and the kernel's console
Options of `linux`:
    --kernel K       6.1, 6.12 or a path [default: 6.12]
    --env K=V        set an environment variable of the program
    --file PATH      copy a file or folder to the guest

Exit status, if not the program's own:
    118  wrong command line             122  the guest panicked
    119  a binary or file is unsuitable 123  the guest ended out of order, or a bare-metal kernel failed
    120  QEMU is missing                124  the guest timed out
    121  the kernel is missing          125  an operation on the host failed
    127  the program did not start      128+N  signal N killed the program

The guest sets PKRU_TEST_FORCE, and with --icount also PKRU_ICOUNT.

As a cargo runner, it runs tests and programs of any crate in the guest:
    cargo build -p pkru-qemu
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=\"$PWD/target/debug/pkru-qemu linux\"
    cargo test --release -p pkru-userspace --tests
";

fn main() -> ExitCode {
    init::enter_if_first();
    match command() {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("pkru-qemu: {error}");
            ExitCode::from(error.status())
        }
    }
}

#[derive(Default)]
struct Options {
    machine: Machine,
    kernel: Option<String>,
    environment: Vec<(OsString, OsString)>,
    files: Vec<PathBuf>,
    positional: Vec<OsString>,
}

fn command() -> Result<u8, Error> {
    if std::env::args_os().skip(1).take_while(|argument| argument != "--").take(2).any(|argument| argument == "--help")
    {
        print!("{HELP}");
        return Ok(0);
    }
    let mut parser = lexopt::Parser::from_env();
    match parser.next().map_err(usage)? {
        Some(Value(verb)) if verb == "linux" => run_linux(parse(parser, true)?),
        Some(Value(verb)) if verb == "kernel" => run_kernel(&parse(parser, false)?),
        Some(Short('h')) => {
            print!("{HELP}");
            Ok(0)
        }
        _ => Err(Error::Usage("the first argument must be `linux` or `kernel`".into())),
    }
}

fn usage(error: lexopt::Error) -> Error {
    Error::Usage(error.to_string())
}

fn parse(mut parser: lexopt::Parser, linux: bool) -> Result<Options, Error> {
    try_parse(&mut parser, linux).map_err(usage)
}

fn try_parse(parser: &mut lexopt::Parser, linux: bool) -> Result<Options, lexopt::Error> {
    let mut options = Options::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("cpu") => options.machine.cpu = parser.value()?.string()?,
            Long("cpus") => options.machine.cpus = parser.value()?.parse()?,
            Long("icount") => options.machine.icount = true,
            Long("memory") => options.machine.memory = parser.value()?.parse()?,
            Long("timeout") => options.machine.timeout = Duration::from_secs(parser.value()?.parse()?),
            Long("verbose") => options.machine.verbose = true,
            Long("kernel") if linux => options.kernel = Some(parser.value()?.string()?),
            Long("file") if linux => options.files.push(parser.value()?.into()),
            Long("env") if linux => {
                let pair = parser.value()?.string()?;
                let (name, value) = pair.split_once('=').ok_or_else(|| format!("--env {pair}: not of the form K=V"))?;
                options.environment.push((name.into(), value.into()));
            }
            Value(first) => {
                // All arguments after the binary belong to it.
                options.positional.push(first);
                options.positional.extend(parser.raw_args()?);
            }
            other => return Err(other.unexpected()),
        }
    }
    Ok(options)
}

fn run_linux(options: Options) -> Result<u8, Error> {
    let mut positional = options.positional.into_iter();
    let program = positional.next().ok_or_else(|| Error::Usage("name a binary to run".into()))?;
    let guest = Guest {
        kernel: linux::kernel(options.kernel.as_deref().unwrap_or("6.12"))?,
        program: program.into(),
        arguments: positional.collect(),
        environment: options.environment,
        files: options.files,
    };
    let init =
        std::env::current_exe().map_err(|source| Error::Io { operation: "find this command's binary", source })?;
    let outcome = guest.run(&options.machine, &init)?.outcome;
    if !matches!(outcome, Outcome::Exited(_)) {
        eprintln!("pkru-qemu: {}: {outcome}", guest.program.display());
    }
    Ok(outcome.status())
}

fn run_kernel(options: &Options) -> Result<u8, Error> {
    let (elf, arguments) =
        options.positional.split_first().ok_or_else(|| Error::Usage("name a kernel to boot".into()))?;
    let arguments: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
    kernel::run(&options.machine, elf.as_ref(), &arguments.join(" "))?;
    Ok(0)
}
