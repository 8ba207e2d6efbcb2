//! Exit statuses and messages of the command, each produced by a real run.
//!
//! The tests need QEMU and the guest kernels, which `make setup` installs.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use pkru_qemu::linux::{self, Guest};
use pkru_qemu::machine::Machine;

const COMMAND: &str = env!("CARGO_BIN_EXE_pkru-qemu");

fn run(arguments: &[&str]) -> Output {
    Command::new(COMMAND).args(arguments).output().expect("the command can be run")
}

/// Runs a shell command in a guest.
fn shell(options: &[&str], script: &str) -> Output {
    run(&[&["linux"], options, &["--", "/bin/sh", "-c", script]].concat())
}

/// Checks the exit status, and that standard error is one line that contains `message`.
fn fails(output: &Output, status: i32, message: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    assert!(stderr.contains(message), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn output_and_exit_status_are_passed_through() {
    for kernel in linux::KERNELS {
        let output = shell(
            &["--kernel", kernel],
            "read release < /proc/sys/kernel/osrelease; echo $release; echo to stderr >&2; printf 'no newline'; exit 7",
        );
        assert_eq!(output.status.code(), Some(7));
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(stdout.starts_with(&format!("{kernel}.")) && stdout.ends_with("\nno newline"), "{stdout:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "to stderr\n");
    }
}

#[test]
fn environment_and_files_arrive() {
    let folder = std::env::temp_dir().join(format!("pkru-qemu-files-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("inner")).unwrap();
    std::fs::write(folder.join("inner/file"), "contents").unwrap();
    let path = folder.to_str().unwrap();
    let script = format!("echo $WORD $PKRU_TEST_FORCE; read line < {path}/inner/file; echo $line");
    let output = shell(&["--env", "WORD=a=b", "--file", path], &script);
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "a=b 1\ncontents\n");
}

#[test]
fn a_file_named_as_an_argument_arrives() {
    let file = std::env::temp_dir().join(format!("pkru-qemu-argument-{}", std::process::id()));
    std::fs::write(&file, "read me").unwrap();
    let output = run(&["linux", "/bin/cat", file.to_str().unwrap()]);
    std::fs::remove_file(&file).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "read me");
}

#[test]
fn a_signal_is_128_and_its_number() {
    fails(&shell(&[], "kill -SEGV $$"), 128 + 11, "killed by signal 11");
}

#[test]
fn a_panic_of_the_guest() {
    fails(&shell(&[], "echo c > /proc/sysrq-trigger"), 122, "the guest panicked: ");
}

#[test]
fn a_guest_that_hangs() {
    let output = shell(&["--timeout", "4"], "echo begun; while :; do :; done");
    // The load of this machine decides which limit is reached first.
    fails(&output, 124, "the guest was killed: it printed nothing ");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "begun\n");
}

#[test]
fn what_a_killed_guest_had_printed_is_kept() {
    let guest = Guest {
        kernel: linux::kernel("6.12").unwrap(),
        program: "/bin/sh".into(),
        arguments: ["-c", "echo kept; while :; do :; done"].map(OsString::from).into(),
        environment: Vec::new(),
        files: Vec::new(),
    };
    let machine = Machine { timeout: Duration::from_secs(4), ..Machine::default() };
    let error = guest.run(&machine, COMMAND.as_ref()).unwrap_err();
    assert_eq!((error.status(), error.stdout()), (124, "kept\n"), "{error}");
}

#[test]
fn a_guest_that_makes_progress_is_not_killed() {
    // Four busy loops of two to three seconds each.
    let script = "for i in 1 2 3 4; do
            echo $i
            read -r now rest < /proc/uptime
            end=$((${now%.*} + 3))
            while [ ${now%.*} -lt $end ]; do read -r now rest < /proc/uptime; done
        done";
    let output = shell(&["--timeout", "6"], script);
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stdout).as_ref()), (Some(0), "1\n2\n3\n4\n"));
}

#[test]
fn a_guest_that_resets() {
    fails(&shell(&[], "echo b > /proc/sysrq-trigger"), 123, "ended out of order");
}

#[test]
fn a_guest_too_small_for_its_files() {
    let path = std::env::temp_dir().join(format!("pkru-qemu-large-{}", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(200 << 20).unwrap();
    let output = run(&["linux", "--memory", "384", "--file", path.to_str().unwrap(), "/bin/true"]);
    std::fs::remove_file(&path).unwrap();
    fails(&output, 123, "its files need more memory than it has");
}

#[test]
fn a_wrong_command_line() {
    fails(&run(&["linux", "--kernel", "5.4", "/bin/true"]), 118, "unknown kernel `5.4`: it is 6.1 or 6.12 or a path");
    fails(&run(&["linux"]), 118, "name a binary");
    fails(&run(&["linux", "--cpus", "many", "/bin/true"]), 118, "many");
    fails(&run(&["linux", "--icount", "--cpus", "2", "/bin/true"]), 118, "one CPU");
    fails(&run(&["windows"]), 118, "`linux` or `kernel`");
    fails(&run(&["kernel", "--env", "A=B", "x"]), 118, "--env");
}

#[test]
fn a_binary_that_cannot_run_there() {
    fails(&run(&["linux", "/no/such/binary"]), 119, "/no/such/binary: ");
    fails(&run(&["linux", "/etc/passwd"]), 119, "not an ELF binary");
    fails(&run(&["linux", "--file", "/no/such/file", "/bin/true"]), 119, "/no/such/file: ");

    let mut elf = std::fs::read(COMMAND).unwrap();
    elf[18] = 183; // e_machine: AArch64
    let path = std::env::temp_dir().join(format!("pkru-qemu-arm-{}", std::process::id()));
    std::fs::write(&path, elf).unwrap();
    let output = run(&["linux", path.to_str().unwrap()]);
    std::fs::remove_file(&path).unwrap();
    fails(&output, 119, "built for Aarch64, but the guest is X86_64");
}

#[test]
fn a_kernel_that_is_missing() {
    fails(&run(&["linux", "--kernel", "/no/such/kernel", "/bin/true"]), 121, "/no/such/kernel");
    fails(&run(&["kernel", "/no/such/kernel"]), 121, "/no/such/kernel");
}

#[test]
fn qemu_that_is_missing() {
    // The command packs the archive before it starts QEMU, and packing needs ldd.
    let folder = std::env::temp_dir().join(format!("pkru-qemu-path-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let ldd = which("ldd");
    std::os::unix::fs::symlink(ldd, folder.join("ldd")).unwrap();
    let output = Command::new(COMMAND).args(["linux", "/bin/true"]).env("PATH", &folder).output().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    fails(&output, 120, "make setup");
}

fn which(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|path| path.is_file()).unwrap()
}

/// Returns how many processes on this machine have `word` in their command line.
fn processes(word: &str) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(word)).count()
}

#[test]
fn qemu_dies_with_the_command() {
    // No other test uses this memory size, so it identifies this test's QEMU.
    let arguments = ["linux", "--memory", "777", "--", "/bin/sleep", "1000"];
    let mut command = Command::new(COMMAND).args(arguments).spawn().unwrap();
    let wait_for = |count: usize| {
        // QEMU can take long to start on a busy machine.
        for _ in 0..6000 {
            if processes("-m\x00777M") == count {
                return true;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        false
    };
    assert!(wait_for(1), "QEMU started");
    command.kill().unwrap();
    command.wait().unwrap();
    assert!(wait_for(0), "QEMU ended");
}

#[test]
fn nothing_is_left_in_the_build_folder() {
    let guest = linux::target_directory().join("guest");
    shell(&[], "exit 0");
    let look = || {
        let left = std::fs::read_dir(&guest).unwrap().flatten().map(|entry| entry.file_name());
        left.filter(|name| !linux::KERNELS.iter().any(|kernel| name == kernel)).collect::<Vec<_>>()
    };
    // Images of other tests have names for a short time.
    let mut left = look();
    for _ in 0..200 {
        if left.is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
        left = look();
    }
    assert!(left.is_empty(), "{left:?}");
}
