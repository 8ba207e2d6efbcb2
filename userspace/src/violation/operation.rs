//! What an instruction does with memory, as far as advice about a violation depends on it.

use crate::sys;

/// What an instruction does with the memory that it writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// It counts up or down: INC, DEC, XADD, or an addition or subtraction of a constant.
    Counts,
    /// It exchanges a value atomically, as taking a lock does: XCHG, or CMPXCHG with a LOCK prefix.
    Exchanges,
    /// Something else, such as a plain store.
    Other,
}

/// The longest instruction in bytes.
const LONGEST: usize = 15;

impl Operation {
    /// Decodes the instruction at an address.
    pub(super) fn at(instruction: u64) -> Self {
        let mut code = [0; LONGEST];
        // At the end of its page the rest may not be readable. What was read before decides.
        let _ = sys::copy_bytes_from(instruction as usize, &mut code);
        Self::decode(&code)
    }

    /// # References
    ///
    /// Intel SDM volume 2, chapter "Instruction Format" and appendix "Opcode Map".
    fn decode(code: &[u8]) -> Self {
        const LOCK: u8 = 0xf0;
        let is_prefix = |byte: &u8| matches!(*byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | LOCK | 0xf2 | 0xf3);
        let prefixes = code.iter().take_while(|byte| is_prefix(byte)).count();
        let is_locked = code[..prefixes].contains(&LOCK);
        let opcode = match &code[prefixes..] {
            // REX.
            [0x40..=0x4f, rest @ ..] | rest => rest,
        };
        // The operation that the register field of the second byte chooses.
        let chosen = |modrm: &u8| modrm >> 3 & 7;
        match opcode {
            [0x0f, 0xc0 | 0xc1, ..] => Self::Counts,
            [0xfe | 0xff, modrm, ..] if matches!(chosen(modrm), 0 | 1) => Self::Counts,
            // ADD and SUB of a constant.
            [0x80 | 0x81 | 0x83, modrm, ..] if matches!(chosen(modrm), 0 | 5) => Self::Counts,
            [0x0f, 0xb0 | 0xb1, ..] if is_locked => Self::Exchanges,
            [0x86 | 0x87, ..] => Self::Exchanges,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Operation::{self, *};

    #[test]
    fn instructions_as_compilers_write_them() {
        for (code, expected) in [
            // lock inc qword ptr [rax]; lock dec qword ptr [rdi]; lock xadd [rdi], rax
            (&[0xf0, 0x48, 0xff, 0x00][..], Counts),
            (&[0xf0, 0x48, 0xff, 0x0f], Counts),
            (&[0xf0, 0x48, 0x0f, 0xc1, 0x07], Counts),
            // inc qword ptr [rax], as for an `Rc`; add dword ptr [rbx + 8], -1; lock sub qword ptr [rdi], 1
            (&[0x48, 0xff, 0x00], Counts),
            (&[0x83, 0x43, 0x08, 0xff], Counts),
            (&[0xf0, 0x48, 0x83, 0x2f, 0x01], Counts),
            // lock cmpxchg [rdi], ecx; lock cmpxchg [r12], cl; xchg [rdi], eax
            (&[0xf0, 0x0f, 0xb1, 0x0f], Exchanges),
            (&[0xf0, 0x41, 0x0f, 0xb0, 0x0c, 0x24], Exchanges),
            (&[0x87, 0x07], Exchanges),
            // mov [rdi], rax; mov byte ptr [rdi], 1; rep movsb; movaps [rdi], xmm0; or dword ptr [rdi], 1; call [rax]
            (&[0x48, 0x89, 0x07], Other),
            (&[0xc6, 0x07, 0x01], Other),
            (&[0xf3, 0xa4], Other),
            (&[0x0f, 0x29, 0x07], Other),
            (&[0x83, 0x0f, 0x01], Other),
            (&[0xff, 0x10], Other),
            (&[0xf0], Other),
            (&[], Other),
        ] {
            assert_eq!(Operation::decode(code), expected, "{code:02x?}");
        }
    }

    #[test]
    fn an_instruction_in_memory() {
        let code = [0xf0u8, 0x48, 0xff, 0x00, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(Operation::at(code.as_ptr().addr() as u64), Counts);
    }
}
