//! Copying from and to memory whose pages a domain may have made inaccessible.
//!
//! A domain can change the protection of its pages, or unmap them. The caller that then reads a result there must get
//! an error and no fault. So each access to such memory is an instruction at an address that the fault handler knows.
//! The handler asks [`resume_failed_copy`] where to resume; the copy then fails with the address of the fault.
//!
//! The bytes may change during a copy. In Rust that would be a data race, in assembly they come as they come.

#![expect(unsafe_code, reason = "it is assembly")]

use std::arch::naked_asm;
use std::mem::MaybeUninit;

/// The size of a word in bytes.
const WORD: usize = size_of::<u64>();

/// A copy failed: this address is not accessible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inaccessible {
    pub(crate) address: usize,
}

/// Copies the bytes of values from an address.
///
/// # Errors
///
/// [`Inaccessible`] if a byte cannot be read. Some of the bytes may then have been copied.
#[inline]
pub(crate) fn copy_from<T>(from: usize, to: &mut [MaybeUninit<T>]) -> Result<(), Inaccessible> {
    let length = size_of_val(to);
    // SAFETY: the target is writable.
    unsafe { copy_out(from, to.as_mut_ptr().cast(), length) }
}

/// Copies bytes from an address over others.
///
/// # Errors
///
/// As for [`copy_from`].
pub(crate) fn copy_bytes_from(from: usize, to: &mut [u8]) -> Result<(), Inaccessible> {
    // SAFETY: the target is writable.
    unsafe { copy_out(from, to.as_mut_ptr(), to.len()) }
}

/// # Safety
///
/// `to` is writable for `length` bytes.
unsafe fn copy_out(from: usize, to: *mut u8, length: usize) -> Result<(), Inaccessible> {
    let (end, words) = (from.wrapping_add(length), length & !(WORD - 1));
    // SAFETY: the target is writable. A fault at the source makes the function return.
    outcome(unsafe { read_words(to, from, end, length / WORD) })?;
    // SAFETY: as above.
    outcome(unsafe { read_bytes(to.wrapping_add(words), from.wrapping_add(words), end, length - words) })
}

/// Copies the bytes of one value from an address. For a small one this is cheaper than [`copy_from`].
///
/// # Errors
///
/// As for [`copy_from`].
#[inline]
pub(crate) fn copy_value_from<T>(from: usize, to: &mut MaybeUninit<T>) -> Result<(), Inaccessible> {
    /// More words are copied faster by one instruction.
    const MOST: usize = 4;
    let (read, unit): (unsafe extern "C" fn(*mut u8, usize, usize) -> usize, usize) = match size_of::<T>() {
        1 => (read_1, 1),
        2 => (read_2, 2),
        4 => (read_4, 4),
        size if size % WORD == 0 && size / WORD <= MOST => (read_8, WORD),
        _ => return copy_from(from, std::slice::from_mut(to)),
    };
    (0..size_of::<T>()).step_by(unit).try_for_each(|offset| {
        let (from, to) = (from.wrapping_add(offset), to.as_mut_ptr().cast::<u8>().wrapping_add(offset));
        // SAFETY: the target has room for the unit. A fault at the source makes the function return.
        outcome(unsafe { read(to, from, from.wrapping_add(unit)) })
    })
}

/// Copies bytes to an address.
///
/// # Errors
///
/// [`Inaccessible`] if a byte cannot be written. Some of the bytes may then have been copied.
///
/// # Safety
///
/// `from` is readable for `length` bytes, and no value of the program's is at `to`.
pub(crate) unsafe fn copy_to(from: *const u8, to: usize, length: usize) -> Result<(), Inaccessible> {
    let (end, words) = (to.wrapping_add(length), length & !(WORD - 1));
    // SAFETY: the source is readable. A fault at the target makes the function return.
    outcome(unsafe { write_words(to, from, end, length / WORD) })?;
    // SAFETY: as above.
    outcome(unsafe { write_bytes(to.wrapping_add(words), from.wrapping_add(words), end, length - words) })
}

#[inline]
fn outcome(address: usize) -> Result<(), Inaccessible> {
    if address == 0 { Ok(()) } else { Err(Inaccessible { address }) }
}

/// Copies words, and returns 0, or the address of a fault at `from..end`.
#[unsafe(naked)]
unsafe extern "C" fn read_words(to: *mut u8, from: usize, end: usize, count: usize) -> usize {
    naked_asm!("rep movsq", "xor eax, eax", "ret")
}

/// Copies bytes, and returns 0, or the address of a fault at `from..end`.
#[unsafe(naked)]
unsafe extern "C" fn read_bytes(to: *mut u8, from: usize, end: usize, count: usize) -> usize {
    naked_asm!("rep movsb", "xor eax, eax", "ret")
}

/// Copies one byte, and returns 0, or the address of a fault at `from..end`.
#[unsafe(naked)]
unsafe extern "C" fn read_1(to: *mut u8, from: usize, end: usize) -> usize {
    naked_asm!("mov al, [rsi]", "mov [rdi], al", "xor eax, eax", "ret")
}

/// Copies two bytes.
#[unsafe(naked)]
unsafe extern "C" fn read_2(to: *mut u8, from: usize, end: usize) -> usize {
    naked_asm!("mov ax, [rsi]", "mov [rdi], ax", "xor eax, eax", "ret")
}

/// Copies four bytes.
#[unsafe(naked)]
unsafe extern "C" fn read_4(to: *mut u8, from: usize, end: usize) -> usize {
    naked_asm!("mov eax, [rsi]", "mov [rdi], eax", "xor eax, eax", "ret")
}

/// Copies eight bytes.
#[unsafe(naked)]
unsafe extern "C" fn read_8(to: *mut u8, from: usize, end: usize) -> usize {
    naked_asm!("mov rax, [rsi]", "mov [rdi], rax", "xor eax, eax", "ret")
}

/// Copies words, and returns 0, or the address of a fault at `to..end`.
#[unsafe(naked)]
unsafe extern "C" fn write_words(to: usize, from: *const u8, end: usize, count: usize) -> usize {
    // Not the bytes of `read_words`, so that no linker folds the two into one.
    naked_asm!("rep movsq", "sub eax, eax", "ret")
}

/// Copies bytes, and returns 0, or the address of a fault at `to..end`.
#[unsafe(naked)]
unsafe extern "C" fn write_bytes(to: usize, from: *const u8, end: usize, count: usize) -> usize {
    naked_asm!("rep movsb", "sub eax, eax", "ret")
}

/// Where a copy resumes that has failed, with the address of the fault in RAX.
#[unsafe(naked)]
unsafe extern "C" fn failed() {
    naked_asm!("ret")
}

/// Returns the instruction at which to resume after a fault at `address`, with that address in RAX, if the instruction
/// that faulted is one of this module's and the address is one that it copies from or to for its caller. `arguments`
/// are the values of RDI, RSI and RDX.
///
/// Async-signal-safe.
pub(crate) fn resume_failed_copy(instruction: u64, arguments: [u64; 3], address: u64) -> Option<u64> {
    // REP MOVS has advanced RDI and RSI to what it could not copy.
    let [rdi, rsi, end] = arguments;
    let foreign = if writing_instructions().contains(&instruction) {
        rdi..end
    } else if reading_instructions().contains(&instruction) {
        rsi..end
    } else {
        return None;
    };
    // 0 says that a copy has succeeded. Nobody's memory is there.
    (foreign.contains(&address) && address != 0).then_some(failed as *const () as u64)
}

/// Returns the addresses of the instructions that read at RSI for the caller.
pub(crate) fn reading_instructions() -> [u64; 6] {
    let functions = [
        read_words as *const (),
        read_bytes as *const (),
        read_1 as *const (),
        read_2 as *const (),
        read_4 as *const (),
        read_8 as *const (),
    ];
    functions.map(|function| function as u64)
}

/// Returns the addresses of the instructions that write at RDI for the caller.
fn writing_instructions() -> [u64; 2] {
    [write_words as *const (), write_bytes as *const ()].map(|function| function as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_copied() {
        let source: Vec<u8> = (0..200).collect();
        for length in [0, 1, 7, 8, 9, 64, 200] {
            let mut target = [MaybeUninit::new(0xff); 201];
            copy_from(source.as_ptr().addr(), &mut target[..length]).unwrap();
            // SAFETY: all bytes were initialised.
            let target = target.map(|byte| unsafe { byte.assume_init() });
            assert_eq!(target[..length], source[..length]);
            assert_eq!(target[length], 0xff);
            let mut target = vec![0xffu8; 201];
            // SAFETY: the target is a vector of bytes.
            unsafe { copy_to(source.as_ptr(), target.as_mut_ptr().addr(), length) }.unwrap();
            assert_eq!(target[..length], source[..length]);
            assert_eq!(target[length], 0xff);
        }
    }

    #[test]
    fn values_of_all_sizes_are_copied() {
        fn check<const SIZE: usize>() {
            let source: [u8; SIZE] = std::array::from_fn(|index| index as u8 + 1);
            let mut target = MaybeUninit::new([[0u8; SIZE], [0xff; SIZE]]);
            let first = target.as_mut_ptr().cast::<MaybeUninit<[u8; SIZE]>>();
            // SAFETY: the first half is a value of this type.
            copy_value_from(source.as_ptr().addr(), unsafe { &mut *first }).unwrap();
            // SAFETY: it was initialised.
            assert_eq!(unsafe { target.assume_init() }, [source, [0xff; SIZE]]);
        }
        check::<0>();
        check::<1>();
        check::<2>();
        check::<3>();
        check::<4>();
        check::<8>();
        check::<12>();
        check::<16>();
        check::<32>();
        check::<40>();
        check::<100>();
    }

    #[test]
    fn only_faults_of_what_is_copied_for_the_caller_are_taken() {
        let failed = Some(failed as *const () as u64);
        let (to, from) = (0x1000, 0x2000);
        let reads = |instruction, address| resume_failed_copy(instruction, [to, from, from + 8], address);
        for instruction in reading_instructions() {
            assert_eq!(reads(instruction, from), failed);
            assert_eq!(reads(instruction, from + 7), failed);
            for address in [from - 1, from + 8, to, 0, u64::MAX] {
                assert_eq!(reads(instruction, address), None, "{address:#x}");
            }
            assert_eq!(reads(instruction + 1, from), None);
            assert_eq!(reads(instruction - 1, from), None);
        }
        for instruction in writing_instructions() {
            let writes = |address| resume_failed_copy(instruction, [to, from, to + 8], address);
            assert_eq!((writes(to), writes(to + 7)), (failed, failed));
            for address in [to - 1, to + 8, from, 0, u64::MAX] {
                assert_eq!(writes(address), None, "{address:#x}");
            }
        }
    }
}
