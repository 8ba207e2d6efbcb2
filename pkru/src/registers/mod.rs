//! The two registers that hold access rights: [`Pkru`] for user pages, [`Pkrs`] for supervisor pages.
//!
//! Both hold a [`KeyRights`](crate::KeyRights). A value of either type proves that the register can be used, because it
//! is had only where the CPU was seen to offer it.

mod pkrs;
mod pkru;

pub use pkrs::Pkrs;
pub use pkru::Pkru;
