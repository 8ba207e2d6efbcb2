//! A shared library with domains of its own, as another language's runtime opens it.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::hint::black_box;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pkru_userspace::{Domain, ViolationKind};

static DOMAIN: Mutex<Option<Domain>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<Domain>> {
    DOMAIN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Builds the domain. Returns 0, or 1 after it has printed the error.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_open() -> i32 {
    match Domain::builder("plugin").build() {
        Ok(domain) => {
            *lock() = Some(domain);
            0
        }
        Err(error) => {
            println!("error: {error}");
            1
        }
    }
}

/// Calls the domain. Returns the sum of what it has allocated there, or -1 after a null write, or -2 otherwise.
///
/// # Panics
///
/// In the domain, if the C library's copy of a text is wrong. That ends the call.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_call(fail: bool) -> i32 {
    let mut domain = lock();
    let Some(domain) = domain.as_mut() else { return -2 };
    let result = domain.call(|| {
        if fail {
            // SAFETY: deliberately unsound: the mistake that the domain contains.
            unsafe { black_box(0x120 as *mut u8).write_volatile(1) };
        }
        let numbers: Vec<i32> = (0..100).map(black_box).collect();
        // The C library allocates for itself here.
        // SAFETY: the text is NUL-terminated, and the copy is freed once.
        unsafe {
            let copy = libc::strdup(c"copied by the C library".as_ptr());
            assert_eq!(libc::strlen(copy), 23);
            libc::free(copy.cast());
        }
        numbers.iter().sum::<i32>()
    });
    match result.as_ref().map_err(|violation| violation.kind()) {
        Ok(sum) => *sum,
        Err(ViolationKind::Null { .. }) => -1,
        Err(other) => {
            println!("violation: {other}");
            -2
        }
    }
}

/// Closes the domain.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_close() {
    *lock() = None;
}
