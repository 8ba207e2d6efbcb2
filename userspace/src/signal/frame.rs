//! The frame that the kernel makes of what a signal has interrupted.
//!
//! # References
//!
//! Linux 6.12, `arch/x86/kernel/fpu/signal.c`, `arch/x86/include/uapi/asm/sigcontext.h`,
//! `include/uapi/asm-generic/siginfo.h`.

#![expect(unsafe_code, reason = "it reads and writes the kernel's signal frames")]

use std::ffi::c_int;
use std::mem::offset_of;
use std::sync::atomic::{AtomicUsize, Ordering};

use pkru::gate::Rewind;
use pkru::xsave::XsaveArea;
use pkru::{AccessRights, KeyRights, ProtectionKey};

use super::trap::Interrupted;
use crate::sys;
use crate::trusted::trusted;

trusted! {
    /// The offset of PKRU in the XSAVE area of a signal frame, in bytes.
    static PKRU_OFFSET: AtomicUsize = AtomicUsize::new(0);
}

/// Sets the offset of PKRU in the XSAVE area of a signal frame, in bytes.
pub(super) fn set_pkru_offset(offset: usize) {
    PKRU_OFFSET.store(offset, Ordering::Relaxed);
}

/// Reads a signal and its frame.
///
/// # Safety
///
/// The arguments are those that the kernel passed to the handler.
pub(super) unsafe fn read(signal: c_int, info: *const libc::siginfo_t, context: &libc::ucontext_t) -> Interrupted {
    let register = |index: c_int| context.uc_mcontext.gregs[index as usize] as u64;
    // SAFETY: the kernel passes a valid description. It clears the parts of it that the signal does not use.
    let description = unsafe { &*info };
    let code = description.si_code;
    // SAFETY: the field is readable. Only signals that a process has sent have a sender there.
    let sender = || unsafe { description.si_pid() } as u32;
    // SAFETY: the field is readable. Only signals sent with a value have one there.
    let value = unsafe { description.si_value() }.sival_ptr.addr();
    // SAFETY: the field is readable. Only faults have an address there.
    let address = unsafe { description.si_addr() } as u64;
    Interrupted {
        signal,
        code,
        is_own: matches!(code, libc::SI_USER | libc::SI_QUEUE | libc::SI_TKILL) && sender() == sys::process_id(),
        value,
        address,
        // SAFETY: the caller answers for the pointer.
        key: unsafe { denying_key(signal, info) },
        error_code: register(libc::REG_ERR) as u32,
        instruction: register(libc::REG_RIP),
        stack: register(libc::REG_RSP),
        arguments: [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(register),
        // SAFETY: the frame is the kernel's.
        rights: unsafe { SavedPkru::of(context) }.map_or(KeyRights::LINUX_INITIAL, |state| state.read()),
    }
}

/// Returns the key that denied an access, if that is what the signal is about.
///
/// # Safety
///
/// The pointer is the one that the kernel passed.
unsafe fn denying_key(signal: c_int, info: *const libc::siginfo_t) -> Option<ProtectionKey> {
    /// The offset of `si_pkey` in `siginfo_t`.
    const SI_PKEY: usize = 0x20;
    /// The code of signals that have it.
    const SEGV_PKUERR: c_int = 4;
    // SAFETY: the caller answers for the pointer.
    if signal != libc::SIGSEGV || unsafe { &*info }.si_code != SEGV_PKUERR {
        return None;
    }
    // SAFETY: with this code the field is there.
    let key = unsafe { info.wrapping_byte_add(SI_PKEY).cast::<u32>().read() };
    ProtectionKey::new(key as u8)
}

/// Writes the state in which a caller resumes into a frame. Returns `false`, with nothing written, if the frame has no
/// PKRU.
pub(super) fn write(context: &mut libc::ucontext_t, rewind: Rewind) -> bool {
    /// The word holds CS, GS, FS and SS, from the lowest bits up. A far jump in the domain can have changed the first
    /// and the last.
    const CS_AND_SS: u64 = 0xffff_0000_0000_ffff;
    /// `__USER_CS` and `__USER_DS` (Linux 6.12, `arch/x86/include/asm/segment.h`).
    const USER_CS_AND_SS: u64 = 0x002b_0000_0000_0033;
    // SAFETY: the frame is the kernel's.
    let Some(mut state) = (unsafe { SavedPkru::of(context) }) else { return false };
    state.write(rewind.rights);
    let registers = &mut context.uc_mcontext.gregs;
    registers[libc::REG_RIP as usize] = rewind.instruction as i64;
    registers[libc::REG_RSP as usize] = rewind.stack as i64;
    registers[libc::REG_R10 as usize] = rewind.r10 as i64;
    registers[libc::REG_EFL as usize] &= !(Rewind::CLEARED_FLAGS as i64);
    let segments = &mut registers[libc::REG_CSGSFS as usize];
    *segments = (*segments as u64 & !CS_AND_SS | USER_CS_AND_SS) as i64;
    true
}

/// Gives the interrupted code all rights to a key.
pub(super) fn grant(context: &libc::ucontext_t, key: ProtectionKey) {
    // SAFETY: the frame is the kernel's.
    if let Some(mut state) = unsafe { SavedPkru::of(context) } {
        state.write(state.read().with(key, AccessRights::READ_WRITE));
    }
}

/// PKRU in a signal frame.
struct SavedPkru {
    area: XsaveArea<'static>,
    offset: usize,
}

impl SavedPkru {
    /// Finds it in a frame; `None` if the frame has none.
    ///
    /// # Safety
    ///
    /// The frame is the kernel's, and outlives the result.
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
        const { assert!(offset_of!(SoftwareBytes, features) == 8) };

        let area = context.uc_mcontext.fpregs.cast::<u8>();
        if area.is_null() {
            return None;
        }
        // SAFETY: the FXSAVE area is longer than these bytes' offset and size.
        let software = unsafe { area.wrapping_add(SOFTWARE_BYTES).cast::<SoftwareBytes>().read() };
        let (offset, size) = (PKRU_OFFSET.load(Ordering::Relaxed), software.state_size as usize);
        if software.magic1 != MAGIC1 || software.features & XsaveArea::PKRU == 0 || offset + 4 > size {
            return None;
        }
        // SAFETY: with the first magic number the area has this size, and the second one follows it.
        if unsafe { area.wrapping_add(size).cast::<u32>().read_unaligned() } != MAGIC2 {
            return None;
        }
        // SAFETY: the area has this size, and nothing else refers to it while the handler runs.
        let bytes = unsafe { std::slice::from_raw_parts_mut(area, size) };
        Some(Self { area: XsaveArea::new(bytes)?, offset })
    }

    fn read(&self) -> KeyRights {
        self.area.pkru(self.offset).unwrap_or(KeyRights::LINUX_INITIAL)
    }

    fn write(&mut self, rights: KeyRights) {
        // `of` has checked that the area reaches so far.
        let _ = self.area.set_pkru(self.offset, rights);
    }
}
