//! The memory of a domain: mappings with guard pages, and thread-locals.

pub(crate) mod locals;
pub(crate) mod mapping;
pub(crate) mod tls;
