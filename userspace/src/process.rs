//! What a process needs once before its first domain.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use pkru::ProtectionKey;

use crate::capability::{self, Capability, SignalFrame};
use crate::interpose::{self, malloc};
use crate::monitor::monitored;
use crate::turn::Turn;
use crate::{Error, fork, keys, signal, sys, tls};

monitored! {
    static PROCESS: OnceLock<Process> = OnceLock::new();
    static MAKING: Turn = Turn::new();
    /// Whether forks are noticed already, since an attempt that failed later.
    static NOTICES_FORKS: AtomicBool = AtomicBool::new(false);
}

/// The process, ready for domains.
#[derive(Debug)]
pub(crate) struct Process {
    /// The key of the signal stacks, on kernels that write a signal's frame with the domain's rights: every domain may
    /// write them.
    signal_stack_key: Option<ProtectionKey>,
}

impl Process {
    /// Whether it is ready.
    pub(crate) fn is_ready() -> bool {
        PROCESS.get().is_some()
    }

    /// Gets the process ready, the first time that this succeeds.
    pub(crate) fn get() -> Result<&'static Self, Error> {
        if let Some(process) = PROCESS.get() {
            return Ok(process);
        }
        let _alone = MAKING.take();
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
        interpose::find_all();
        sys::prepare_unwinding();
        // Before the first lock is taken that these handlers hold.
        if !NOTICES_FORKS.load(Ordering::Relaxed) {
            sys::around_forks(fork::before, fork::after_in_parent, fork::after_in_child)
                .map_err(Error::system("be told of forks"))?;
            NOTICES_FORKS.store(true, Ordering::Relaxed);
        }
        let signal_stack_key = match signal_frame {
            SignalFrame::OnAnyStack => None,
            SignalFrame::OnWritableStack => Some(keys::take()?),
        };
        let undo = |error| {
            signal_stack_key.into_iter().for_each(keys::give_back);
            error
        };
        // If this fails once it fails each time; the signals taken over so far stay so.
        sys::start_a_thread().map_err(Error::system("start a thread")).map_err(undo)?;
        signal::install(pkru_offset).map_err(undo)?;
        signal::panics::install_hook();
        Ok(Self { signal_stack_key })
    }

    pub(crate) const fn signal_stack_key(&self) -> Option<ProtectionKey> {
        self.signal_stack_key
    }
}
