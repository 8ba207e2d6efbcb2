//! Which protection keys are free.

use core::fmt;

use crate::{KeySet, ProtectionKey};

/// A set of protection keys to hand out and take back.
///
/// Only bookkeeping: whoever frees a key has untagged its pages before, for a key that still tags pages would give its
/// next owner access to them.
///
/// # Examples
///
/// ```
/// use pkru::ProtectionKey;
/// use pkru::allocator::{KeyAllocator, KeyError};
///
/// let mut keys = KeyAllocator::new();
/// let first = keys.allocate()?;
/// assert_ne!(first, ProtectionKey::DEFAULT);
/// keys.free(first)?;
/// assert_eq!(keys.free(first), Err(KeyError::NotAllocated { key: first }));
/// # Ok::<(), KeyError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyAllocator {
    /// The keys that are free. Invariant: without key 0.
    free: KeySet,
    /// The keys that this allocator hands out, free or not.
    usable: KeySet,
}

impl KeyAllocator {
    /// Creates an allocator of keys 1 to 15. Key 0 tags everything else and is never handed out.
    #[must_use]
    pub const fn new() -> Self {
        Self { free: KeySet::ALL_BUT_DEFAULT, usable: KeySet::ALL_BUT_DEFAULT }
    }

    /// Takes a key out for good, because something else uses it.
    ///
    /// # Errors
    ///
    /// [`KeyError::NotFree`] if it is handed out, reserved already, or key 0.
    pub const fn reserve(&mut self, key: ProtectionKey) -> Result<(), KeyError> {
        if !self.free.contains(key) {
            return Err(KeyError::NotFree { key });
        }
        self.free.remove(key);
        self.usable.remove(key);
        Ok(())
    }

    /// Hands out the lowest free key.
    ///
    /// # Errors
    ///
    /// [`KeyError::Exhausted`] if none is free.
    pub const fn allocate(&mut self) -> Result<ProtectionKey, KeyError> {
        match self.free.first() {
            Some(key) => {
                self.free.remove(key);
                Ok(key)
            }
            None => Err(KeyError::Exhausted { limit: self.usable.len() as u8 }),
        }
    }

    /// Takes a key back.
    ///
    /// # Errors
    ///
    /// [`KeyError::NotAllocated`] if this allocator did not hand it out.
    pub const fn free(&mut self, key: ProtectionKey) -> Result<(), KeyError> {
        if !self.usable.contains(key) || self.free.contains(key) {
            return Err(KeyError::NotAllocated { key });
        }
        self.free.insert(key);
        Ok(())
    }

    /// Returns how many keys are free.
    #[must_use]
    pub const fn available(&self) -> usize {
        self.free.len()
    }
}

impl Default for KeyAllocator {
    fn default() -> Self {
        Self::new()
    }
}

/// Why a key was not handed out or not taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyError {
    /// Every key is in use.
    Exhausted {
        /// How many keys there are to use.
        limit: u8,
    },
    /// The key cannot be reserved because it is not free.
    NotFree {
        /// That key.
        key: ProtectionKey,
    },
    /// The key was given back but had not been handed out.
    NotAllocated {
        /// That key.
        key: ProtectionKey,
    },
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exhausted { limit } => write!(f, "all {limit} usable protection keys are in use"),
            Self::NotFree { key } => write!(f, "protection key {key} is not free"),
            Self::NotAllocated { key } => write!(f, "protection key {key} was not handed out"),
        }
    }
}

impl core::error::Error for KeyError {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn fifteen_and_then_an_error_that_names_the_limit() {
        let mut keys = KeyAllocator::new();
        let taken: Vec<_> = (0..15).map(|_| keys.allocate().unwrap().number()).collect();
        assert_eq!(taken, (1..=15).collect::<Vec<_>>());
        let error = keys.allocate().unwrap_err();
        assert_eq!(error, KeyError::Exhausted { limit: 15 });
        assert_eq!(std::format!("{error}"), "all 15 usable protection keys are in use");
    }

    #[test]
    fn key_zero_is_neither_handed_out_nor_taken_back() {
        let mut keys = KeyAllocator::new();
        let zero = ProtectionKey::DEFAULT;
        assert_eq!(keys.free(zero), Err(KeyError::NotAllocated { key: zero }));
        assert_eq!(keys.reserve(zero), Err(KeyError::NotFree { key: zero }));
    }

    #[test]
    fn a_reserved_key_stays_out() {
        let mut keys = KeyAllocator::new();
        let key = ProtectionKey::new(1).unwrap();
        keys.reserve(key).unwrap();
        assert_eq!(keys.allocate().unwrap().number(), 2);
        assert_eq!(keys.free(key), Err(KeyError::NotAllocated { key }));
        assert_eq!(keys.available(), 13);
    }
}
