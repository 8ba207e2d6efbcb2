//! Opening the statics of the whole program to domains that ask for it.
//!
//! The writable data of the program and of the libraries that are loaded gets a key of its own: the program goes on
//! with all rights to it, domains may read it as before, and those built with [`Globals::Writable`] may write it.
//! Rights are each thread's own, and one that had none to this key could not touch a static any more. So each thread is
//! first sent a signal whose handler gives it the rights; the threads that it starts inherit them. One that was missed
//! gets them when it faults.

use std::ffi::c_int;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pkru::{AccessRights, KeyRights, ProtectionKey};

use crate::keys::Keys;
use crate::monitor::{self, monitored};
use crate::thread::Thread;
use crate::turn::Turn;
use crate::{Error, keys, library, sys, thread};

/// What a domain may do with the statics of the program and its libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Globals {
    /// Read them. C code that writes one has a violation.
    #[default]
    Protected,
    /// Read and write them.
    ///
    /// For C code that keeps state in statics all over the program, such as the C library's `rand` and `localtime_r`.
    /// This is the level of protection of SDRaD: a mistake in the domain can corrupt the statics of every library, the
    /// C library included, and is not undone when the domain is discarded. Worse, what the C library allocates in the
    /// domain and keeps in a static (a `FILE`, its buffer, `environ` after `setenv`, the time zone's data) lies on the
    /// domain's heap: once that is discarded or dropped the program must not use it any more, so keep the domain, or
    /// have the program use such things first; and what the program has allocated there the domain cannot free. A lock
    /// that code in the domain holds when its call ends in a violation stays locked for the program. The program's
    /// heap, stacks and thread-locals stay closed, and so do libraries that are loaded later, and what this crate
    /// relies on. The first such domain gives the statics a protection key of their own, for good.
    Writable,
}

monitored! {
    /// The number of the key that the statics have, 0 while they have none of their own.
    static KEY: AtomicU8 = AtomicU8::new(0);
    /// How many threads have followed the invitation.
    static FOLLOWED: AtomicUsize = AtomicUsize::new(0);
    static IS_OPEN: AtomicBool = AtomicBool::new(false);
    static OPENING: Turn = Turn::new();
}

/// The signal by which threads are told; it is one that is not blocked where domains are called.
pub(crate) const INVITATION: c_int = libc::SIGFPE;

/// The value that comes with the signal: nothing else has this address to give.
pub(crate) fn invitation_value() -> usize {
    open as *const () as usize
}

/// Returns the key that the statics have, if it is one of their own.
pub(crate) fn key() -> Option<ProtectionKey> {
    ProtectionKey::new(KEY.load(Ordering::Relaxed)).filter(|key| *key != ProtectionKey::DEFAULT)
}

/// Returns whether memory with this key is memory that no domain writes by default: the statics, or what nobody has
/// tagged.
pub(crate) fn is_of_the_program(of: ProtectionKey) -> bool {
    of == ProtectionKey::DEFAULT || Some(of) == key()
}

/// Returns a domain's rights with those to the statics.
pub(crate) fn grant(rights: KeyRights, globals: Globals) -> KeyRights {
    let access = match globals {
        Globals::Protected => AccessRights::READ_ONLY,
        Globals::Writable => AccessRights::READ_WRITE,
    };
    key().map_or(rights, |key| rights.with(key, access))
}

/// Notes that a thread has followed the invitation.
pub(crate) fn follow() {
    FOLLOWED.fetch_add(1, Ordering::Release);
}

/// Gives the statics a key of their own, if they have none yet.
pub(crate) fn open(thread: &Thread) -> Result<(), Error> {
    if !IS_OPEN.load(Ordering::Acquire) && Keys::lock().are_pinned_by(thread) {
        // Another thread may be about it, and wait for this one's key.
        let operation = "open the program's statics for the first time in the middle of a domain's call";
        return Err(Error::System { operation, errno: libc::EDEADLK });
    }
    let _alone = OPENING.take();
    if IS_OPEN.load(Ordering::Acquire) {
        return Ok(());
    }
    // After a failure the key stays for another try; threads have rights to it already.
    let key = match key() {
        Some(key) => key,
        None => keys::take_for_good()?,
    };
    KEY.store(key.number(), Ordering::Relaxed);
    thread::open(key);
    // The buffers that they allocate at first use shall not lie on a domain's heap.
    drop((std::io::stdout().lock(), std::io::stderr().lock()));
    invite_all()?;
    // Domains learn of the key when they are next given one.
    keys::while_none_has_a_key(thread, || {
        for pages in statics() {
            // SAFETY: the pages are writable data of loaded objects, and stay so; every thread has rights to the key.
            unsafe { sys::protect(pages, key) }
                .map_err(Error::system("give the program's statics a key of their own"))?;
        }
        Ok(())
    })?;
    IS_OPEN.store(true, Ordering::Release);
    Ok(())
}

/// Has every thread of the process give itself rights to the key.
fn invite_all() -> Result<(), Error> {
    const LIMIT: Duration = Duration::from_secs(5);
    let operation = "have all threads follow the statics' key: one blocks the signals that faults raise";
    let mut invited = vec![sys::thread_id()];
    loop {
        let threads = sys::threads().map_err(Error::system("list the threads of the process"))?;
        let new: Vec<_> = threads.into_iter().filter(|thread| !invited.contains(thread)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for thread in new {
            invited.push(thread);
            let followed = FOLLOWED.load(Ordering::Acquire);
            if !sys::send_value(thread, INVITATION, invitation_value()) {
                // It has ended.
                continue;
            }
            let start = Instant::now();
            while FOLLOWED.load(Ordering::Acquire) == followed && sys::thread_exists(thread) {
                if start.elapsed() > LIMIT {
                    return Err(Error::System { operation, errno: libc::ETIMEDOUT });
                }
                std::thread::yield_now();
            }
        }
    }
}

/// Returns the pages of all statics, but for this crate's own and those that a domain has.
fn statics() -> Vec<Range<usize>> {
    let mut pages: Vec<_> = sys::libraries().iter().flat_map(sys::Library::writable_pages).collect();
    for kept in monitor::pages().into_iter().chain(library::taken()) {
        pages = pages.into_iter().flat_map(|range| without(&range, &kept)).collect();
    }
    pages
}

/// Returns what is left of a range without another.
fn without(range: &Range<usize>, other: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let before = range.start..other.start.clamp(range.start, range.end);
    let after = other.end.clamp(range.start, range.end)..range.end;
    [before, after].into_iter().filter(|range| !range.is_empty())
}

#[cfg(test)]
mod tests {
    use super::without;

    #[test]
    fn ranges_without_others() {
        for (other, expected) in [
            (12..15, vec![(10, 12), (15, 20)]),
            (10..20, vec![]),
            (5..12, vec![(12, 20)]),
            (15..30, vec![(10, 15)]),
            (0..5, vec![(10, 20)]),
            (30..40, vec![(10, 20)]),
        ] {
            let left: Vec<_> = without(&(10..20), &other).map(|range| (range.start, range.end)).collect();
            assert_eq!(left, expected, "without {other:?}");
        }
    }
}
