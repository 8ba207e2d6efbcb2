//! Boots a Linux guest that runs one program of the host.
//!
//! The guest has three serial ports: the kernel's console, the program's standard output, and its standard error.
//! [`init`](crate::init) reports the program's outcome on the console.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Error;
use crate::init::{ICOUNT, Outcome, Task};
use crate::initramfs::Initramfs;
use crate::machine::{EXIT_ORDERLY, Machine, Sink, readable};

/// A program to run in a guest, and the files it needs there.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel image to boot.
    pub kernel: PathBuf,
    /// The program. The guest gets it with all libraries that it loads.
    pub program: PathBuf,
    /// Its arguments. The guest gets the files that they name.
    pub arguments: Vec<OsString>,
    /// Additional environment variables. `PATH` and `HOME` are set.
    pub environment: Vec<(OsString, OsString)>,
    /// Additional files or folders. Each has the same path in the guest.
    pub files: Vec<PathBuf>,
}

/// The versions of the kernels that `make setup` unpacks, newest last.
pub const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// Returns the path of a kernel image. `name` is one of [`KERNELS`], or a path.
///
/// # Errors
///
/// [`Error::KernelMissing`] if there is no such file, [`Error::Usage`] if `name` is neither a version nor a path.
pub fn kernel(name: &str) -> Result<PathBuf, Error> {
    let path = if KERNELS.contains(&name) {
        let image = |folder: PathBuf| folder.join("guest").join(name).join("vmlinuz");
        let path = image(target_directory());
        // `CARGO_TARGET_DIR` may be the build folder of another project whose program runs in the guest.
        if path.exists() { path } else { image(workspace().join("target")) }
    } else if name.contains('/') || Path::new(name).exists() {
        PathBuf::from(name)
    } else {
        return Err(Error::Usage(format!("unknown kernel `{name}`: it is {} or a path", KERNELS.join(" or "))));
    };
    readable(&path).map_err(|_| Error::KernelMissing { path: path.clone() })?;
    Ok(path)
}

/// Returns the workspace's build folder. `make setup` unpacks the guest kernels there.
#[must_use]
pub fn target_directory() -> PathBuf {
    workspace().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The result of a program in a guest.
#[derive(Debug)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// What it wrote to its standard output.
    pub stdout: String,
}

impl Guest {
    /// Boots the guest, copies the program's output to this process's, and returns how the program ended.
    ///
    /// `init` is the binary to run as the guest's first process. Its `main` must begin with
    /// [`init::enter_if_first`](crate::init::enter_if_first). Usually it is `pkru-qemu` itself.
    ///
    /// # Errors
    ///
    /// Every variant of [`Error`]. A program that runs and fails is an [`Outcome`], not an error.
    pub fn run(&self, machine: &Machine, init: &Path) -> Result<Report, Error> {
        let directory = std::env::current_dir().map_err(Error::io("read the current folder"))?;
        let program = absolute(&self.program)?;
        let mut archive = Initramfs::new(init)?;
        archive.add_program(&program)?;
        let named = self.arguments.iter().map(Path::new).filter(|argument| argument.is_file());
        for file in self.files.iter().map(PathBuf::as_path).chain(named) {
            archive.add_tree(&absolute(file)?)?;
        }
        let mut environment = self.environment.clone();
        if machine.icount {
            environment.push((ICOUNT.into(), "1".into()));
        }
        archive.add_task(&Task { directory, program, arguments: self.arguments.clone(), environment });

        let image = nameless_file()?;
        archive.write(&image)?;

        let path = |path: &Path| -> Result<String, Error> {
            path.to_str().map(String::from).ok_or_else(|| Error::input(path, "the path is not UTF-8"))
        };
        let finished = machine.run(
            &[
                "-kernel",
                &path(&self.kernel)?,
                "-initrd",
                &format!("/proc/{}/fd/{}", std::process::id(), image.as_raw_fd()),
                "-append",
                // The kernel resets the machine on a panic, and -no-reboot turns a reset into an exit. On a busy host the
                // emulated timer can be late, which the kernel's check at boot takes for a broken one, and panics
                // (Linux 6.12, `arch/x86/kernel/apic/io_apic.c`, `check_timer`).
                "console=ttyS0 quiet panic=-1 random.trust_cpu=on no_timer_check",
            ],
            vec![Sink::Keep { show: machine.verbose }, Sink::Stdout, Sink::Stderr],
        )?;

        let [console, stdout, ..] = &finished.kept[..] else { unreachable!("two ports are kept") };
        let stdout = stdout.clone();
        if let Some(line) = console.lines().find(|line| line.contains("Kernel panic")) {
            return Err(Error::Panicked { message: line.trim().into(), stdout });
        }
        // If unpacking fails, Linux boots with the files unpacked so far (6.12, `init/initramfs.c`).
        if console.contains("Initramfs unpacking failed") {
            let reason = "its files need more memory than it has (--memory)".into();
            return Err(Error::Disorderly { reason, stdout });
        }
        let status = match finished.ended {
            Ok(status) => status,
            Err(reason) => return Err(Error::TimedOut { reason, stdout }),
        };
        let outcome = console.lines().find_map(Outcome::parse);
        let reason = match (status.code(), outcome) {
            (Some(EXIT_ORDERLY), Some(outcome)) => return Ok(Report { outcome, stdout }),
            (Some(EXIT_ORDERLY), None) => "the console has no verdict".into(),
            (Some(code), _) => format!("QEMU exited with {code}"),
            (None, _) => format!("QEMU was killed by signal {}", status.signal().unwrap_or(0)),
        };
        let last = console.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing").trim();
        Err(Error::Disorderly { reason: format!("{reason}; the console's last line: {last}"), stdout })
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|error| Error::input(path, error))
}

/// Makes an unlinked file in the build folder. The kernel frees it when this process ends, even by a signal. QEMU opens
/// it through /proc/PID/fd.
fn nameless_file() -> Result<File, Error> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let folder = target_directory().join("guest");
    std::fs::create_dir_all(&folder).map_err(Error::io("make the folder for guest images"))?;
    let path = folder.join(format!("initramfs-{}-{number}", std::process::id()));
    let file = File::create_new(&path).map_err(Error::io("make a guest image"))?;
    std::fs::remove_file(&path).map_err(Error::io("unlink a guest image"))?;
    Ok(file)
}
