//! Making the process and its threads ready for domains, and keeping them so across forks.

pub(crate) mod fork;
pub(crate) mod globals;
pub(crate) mod process;
pub(crate) mod thread;
