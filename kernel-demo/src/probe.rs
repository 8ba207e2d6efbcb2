//! Single accesses whose faults are caught, so that what the machine allows can be asked.

use core::arch::naked_asm;

use pkru::rights::Access;
use spin::Mutex;

use crate::traps::Trap;

static CAUGHT: Mutex<Option<Trap>> = Mutex::new(None);

/// Makes one access of one byte, and returns the trap that it raised, if it did. A write writes 0xc3, the byte of
/// `ret`; an execution calls the address, where a `ret` must stand.
///
/// # Errors
///
/// The trap.
///
/// # Safety
///
/// If the access is allowed, it breaks nothing.
pub unsafe fn access(address: u64, access: Access) -> Result<(), Trap> {
    let probe: unsafe extern "C" fn(u64) = match access {
        Access::Read => read,
        Access::Write => write,
        Access::Execute => jump,
    };
    *TARGET.lock() = (access == Access::Execute).then_some(address);
    // SAFETY: the caller answers for the access; a trap at it resumes after it.
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
    caught.then(|| at(give_up))
}

pub(crate) fn record(trap: &Trap) {
    *CAUGHT.lock() = Some(*trap);
}

/// The address that is being executed.
static TARGET: Mutex<Option<u64>> = Mutex::new(None);

#[unsafe(naked)]
unsafe extern "C" fn read(address: u64) {
    naked_asm!("mov al, [rdi]", "ret")
}

#[unsafe(naked)]
unsafe extern "C" fn write(address: u64) {
    naked_asm!("mov byte ptr [rdi], 0xc3", "ret")
}

/// Jumps, so that the `ret` at the target returns to the caller, and `give_up` can do so in its place.
#[unsafe(naked)]
unsafe extern "C" fn jump(address: u64) {
    naked_asm!("jmp rdi")
}

/// Where a probe resumes whose access raised a trap.
#[unsafe(naked)]
unsafe extern "C" fn give_up(_: u64) {
    naked_asm!("ret")
}
