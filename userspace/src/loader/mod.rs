//! Loaded objects.
//!
//! This folder changes and remembers what the loader has loaded. It knows no threads and no calls.
//!
//! | module | subject |
//! |---|---|
//! | [`bind`] | binding the functions that libraries call |
//! | [`route`] | routing them to this crate where the loader does not |
//! | `elf` | the tables of loaded objects |
//! | [`landmarks`] | addresses at which the C and C++ libraries abort |
//! | [`library_data`] | giving a domain the data of a library |
//! | [`owned`] | the list of data that domains own |

pub(crate) mod bind;
mod elf;
pub(crate) mod landmarks;
pub(crate) mod library_data;
pub(crate) mod owned;
pub(crate) mod route;
