//! The two registers that hold access rights: [`Pkru`] for user pages, [`Pkrs`] for supervisor pages.
//!
//! Both registers hold a [`KeyRights`](crate::KeyRights). A value of either type proves that the register is usable:
//! `detect` returns one only if the CPU has the register.

mod pkrs;
mod pkru;

pub use pkrs::Pkrs;
pub use pkru::Pkru;
