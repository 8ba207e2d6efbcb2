//! What runs with a domain's rights.
//!
//! Code in this folder takes no lock and writes no static. What it finds in the domain's memory may be spoiled; the
//! worst that follows is a violation. Nothing outside relies on what it says.
//!
//! | module | subject |
//! |---|---|
//! | [`entry`] | the function that a call enters |
//! | [`request`] | asking the caller for something |
//! | [`callback`] | callbacks |
//! | [`service`] | system calls that the caller makes |
//! | [`abort`] | ending the call |
//! | [`exported`] | blocks that results refer to |
//! | [`libc`], [`mappings`], [`descriptors`] | functions of the C library, as they act in a domain |
//! | `panic` | the panic hook |
//!
//! One function writes statics: the panic hook undoes std's writes in a domain that may write statics.
//!
//! Three more pieces run with a domain's rights and live elsewhere: `Transfer::into_wire`, which users implement
//! ([`crate::transfer`]); `pkru`'s heap; and `pkru`'s gate up to the switch of rights.

pub(crate) mod abort;
pub(crate) mod callback;
pub(crate) mod descriptors;
pub(crate) mod entry;
pub(crate) mod exported;
pub(crate) mod libc;
pub(crate) mod mappings;
pub(crate) mod panic;
pub(crate) mod request;
pub(crate) mod service;
