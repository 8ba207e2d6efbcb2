//! The limits of a domain.

use std::time::Duration;

/// What a domain does beyond the default.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limits {
    pub(super) transient: bool,
    pub(super) deadline: Option<Duration>,
    pub(super) retire_after: Option<u32>,
}

impl Limits {
    pub(super) const fn are_set(self) -> bool {
        self.transient || self.deadline.is_some() || self.retire_after.is_some()
    }
}
