//! What isolates domains: protection keys.
//!
//! A further backend, such as worker processes, is a second `pkru::domain::Platform` beside [`pku`], with the same
//! [`Trap`](crate::signal::trap::Trap) and the same view of its memory.

pub(crate) mod pku;
