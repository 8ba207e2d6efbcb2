//! The key of the program's statics, if they have one of their own.
//!
//! The first domain with [`Globals::Writable`] gives it to them (`setup/globals.rs`).

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use pkru::{AccessRights, KeyRights, ProtectionKey};

use crate::trusted::trusted;

/// What a domain may do with the statics of the program and its libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Globals {
    /// Read them. C code that writes one ends in a violation.
    #[default]
    Protected,
    /// Read and write them.
    ///
    /// This is for C code that keeps state in statics all over the program, such as the C library's `rand` and
    /// `localtime_r`. It gives the level of protection of SDRaD:
    ///
    /// - A mistake in the domain can corrupt the statics of every library, the C library's included. A discard does not
    ///   undo that.
    /// - What the C library allocates in the domain and keeps in a static (a `FILE`, its buffer, `environ` after
    ///   `setenv`, time zone data) lies on the domain's heap. The program must not use it once the domain is discarded
    ///   or dropped. Keep the domain, or have the program use such things first.
    /// - The domain cannot free what the program has allocated for such a static.
    /// - A lock that code in the domain holds when its call ends in a violation stays locked.
    ///
    /// The program's heap, stacks and thread-locals, libraries loaded later, and this crate's own statics stay
    /// read-only. The first such domain gives the statics a protection key of their own, for good.
    Writable,
}

trusted! {
    /// The number of the key, 0 while the statics have key 0.
    static KEY: AtomicU8 = AtomicU8::new(0);
    /// How many threads have acknowledged the grant signal.
    static ACKNOWLEDGED: AtomicUsize = AtomicUsize::new(0);
}

/// The value that a grant signal carries: an address, which nothing else sends.
///
/// The handler of such a signal gives the thread rights to the key. It is one of the signals of faults, because those stay
/// unblocked where domains are called.
pub(crate) fn grant_value() -> usize {
    (&raw const KEY).addr()
}

/// Returns the key of the statics, if they have one of their own.
pub(crate) fn key() -> Option<ProtectionKey> {
    ProtectionKey::new(KEY.load(Ordering::Relaxed)).filter(|key| *key != ProtectionKey::DEFAULT)
}

/// Sets the key.
pub(crate) fn set_key(key: ProtectionKey) {
    KEY.store(key.number(), Ordering::Relaxed);
}

/// Returns whether memory with this key is the program's: untagged, or a static.
pub(crate) fn is_programs(key: ProtectionKey) -> bool {
    key == ProtectionKey::DEFAULT || Some(key) == self::key()
}

/// Adds the rights to statics to a domain's rights.
pub(crate) fn add_rights(rights: KeyRights, globals: Globals) -> KeyRights {
    let access = match globals {
        Globals::Protected => AccessRights::READ_ONLY,
        Globals::Writable => AccessRights::READ_WRITE,
    };
    key().map_or(rights, |key| rights.with(key, access))
}

/// Notes that a thread has rights to the key, on its grant signal. Async-signal-safe.
pub(crate) fn acknowledge() {
    ACKNOWLEDGED.fetch_add(1, Ordering::Release);
}

/// Returns how many threads have acknowledged the grant signal.
pub(crate) fn acknowledged() -> usize {
    ACKNOWLEDGED.load(Ordering::Acquire)
}
