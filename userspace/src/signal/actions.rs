//! What the program wants to happen on each signal.
//!
//! The kernel calls this crate for every signal that has a handler, on this crate's signal stack. This table keeps what
//! the program asked for; the functions that replace sigaction(2) and its like write it.

#![expect(unsafe_code, reason = "it installs signal handlers")]

use std::ffi::c_int;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

use crate::sys::{self, Action, BlockedSignals, FAULTS, is_forking};
use crate::trusted::trusted;

const SIGNALS: usize = 65;

/// One signal's action: read in handlers while another thread may be writing it.
struct Cell {
    /// Odd while it is written.
    version: AtomicUsize,
    handler: AtomicUsize,
    flags: AtomicU64,
    mask: AtomicU64,
}

struct Table {
    cells: [Cell; SIGNALS],
    writing: AtomicBool,
    /// The address of the handler that the kernel calls.
    entry: AtomicUsize,
    is_in_force: AtomicBool,
}

trusted! {
    static TABLE: Table = Table {
        cells: [const {
            Cell {
                version: AtomicUsize::new(0),
                handler: AtomicUsize::new(libc::SIG_DFL),
                flags: AtomicU64::new(0),
                mask: AtomicU64::new(0),
            }
        }; SIGNALS],
        writing: AtomicBool::new(false),
        entry: AtomicUsize::new(0),
        is_in_force: AtomicBool::new(false),
    };
}

/// Runs a function with the table locked and every signal blocked: a handler on this thread would wait for the lock for
/// ever.
fn alone<R>(function: impl FnOnce() -> R) -> R {
    if is_forking() {
        // In a fork handler of the program's this thread holds the lock.
        return function();
    }
    let _blocked = BlockedSignals::new();
    lock();
    let result = function();
    unlock();
    result
}

/// Locks the table. Every signal is blocked by the caller.
pub(crate) fn lock() {
    while TABLE.writing.swap(true, Ordering::Acquire) {
        std::hint::spin_loop();
    }
}

/// Unlocks it.
pub(crate) fn unlock() {
    TABLE.writing.store(false, Ordering::Release);
}

fn write(signal: c_int, action: Action) {
    let cell = &TABLE.cells[signal as usize];
    cell.version.fetch_add(1, Ordering::Relaxed);
    fence(Ordering::Release);
    cell.handler.store(action.handler, Ordering::Relaxed);
    cell.flags.store(action.flags, Ordering::Relaxed);
    cell.mask.store(action.mask, Ordering::Relaxed);
    cell.version.fetch_add(1, Ordering::Release);
}

/// Returns what the program wants to happen on a signal; async-signal-safe.
pub(super) fn get(signal: c_int) -> Action {
    let cell = &TABLE.cells[signal as usize];
    loop {
        let version = cell.version.load(Ordering::Acquire);
        let action = Action::new(
            cell.handler.load(Ordering::Relaxed),
            cell.flags.load(Ordering::Relaxed),
            cell.mask.load(Ordering::Relaxed),
        );
        fence(Ordering::Acquire);
        if version.is_multiple_of(2) && cell.version.load(Ordering::Relaxed) == version {
            return action;
        }
        std::hint::spin_loop();
    }
}

/// Returns whether a signal is one whose action this crate keeps: a real one, that can have a handler, and not the one
/// by which the C library cancels threads, whose handler unwinds the stack on which it is called.
pub(crate) const fn is_kept(signal: c_int) -> bool {
    /// `SIGCANCEL` (glibc 2.36, `sysdeps/unix/sysv/linux/internal-signals.h`)
    const CANCEL: c_int = 32;
    signal > 0 && (signal as usize) < SIGNALS && !matches!(signal, libc::SIGKILL | libc::SIGSTOP | CANCEL)
}

/// Returns whether the table is in force: [`take_over`] was called.
pub(crate) fn is_in_force() -> bool {
    TABLE.is_in_force.load(Ordering::Acquire)
}

/// Takes over the program's handlers. From now on the kernel calls `entry` in their place.
///
/// # Safety
///
/// `entry` is a handler that can be called at any instruction.
pub(super) unsafe fn take_over(entry: usize) -> io::Result<()> {
    TABLE.entry.store(entry, Ordering::Relaxed);
    let result = alone(|| {
        for signal in (1..SIGNALS as c_int).filter(|signal| is_kept(*signal)) {
            let action = sys::action(signal)?;
            if action.handler == entry {
                // An earlier attempt took it over, and failed later or stayed behind in the parent of a fork.
                continue;
            }
            write(signal, action);
            put_in_force(signal, &action)?;
        }
        Ok(())
    });
    TABLE.is_in_force.store(true, Ordering::Release);
    result
}

/// Sets what the program wants to happen on a signal, and returns what it wanted before.
pub(crate) fn replace(signal: c_int, new: Option<Action>) -> io::Result<Action> {
    if !is_kept(signal) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let Some(new) = new else { return Ok(get(signal)) };
    alone(|| {
        let old = get(signal);
        write(signal, new);
        put_in_force(signal, &new).inspect_err(|_| write(signal, old))?;
        Ok(old)
    })
}

/// Back to the default after one delivery; async-signal-safe, with every signal blocked.
pub(super) fn reset(signal: c_int) {
    lock();
    write(signal, Action::DEFAULT);
    // It cannot fail for a signal that has just been delivered.
    let _ = put_in_force(signal, &Action::DEFAULT);
    unlock();
}

/// Sets the kernel's action: this crate's handler if the program has one, or if a fault raises the signal.
fn put_in_force(signal: c_int, action: &Action) -> io::Result<()> {
    const KEPT: c_int = libc::SA_RESTART | libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT;
    let kernels = if action.is_function() || FAULTS.contains(&signal) {
        // Where the program has no handler of its own, it does not expect to have its system calls interrupted.
        let restart = if action.is_function() { 0 } else { libc::SA_RESTART as u64 };
        let flags = action.flags & KEPT as u64 | restart | (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64;
        Action::new(TABLE.entry.load(Ordering::Relaxed), flags, u64::MAX)
    } else {
        *action
    };
    // SAFETY: the entry can be called at any instruction; what the program wants is its own business.
    unsafe { sys::set_action(signal, kernels) }
}
