//! PKRU in an XSAVE area, as an operating system saves it with a thread's state or in a signal frame.

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
/// The place of PKRU, which is component 9, differs between CPUs: CPUID leaf 0xd tells it
/// ([`Features::pkru_offset`](crate::cpuid::Features)).
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
/// Intel SDM volume 1, sections "XSAVE Area" and "XSAVE-Managed State".
#[derive(Debug)]
pub struct XsaveArea<'a>(
    // Invariant: at least `HEADER_END` bytes.
    &'a mut [u8],
);

impl<'a> XsaveArea<'a> {
    /// PKRU's bit in XSTATE_BV, and in the mask of components that an area has.
    pub const PKRU: u64 = 1 << 9;

    const HEADER: usize = 512;
    const HEADER_END: usize = 576;

    /// Takes the bytes of an area; `None` if they are fewer than legacy region and header have.
    #[must_use]
    pub const fn new(bytes: &'a mut [u8]) -> Option<Self> {
        if bytes.len() < Self::HEADER_END { None } else { Some(Self(bytes)) }
    }

    /// Reads PKRU at an offset from the start of the area; `None` if the area does not reach so far.
    #[must_use]
    pub fn pkru(&self, offset: usize) -> Option<KeyRights> {
        let value = self.0.get(Self::slot(offset)?)?;
        if self.present() & Self::PKRU == 0 {
            // The initial state of PKRU is 0.
            return Some(KeyRights::ALL);
        }
        Some(KeyRights::from_bits(u32::from_le_bytes(value.try_into().ok()?)))
    }

    /// Writes PKRU at an offset from the start of the area, and marks it as present. Returns `false`, with nothing
    /// written, if the area does not reach so far.
    #[must_use]
    pub fn set_pkru(&mut self, offset: usize, rights: KeyRights) -> bool {
        let Some(value) = Self::slot(offset).and_then(|slot| self.0.get_mut(slot)) else { return false };
        value.copy_from_slice(&rights.bits().to_le_bytes());
        let present = self.present() | Self::PKRU;
        self.0[Self::HEADER..Self::HEADER + 8].copy_from_slice(&present.to_le_bytes());
        true
    }

    fn slot(offset: usize) -> Option<core::ops::Range<usize>> {
        (offset >= Self::HEADER_END).then_some(offset..offset.checked_add(4)?)
    }

    /// XSTATE_BV.
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
    fn a_write_marks_the_component_and_touches_nothing_else() {
        let mut bytes = [0; 700];
        bytes[512] = 3;
        assert!(XsaveArea::new(&mut bytes).unwrap().set_pkru(600, KeyRights::NONE));
        assert_eq!((bytes[512], bytes[513]), (3, 2));
        assert_eq!(bytes[600..604], [0xff; 4]);
        assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 6);
    }

    #[test]
    fn an_offset_outside_the_area_or_in_its_header_is_refused() {
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
