//! Giving the statics of the program a key of their own.
//!
//! The key tags the writable data of the executable and of the loaded libraries. The program keeps all rights to it.
//! Domains can read it as before, and those built with [`Globals::Writable`](crate::Globals::Writable) can write it.
//!
//! Each thread has rights of its own, and a thread without rights to the key could use no static. So each thread is
//! first sent the grant signal, whose handler adds the rights. New threads inherit them. A thread that the signal
//! misses gets them when it faults.

#![expect(unsafe_code, reason = "it tags the pages of statics")]

use std::ffi::c_int;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::fork_lock::ForkLock;
use crate::keys::statics;
use crate::loader::owned;
use crate::thread::Thread;
use crate::trusted::{self, trusted};
use crate::{Error, keys, rights, sys};

trusted! {
    static IS_OPEN: AtomicBool = AtomicBool::new(false);
    static OPENING: ForkLock = ForkLock::new();
}

/// Gives the statics a key of their own, if they have none yet.
pub(crate) fn open_statics(thread: &Thread) -> Result<(), Error> {
    if !IS_OPEN.load(Ordering::Acquire) && keys::are_pinned_by(thread.caller()) {
        // Another thread may be opening the statics and wait for this thread's key.
        let operation =
            "make the program's statics writable to a domain for the first time while a call into another domain runs";
        return Err(Error::System { operation, errno: libc::EDEADLK });
    }
    let _guard = OPENING.lock();
    if IS_OPEN.load(Ordering::Acquire) {
        return Ok(());
    }
    // After a failure the key is kept for the next attempt, because threads have rights to it already.
    let key = match statics::key() {
        Some(key) => key,
        None => keys::take_for_good(Some(thread.caller()))?,
    };
    statics::set_key(key);
    rights::allow(key);
    // These allocate buffers at first use. The buffers must not lie on a domain's heap.
    drop((std::io::stdout().lock(), std::io::stderr().lock()));
    grant_to_all_threads()?;
    // A domain gets its rights to the statics when it next gets a key.
    keys::while_no_domain_has_a_key(thread.caller(), || {
        for pages in static_pages() {
            // SAFETY: the pages are writable data of loaded objects and stay writable, and every thread has rights to
            // the key.
            unsafe { sys::protect(pages, sys::Protection::READ_WRITE, key) }
                .map_err(Error::system("tag the program's statics with a protection key"))?;
        }
        Ok(())
    })?;
    let libraries = sys::libraries();
    let library = libraries.iter().find(|library| owned::is_called(library, "libc.so"));
    // The last bytes of a page are no lock.
    let _ = LIBRARY_PAGES
        .set(library.map_or_else(Vec::new, sys::Library::writable_pages).into_iter().map(shorter).collect());
    IS_OPEN.store(true, Ordering::Release);
    Ok(())
}

/// Returns a range without its last word.
fn shorter(range: Range<usize>) -> Range<usize> {
    range.start..range.end.saturating_sub(size_of::<u64>())
}

trusted! {
    /// The pages of the C library's statics, once they are open.
    static LIBRARY_PAGES: OnceLock<Vec<Range<usize>>> = OnceLock::new();
}

/// Unlocks the C library's standard streams that a domain held when its call ended. `owner` is its thread pointer, which
/// the library notes in a stream's lock. Otherwise the program would wait for ever at its next use of the stream, or
/// when it exits.
///
/// # References
///
/// glibc 2.36, `sysdeps/nptl/stdio-lock.h`.
pub(crate) fn unlock_streams(owner: u64) {
    #[repr(C)]
    struct Lock {
        /// 1 if a thread has it, 2 if others wait.
        word: AtomicU32,
        /// How many times its owner has it.
        count: AtomicU32,
        owner: AtomicU64,
    }
    let pages = LIBRARY_PAGES.get().into_iter().flatten();
    for address in pages.flat_map(|pages| pages.clone().step_by(align_of::<Lock>())) {
        // SAFETY: the library's statics are mapped, this thread has rights to them, and other threads use locks by atomics.
        let lock = unsafe { &*(address as *const Lock) };
        let is_held = || matches!(lock.word.load(Ordering::Relaxed), 1 | 2) && lock.count.load(Ordering::Relaxed) != 0;
        if lock.owner.load(Ordering::Relaxed) == owner && is_held() {
            lock.count.store(0, Ordering::Relaxed);
            lock.owner.store(0, Ordering::Relaxed);
            if lock.word.swap(0, Ordering::Release) == 2 {
                sys::wake(&lock.word);
            }
        }
    }
}

/// The signals that may carry the grant, the best first: those of faults. std handles the last two, and does not ask that
/// system calls are restarted.
const GRANT_SIGNALS: [c_int; 6] =
    [libc::SIGFPE, libc::SIGTRAP, libc::SIGILL, libc::SIGABRT, libc::SIGBUS, libc::SIGSEGV];

/// Sends every thread of the process the grant signal.
fn grant_to_all_threads() -> Result<(), Error> {
    const LIMIT: Duration = Duration::from_secs(5);
    let operation =
        "give every thread rights to the statics' key, because a thread blocks the signals of faults or waits for them";
    let mut signalled = vec![sys::thread_id()];
    loop {
        let threads = sys::threads().map_err(Error::system("list the threads of the process"))?;
        let new: Vec<_> = threads.into_iter().filter(|thread| !signalled.contains(thread)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for thread in new {
            signalled.push(thread);
            let Some(closed) = sys::closed_signals(thread) else { continue };
            let Some(signal) = GRANT_SIGNALS.into_iter().find(|signal| closed & 1 << (signal - 1) == 0) else {
                return Err(Error::System { operation, errno: libc::EBUSY });
            };
            let acknowledged = statics::acknowledged();
            if !sys::send_value(thread, signal, statics::grant_value()) {
                // The thread has ended.
                continue;
            }
            let start = Instant::now();
            while statics::acknowledged() == acknowledged && sys::thread_exists(thread) {
                if start.elapsed() > LIMIT {
                    return Err(Error::System { operation, errno: libc::ETIMEDOUT });
                }
                std::thread::yield_now();
            }
        }
    }
}

/// Returns the pages of all statics except this crate's trusted statics and those that a domain owns.
fn static_pages() -> Vec<Range<usize>> {
    let mut pages: Vec<_> = sys::libraries().iter().flat_map(sys::Library::writable_pages).collect();
    for kept in trusted::pages().into_iter().chain(owned::pages()) {
        pages = pages.into_iter().flat_map(|range| without(&range, &kept)).collect();
    }
    pages
}

/// Returns the parts of a range that another does not cover.
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
