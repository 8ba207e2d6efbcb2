//! Single accesses whose faults are caught: they show what the CPU allows.

#![expect(unsafe_code, reason = "a probe makes the access that it is given")]

use core::arch::naked_asm;

use pkru::rights::Access;
use spin::Mutex;

use crate::trap::Trap;

/// The trap of the last probe.
static CAUGHT: Mutex<Option<Trap>> = Mutex::new(None);

/// The address that a probe executes.
static TARGET: Mutex<Option<u64>> = Mutex::new(None);

/// Accesses one byte. A write stores 0xc3, the opcode of `ret`. An execution calls the address, which must hold a
/// `ret`.
///
/// # Errors
///
/// The trap that the access raised.
///
/// # Safety
///
/// If the CPU allows the access, the access is sound.
pub unsafe fn access(address: u64, access: Access) -> Result<(), Trap> {
    let probe: unsafe extern "C" fn(u64) = match access {
        Access::Read => read,
        Access::Write => write,
        Access::Execute => jump,
    };
    *TARGET.lock() = (access == Access::Execute).then_some(address);
    // SAFETY: an access that the CPU allows is sound by this function's contract. One that it denies has no effect, and
    // the trap resumes at `skip`, which returns here.
    unsafe { probe(address) };
    *TARGET.lock() = None;
    CAUGHT.lock().take().map_or(Ok(()), Err)
}

/// Returns where to resume if the instruction is a probe's.
pub(crate) fn resume_after(instruction: u64) -> Option<u64> {
    let at = |function: unsafe extern "C" fn(u64)| function as usize as u64;
    let caught = instruction == at(read)
        || instruction == at(write)
        || TARGET.lock().is_some_and(|target| target == instruction);
    caught.then(|| at(skip))
}

/// Records the trap of a probe.
pub(crate) fn record(trap: &Trap) {
    *CAUGHT.lock() = Some(*trap);
}

#[unsafe(naked)]
unsafe extern "C" fn read(address: u64) {
    naked_asm!("mov al, [rdi]", "ret")
}

#[unsafe(naked)]
unsafe extern "C" fn write(address: u64) {
    naked_asm!("mov byte ptr [rdi], 0xc3", "ret")
}

/// Jumps, so that the top of the stack is this function's return address, both for the target and for [`skip`].
#[unsafe(naked)]
unsafe extern "C" fn jump(address: u64) {
    naked_asm!("jmp rdi")
}

/// Returns from a probe whose access trapped.
#[unsafe(naked)]
unsafe extern "C" fn skip(_: u64) {
    naked_asm!("ret")
}
