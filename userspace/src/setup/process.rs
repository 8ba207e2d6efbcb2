//! Making the process ready for domains, once, before the first one.

use std::sync::atomic::{AtomicBool, Ordering};

use super::fork;
use crate::capability::{self, Capability, SignalFrame};
use crate::fork_lock::ForkLock;
use crate::interpose::{self, malloc};
use crate::loader::route;
use crate::memory::tls;
use crate::trusted::trusted;
use crate::{Error, keys, rights, signal, sys, thread};

trusted! {
    static MAKING_READY: ForkLock = ForkLock::new();
    /// Whether the fork handlers are registered. An attempt that fails later leaves them registered.
    static HAS_FORK_HANDLERS: AtomicBool = AtomicBool::new(false);
    static HAS_PANIC_HOOK: AtomicBool = AtomicBool::new(false);
}

/// Returns whether panics in domains are reported with their message.
pub(crate) fn has_panic_hook() -> bool {
    HAS_PANIC_HOOK.load(Ordering::Relaxed)
}

/// Makes the process ready for domains. Does nothing if it is ready already.
///
/// # Errors
///
/// The errors of [`capability::detect`], [`Error::MallocNotRouted`], [`Error::KeysExhausted`], or [`Error::System`].
pub(crate) fn make_ready() -> Result<(), Error> {
    if rights::is_ready() && HAS_PANIC_HOOK.load(Ordering::Relaxed) {
        return Ok(());
    }
    let _guard = MAKING_READY.lock();
    if !rights::is_ready() {
        set_up()?;
        rights::set_ready();
    }
    install_panic_hook();
    Ok(())
}

fn set_up() -> Result<(), Error> {
    let Capability { pkru_offset, signal_frame } = capability::detect()?;
    if !tls::is_as_expected() {
        return Err(Error::NoFsgsbase);
    }
    if !malloc::is_routed() {
        let _quiet = sys::BlockedSignals::new();
        route::begin(&interpose::names())?;
    }
    interpose::find_all();
    sys::prepare_unwinding();
    // Before anything takes a lock that these handlers hold across a fork.
    if !HAS_FORK_HANDLERS.load(Ordering::Relaxed) {
        sys::around_forks(fork::before, fork::after_in_parent, fork::after_in_child)
            .map_err(Error::system("register fork handlers"))?;
        HAS_FORK_HANDLERS.store(true, Ordering::Relaxed);
    }
    let signal_stack_key = match signal_frame {
        SignalFrame::OnAnyStack => None,
        SignalFrame::OnWritableStack => Some(keys::take(thread::current_caller())?),
    };
    let undo = |error| {
        signal_stack_key.into_iter().for_each(keys::give_back);
        error
    };
    // The next attempt repeats what fails here. Signals that were taken over stay taken over. The thread makes glibc
    // install its handler of SIGSETXID, so that this crate takes that handler over too.
    sys::start_a_thread().map_err(Error::system("start a thread")).map_err(undo)?;
    signal::install(pkru_offset).map_err(undo)?;
    signal_stack_key.into_iter().for_each(thread::set_signal_stack_key);
    Ok(())
}

/// Installs a panic hook. In a domain it ends the call with the panic's message, and outside domains it calls the
/// previous hook.
fn install_panic_hook() {
    // A panicking thread, for example in a destructor, cannot replace the hook. Until another does, panics in domains have
    // no message.
    if HAS_PANIC_HOOK.load(Ordering::Relaxed) || std::thread::panicking() {
        return;
    }
    HAS_PANIC_HOOK.store(true, Ordering::Relaxed);
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if crate::memory::locals::says_in_domain() {
            crate::inside::panic::end_call(panic);
        }
        previous(panic);
    }));
}
