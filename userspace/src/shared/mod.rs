//! Memory with a protection key of its own: regions that domains share, and vaults that none can read.
//!
//! Code in a domain that calls these functions gets no rights by them.

pub(crate) mod region;
pub(crate) mod vault;
