//! Allocating protection keys.

use core::fmt;

use crate::{KeySet, ProtectionKey};

/// An allocator of protection keys.
///
/// It keeps only a record of which keys are free. Untag all pages of a key before you free the key. Otherwise its next
/// owner gets access to these pages.
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
    /// The free keys. Invariant: does not contain key 0.
    free: KeySet,
    /// The keys that this allocator can allocate, free or not.
    usable: KeySet,
}

impl KeyAllocator {
    /// Creates an allocator of keys 1 to 15. Key 0 is the key of all untagged pages and is never allocated.
    #[must_use]
    pub const fn new() -> Self {
        Self { free: KeySet::ALL_BUT_DEFAULT, usable: KeySet::ALL_BUT_DEFAULT }
    }

    /// Reserves a key for another use. The allocator never allocates it afterwards.
    ///
    /// # Errors
    ///
    /// [`KeyError::NotFree`] if the key is allocated, already reserved, or key 0.
    pub const fn reserve(&mut self, key: ProtectionKey) -> Result<(), KeyError> {
        if !self.free.contains(key) {
            return Err(KeyError::NotFree { key });
        }
        self.free.remove(key);
        self.usable.remove(key);
        Ok(())
    }

    /// Allocates the free key with the lowest number.
    ///
    /// # Errors
    ///
    /// [`KeyError::Exhausted`] if no key is free.
    pub const fn allocate(&mut self) -> Result<ProtectionKey, KeyError> {
        match self.free.first() {
            Some(key) => {
                self.free.remove(key);
                Ok(key)
            }
            None => Err(KeyError::Exhausted { limit: self.usable.len() as u8 }),
        }
    }

    /// Frees a key.
    ///
    /// # Errors
    ///
    /// [`KeyError::NotAllocated`] if the key is not allocated by this allocator.
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

/// The error of a failed operation of [`KeyAllocator`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyError {
    /// All usable keys are allocated.
    Exhausted {
        /// The number of usable keys.
        limit: u8,
    },
    /// A key to reserve is not free.
    NotFree {
        /// The key.
        key: ProtectionKey,
    },
    /// A key to free is not allocated.
    NotAllocated {
        /// The key.
        key: ProtectionKey,
    },
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exhausted { limit } => write!(f, "all {limit} usable protection keys are in use"),
            Self::NotFree { key } => write!(f, "protection key {key} is not free"),
            Self::NotAllocated { key } => write!(f, "protection key {key} is not allocated"),
        }
    }
}

impl core::error::Error for KeyError {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn fifteen_keys_and_then_an_error_with_the_limit() {
        let mut keys = KeyAllocator::new();
        let taken: Vec<_> = (0..15).map(|_| keys.allocate().unwrap().number()).collect();
        assert_eq!(taken, (1..=15).collect::<Vec<_>>());
        let error = keys.allocate().unwrap_err();
        assert_eq!(error, KeyError::Exhausted { limit: 15 });
        assert_eq!(std::format!("{error}"), "all 15 usable protection keys are in use");
    }

    #[test]
    fn key_zero_is_neither_freed_nor_reserved() {
        let mut keys = KeyAllocator::new();
        let zero = ProtectionKey::DEFAULT;
        assert_eq!(keys.free(zero), Err(KeyError::NotAllocated { key: zero }));
        assert_eq!(keys.reserve(zero), Err(KeyError::NotFree { key: zero }));
    }

    #[test]
    fn a_reserved_key_is_neither_allocated_nor_freed() {
        let mut keys = KeyAllocator::new();
        let key = ProtectionKey::new(1).unwrap();
        keys.reserve(key).unwrap();
        assert_eq!(keys.allocate().unwrap().number(), 2);
        assert_eq!(keys.free(key), Err(KeyError::NotAllocated { key }));
        assert_eq!(keys.available(), 13);
    }
}
