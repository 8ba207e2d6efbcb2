//! Signal frames: the state of the interrupted code, as the kernel saves it.
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

/// The kernel's `struct ucontext`. The C library's type of that name is larger: it would reach into the siginfo and the
/// XSAVE area behind it.
#[derive(Debug)]
#[repr(C)]
pub(super) struct SignalContext {
    flags: u64,
    link: usize,
    /// The alternate signal stack to set on return.
    pub(super) stack: libc::stack_t,
    pub(super) machine: libc::mcontext_t,
    /// The signal mask to set on return, one bit for each signal from 1.
    pub(super) mask: u64,
}

// As large as the kernel's, in which `uc_sigmask` is last.
const _: () = assert!(size_of::<SignalContext>() == 304 && offset_of!(libc::ucontext_t, uc_sigmask) == 296);

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
/// The kernel passed the arguments to the handler.
pub(super) unsafe fn read(signal: c_int, info: *const libc::siginfo_t, context: &SignalContext) -> Interrupted {
    let register = |index: c_int| context.machine.gregs[index as usize] as u64;
    // SAFETY: the kernel passes a valid `siginfo_t`, and clears the fields that the signal does not use.
    let description = unsafe { &*info };
    let code = description.si_code;
    // SAFETY: the field is initialised. It holds a sender if a process sent the signal.
    let sender = || unsafe { description.si_pid() } as u32;
    // SAFETY: the field is initialised. It holds a value if the signal was sent with one.
    let value = unsafe { description.si_value() }.sival_ptr.addr();
    // SAFETY: the field is initialised. It holds an address if a fault raised the signal.
    let address = unsafe { description.si_addr() } as u64;
    Interrupted {
        signal,
        code,
        is_own: matches!(code, libc::SI_USER | libc::SI_QUEUE | libc::SI_TKILL) && sender() == sys::process_id(),
        value,
        address,
        // SAFETY: the kernel passed the pointer.
        key: unsafe { denying_key(signal, info) },
        error_code: register(libc::REG_ERR) as u32,
        instruction: register(libc::REG_RIP),
        stack: register(libc::REG_RSP),
        arguments: [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(register),
        // SAFETY: the frame is the kernel's, and outlives the result.
        rights: unsafe { SavedPkru::of(context) }.map_or(KeyRights::LINUX_INITIAL, |state| state.read()),
    }
}

/// Returns the key that denied an access, if a key did.
///
/// # Safety
///
/// The kernel passed the pointer.
unsafe fn denying_key(signal: c_int, info: *const libc::siginfo_t) -> Option<ProtectionKey> {
    /// The offset of `si_pkey` in `siginfo_t`.
    const SI_PKEY: usize = 0x20;
    /// The `si_code` of signals that have this field.
    const SEGV_PKUERR: c_int = 4;
    // SAFETY: the kernel passes a valid `siginfo_t`.
    if signal != libc::SIGSEGV || unsafe { &*info }.si_code != SEGV_PKUERR {
        return None;
    }
    // SAFETY: with this code the kernel sets the field.
    let key = unsafe { info.wrapping_byte_add(SI_PKEY).cast::<u32>().read() };
    ProtectionKey::new(key as u8)
}

/// Writes the state in which a caller resumes to a frame. Returns `false` and writes nothing if the frame has no PKRU.
pub(super) fn write(context: &mut SignalContext, rewind: Rewind) -> bool {
    /// The bits of CS and SS in a word that holds CS, GS, FS and SS, from the lowest bits up. A far jump in the domain
    /// can change CS and SS.
    const CS_AND_SS: u64 = 0xffff_0000_0000_ffff;
    /// `__USER_CS` and `__USER_DS` (Linux 6.12, `arch/x86/include/asm/segment.h`).
    const USER_CS_AND_SS: u64 = 0x002b_0000_0000_0033;
    // SAFETY: the frame is the kernel's, and outlives the result.
    let Some(mut state) = (unsafe { SavedPkru::of(context) }) else { return false };
    state.write(rewind.rights);
    let registers = &mut context.machine.gregs;
    registers[libc::REG_RIP as usize] = rewind.instruction as i64;
    registers[libc::REG_RSP as usize] = rewind.stack as i64;
    registers[libc::REG_R10 as usize] = rewind.r10 as i64;
    registers[libc::REG_EFL as usize] &= !(Rewind::CLEARED_FLAGS as i64);
    let segments = &mut registers[libc::REG_CSGSFS as usize];
    *segments = (*segments as u64 & !CS_AND_SS | USER_CS_AND_SS) as i64;
    true
}

/// Has a [copy](sys::resume_failed_copy) that faulted at an address resume as failed.
pub(super) const fn fail_copy(context: &mut SignalContext, resume: u64, address: u64) {
    context.machine.gregs[libc::REG_RIP as usize] = resume as i64;
    context.machine.gregs[libc::REG_RAX as usize] = address as i64;
}

/// Gives the interrupted code all rights to a key.
pub(super) fn grant(context: &SignalContext, key: ProtectionKey) {
    // SAFETY: the frame is the kernel's, and outlives the result.
    if let Some(mut state) = unsafe { SavedPkru::of(context) } {
        state.write(state.read().with(key, AccessRights::READ_WRITE));
    }
}

/// The software-reserved bytes of the FXSAVE area in a frame, `struct _fpx_sw_bytes`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SoftwareBytes {
    magic1: u32,
    /// The size in bytes of all that is saved.
    extended_size: u32,
    features: u64,
    /// The size in bytes of the XSAVE area.
    state_size: u32,
}

const _: () = assert!(offset_of!(SoftwareBytes, features) == 8);

impl SoftwareBytes {
    /// Reads them. Returns `None` if the frame has no XSAVE area.
    ///
    /// # Safety
    ///
    /// The frame is the kernel's.
    unsafe fn of(context: &SignalContext) -> Option<Self> {
        const MAGIC1: u32 = 0x4650_5853;
        /// Where they lie in the FXSAVE area, which has 512 bytes.
        const OFFSET: usize = 464;
        let area = context.machine.fpregs.cast::<u8>();
        if area.is_null() {
            return None;
        }
        // SAFETY: these bytes are in the FXSAVE area.
        let bytes = unsafe { area.wrapping_add(OFFSET).cast::<Self>().read() };
        (bytes.magic1 == MAGIC1).then_some(bytes)
    }
}

/// Returns the size in bytes of the FPU's state in a frame, which lies at `machine.fpregs`.
///
/// # Safety
///
/// The frame is the kernel's.
pub(super) unsafe fn state_size(context: &SignalContext) -> usize {
    const FXSAVE: usize = 512;
    if context.machine.fpregs.is_null() {
        return 0;
    }
    // SAFETY: the caller guarantees this.
    unsafe { SoftwareBytes::of(context) }.map_or(FXSAVE, |bytes| bytes.extended_size as usize)
}

/// PKRU in a signal frame.
struct SavedPkru {
    area: XsaveArea<'static>,
    offset: usize,
}

impl SavedPkru {
    /// Finds PKRU in a frame. Returns `None` if the frame has none.
    ///
    /// # Safety
    ///
    /// The frame is the kernel's, and outlives the result.
    unsafe fn of(context: &SignalContext) -> Option<Self> {
        const MAGIC2: u32 = 0x4650_5845;
        let area = context.machine.fpregs.cast::<u8>();
        // SAFETY: the caller guarantees this.
        let software = unsafe { SoftwareBytes::of(context) }?;
        let (offset, size) = (PKRU_OFFSET.load(Ordering::Relaxed), software.state_size as usize);
        if software.features & XsaveArea::PKRU == 0 || offset + 4 > size {
            return None;
        }
        // SAFETY: with the first magic number the area has this size, and the second magic number follows it.
        if unsafe { area.wrapping_add(size).cast::<u32>().read_unaligned() } != MAGIC2 {
            return None;
        }
        // SAFETY: both magic numbers confirm the size of the area, and nothing else refers to it while the handler
        // runs.
        let bytes = unsafe { std::slice::from_raw_parts_mut(area, size) };
        Some(Self { area: XsaveArea::new(bytes)?, offset })
    }

    fn read(&self) -> KeyRights {
        self.area.pkru(self.offset).unwrap_or(KeyRights::LINUX_INITIAL)
    }

    fn write(&mut self, rights: KeyRights) {
        // `of` has checked that the area contains this offset.
        let _ = self.area.set_pkru(self.offset, rights);
    }
}
