//! Reports which features of domains this machine supports, and whether domains work here.
//!
//!     cargo run --example doctor
//!
//! It tests each feature, in a child process if needed. The exit status is 0 if domains work, and 1 if not.

use std::process::ExitCode;

use pkru_userspace::{Domain, capability};

fn main() -> ExitCode {
    println!("{}", capability::survey());
    match try_a_domain() {
        Ok(()) => {
            println!("Domains work here: one was made, and a call into it returned.");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            println!("Domains do not work here: {reason}.");
            ExitCode::FAILURE
        }
    }
}

/// Makes a domain and calls into it.
fn try_a_domain() -> Result<(), String> {
    let mut domain = Domain::builder("doctor").build().map_err(|error| error.to_string())?;
    match domain.call(|| 6 * 7) {
        Ok(42) => Ok(()),
        Ok(other) => Err(format!("a call that computes 6 * 7 returned {other}")),
        Err(violation) => Err(format!("a call that only computes was stopped: {violation}")),
    }
}
