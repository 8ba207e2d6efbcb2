//! What the crate does with loaded objects: it binds their functions, keeps the data that domains own, and finds the
//! places at which the C and C++ libraries abort.

pub(crate) mod bind;
pub(crate) mod landmarks;
pub(crate) mod library_data;
pub(crate) mod owned;
