//! The program's signal actions.
//!
//! For every signal that has a handler, the kernel calls this crate's handler on this crate's signal stack. This table
//! holds the program's actions. The functions that replace sigaction(2) and its variants write it.

#![expect(unsafe_code, reason = "it installs signal handlers")]

use std::ffi::c_int;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

use crate::sys::{self, Action, BlockedSignals, is_forking};
use crate::trusted::trusted;

const SIGNALS: usize = 65;

/// The action of one signal. Handlers read it while another thread may write it.
struct Cell {
    /// Odd while a thread writes the cell.
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

trusted! {
    /// The first handler of SIGSEGV that the program had, 0 if there was none.
    static FIRST_HANDLER: AtomicUsize = AtomicUsize::new(0);
}

/// Notes an action that the program sets.
pub(crate) fn note(signal: c_int, action: &Action) {
    if signal == libc::SIGSEGV && action.is_function() {
        let _ = FIRST_HANDLER.compare_exchange(0, action.handler, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Returns the first handler of SIGSEGV that the program had, 0 if there was none; async-signal-safe.
///
/// std installs one before `main`. It ends the program at a fault in the guard page of a thread's stack.
pub(super) fn first_handler() -> usize {
    FIRST_HANDLER.load(Ordering::Relaxed)
}

/// Runs a function with the table locked and every signal blocked. A handler on this thread would wait forever for the
/// lock.
fn alone<R>(function: impl FnOnce() -> R) -> R {
    if is_forking() {
        // In a fork handler this thread holds the lock already.
        return function();
    }
    let _blocked = BlockedSignals::new();
    lock();
    let result = function();
    unlock();
    result
}

/// Locks the table. The caller blocks every signal.
pub(crate) fn lock() {
    while TABLE.writing.swap(true, Ordering::Acquire) {
        std::hint::spin_loop();
    }
}

/// Unlocks the table.
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

/// Returns the program's action for a signal; async-signal-safe.
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

/// Returns whether this crate takes over the handler of a signal.
///
/// It does for every signal that can have a handler, except SIGCANCEL. The C library's handler of SIGCANCEL unwinds the
/// stack that it is called on.
pub(crate) const fn is_kept(signal: c_int) -> bool {
    /// `SIGCANCEL` (glibc 2.36, `sysdeps/unix/sysv/linux/internal-signals.h`)
    const CANCEL: c_int = 32;
    signal > 0 && (signal as usize) < SIGNALS && !matches!(signal, libc::SIGKILL | libc::SIGSTOP | CANCEL)
}

/// Returns whether the table is in use, because [`take_over`] was called.
pub(crate) fn is_in_force() -> bool {
    TABLE.is_in_force.load(Ordering::Acquire)
}

/// Takes over the program's handlers. The kernel then calls `entry` instead.
///
/// # Safety
///
/// `entry` may be called at any instruction.
pub(super) unsafe fn take_over(entry: usize) -> io::Result<()> {
    TABLE.entry.store(entry, Ordering::Relaxed);
    alone(|| {
        let kept = || (1..SIGNALS as c_int).filter(|signal| is_kept(*signal));
        // All are noted before the first changes: if one fails later, the table still tells what the program wants.
        for signal in kept() {
            let action = sys::action(signal)?;
            // An earlier attempt may have taken it over, and failed later or been left to the parent of a fork.
            if action.handler != entry {
                write(signal, action);
                note(signal, &action);
            }
        }
        TABLE.is_in_force.store(true, Ordering::Release);
        kept().try_for_each(|signal| put_in_force(signal, &get(signal)))
    })
}

/// Sets the program's action for a signal if `new` is given. Returns the old one.
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

/// Resets the program's action for a signal to the default; async-signal-safe. The caller blocks every signal.
pub(super) fn reset(signal: c_int) {
    set(signal, Action::DEFAULT);
}

/// Sets the program's action for a signal; async-signal-safe. The caller blocks every signal.
pub(super) fn set(signal: c_int, action: Action) {
    lock();
    write(signal, action);
    // It cannot fail for a signal that has just been delivered.
    let _ = put_in_force(signal, &action);
    unlock();
}

/// Returns whether the program leaves it to the kernel what a signal does; async-signal-safe.
pub(crate) fn is_default(signal: c_int) -> bool {
    get(signal).handler == libc::SIG_DFL
}

/// Sets the kernel's action for a signal. It is this crate's handler if the program has a handler, or if the signal is
/// about what the running code did: a fault, or a limit that would end the process.
fn put_in_force(signal: c_int, action: &Action) -> io::Result<()> {
    const KEPT: c_int = libc::SA_RESTART | libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT;
    let is_about_code = sys::is_fault(signal) || (sys::is_limit(signal) && action.handler == libc::SIG_DFL);
    let kernels = if action.is_function() || is_about_code {
        // If the program has no handler, its system calls must not fail with EINTR.
        let restart = if action.is_function() { 0 } else { libc::SA_RESTART as u64 };
        let flags = action.flags & KEPT as u64 | restart | (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64;
        Action::new(TABLE.entry.load(Ordering::Relaxed), flags, u64::MAX)
    } else {
        *action
    };
    // SAFETY: the entry may be called at any instruction, and the program's action is the default or to ignore the
    // signal.
    unsafe { sys::set_action(signal, kernels) }
}
