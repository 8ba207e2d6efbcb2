//! Protection keys.

use core::fmt;

/// A protection key: a number from 0 to 15. It is stored in bits 62:59 of a leaf page-table entry.
///
/// ```text
///  63   62      59   58                                            0
/// ┌────┬──────────┬─────────────────────────────────────────────────┐
/// │ XD │   key    │   available, physical address, flags            │
/// └────┴──────────┴─────────────────────────────────────────────────┘
/// ```
///
/// # Examples
///
/// ```
/// use pkru::ProtectionKey;
///
/// let key = ProtectionKey::new(3).expect("3 is a key");
/// assert_eq!(key.in_entry(0x8000_0000_0000_1067), 0x9800_0000_0000_1067);
/// assert_eq!(ProtectionKey::of_entry(0x9800_0000_0000_1067), key);
/// assert_eq!(ProtectionKey::new(16), None);
/// ```
///
/// # References
///
/// Intel SDM volume 3, section "Protection Keys"; AMD APM volume 2, section "Page-Protection by Memory Protection
/// Keys".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProtectionKey(
    // Invariant: below `COUNT`.
    u8,
);

impl ProtectionKey {
    /// The number of keys.
    pub const COUNT: usize = 16;

    /// Key 0: the key of every page that has not been tagged.
    pub const DEFAULT: Self = Self(0);

    const SHIFT: u32 = 59;
    const MASK: u64 = 0xf << Self::SHIFT;

    /// Returns the key with this number, or `None` if it is above 15.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if (number as usize) < Self::COUNT { Some(Self(number)) } else { None }
    }

    /// Returns the number, 0 to 15.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Returns the number as an index into an array of [`COUNT`](Self::COUNT) elements.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Returns the key in a leaf page-table entry.
    #[must_use]
    pub const fn of_entry(entry: u64) -> Self {
        Self(((entry & Self::MASK) >> Self::SHIFT) as u8)
    }

    /// Returns the leaf page-table entry with its key replaced by this one.
    #[must_use]
    pub const fn in_entry(self, entry: u64) -> u64 {
        entry & !Self::MASK | (self.0 as u64) << Self::SHIFT
    }

    /// Iterates over all keys, from 0 to 15.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> + ExactSizeIterator {
        (0..16).map(Self)
    }
}

impl fmt::Display for ProtectionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_entry_changes_only_the_key() {
        for key in ProtectionKey::all() {
            for entry in [0, u64::MAX, 0x8000_0000_0000_0063] {
                let tagged = key.in_entry(entry);
                assert_eq!(ProtectionKey::of_entry(tagged), key);
                assert_eq!(tagged & !ProtectionKey::MASK, entry & !ProtectionKey::MASK);
            }
        }
    }

    #[test]
    fn there_are_sixteen_keys() {
        assert_eq!(ProtectionKey::all().len(), ProtectionKey::COUNT);
        assert!(ProtectionKey::all().all(|key| ProtectionKey::new(key.number()) == Some(key)));
        assert!((16..=255).all(|number| ProtectionKey::new(number).is_none()));
    }
}
