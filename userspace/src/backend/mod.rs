//! The mechanism that isolates domains: protection keys.
//!
//! Another mechanism, such as worker processes, would be a second implementation of `pkru::domain::Platform` beside
//! [`pku`], with the same [`Trap`](crate::signal::trap::Trap).

mod mappings;
pub(crate) mod pku;
