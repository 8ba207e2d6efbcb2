//! The protection keys of this process, and which domain has which.
//!
//! This folder knows callers and page ranges, and no threads, domains or signals.
//!
//! There are fewer keys than a program may want domains, so a domain has a key only while it needs one. A call *pins*
//! the key of its domain. A key that no call pins can be taken away: the pages of the least recently called domain get
//! the *closed* key, to which no domain has rights, and its key goes to the domain that is called. Keys are allocated
//! when they are first needed and never freed: `pkey_free` does not untag pages, and a key that still tags pages would
//! give its next owner access to them.
//!
//! Pinning is one compare-and-swap on a cache line of the key's own. Only a domain that has lost its key takes a lock.
//!
//! # References
//!
//! pkeys(7); pkey_alloc(2).

#![expect(unsafe_code, reason = "it tags pages; a key that is handed in comes with a contract")]

mod caller;
pub(crate) mod lent;
#[cfg(test)]
mod model;
#[cfg(test)]
mod properties;
mod remains;
mod slots;
pub(crate) mod statics;
mod sync;
mod table;
mod tagged;

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex};

use pkru::ProtectionKey;
use pkru::gate::{Context, Gate};

use crate::memory::layout::Run;
use crate::sys::{self, BlockedSignals, Protection};
use crate::trusted::trusted;
use crate::{Error, rights};
pub(crate) use remains::Unmap;
use slots::{Pin as TablePin, Slot, Slots};
use table::{Keys, Table, Tagger};

pub(crate) use caller::{Caller, SIGNAL_STACK_SIZE};
pub(crate) use tagged::Tagged;

/// Linux, as the key table needs it.
struct Linux;

impl Tagger for Linux {
    type Quiet = BlockedSignals;

    fn quiet(&self) -> BlockedSignals {
        if rights::is_in_domain() {
            // Code in a domain cannot use the table. It faults here, before signals are blocked: with SIGSEGV blocked
            // the kernel would kill the process.
            // The compiler must not remove the store because nothing reads it.
            std::hint::black_box(&TOUCHED).store(1, Ordering::Relaxed);
        }
        BlockedSignals::new()
    }

    fn allocate(&self) -> io::Result<Option<ProtectionKey>> {
        match sys::pkey_alloc() {
            Ok(key) => Ok(Some(key)),
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Ok(None),
            Err(error) => Err(error),
        }
    }

    unsafe fn tag(&self, pages: Range<usize>, protection: Protection, key: ProtectionKey) -> io::Result<()> {
        // SAFETY: the caller answers for the pages.
        unsafe { sys::protect(pages, protection, key) }
    }
}

impl Slots {
    const fn new() -> Self {
        Self {
            slots: [const { Slot { owner: AtomicU64::new(0), used: AtomicU64::new(0), signal_stack: AtomicUsize::new(0) } };
                ProtectionKey::COUNT],
            epoch: AtomicU64::new(1),
            next: AtomicU64::new(1),
        }
    }
}

trusted! {
    static TABLE: Table<Linux> = Table { tagger: Linux, slots: Slots::new(), keys: Mutex::new(Keys::new()) };
    static TOUCHED: AtomicUsize = AtomicUsize::new(0);
}

/// A pinned key: its domain keeps it until this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Pin(TablePin<'static>);

impl Pin {
    pub(crate) fn key(&self) -> ProtectionKey {
        TABLE.pinned_key(&self.0)
    }
}

impl Tagged {
    /// Describes memory that has no key yet: whole pages, which nothing else tags.
    pub(crate) fn new(runs: Box<[Run]>) -> Arc<Self> {
        TABLE.describe(runs)
    }

    /// Returns the key that it has at the moment.
    pub(crate) fn key(&self) -> Option<ProtectionKey> {
        TABLE.key_of(self)
    }

    /// Pins its key for a call on this thread, if it has one.
    #[inline]
    pub(crate) fn pin(&self, caller: Caller) -> Option<Pin> {
        TABLE.pin(self, caller).map(Pin)
    }

    /// Gives it a key and pins that for a call on this thread: the key `want` if there is one. Waits while calls of
    /// other threads pin all keys.
    #[cold]
    pub(crate) fn assign_key(self: &Arc<Self>, caller: Caller, want: Option<ProtectionKey>) -> Result<Pin, Error> {
        TABLE.assign_key(self, caller, want).map(Pin)
    }

    /// Releases its key while `unmap` unmaps it. `unmap` returns whether no page carries the key afterwards; else it is
    /// called again later.
    pub(crate) fn release(&self, unmap: impl Unmap) {
        TABLE.release(self, unmap);
    }

    /// Replaces the pages that it consists of. Those have its key, if it has one.
    pub(crate) fn set_runs(&self, runs: Box<[Run]>) {
        TABLE.set_runs(self, runs);
    }

    /// Tags it again after pages of it were mapped anew.
    pub(crate) fn tag_again(&self) -> io::Result<()> {
        TABLE.tag_again(self)
    }
}

/// Holds the lock on the table, with signals blocked, across a fork.
pub(crate) struct Locked(table::Locked<'static, Linux>);

/// Locks the table.
pub(crate) fn lock() -> Locked {
    Locked(TABLE.lock())
}

impl Locked {
    /// In a forked child, whose thread held this lock in the parent: ends what other threads had begun.
    pub(crate) fn after_fork(&mut self, caller: Option<Caller>) {
        self.0.after_fork(caller);
    }
}

/// Returns whether a call of this thread pins a key.
pub(crate) fn are_pinned_by(caller: Caller) -> bool {
    TABLE.lock().are_pinned_by(caller)
}

/// Removes the pin of a call that never ends: a signal handler has left it by a jump.
pub(crate) fn abandon(key: ProtectionKey) {
    TABLE.abandon(key);
}

/// Runs a function while no domain has a key. Each domain then learns what the function has done to rights when it next
/// gets a key. Waits for calls of other threads to end.
///
/// # Errors
///
/// The function's, and [`Error::InDomain`] if the calling thread is itself within a call.
pub(crate) fn while_no_domain_has_a_key(
    caller: Caller,
    function: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    TABLE.while_no_domain_has_a_key(caller, function)
}

/// Takes a key for memory that is no domain's, until [`give_back`].
pub(crate) fn take(caller: Option<Caller>) -> Result<ProtectionKey, Error> {
    TABLE.take(caller)
}

/// Takes a key as [`take`] does, unless too few would be left for domains.
pub(crate) fn take_for_good(caller: Option<Caller>) -> Result<ProtectionKey, Error> {
    TABLE.take_for_good(caller)
}

/// Gives back a key that [`take`] returned and that tags nothing any more.
pub(crate) fn give_back(key: ProtectionKey) {
    TABLE.give_back(key);
}

/// Gives back a key that [`take`] returned, once `unmap` has unmapped what carries it. `unmap` is called until it returns
/// `true`.
pub(crate) fn give_back_after(key: ProtectionKey, unmap: impl Unmap) {
    TABLE.give_back_after(key, unmap);
}

/// Returns the key of memory that no domain may access.
pub(crate) fn closed(caller: Option<Caller>) -> Result<ProtectionKey, Error> {
    TABLE.closed(caller)
}

/// Finds the call that a signal has interrupted in a domain, by the address of the signal's frame. Async-signal-safe.
///
/// The frame lies on the signal stack of the thread that made the call.
pub(crate) fn running_on(frame: usize) -> Option<NonNull<Context>> {
    ProtectionKey::all().find_map(|key| {
        // The context is read first. A slot keeps the stack of the thread that pinned it last, while another thread may
        // be pinning it. If there is a context, the stack is that of its thread, or of a later one, which is not this.
        let context = Gate::Pkru.running_with(key)?;
        fence(Ordering::Acquire);
        let stack = TABLE.slots.of(key).signal_stack.load(Ordering::Relaxed);
        (stack..stack + SIGNAL_STACK_SIZE).contains(&frame).then_some(context)
    })
}

/// Sets the most protection keys that this crate allocates, for all domains together. The default is 15.
///
/// A program that uses keys itself reserves some for itself this way. Two keys make for any number of domains, three
/// before Linux 6.12: one closes the memory of domains that have none. A domain that is called while others have all keys takes the key of the
/// least recently called one, at the cost of a few system calls. Keys that are allocated already are kept.
///
/// Linux itself takes a key when a program first makes memory executable only (`mprotect` with `PROT_EXEC`). Without a
/// free key that memory is readable, and the program is not told. A limit of 14 keeps one for that.
///
/// # Examples
///
/// ```
/// // Before the first domain, on any machine.
/// pkru_userspace::set_key_limit(8);
/// ```
pub fn set_key_limit(limit: usize) {
    TABLE.set_limit(limit);
}

/// Hands a protection key that the program has allocated over to domains.
///
/// # Safety
///
/// The key is allocated, tags no page, and is not used by the program any more.
pub unsafe fn hand_in_key(key: ProtectionKey) {
    TABLE.hand_in(key);
}
