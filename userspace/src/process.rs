//! What a process needs once before its first domain.

use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use pkru::ProtectionKey;

use crate::capability::{self, Capability, SignalFrame};
use crate::interpose::{self, malloc};
use crate::monitor::monitored;
use crate::{Error, keys, signal, sys, tls};

monitored! {
    static PROCESS: OnceLock<Process> = OnceLock::new();
    static MAKING: Mutex<()> = Mutex::new(());
    /// A page that is wiped in every copy of the process.
    static MARK: AtomicPtr<AtomicU8> = AtomicPtr::new(std::ptr::null_mut());
}

/// Marks this process as the program's.
fn mark() {
    // SAFETY: the pointer is null, or leads to the page.
    if let Some(mark) = unsafe { MARK.load(Ordering::Relaxed).as_ref() } {
        mark.store(1, Ordering::Relaxed);
    }
}

extern "C" fn after_fork_in_child() {
    mark();
    keys::after_fork_in_child();
}

/// Whether this process is the program's, or a child that the C library has forked for it, and not a copy that code in a domain has made
/// by a system call.
pub(crate) fn is_original() -> bool {
    // SAFETY: as in `mark`.
    unsafe { MARK.load(Ordering::Relaxed).as_ref() }.is_some_and(|mark| mark.load(Ordering::Relaxed) == 1)
}

/// The process, ready for domains.
#[derive(Debug)]
pub(crate) struct Process {
    /// The key of the signal stacks, on kernels that write a signal's frame with the domain's rights: every domain may write
    /// them.
    signal_stack_key: Option<ProtectionKey>,
}

impl Process {
    /// Gets the process ready, the first time that this succeeds.
    pub(crate) fn get() -> Result<&'static Self, Error> {
        if let Some(process) = PROCESS.get() {
            return Ok(process);
        }
        let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        match PROCESS.get() {
            Some(process) => Ok(process),
            None => {
                let process = Self::new()?;
                Ok(PROCESS.get_or_init(|| process))
            }
        }
    }

    fn new() -> Result<Self, Error> {
        let Capability { pkru_offset, signal_frame } = capability::detect()?;
        if !tls::is_as_expected() {
            return Err(Error::NoFsgsbase);
        }
        if !malloc::is_routed() {
            return Err(Error::MallocNotRouted);
        }
        let signal_stack_key = match signal_frame {
            SignalFrame::OnAnyStack => None,
            SignalFrame::OnWritableStack => Some(keys::take()?),
        };
        let undo = |error| {
            signal_stack_key.into_iter().for_each(keys::give_back);
            error
        };
        interpose::find_all();
        sys::prepare_unwinding();
        if MARK.load(Ordering::Relaxed).is_null() {
            let page =
                sys::map_wiped_in_copies().map_err(Error::system("map a page that copies of the process do not get"));
            MARK.store(page.map_err(undo)?.as_ptr().cast(), Ordering::Relaxed);
        }
        mark();
        sys::around_forks(keys::before_fork, keys::after_fork, after_fork_in_child)
            .map_err(Error::system("be told of forks"))
            .map_err(undo)?;
        // This fails for no reason that would be gone another time.
        signal::install(pkru_offset)?;
        signal::panics::install_hook();
        Ok(Self { signal_stack_key })
    }

    pub(crate) const fn signal_stack_key(&self) -> Option<ProtectionKey> {
        self.signal_stack_key
    }
}
