//! Runs the test suites and prints a table of the results.
//!
//! | command | runs |
//! |---|---|
//! | `pkru-tests all` | `host` and `qemu` |
//! | `pkru-tests host` | unit and documentation tests, and the suites on this machine's CPU if it has keys |
//! | `pkru-tests qemu` | the bare-metal suites, and the guest suites and examples on each kernel |
//! | `pkru-tests plugin` | of these, the shared library that a program and Python open |
//! | `pkru-tests soak RUNS` | the storm, that many times for a minute, on each kernel and on this machine's CPU if it has keys |
//! | `pkru-tests floors FOLDER…` | the check of module layers, on the crates in these source folders |
//! | `pkru-tests inside BINARY…` | the suites in these binaries; used in a guest |

mod bare;
mod build;
mod floors;
mod guest;
mod host;
mod inside;
mod plugin;
mod soak;
mod stream;
mod tally;

#[cfg(test)]
mod docs;
#[cfg(test)]
mod messages;
#[cfg(test)]
mod scripts;

use std::process::ExitCode;

use tally::Tally;

fn main() -> ExitCode {
    pkru_qemu::init::enter_if_first();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let mut tally = Tally::default();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["all"] => host::run(&mut tally).and_then(|()| qemu(&mut tally)),
        ["host"] => host::run(&mut tally),
        ["qemu"] => qemu(&mut tally),
        ["plugin"] => guest::plugins(&mut tally),
        ["soak", runs] => match runs.parse() {
            Ok(runs) => soak::run(&mut tally, runs),
            Err(_) => Err(format!("`{runs}` is no number of runs")),
        },
        ["floors", folders @ ..] if !folders.is_empty() => return floors::run(folders),
        ["inside", binaries @ ..] if !binaries.is_empty() => return inside::run(binaries),
        _ => Err("usage: pkru-tests all | host | qemu | plugin | soak RUNS | floors FOLDER…".into()),
    };
    if let Err(error) = result {
        eprintln!("pkru-tests: {error}");
        return ExitCode::FAILURE;
    }
    tally.print();
    if tally.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn qemu(tally: &mut Tally) -> Result<(), String> {
    tally.add(host::cargo_test("pkru-qemu: the command", "pkru-qemu", &["--test", "command"])?);
    bare::run(tally)?;
    guest::run(tally)
}
