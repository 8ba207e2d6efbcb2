//! What a process needs once before its first domain.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::fork;
use crate::capability::{self, Capability, SignalFrame};
use crate::fork_lock::ForkLock;
use crate::interpose::{self, malloc};
use crate::memory::tls;
use crate::trusted::trusted;
use crate::{Error, keys, rights, signal, sys, thread};

trusted! {
    static IS_READY: OnceLock<()> = OnceLock::new();
    static MAKING_READY: ForkLock = ForkLock::new();
    /// Whether the fork handlers are registered already, by an attempt that failed later.
    static HAS_FORK_HANDLERS: AtomicBool = AtomicBool::new(false);
}

/// Makes the process ready for domains, the first time that this succeeds.
///
/// # Errors
///
/// What the machine, the kernel or the program lacks.
pub(crate) fn make_ready() -> Result<(), Error> {
    if IS_READY.get().is_some() {
        return Ok(());
    }
    let _guard = MAKING_READY.lock();
    if IS_READY.get().is_none() {
        set_up()?;
        rights::set_ready();
        IS_READY.get_or_init(|| ());
    }
    Ok(())
}

fn set_up() -> Result<(), Error> {
    let Capability { pkru_offset, signal_frame } = capability::detect()?;
    if !tls::is_as_expected() {
        return Err(Error::NoFsgsbase);
    }
    if !malloc::is_routed() {
        return Err(Error::MallocNotRouted);
    }
    interpose::find_all();
    sys::prepare_unwinding();
    // Before the first lock is taken that these handlers hold.
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
    // A failure here repeats each time. The signals taken over so far stay taken over.
    sys::start_a_thread().map_err(Error::system("start a thread")).map_err(undo)?;
    signal::install(pkru_offset).map_err(undo)?;
    install_panic_hook();
    signal_stack_key.into_iter().for_each(thread::set_signal_stack_key);
    Ok(())
}

/// Installs a panic hook that ends the call of a domain with the panic's message, and outside domains calls the hook
/// that was there before.
fn install_panic_hook() {
    // A thread that panics, as in a destructor, cannot replace the hook. Panics in domains have no message then.
    if std::thread::panicking() {
        return;
    }
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if crate::memory::locals::says_in_domain() {
            crate::inside::panic::end_call(panic);
        }
        previous(panic);
    }));
}
