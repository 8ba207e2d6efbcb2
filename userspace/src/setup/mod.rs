//! Making the process and its threads ready for domains, and keeping them so across forks.
//!
//! This folder alone knows all modules below it: it connects them.

pub(crate) mod fork;
pub(crate) mod globals;
pub(crate) mod process;
pub(crate) mod thread;
