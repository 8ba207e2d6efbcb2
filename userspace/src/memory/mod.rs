//! The memory of a domain: mappings between guard pages, and thread-locals in them.

pub(crate) mod locals;
pub(crate) mod mapping;
pub(crate) mod tls;
