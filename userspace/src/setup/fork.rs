//! Fork handlers, so that domains work in the child.

#![expect(unsafe_code, reason = "it keeps guards from before a fork to after it")]

use std::cell::UnsafeCell;
use std::sync::MutexGuard;

use crate::loader::owned;
use crate::signal::{actions, stacks};
use crate::trusted::trusted;
use crate::violation::symbol_tables::{self, SymbolTables};
use crate::{keys, rights, sys, thread};

/// The locks that are held across a fork. If another thread held one, the child would never get it, and what it
/// protects could be half changed.
struct Held {
    _owned: MutexGuard<'static, owned::OwnedData>,
    _symbols: MutexGuard<'static, SymbolTables>,
    _loader: MutexGuard<'static, ()>,
    // Dropped last, because it keeps signals blocked.
    keys: keys::Locked,
}

/// Not a thread-local, because a program can fork in a destructor of thread-locals.
struct Place(UnsafeCell<Option<Held>>);

// SAFETY: only the thread that holds the key table's lock uses it.
unsafe impl Sync for Place {}

trusted! { static HELD: Place = Place(UnsafeCell::new(None)); }

/// Runs before a fork.
///
/// Functions of the C library that fork internally call it in a domain too. It then does nothing.
pub(super) extern "C" fn before() {
    if rights::is_in_domain() {
        return;
    }
    let keys = keys::lock();
    let held = Held { _owned: owned::lock(), _symbols: symbol_tables::lock(), _loader: sys::lock_loader(), keys };
    actions::lock();
    sys::begin_fork();
    // SAFETY: this thread holds the key table's lock.
    unsafe { *HELD.0.0.get() = Some(held) };
}

/// Runs after a fork, in the parent.
pub(super) extern "C" fn after_in_parent() {
    if rights::is_in_domain() {
        return;
    }
    // SAFETY: this thread has held the key table's lock since `before`.
    let held = unsafe { (*HELD.0.0.get()).take() };
    after(held);
}

/// Runs after a fork, in the child.
pub(super) extern "C" fn after_in_child() {
    if rights::is_in_domain() {
        return;
    }
    stacks::after_fork();
    let thread = thread::current();
    if let Some(thread) = thread {
        thread.after_fork();
    }
    // SAFETY: the child's only thread is a copy of the one that has held the key table's lock since `before`.
    let mut held = unsafe { (*HELD.0.0.get()).take() };
    if let Some(held) = &mut held {
        held.keys.after_fork(thread.map(thread::Thread::caller));
    }
    after(held);
}

fn after(held: Option<Held>) {
    sys::end_fork();
    actions::unlock();
    drop(held);
}
