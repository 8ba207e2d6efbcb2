//! Sets of protection keys.

use core::fmt;

use crate::ProtectionKey;

/// A set of protection keys, with one bit for each key.
///
/// # Examples
///
/// ```
/// use pkru::{KeySet, ProtectionKey};
///
/// let key = ProtectionKey::new(3).expect("3 is a key");
/// let mut keys = KeySet::EMPTY.with(key);
/// assert!(keys.contains(key));
/// assert_eq!((keys.len(), keys.first()), (1, Some(key)));
/// keys.remove(key);
/// assert!(keys.is_empty());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct KeySet(u16);

impl KeySet {
    /// The empty set.
    pub const EMPTY: Self = Self(0);

    /// All keys except key 0.
    pub const ALL_BUT_DEFAULT: Self = Self(0xfffe);

    /// Creates a set from its bits: bit n is key n.
    #[must_use]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Returns the set as bits: bit n is key n.
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }

    const fn bit(key: ProtectionKey) -> u16 {
        1 << key.number()
    }

    /// Returns whether a key is in the set.
    #[must_use]
    pub const fn contains(self, key: ProtectionKey) -> bool {
        self.0 & Self::bit(key) != 0
    }

    /// Adds a key.
    pub const fn insert(&mut self, key: ProtectionKey) {
        self.0 |= Self::bit(key);
    }

    /// Removes a key.
    pub const fn remove(&mut self, key: ProtectionKey) {
        self.0 &= !Self::bit(key);
    }

    /// Returns the set with a key added.
    #[must_use]
    pub const fn with(mut self, key: ProtectionKey) -> Self {
        self.insert(key);
        self
    }

    /// Returns the set with a key removed.
    #[must_use]
    pub const fn without(mut self, key: ProtectionKey) -> Self {
        self.remove(key);
        self
    }

    /// Returns the key with the lowest number; `None` if the set is empty.
    #[must_use]
    pub const fn first(self) -> Option<ProtectionKey> {
        ProtectionKey::new(self.0.trailing_zeros() as u8)
    }

    /// Returns the number of keys in the set.
    #[must_use]
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Returns whether the set is empty.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Iterates over the keys in the set, in ascending order.
    pub fn iter(self) -> impl Iterator<Item = ProtectionKey> {
        ProtectionKey::all().filter(move |key| self.contains(*key))
    }
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(ProtectionKey::number)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_and_iter_are_in_ascending_order() {
        let keys = KeySet::from_bits(1 << 9 | 1 << 2);
        assert_eq!(keys.first(), ProtectionKey::new(2));
        assert!(keys.iter().map(ProtectionKey::number).eq([2, 9]));
        assert_eq!(KeySet::EMPTY.first(), None);
        assert_eq!(KeySet::ALL_BUT_DEFAULT.len(), 15);
        assert!(!KeySet::ALL_BUT_DEFAULT.contains(ProtectionKey::DEFAULT));
    }
}
