//! The memory of a domain: mappings with guard pages, and thread-locals.
//!
//! This folder lays memory out. It knows no calls, and reads nothing that a domain has written.

pub(crate) mod layout;
pub(crate) mod locals;
pub(crate) mod mapping;
pub(crate) mod tls;
