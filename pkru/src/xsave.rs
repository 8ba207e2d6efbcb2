//! Reading and writing PKRU in an XSAVE area, in which an operating system saves a thread's state.

use crate::KeyRights;

/// An XSAVE area in the standard format.
///
/// ```text
///  0                512        576              offset
/// ┌──────────────────┬──────────┬─── ─ ─ ─ ──────┬──────┬───
/// │ legacy region    │ header   │                │ PKRU │
/// └──────────────────┴──────────┴─── ─ ─ ─ ──────┴──────┴───
///                      └ XSTATE_BV: bit n is clear while component n is in its initial state
/// ```
///
/// PKRU is state component 9. Its offset differs between CPUs. CPUID leaf 0Dh reports it, see
/// [`Features::pkru_offset`](crate::cpuid::Features::pkru_offset).
///
/// # Examples
///
/// ```
/// use pkru::KeyRights;
/// use pkru::xsave::XsaveArea;
///
/// let mut bytes = [0; 1024];
/// let mut area = XsaveArea::new(&mut bytes).expect("1024 bytes hold a header");
/// assert_eq!(area.pkru(960), Some(KeyRights::ALL));
/// assert!(area.set_pkru(960, KeyRights::LINUX_INITIAL));
/// assert_eq!(area.pkru(960), Some(KeyRights::LINUX_INITIAL));
/// ```
///
/// # References
///
/// Intel SDM volume 1, sections "XSAVE Area", "XSAVE-Managed State" and "Processor Tracking of XSAVE-Managed State".
#[derive(Debug)]
pub struct XsaveArea<'a>(
    // Invariant: at least `HEADER_END` bytes.
    &'a mut [u8],
);

impl<'a> XsaveArea<'a> {
    /// PKRU's bit in XSTATE_BV, XCR0 and other masks of XSAVE state components.
    pub const PKRU: u64 = 1 << 9;

    const HEADER: usize = 512;
    const HEADER_END: usize = 576;

    /// Creates an area over its bytes; `None` if they are fewer than 576, the size of legacy region and header.
    #[must_use]
    #[inline]
    pub const fn new(bytes: &'a mut [u8]) -> Option<Self> {
        if bytes.len() < Self::HEADER_END { None } else { Some(Self(bytes)) }
    }

    /// Returns PKRU at `offset` bytes from the start of the area.
    ///
    /// Returns [`KeyRights::ALL`], the initial state, if XSTATE_BV marks PKRU as absent. Returns `None` if the offset
    /// is in the legacy region or header, or beyond the area.
    #[must_use]
    #[inline]
    pub fn pkru(&self, offset: usize) -> Option<KeyRights> {
        let value = self.0.get(Self::slot(offset)?)?;
        if self.present() & Self::PKRU == 0 {
            // The initial state of PKRU is 0.
            return Some(KeyRights::ALL);
        }
        Some(KeyRights::from_bits(u32::from_le_bytes(value.try_into().ok()?)))
    }

    /// Writes PKRU at `offset` bytes from the start of the area, and marks it as present in XSTATE_BV.
    ///
    /// Returns `false` and writes nothing if the offset is in the legacy region or header, or beyond the area.
    #[must_use]
    #[inline]
    pub fn set_pkru(&mut self, offset: usize, rights: KeyRights) -> bool {
        let Some(value) = Self::slot(offset).and_then(|slot| self.0.get_mut(slot)) else { return false };
        value.copy_from_slice(&rights.bits().to_le_bytes());
        let present = self.present() | Self::PKRU;
        self.0[Self::HEADER..Self::HEADER + 8].copy_from_slice(&present.to_le_bytes());
        true
    }

    #[inline]
    fn slot(offset: usize) -> Option<core::ops::Range<usize>> {
        (offset >= Self::HEADER_END).then_some(offset..offset.checked_add(4)?)
    }

    /// Returns XSTATE_BV.
    #[inline]
    fn present(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[Self::HEADER..Self::HEADER + 8]);
        u64::from_le_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_component_in_its_initial_state_reads_as_all_rights() {
        let mut bytes = [0xff; 700];
        bytes[512..520].fill(0);
        assert_eq!(XsaveArea::new(&mut bytes).unwrap().pkru(600), Some(KeyRights::ALL));
    }

    #[test]
    fn set_pkru_marks_the_component_and_changes_nothing_else() {
        let mut bytes = [0; 700];
        bytes[512] = 3;
        assert!(XsaveArea::new(&mut bytes).unwrap().set_pkru(600, KeyRights::NONE));
        assert_eq!((bytes[512], bytes[513]), (3, 2));
        assert_eq!(bytes[600..604], [0xff; 4]);
        assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 6);
    }

    #[test]
    fn an_offset_outside_the_area_or_in_its_header_fails() {
        let mut bytes = [0; 700];
        let mut area = XsaveArea::new(&mut bytes).unwrap();
        for offset in [0, 512, 575, 697, 700, usize::MAX] {
            assert_eq!(area.pkru(offset), None);
            assert!(!area.set_pkru(offset, KeyRights::NONE));
        }
        assert!(area.set_pkru(696, KeyRights::NONE));
        assert!(XsaveArea::new(&mut [0; 575]).is_none());
    }
}
