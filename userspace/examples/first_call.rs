//! The README's example.

use pkru_userspace::{Domain, Error};

fn main() -> Result<(), Error> {
    let mut domain = Domain::builder("parser").build()?;
    let input = String::from("untrusted, 9 bytes");

    // The closure runs in the domain. It reads `input` in place; its result is checked and copied out.
    let digits = domain.call(|| input.chars().filter(char::is_ascii_digit).collect::<String>());
    println!("{digits:?}"); // Ok("9")

    // A write to the caller's memory is stopped; the program goes on.
    let target = input.as_ptr().cast_mut();
    // SAFETY: none: this is the mistake.
    if let Err(violation) = domain.call(|| unsafe { target.write(b'X') }) {
        println!("{violation}"); // domain `parser`: write of 0x… denied by key 0 (read-only, …): the program's memory, …
    }
    Ok(())
}
