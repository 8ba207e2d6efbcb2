//! What a process needs once before its first domain.

use std::sync::OnceLock;

use pkru::ProtectionKey;

use crate::capability::{self, Capability, SignalFrame};
use crate::{Error, keys, malloc, signal, tls};

/// The process, ready for domains.
#[derive(Debug)]
pub(crate) struct Process {
    /// The key of the signal stacks, on kernels that write a signal's frame with the domain's rights: every domain may write
    /// them.
    signal_stack_key: Option<ProtectionKey>,
}

impl Process {
    /// Gets the process ready, the first time; afterwards returns what came of that.
    pub(crate) fn get() -> Result<&'static Self, Error> {
        static PROCESS: OnceLock<Result<Process, Error>> = OnceLock::new();
        PROCESS.get_or_init(Self::new).as_ref().map_err(Clone::clone)
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
            SignalFrame::OnWritableStack => Some(keys::allocate()?),
        };
        signal::install(pkru_offset)?;
        Ok(Self { signal_stack_key })
    }

    pub(crate) const fn signal_stack_key(&self) -> Option<ProtectionKey> {
        self.signal_stack_key
    }
}
