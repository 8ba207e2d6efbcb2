//! The protection keys of this process.
//!
//! Keys are taken from the kernel when they are first needed and never given back: `pkey_free` does not untag pages, and a
//! key that still tags some would give its next owner access to them.

use std::io;
use std::sync::{Mutex, PoisonError};

use pkru::ProtectionKey;

use crate::{Error, sys};

/// Keys that are taken from the kernel: those in use, and those free for the next domain, one bit each.
struct Keys {
    used: u16,
    free: u16,
}

static KEYS: Mutex<Keys> = Mutex::new(Keys { used: 0, free: 0 });

/// Hands out a key that tags no page.
pub(crate) fn allocate() -> Result<ProtectionKey, Error> {
    let mut keys = KEYS.lock().unwrap_or_else(PoisonError::into_inner);
    let key = match ProtectionKey::new(keys.free.trailing_zeros() as u8) {
        Some(key) => key,
        None => sys::pkey_alloc().map_err(|error| exhausted(&keys, &error))?,
    };
    keys.free &= !bit(key);
    keys.used |= bit(key);
    Ok(key)
}

/// Takes back a key whose pages are unmapped.
pub(crate) fn free(key: ProtectionKey) {
    let mut keys = KEYS.lock().unwrap_or_else(PoisonError::into_inner);
    keys.used &= !bit(key);
    keys.free |= bit(key);
}

fn exhausted(keys: &Keys, error: &io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => Error::KeysExhausted { limit: keys.used.count_ones() as usize },
        errno => Error::System { operation: "take a protection key from the kernel", errno: errno.unwrap_or(0) },
    }
}

const fn bit(key: ProtectionKey) -> u16 {
    1 << key.number()
}
