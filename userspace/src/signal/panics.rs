//! Rust panics in a domain.
//!
//! Before std calls the panic hook it counts the panic, and takes a lock that keeps the hook from being replaced: two
//! writes to statics, which a domain cannot make. The call is lost in any case, and nothing else looks at those statics
//! on its behalf, so the fault handler does as if they were made: it sets the registers as the instruction would, and
//! leaves memory alone. Then the hook runs in the domain, which is this crate's, and reports the message.
//!
//! Which instructions these are is learned from a panic in the first domain. A domain with `Globals::Writable` does
//! make those writes; there the hook takes them back.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pkru::fault::ErrorCode;
use pkru::registers::Pkru;
use pkru::rights::Access;

use super::Trap;
use crate::monitor::monitored;
use crate::report::{self, Report};
use crate::{globals, tls};

/// One of those instructions, and what it does to what.
struct Write {
    /// The address of the instruction; 0: there is none.
    instruction: AtomicU64,
    static_at: AtomicU64,
    /// What it adds.
    difference: AtomicU64,
    /// The size of the static in bytes.
    size: AtomicU64,
}

monitored! {
    static LEARNED: [Write; 4] = [const {
        Write {
            instruction: AtomicU64::new(0),
            static_at: AtomicU64::new(0),
            difference: AtomicU64::new(0),
            size: AtomicU64::new(0),
        }
    }; 4];
}

/// Installs a hook that reports panics in domains, and hands all others to the hook before it.
pub(crate) fn install_hook() {
    // It cannot be replaced while this thread panics, as in a destructor; then panics in domains have no message.
    if std::thread::panicking() {
        return;
    }
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if tls::is_in_domain() {
            take_back();
            let message = panic.to_string();
            // A Rust panic does not get as far as a frame that cannot unwind, for it ends here.
            if message.ends_with("panic in a function that cannot unwind") {
                report::end_call(Report::Exception);
            }
            report::end_call(Report::Panic { text: message.as_ptr().addr(), length: message.len() });
        }
        previous(panic);
    }));
}

/// Forgets what a trial has taught, because it did not end as it should.
pub(crate) fn forget() {
    LEARNED.iter().for_each(|write| write.instruction.store(0, Ordering::Relaxed));
}

/// Whether a fault is one of those writes; if `learning`, it is learned as one.
pub(super) fn is_bookkeeping(trap: &Trap, learning: bool) -> bool {
    let is_write = ErrorCode::from_bits_retain(trap.error_code).access() == Access::Write;
    if !trap.key.is_some_and(globals::is_of_the_program) || !is_write {
        return false;
    }
    let place_of = |address| LEARNED.iter().find(|write| write.instruction.load(Ordering::Relaxed) == address);
    if learning
        && place_of(trap.instruction).is_none()
        && let Some(free) = place_of(0)
    {
        free.static_at.store(trap.address, Ordering::Relaxed);
        free.instruction.store(trap.instruction, Ordering::Relaxed);
    }
    // The same instruction on something else is a mistake like any other.
    place_of(trap.instruction).is_some_and(|write| write.static_at.load(Ordering::Relaxed) == trap.address)
}

/// In a domain that may write statics: takes the writes back that std has made about a panic which ends here.
fn take_back() {
    let Some(key) = globals::key() else { return };
    // SAFETY: there are domains, so there is PKU.
    if !unsafe { Pkru::assume() }.read().get(key).is_empty() {
        return;
    }
    for write in LEARNED.iter().filter(|write| write.instruction.load(Ordering::Relaxed) != 0) {
        let (address, difference) = (write.static_at.load(Ordering::Relaxed), write.difference.load(Ordering::Relaxed));
        if write.size.load(Ordering::Relaxed) == 8 {
            // SAFETY: it is a static of std's, an atomic of that size, which this panic has changed by as much.
            unsafe { &*(address as *const AtomicU64) }.fetch_sub(difference, Ordering::Release);
        } else {
            // SAFETY: as above.
            unsafe { &*(address as *const AtomicU32) }.fetch_sub(difference as u32, Ordering::Release);
        }
    }
}

/// Does as if the instruction at which a domain has faulted had been executed, but for its write; `false` if it is none
/// that this knows.
///
/// # Safety
///
/// The frame is that of a page fault by the instruction's write to `address`.
pub(super) unsafe fn pass_over(context: &mut libc::ucontext_t, address: u64) -> bool {
    let registers = &mut context.uc_mcontext.gregs;
    let instruction = registers[libc::REG_RIP as usize] as *const [u8; 15];
    // SAFETY: the instruction has just been fetched; what follows it in its page or the next is code too.
    let code = unsafe { instruction.read_unaligned() };
    let Some(found) = Instruction::decode(&code) else { return false };
    let value = if found.is_wide {
        // SAFETY: the instruction reads there, and has faulted only for its write.
        unsafe { (address as *const u64).read_unaligned() }
    } else {
        // SAFETY: as above.
        u64::from(unsafe { (address as *const u32).read_unaligned() })
    };
    let mask = if found.is_wide { u64::MAX } else { u64::from(u32::MAX) };
    registers[libc::REG_EFL as usize] &= !ZERO;
    let operand = registers[found.register] as u64;
    let difference = match found.operation {
        Operation::Add => 1,
        Operation::ExchangeAdd => operand,
        Operation::CompareExchange => operand.wrapping_sub(value),
    };
    if let Some(write) =
        LEARNED.iter().find(|write| write.instruction.load(Ordering::Relaxed) == instruction.addr() as u64)
    {
        write.difference.store(difference & mask, Ordering::Relaxed);
        write.size.store(if found.is_wide { 8 } else { 4 }, Ordering::Relaxed);
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
    true
}

/// The flag ZF.
const ZERO: i64 = 1 << 6;

/// An atomic instruction that writes memory.
#[derive(Debug, PartialEq)]
struct Instruction {
    operation: Operation,
    /// The index of its register operand in a frame.
    register: usize,
    is_wide: bool,
    /// In bytes.
    length: usize,
}

#[derive(Debug, PartialEq)]
enum Operation {
    /// ADD, INC: only flags would tell what was there.
    Add,
    /// XADD
    ExchangeAdd,
    /// CMPXCHG
    CompareExchange,
}

impl Instruction {
    /// Decodes an instruction with a LOCK prefix; `None` if it is none of these.
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

/// Where a frame has the registers, in the order of the CPU's numbers.
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
