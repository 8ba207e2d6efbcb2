//! Says what this machine offers for isolation, and whether domains can be made here.
//!
//!     cargo run --example doctor
//!
//! Each thing is found by trying it, in a child process. The exit status is 0 if domains can be made, and 1 if not.

use std::process::ExitCode;

use pkru_userspace::{Domain, capability};

fn main() -> ExitCode {
    println!("{}", capability::survey());
    match try_a_domain() {
        Ok(()) => {
            println!("Domains can be made here: one was, and a call of it returned.");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            println!("No domains can be made here: {reason}.");
            ExitCode::FAILURE
        }
    }
}

fn try_a_domain() -> Result<(), String> {
    let mut domain = Domain::builder("doctor").build().map_err(|error| error.to_string())?;
    match domain.call(|| 6 * 7) {
        Ok(42) => Ok(()),
        Ok(other) => Err(format!("a call that computes 6 * 7 returned {other}")),
        Err(violation) => Err(format!("a call that only computes was stopped: {violation}")),
    }
}
