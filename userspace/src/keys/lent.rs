//! Vaults that are open: memory under the closed key to which the program has references.
//!
//! A reference may be used on any thread, and rights are each thread's own. The thread that opens a vault gets its rights
//! at once. Any other gets them when it faults, as long as a vault is open ([`signal`](crate::signal)).

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use pkru::ProtectionKey;

use crate::trusted::trusted;

trusted! {
    /// The number of the vaults' key, 0 while there is no vault.
    static KEY: AtomicU8 = AtomicU8::new(0);
    /// How many times vaults are open.
    static OPEN: AtomicUsize = AtomicUsize::new(0);
}

/// Sets the key of the vaults.
pub(crate) fn set_key(key: ProtectionKey) {
    KEY.store(key.number(), Ordering::Relaxed);
}

/// Returns the key of the vaults if one is open. Async-signal-safe.
pub(crate) fn key() -> Option<ProtectionKey> {
    if OPEN.load(Ordering::Acquire) == 0 {
        return None;
    }
    ProtectionKey::new(KEY.load(Ordering::Relaxed)).filter(|key| *key != ProtectionKey::DEFAULT)
}

/// A vault is open while this exists.
#[derive(Debug)]
pub(crate) struct Lent(());

impl Lent {
    pub(crate) fn new() -> Self {
        OPEN.fetch_add(1, Ordering::AcqRel);
        Self(())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Release);
    }
}
