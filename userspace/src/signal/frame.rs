//! The frame that the kernel makes of what a signal has interrupted.
//!
//! # References
//!
//! Linux 6.12, `arch/x86/kernel/fpu/signal.c`, `arch/x86/include/uapi/asm/sigcontext.h`; Intel SDM volume 1, section
//! "XSAVE Area".

use std::mem::offset_of;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::monitor::monitored;
use pkru::gate::Rewind;
use pkru::{AccessRights, KeyRights, ProtectionKey};

monitored! {
    /// Where PKRU stands in the XSAVE area of a signal frame, in bytes.
    static PKRU_OFFSET: AtomicUsize = AtomicUsize::new(0);
}

/// Says where PKRU stands in the XSAVE area of a signal frame, in bytes.
pub(super) fn set_pkru_offset(offset: usize) {
    PKRU_OFFSET.store(offset, Ordering::Relaxed);
}

/// Writes the state in which a caller resumes into a frame; `false`, with nothing written, if the frame has no PKRU.
pub(super) fn write(context: &mut libc::ucontext_t, rewind: Rewind) -> bool {
    /// TF, DF, NT and AC.
    const FLAGS: i64 = 1 << 8 | 1 << 10 | 1 << 14 | 1 << 18;
    /// The word holds CS, GS, FS and SS, from the lowest bits up. A far jump in the domain can have changed the first
    /// and the last.
    const CS_AND_SS: u64 = 0xffff_0000_0000_ffff;
    /// `__USER_CS` and `__USER_DS` (Linux 6.12, `arch/x86/include/asm/segment.h`).
    const USER_CS_AND_SS: u64 = 0x002b_0000_0000_0033;
    // SAFETY: the frame is the kernel's.
    let Some(state) = (unsafe { SavedPkru::of(context) }) else { return false };
    let registers = &mut context.uc_mcontext.gregs;
    registers[libc::REG_RIP as usize] = rewind.instruction as i64;
    registers[libc::REG_RSP as usize] = rewind.stack as i64;
    registers[libc::REG_R10 as usize] = rewind.r10 as i64;
    registers[libc::REG_EFL as usize] &= !FLAGS;
    let segments = &mut registers[libc::REG_CSGSFS as usize];
    *segments = (*segments as u64 & !CS_AND_SS | USER_CS_AND_SS) as i64;
    state.write(rewind.rights);
    true
}

/// Returns a register as the signal found it.
pub(super) fn register(context: &libc::ucontext_t, index: i32) -> u64 {
    context.uc_mcontext.gregs[index as usize] as u64
}

/// Gives what was interrupted all rights to a key.
pub(super) fn grant(context: &libc::ucontext_t, key: ProtectionKey) {
    // SAFETY: the frame is the kernel's.
    if let Some(state) = unsafe { SavedPkru::of(context) } {
        state.write(state.read().with(key, AccessRights::READ_WRITE));
    }
}

/// Returns the rights that were in force.
pub(super) fn rights(context: &libc::ucontext_t) -> KeyRights {
    // SAFETY: the frame is the kernel's.
    unsafe { SavedPkru::of(context) }.map_or(KeyRights::LINUX_INITIAL, |state| state.read())
}

/// PKRU as a signal frame holds it.
struct SavedPkru {
    value: *mut u32,
    /// XSTATE_BV, whose bits say which components are not in their initial state.
    present: *mut u64,
}

impl SavedPkru {
    const COMPONENT: u64 = 1 << 9;

    /// Finds it in a frame; `None` if the frame has no such component.
    ///
    /// # Safety
    ///
    /// The frame is the kernel's.
    unsafe fn of(context: &libc::ucontext_t) -> Option<Self> {
        const MAGIC1: u32 = 0x4650_5853;
        const MAGIC2: u32 = 0x4650_5845;
        /// The software-reserved bytes of the FXSAVE area, `struct _fpx_sw_bytes`.
        #[derive(Clone, Copy)]
        #[repr(C)]
        struct SoftwareBytes {
            magic1: u32,
            extended_size: u32,
            features: u64,
            state_size: u32,
        }
        const SOFTWARE_BYTES: usize = 464;
        const HEADER: usize = 512;
        const { assert!(offset_of!(SoftwareBytes, features) == 8) };

        let area = context.uc_mcontext.fpregs.cast::<u8>();
        if area.is_null() {
            return None;
        }
        // SAFETY: the FXSAVE area is longer than these bytes' offset and size.
        let software = unsafe { area.wrapping_add(SOFTWARE_BYTES).cast::<SoftwareBytes>().read() };
        let offset = PKRU_OFFSET.load(Ordering::Relaxed);
        let size = software.state_size as usize;
        if software.magic1 != MAGIC1 || software.features & Self::COMPONENT == 0 || offset + 4 > size {
            return None;
        }
        // SAFETY: with the first magic number the area has this size, and the second one follows it.
        if unsafe { area.wrapping_add(size).cast::<u32>().read_unaligned() } != MAGIC2 {
            return None;
        }
        let present = area.wrapping_add(HEADER).cast();
        let value = area.wrapping_add(offset).cast();
        Some(Self { value, present })
    }

    fn read(&self) -> KeyRights {
        // SAFETY: the pointer leads into the frame.
        if unsafe { self.present.read() } & Self::COMPONENT == 0 {
            // The component is in its initial state.
            return KeyRights::ALL;
        }
        // SAFETY: as above.
        KeyRights::from_bits(unsafe { self.value.read() })
    }

    fn write(&self, rights: KeyRights) {
        // SAFETY: the pointer leads into the frame.
        unsafe { self.value.write(rights.bits()) };
        // SAFETY: as above.
        unsafe { *self.present |= Self::COMPONENT };
    }
}
