//! What is done around the program's forks, so that domains work in the child.

use std::cell::UnsafeCell;
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::keys::{Keys, Locked};
use crate::monitor::monitored;
use crate::signal::actions;
use crate::{library, sys, thread};

/// What no other thread may be changing at the moment of a fork, for in the child it would never finish.
struct Held {
    _libraries: MutexGuard<'static, library::Taken>,
    _loader: MutexGuard<'static, ()>,
    // Last, for signals are blocked until it is dropped.
    keys: Locked,
}

/// Not a thread-local: a fork in the destructor of one would find it gone.
struct Place(UnsafeCell<Option<Held>>);

// SAFETY: it is used by the thread alone that has the lock on the keys.
unsafe impl Sync for Place {}

monitored! {
    static HELD: Place = Place(UnsafeCell::new(None));
    /// The thread that is forking, as the C library numbers it: the child's has the same number. 0 if none is.
    static FORKING: AtomicUsize = AtomicUsize::new(0);
}

/// Whether the calling thread is in the middle of a fork, as in another handler of forks. It has the table of actions
/// to itself.
pub(crate) fn is_here() -> bool {
    FORKING.load(Ordering::Relaxed) == sys::thread_handle()
}

/// Before a fork.
///
/// Code in a domain can get here too, by functions of the C library's that fork without being asked to. Nothing is made
/// ready for its child.
pub(crate) extern "C" fn before() {
    if thread::is_in_domain() {
        return;
    }
    let keys = Keys::lock();
    let held = Held { _libraries: library::lock(), _loader: sys::lock_loader(), keys };
    actions::lock();
    FORKING.store(sys::thread_handle(), Ordering::Relaxed);
    // SAFETY: this thread has just got the lock on the keys.
    unsafe { *HELD.0.0.get() = Some(held) };
}

/// After a fork, in the parent.
pub(crate) extern "C" fn after_in_parent() {
    if thread::is_in_domain() {
        return;
    }
    // SAFETY: this thread has had the lock on the keys since `before`.
    let held = unsafe { (*HELD.0.0.get()).take() };
    after(held);
}

/// After a fork, in the child.
pub(crate) extern "C" fn after_in_child() {
    if thread::is_in_domain() {
        return;
    }
    let thread = thread::current();
    if let Some(thread) = thread {
        thread.adopt();
    }
    // SAFETY: as in the parent, of which this is a copy.
    let mut held = unsafe { (*HELD.0.0.get()).take() };
    if let Some(held) = &mut held {
        held.keys.adopt(thread);
    }
    after(held);
}

fn after(held: Option<Held>) {
    FORKING.store(0, Ordering::Relaxed);
    actions::unlock();
    drop(held);
}
