//! The calling thread's rights to protection keys: its PKRU register.

#![expect(unsafe_code, reason = "it writes PKRU")]

use std::sync::atomic::{AtomicBool, Ordering};

use pkru::registers::Pkru;
use pkru::{AccessRights, KeyRights, ProtectionKey};

use crate::trusted::trusted;

trusted! {
    /// Whether the process is ready for domains, and so has PKRU.
    static IS_READY: AtomicBool = AtomicBool::new(false);
}

/// Notes that the process is ready for domains.
pub(crate) fn set_ready() {
    IS_READY.store(true, Ordering::Release);
}

/// Returns whether the process is ready for domains.
pub(crate) fn is_ready() -> bool {
    IS_READY.load(Ordering::Acquire)
}

/// Returns PKRU.
///
/// Everything in this module but [`is_in_domain`] is called only after the capability check of the process.
fn register() -> Pkru {
    // SAFETY: the capability check has found PKU switched on, for this process and every thread of it.
    unsafe { Pkru::assume() }
}

/// Returns the rights in force.
#[inline]
pub(crate) fn read() -> KeyRights {
    register().read()
}

/// Puts rights in force.
///
/// # Safety
///
/// As for [`Pkru::write`].
pub(crate) unsafe fn write(rights: KeyRights) {
    // SAFETY: the caller answers for the rights.
    unsafe { register().write(rights) };
}

/// Returns whether the calling thread has all rights to a key.
#[inline]
pub(crate) fn has(key: ProtectionKey) -> bool {
    read().get(key).is_empty()
}

/// Returns whether the rights in force are a domain's: key 0 is read-only.
pub(crate) fn are_domains() -> bool {
    !has(ProtectionKey::DEFAULT)
}

/// Returns whether the calling code runs in a domain.
///
/// It asks PKRU, which a mistake does not change, and not a variable of the domain's. It may be called at any time.
pub(crate) fn is_in_domain() -> bool {
    is_ready() && are_domains()
}

/// Gives the calling thread all rights to a key. Does nothing in a domain.
#[cold]
pub(crate) fn allow(key: ProtectionKey) {
    if !are_domains() {
        // SAFETY: added rights make no access of the program's fail, and the key tags only memory of this crate's or
        // statics, which the program's threads may use.
        unsafe { write(read().with(key, AccessRights::READ_WRITE)) };
    }
}

/// Runs a function with all rights to a key, and restores the rights to it afterwards, however the function ends. In a
/// domain the rights stay as they are.
pub(crate) fn with_access<R>(key: ProtectionKey, function: impl FnOnce() -> R) -> R {
    struct Restore(ProtectionKey, AccessRights);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: what has the key is used only within the function.
            unsafe { write(read().with(self.0, self.1)) };
        }
    }
    if are_domains() {
        return function();
    }
    let before = read();
    let _restore = Restore(key, before.get(key));
    // SAFETY: as in `allow`.
    unsafe { write(before.with(key, AccessRights::READ_WRITE)) };
    function()
}
