//! Detecting protection keys with CPUID.
//!
//! The decoder reads through the `CpuIdReader` trait of `raw-cpuid`, so the tests can replay dumps of other CPUs.

use raw_cpuid::{CpuIdReader, CpuIdResult};

/// The features of a CPU that domains need.
///
/// | field | CPUID | meaning |
/// |---|---|---|
/// | `pku` | 7.0:ECX\[3\] | the CPU has PKU |
/// | `ospke` | 7.0:ECX\[4\] | the operating system has enabled PKU: mirrors CR4.PKE |
/// | `pks` | 7.0:ECX\[31\] | the CPU has PKS |
/// | `fsgsbase` | 7.0:EBX\[0\] | the CPU has RDFSBASE, WRFSBASE, RDGSBASE and WRGSBASE |
/// | `pkru_offset` | 0Dh.9:EBX | the offset of PKRU in an XSAVE area in standard format |
///
/// # Examples
///
/// ```
/// use pkru::cpuid::Features;
///
/// # #[cfg(target_arch = "x86_64")]
/// println!("{:?}", Features::of_this_cpu());
/// ```
///
/// # References
///
/// Intel SDM volume 2, CPUID, tables for leaves 07H and 0DH; AMD APM volume 3, appendix E.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub struct Features {
    /// The CPU has protection keys for user pages.
    pub pku: bool,
    /// The operating system has enabled PKU, so RDPKRU and WRPKRU can be used.
    pub ospke: bool,
    /// The CPU has protection keys for supervisor pages. CPUID does not report whether they are enabled (CR4.PKS).
    pub pks: bool,
    /// The CPU has the instructions that read and write the FS and GS base. They also need CR4.FSGSBASE.
    pub fsgsbase: bool,
    /// The offset in bytes of PKRU in an XSAVE area in standard format; `None` if XSAVE does not save PKRU. Linux's
    /// signal frames use the standard format.
    pub pkru_offset: Option<u32>,
}

impl Features {
    const LEAF_FEATURES: u32 = 0x7;
    const LEAF_XSAVE: u32 = 0xd;
    /// PKRU's number as an XSAVE state component.
    const XSAVE_PKRU: u32 = 9;

    /// Decodes the CPUID leaves that `reader` returns.
    #[must_use]
    pub fn decode(reader: &impl CpuIdReader) -> Self {
        let last = reader.cpuid1(0).eax;
        let leaf = |leaf: u32, subleaf: u32| {
            // Intel CPUs return the data of the last basic leaf for a leaf above it.
            if leaf <= last { reader.cpuid2(leaf, subleaf) } else { CpuIdResult { eax: 0, ebx: 0, ecx: 0, edx: 0 } }
        };
        let features = leaf(Self::LEAF_FEATURES, 0);
        let bit = |register: u32, bit: u32| register >> bit & 1 == 1;
        let pku = bit(features.ecx, 3);

        let components = leaf(Self::LEAF_XSAVE, 0).eax;
        let state = leaf(Self::LEAF_XSAVE, Self::XSAVE_PKRU);
        // Some CPUs without PKU describe component 9: AMD's Zen 2 reports a size of 64 bytes.
        let saved = pku && bit(components, Self::XSAVE_PKRU) && state.eax >= 4;
        Self {
            pku,
            ospke: bit(features.ecx, 4),
            pks: bit(features.ecx, 31),
            fsgsbase: bit(features.ebx, 0),
            pkru_offset: saved.then_some(state.ebx),
        }
    }

    /// Reads the features of the CPU that executes this function.
    #[cfg(target_arch = "x86_64")]
    #[must_use]
    pub fn of_this_cpu() -> Self {
        Self::decode(&raw_cpuid::CpuIdReaderNative)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CPUID of one CPU: leaf, subleaf, and EAX, EBX, ECX, EDX.
    type Dump = [(u32, u32, [u32; 4])];

    fn decode(dump: &Dump) -> Features {
        let answer = |leaf: u32, subleaf: u32| {
            let found = dump.iter().find(|(l, s, _)| (*l, *s) == (leaf, subleaf));
            let [eax, ebx, ecx, edx] = found.map_or([0; 4], |(_, _, registers)| *registers);
            CpuIdResult { eax, ebx, ecx, edx }
        };
        Features::decode(&answer)
    }

    // The leaves that the decoder reads, from real CPUs and QEMU. All but the last are from InstLatx64's collection of
    // dumps, under the CPU's signature. They were taken under Windows, which does not enable PKU.

    /// 000306F2, Haswell-EP: neither PKU nor PKS.
    const HASWELL_EP: &Dump = &[
        (0x0, 0, [0x0000_000f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (0x7, 0, [0x0000_0000, 0x0000_3fbb, 0x0000_0000, 0x0000_0000]),
        (0xd, 0, [0x0000_0007, 0x0000_0340, 0x0000_0340, 0x0000_0000]),
    ];

    /// 00050654, Skylake-SP: PKU. In this dump leaf 0Dh reports component 9, but its subleaf is empty.
    const SKYLAKE_SP: &Dump = &[
        (0x0, 0, [0x0000_0016, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (0x7, 0, [0x0000_0000, 0xd39f_fffb, 0x0000_0008, 0x0000_0000]),
        (0xd, 0, [0x0000_02ff, 0x0000_0340, 0x0000_0a88, 0x0000_0000]),
        (0xd, 9, [0x0000_0000, 0x0000_0000, 0x0000_0000, 0x0000_0000]),
    ];

    /// 000806F8, Sapphire Rapids: PKU and PKS.
    const SAPPHIRE_RAPIDS: &Dump = &[
        (0x0, 0, [0x0000_0020, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (0x7, 0, [0x0000_0002, 0xf3bf_bffb, 0xbb41_7fee, 0xffdd_4430]),
        (0xd, 0, [0x0006_02e7, 0x0000_2b00, 0x0000_2b00, 0x0000_0000]),
        (0xd, 9, [0x0000_0008, 0x0000_0a80, 0x0000_0000, 0x0000_0000]),
    ];

    /// 00090672, Alder Lake: PKU and PKS on a desktop.
    const ALDER_LAKE: &Dump = &[
        (0x0, 0, [0x0000_0020, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (0x7, 0, [0x0000_0002, 0x239c_27eb, 0x98c0_07ac, 0xfc18_c410]),
        (0xd, 0, [0x0000_0207, 0x0000_0340, 0x0000_0a88, 0x0000_0000]),
        (0xd, 9, [0x0000_0008, 0x0000_0a80, 0x0000_0000, 0x0000_0000]),
    ];

    /// 00830F10, Rome (Zen 2): no PKU, but a subleaf for XSAVE component 9.
    const ROME: &Dump = &[
        (0x0, 0, [0x0000_0010, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        (0x7, 0, [0x0000_0000, 0x219c_91a9, 0x0040_0004, 0x0000_0000]),
        (0xd, 0, [0x0000_0207, 0x0000_0340, 0x0000_0380, 0x0000_0000]),
        (0xd, 9, [0x0000_0040, 0x0000_0340, 0x0000_0000, 0x0000_0000]),
    ];

    /// 00A10F11, Genoa (Zen 4): PKU. The offset of PKRU differs from that of Intel's CPUs.
    const GENOA: &Dump = &[
        (0x0, 0, [0x0000_0010, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        (0x7, 0, [0x0000_0001, 0xf1bf_97a9, 0x0041_5fce, 0x1000_0010]),
        (0xd, 0, [0x0000_02e7, 0x0000_0980, 0x0000_0988, 0x0000_0000]),
        (0xd, 9, [0x0000_0008, 0x0000_0980, 0x0000_0000, 0x0000_0000]),
    ];

    /// QEMU 7.2, `-cpu max`, under Linux: PKS, and PKU enabled.
    const QEMU_MAX: &Dump = &[
        (0x0, 0, [0x0000_000d, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        (0x7, 0, [0x0000_0000, 0x01d8_43a9, 0x8001_021c, 0x0000_0000]),
        (0xd, 0, [0x0000_021f, 0x0000_0a88, 0x0000_0a88, 0x0000_0000]),
        (0xd, 9, [0x0000_0008, 0x0000_0a80, 0x0000_0000, 0x0000_0000]),
    ];

    const NOTHING_BUT_FSGSBASE: Features =
        Features { pku: false, ospke: false, pks: false, fsgsbase: true, pkru_offset: None };

    #[test]
    fn intel_without_pku() {
        assert_eq!(decode(HASWELL_EP), NOTHING_BUT_FSGSBASE);
    }

    #[test]
    fn intel_with_pku() {
        assert_eq!(decode(SKYLAKE_SP), Features { pku: true, ..NOTHING_BUT_FSGSBASE });
    }

    #[test]
    fn intel_with_pks() {
        let expected = Features { pku: true, pks: true, pkru_offset: Some(0xa80), ..NOTHING_BUT_FSGSBASE };
        assert_eq!(decode(SAPPHIRE_RAPIDS), expected);
        assert_eq!(decode(ALDER_LAKE), expected);
    }

    #[test]
    fn amd_without_pku_but_with_its_xsave_subleaf() {
        assert_eq!(decode(ROME), NOTHING_BUT_FSGSBASE);
    }

    #[test]
    fn amd_with_pku() {
        assert_eq!(decode(GENOA), Features { pku: true, pkru_offset: Some(0x980), ..NOTHING_BUT_FSGSBASE });
    }

    #[test]
    fn pku_enabled() {
        let expected = Features { pku: true, ospke: true, pks: true, fsgsbase: true, pkru_offset: Some(0xa80) };
        assert_eq!(decode(QEMU_MAX), expected);
    }

    #[test]
    fn a_cpu_without_leaf_7() {
        let old: &Dump = &[(0x0, 0, [0x6, 0, 0, 0]), (0x7, 0, [0, 1, u32::MAX, 0])];
        assert_eq!(decode(old), Features::default());
    }
}
