//! Restartable sequences: the area that the kernel writes when it returns to a thread in user mode.

#![expect(unsafe_code, reason = "it makes system calls")]

use std::ffi::c_int;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::assembly::thread_pointer;
use super::loader::lookup;
use super::threads::auxiliary;

/// Returns the calling thread's restartable-sequences area, if glibc registered one.
pub(crate) fn rseq_area() -> Option<usize> {
    let (offset, size) = (lookup(c"__rseq_offset")?, lookup(c"__rseq_size")?);
    // SAFETY: glibc defines the symbol as an `unsigned int`.
    if unsafe { size.cast::<u32>().read() } == 0 {
        return None;
    }
    // SAFETY: glibc defines the symbol as a `ptrdiff_t`.
    let offset = unsafe { offset.cast::<isize>().read() };
    Some(thread_pointer().wrapping_add_signed(offset))
}

/// Unregisters a restartable-sequences area of the calling thread; async-signal-safe.
///
/// The kernel writes the area when it returns to the thread, with the rights in force. A domain has no rights to write
/// it, and the failed write kills the process.
///
/// # References
///
/// Linux 6.12, `kernel/rseq.c`; glibc 2.35 manual, "Restartable Sequences".
pub(crate) fn unregister_rseq(area: usize) -> io::Result<()> {
    const UNREGISTER: c_int = 1;
    const SIGNATURE: u32 = 0x5305_3053;
    /// The size that glibc registers, unless the kernel asks for more.
    const LENGTH: u32 = 32;
    const AT_RSEQ_FEATURE_SIZE: libc::c_ulong = 27;
    let wanted = (auxiliary(AT_RSEQ_FEATURE_SIZE) as u32).next_multiple_of(LENGTH);
    let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
    for length in [LENGTH, wanted] {
        // SAFETY: after this call the kernel no longer writes the area, and the call changes no other memory.
        if unsafe { libc::syscall(libc::SYS_rseq, area, length, UNREGISTER, SIGNATURE) } == 0 {
            return Ok(());
        }
        refused = io::Error::last_os_error();
    }
    match refused.raw_os_error() {
        // The kernel has no such call.
        Some(libc::ENOSYS) => Ok(()),
        // An attempt has registered this module's area, as below, and failed then.
        _ if unregister_own_rseq().is_ok() => Ok(()),
        // Either the thread has unregistered its area already, or it has registered one with other arguments. EINVAL
        // stands for both. Registering an area succeeds in the first case only.
        _ => match register_rseq() {
            Ok(()) => unregister_own_rseq(),
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
            Err(_) => Err(refused),
        },
    }
}

#[repr(align(32))]
struct RseqArea([AtomicU64; 4]);

/// The area that [`register_rseq`] registers.
static RSEQ_AREA: RseqArea = RseqArea([const { AtomicU64::new(0) }; 4]);

/// Registers this module's area for the calling thread. It fails if the thread has one, which is what callers test.
///
/// # References
///
/// Linux 6.12, `include/uapi/linux/rseq.h`.
pub(crate) fn register_rseq() -> io::Result<()> {
    // `cpu_id`, the upper half, is RSEQ_CPU_ID_UNINITIALIZED.
    RSEQ_AREA.0[0].store(0xffff_ffff << 32, Ordering::Relaxed);
    rseq_call(0)
}

/// Unregisters this module's area.
pub(crate) fn unregister_own_rseq() -> io::Result<()> {
    const UNREGISTER: c_int = 1;
    rseq_call(UNREGISTER)
}

fn rseq_call(flags: c_int) -> io::Result<()> {
    // The signature precedes each abort handler. This area has no handlers, so any signature serves.
    let (length, signature) = (size_of::<RseqArea>(), 0);
    // SAFETY: the area is an aligned static of the size of the kernel's first version, and nothing else uses it.
    match unsafe { libc::syscall(libc::SYS_rseq, RSEQ_AREA.0.as_ptr(), length, flags, signature) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
