//! The example of the README: a call that works, and one that is stopped.

use pkru_userspace::{Domain, Error};

fn main() -> Result<(), Error> {
    let mut domain = Domain::builder("parser").build()?;
    let input = String::from("untrusted, 9 bytes");

    // The closure runs in the domain and reads `input` in place. Its result is checked and copied out.
    let digits = domain.call(|| input.chars().filter(char::is_ascii_digit).collect::<String>());
    println!("{digits:?}");

    // A write to the caller's memory ends the call, and the program continues.
    let target = input.as_ptr().cast_mut();
    // SAFETY: none: this is the mistake.
    let result = domain.call(|| unsafe { target.write(b'X') });
    println!("{result:?}, and {input:?} is unchanged");
    Ok(())
}
