//! Rust panics in a domain.
//!
//! Before std calls the panic hook, it counts the panic and takes a lock on the hook. These are two writes to statics,
//! and in a domain they fault. The panic ends the call in any case, so nothing needs the values. The fault handler sets
//! the registers as if the instruction had written, leaves memory unchanged, and resumes after the instruction. The
//! hook then runs in the domain and reports the message ([`inside::panic`](crate::inside::panic)).
//!
//! This module learns the instructions from a panic in a trial call. In a domain with `Globals::Writable` the writes do
//! not fault, and the hook undoes them.

#![expect(unsafe_code, reason = "it reads an instruction and its operand in a domain")]

use std::sync::atomic::Ordering;

use pkru::fault::ErrorCode;
use pkru::rights::Access;

use super::frame::SignalContext;
use super::trap::{Interrupted, Trap};
use crate::inside::panic::{PANIC_WRITES, PanicWrite};
use crate::keys::statics;

/// Forgets the instructions, because the trial call did not end as expected.
pub(crate) fn forget() {
    PANIC_WRITES.iter().for_each(|write| write.instruction.store(0, Ordering::Relaxed));
}

/// Returns whether a trap is a write to one of the statics in which std records panics. A panic without a hook, as by
/// `resume_unwind`, writes them by other instructions.
pub(crate) fn is_noted_by(trap: &Trap) -> bool {
    let is_target = |write: &PanicWrite| {
        write.target.load(Ordering::Relaxed) == trap.at.address && write.instruction.load(Ordering::Relaxed) != 0
    };
    trap.at.key.is_some_and(statics::is_programs) && PANIC_WRITES.iter().any(is_target)
}

/// A write that the handler skips.
#[derive(Debug, Clone, Copy)]
pub(super) struct Skip {
    found: Instruction,
    /// The value of the static.
    value: u64,
}

fn find(instruction: u64) -> Option<&'static PanicWrite> {
    PANIC_WRITES.iter().find(|write| write.instruction.load(Ordering::Relaxed) == instruction)
}

/// Returns the write that faulted, if std records a panic with it. With `learning`, every atomic write to a static
/// counts.
///
/// # Safety
///
/// The values are those of a signal that interrupted a domain.
pub(super) unsafe fn recognize(at: &Interrupted, learning: bool) -> Option<Skip> {
    let is_write = ErrorCode::from_bits_retain(at.error_code).access() == Access::Write;
    if !at.key.is_some_and(statics::is_programs) || !is_write {
        return None;
    }
    match find(at.instruction) {
        // The same instruction at another address is a violation.
        Some(write) if write.target.load(Ordering::Relaxed) == at.address => {}
        None if learning && find(0).is_some() => {}
        _ => return None,
    }
    // SAFETY: the instruction was just executed, and the code of std continues after it.
    let code = unsafe { (at.instruction as *const [u8; 15]).read_unaligned() };
    let found = Instruction::decode(&code)?;
    let value = if found.is_wide {
        // SAFETY: the instruction may read this address, because its fault was about the write.
        unsafe { (at.address as *const u64).read_unaligned() }
    } else {
        // SAFETY: as above.
        u64::from(unsafe { (at.address as *const u32).read_unaligned() })
    };
    Some(Skip { found, value })
}

/// Sets the registers as if the instruction had written, and records the instruction in [`PANIC_WRITES`].
pub(super) fn skip(context: &mut SignalContext, at: &Interrupted, Skip { found, value }: Skip) {
    let registers = &mut context.machine.gregs;
    let mask = if found.is_wide { u64::MAX } else { u64::from(u32::MAX) };
    registers[libc::REG_EFL as usize] &= !ZERO;
    let operand = registers[found.register] as u64;
    let difference = match found.operation {
        Operation::Add => 1,
        Operation::ExchangeAdd => operand,
        Operation::CompareExchange => operand.wrapping_sub(value),
    };
    if let Some(write) = find(at.instruction).or_else(|| find(0)) {
        write.target.store(at.address, Ordering::Relaxed);
        write.difference.store(difference & mask, Ordering::Relaxed);
        write.size.store(if found.is_wide { 8 } else { 4 }, Ordering::Relaxed);
        write.instruction.store(at.instruction, Ordering::Relaxed);
    }
    match found.operation {
        Operation::Add => {}
        Operation::ExchangeAdd => registers[found.register] = value as i64,
        Operation::CompareExchange => {
            if registers[libc::REG_RAX as usize] as u64 & mask == value {
                registers[libc::REG_EFL as usize] |= ZERO;
            } else {
                registers[libc::REG_RAX as usize] = value as i64;
            }
        }
    }
    registers[libc::REG_RIP as usize] += found.length as i64;
}

/// The flag ZF.
const ZERO: i64 = 1 << 6;

/// An atomic instruction that writes memory.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Instruction {
    operation: Operation,
    /// The index of its register operand in a frame.
    register: usize,
    is_wide: bool,
    /// The length of the instruction in bytes.
    length: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Operation {
    /// ADD and INC. They return nothing but flags.
    Add,
    /// XADD
    ExchangeAdd,
    /// CMPXCHG
    CompareExchange,
}

impl Instruction {
    /// Decodes an instruction with a LOCK prefix. Returns `None` for other instructions.
    ///
    /// # References
    ///
    /// Intel SDM volume 2, chapter "Instruction Format".
    fn decode(code: &[u8; 15]) -> Option<Self> {
        const LOCK: u8 = 0xf0;
        let rest = code.strip_prefix(&[LOCK])?;
        let (rex, rest) = match rest {
            [rex @ 0x40..=0x4f, rest @ ..] => (*rex, rest),
            _ => (0, rest),
        };
        let (operation, rest, immediate) = match rest {
            [0x0f, 0xc1, rest @ ..] => (Operation::ExchangeAdd, rest, 0),
            [0x0f, 0xb1, rest @ ..] => (Operation::CompareExchange, rest, 0),
            [0x01, rest @ ..] => (Operation::Add, rest, 0),
            [0xff, rest @ ..] if rest[0] >> 3 & 7 == 0 => (Operation::Add, rest, 0),
            [0x83, rest @ ..] if rest[0] >> 3 & 7 == 0 => (Operation::Add, rest, 1),
            [0x81, rest @ ..] if rest[0] >> 3 & 7 == 0 => (Operation::Add, rest, 4),
            _ => return None,
        };
        let (modrm, rest_length) = (rest[0], rest.len());
        let (mode, base) = (modrm >> 6, modrm & 7);
        let index_byte = usize::from(mode != 3 && base == 4);
        let displacement = match (mode, base) {
            (0, 5) | (2, _) => 4,
            (0, 4) if rest[1] & 7 == 5 => 4,
            (0, _) => 0,
            (1, _) => 1,
            // A register operand does not fault.
            _ => return None,
        };
        let before = code.len() - rest_length;
        let number = modrm >> 3 & 7 | (rex >> 2 & 1) << 3;
        Some(Self {
            operation,
            register: REGISTERS[usize::from(number)],
            is_wide: rex & 8 != 0,
            length: before + 1 + index_byte + displacement + immediate,
        })
    }
}

/// The indices of the registers in a frame, in the order of the CPU's register numbers.
const REGISTERS: [usize; 16] = [
    libc::REG_RAX as usize,
    libc::REG_RCX as usize,
    libc::REG_RDX as usize,
    libc::REG_RBX as usize,
    libc::REG_RSP as usize,
    libc::REG_RBP as usize,
    libc::REG_RSI as usize,
    libc::REG_RDI as usize,
    libc::REG_R8 as usize,
    libc::REG_R9 as usize,
    libc::REG_R10 as usize,
    libc::REG_R11 as usize,
    libc::REG_R12 as usize,
    libc::REG_R13 as usize,
    libc::REG_R14 as usize,
    libc::REG_R15 as usize,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Option<Instruction> {
        let mut code = [0x90; 15];
        code[..bytes.len()].copy_from_slice(bytes);
        let found = Instruction::decode(&code)?;
        assert_eq!(found.length, bytes.len(), "{bytes:02x?}");
        Some(found)
    }

    #[test]
    fn instructions_as_compilers_write_them() {
        // lock xadd [rip + 0x12345678], rax
        let found = decode(&[0xf0, 0x48, 0x0f, 0xc1, 0x05, 0x78, 0x56, 0x34, 0x12]).unwrap();
        assert_eq!(
            (found.operation, found.register, found.is_wide),
            (Operation::ExchangeAdd, libc::REG_RAX as usize, true)
        );
        // lock cmpxchg [rbx], ecx
        let found = decode(&[0xf0, 0x0f, 0xb1, 0x0b]).unwrap();
        assert_eq!((found.operation, found.is_wide), (Operation::CompareExchange, false));
        // lock cmpxchg [r12 + rax*8 + 16], r9d
        let found = decode(&[0xf0, 0x45, 0x0f, 0xb1, 0x4c, 0xc4, 0x10]).unwrap();
        assert_eq!(found.register, libc::REG_R9 as usize);
        // lock inc qword ptr [rip + 1]; lock add qword ptr [rax], 1; lock add dword ptr [rsp + 0x100], 0x1000
        for bytes in [
            &[0xf0, 0x48, 0xff, 0x05, 1, 0, 0, 0][..],
            &[0xf0, 0x48, 0x83, 0x00, 1],
            &[0xf0, 0x81, 0x84, 0x24, 0, 1, 0, 0, 0, 0x10, 0, 0],
        ] {
            assert_eq!(decode(bytes).unwrap().operation, Operation::Add);
        }
    }

    #[test]
    fn others_are_left_alone() {
        // mov [rax], rcx; lock and dword ptr [rax], 1; lock dec dword ptr [rax]; lock xadd of a register, which is none
        for bytes in [&[0x48, 0x89, 0x08][..], &[0xf0, 0x83, 0x20, 1], &[0xf0, 0xff, 0x08], &[0xf0, 0x0f, 0xc1, 0xc1]] {
            assert_eq!(decode(bytes), None);
        }
    }
}
