//! What the program wants to happen on each signal.
//!
//! The kernel calls this crate for every signal that has a handler, on this crate's signal stack; what the program
//! asked for stands here. See [`crate::interpose::signals`] for how it gets here.

use std::ffi::c_int;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

use super::{FAULTS, entry};
use crate::fork;
use crate::monitor::monitored;
use crate::sys::{self, Action, BlockedSignals};

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
    is_in_force: AtomicBool,
}

monitored! {
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
        is_in_force: AtomicBool::new(false),
    };
}

/// Runs with the table to itself, and every signal blocked, for a handler on this thread would wait for it in vain.
fn alone<R>(function: impl FnOnce() -> R) -> R {
    if fork::is_here() {
        // In another handler of forks. The lock is this thread's.
        return function();
    }
    let _blocked = BlockedSignals::new();
    lock();
    let result = function();
    unlock();
    result
}

/// Lets nobody else write the table; every signal is blocked.
pub(crate) fn lock() {
    while TABLE.writing.swap(true, Ordering::Acquire) {
        std::hint::spin_loop();
    }
}

/// Ends that.
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

/// Returns whether the table is in force: [`adopt`] was called.
pub(crate) fn is_in_force() -> bool {
    TABLE.is_in_force.load(Ordering::Acquire)
}

/// Takes over the handlers that there are.
pub(super) fn adopt() -> io::Result<()> {
    let result = alone(|| {
        for signal in (1..SIGNALS as c_int).filter(|signal| is_kept(*signal)) {
            let action = sys::action(signal)?;
            if action.handler == entry as *const () as usize {
                // Of an attempt that did not end: it failed, or a fork left it to the parent.
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

/// Tells the kernel: to call this crate if there is a handler, or if the signal is one that a fault raises.
fn put_in_force(signal: c_int, action: &Action) -> io::Result<()> {
    const KEPT: c_int = libc::SA_RESTART | libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT;
    let kernels = if action.is_function() || FAULTS.contains(&signal) {
        // Where the program has no handler of its own, it does not expect to have its system calls interrupted.
        let restart = if action.is_function() { 0 } else { libc::SA_RESTART as u64 };
        let flags = action.flags & KEPT as u64 | restart | (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64;
        Action::new(entry as *const () as usize, flags, u64::MAX)
    } else {
        *action
    };
    // SAFETY: the entry can be called at any instruction; what the program wants is its own business.
    unsafe { sys::set_action(signal, kernels) }
}
