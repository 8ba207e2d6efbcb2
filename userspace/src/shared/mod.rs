//! Memory with a protection key of its own: regions that domains share, and vaults that none can read.

pub(crate) mod region;
pub(crate) mod vault;
