//! The mechanism that isolates domains: protection keys.
//!
//! Another mechanism, such as worker processes, would be a second implementation of `pkru::domain::Platform` beside
//! [`pku`], with the same [`Trap`](crate::signal::trap::Trap).

pub(crate) mod pku;
