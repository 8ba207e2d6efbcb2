//! The memory of a domain: mappings with guard pages, and thread-locals.
//!
//! This folder lays memory out. It knows no calls, and what a domain writes there is of no account to it.

pub(crate) mod locals;
pub(crate) mod mapping;
pub(crate) mod tls;
