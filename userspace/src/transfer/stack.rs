//! How much of the caller's stack receiving a result takes.
//!
//! The code in the domain chooses how deep a result's vectors nest. A program may receive on a thread with a small stack,
//! or results with large parts. So before a frame is entered whose size depends on the result's type, or whose number
//! the domain chooses, the stack pointer is compared with the end of the stack.

#![expect(unsafe_code, reason = "it reads the stack pointer")]

use std::arch::asm;
use std::cell::Cell;

/// Returns the lowest address that the stack with this stack pointer may reach.
pub(crate) type StackLimit = fn(usize) -> usize;

/// The stack of the thread that receives.
#[derive(Debug)]
pub(super) struct Stack {
    find: StackLimit,
    /// What it has found.
    limit: Cell<Option<usize>>,
}

impl Stack {
    #[inline]
    pub(super) const fn new(find: StackLimit) -> Self {
        Self { find, limit: Cell::new(None) }
    }

    /// Returns whether the stack has room for code that makes values of `size` bytes.
    #[inline(never)]
    pub(super) fn has_room(&self, size: usize) -> bool {
        let here = stack_pointer();
        let limit = self.limit.get().unwrap_or_else(|| {
            let limit = (self.find)(here);
            self.limit.set(Some(limit));
            limit
        });
        here.checked_sub(limit).is_some_and(|left| left >= needed(size))
    }
}

/// Returns how many bytes of stack code takes that makes values of `size` bytes, up to the next check.
const fn needed(size: usize) -> usize {
    /// What it takes for itself, allocations included.
    const CODE: usize = if cfg!(debug_assertions) { 16 * 1024 } else { 4 * 1024 };
    /// How many copies of a value there are on its way through options and tuples into its place.
    const COPIES: usize = if cfg!(debug_assertions) { 24 } else { 7 };
    size.saturating_mul(COPIES).saturating_add(CODE)
}

/// Calls a function that may have a large frame, in that frame and not in its caller's.
#[inline(never)]
pub(super) fn apart<R>(function: impl FnOnce() -> R) -> R {
    function()
}

/// Values up to this size in bytes are received in the frame of whoever asks for them.
pub(super) const SMALL: usize = 256;

fn stack_pointer() -> usize {
    let pointer;
    // SAFETY: it reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) pointer, options(nomem, nostack, preserves_flags)) };
    pointer
}

#[cfg(test)]
mod tests {
    use super::super::{Block, DomainMemory, Transfer};
    use super::*;

    /// Returns the bytes of stack that receiving a value takes, on a stack that is large enough.
    #[inline(never)]
    fn used<T: Transfer>(memory: &DomainMemory<'_>, mailbox: usize) -> usize {
        const SIZE: usize = 40 << 20;
        const MARK: u64 = 0xa5a5_a5a5_a5a5_a5a5;
        let top = (stack_pointer() - 1024) & !7;
        let words = std::ptr::with_exposed_provenance_mut::<u64>(top - SIZE);
        for index in 0..SIZE / 8 {
            // SAFETY: the thread's stack is larger than this, and nothing is there yet.
            unsafe { words.wrapping_add(index).write_volatile(MARK) };
        }
        run::<T>(memory, mailbox);
        // SAFETY: as above.
        let read = |index: &usize| unsafe { words.wrapping_add(*index).read_volatile() };
        let untouched = (0..SIZE / 8).take_while(|index| read(index) == MARK);
        SIZE - untouched.count() * 8
    }

    #[inline(never)]
    fn run<T: Transfer>(memory: &DomainMemory<'_>, mailbox: usize) {
        assert!(std::hint::black_box(memory.receive(mailbox, |wire| Vec::<T>::from_wire(wire, memory))).is_ok());
    }

    /// Checks that receiving a vector with a value in it takes no more than what is checked for, if its parts that are
    /// received together have this size.
    #[track_caller]
    fn check<T: Transfer>(size: usize) {
        // All options are there.
        let bytes = vec![1u8; 4 << 20];
        let block = Block { address: bytes.as_ptr().addr() as u64, length: 1 };
        let range = bytes.as_ptr().addr()..bytes.as_ptr().addr() + bytes.len();
        let mailbox = (&raw const block).addr();
        let run = move || used::<T>(&DomainMemory::new(std::slice::from_ref(&range), |_| 0), mailbox);
        let used = std::thread::Builder::new().stack_size(64 << 20).spawn(run).unwrap().join().unwrap();
        let limit = needed(size);
        println!("{used} of {limit} bytes of stack for {size}: {}", std::any::type_name::<T>());
        assert!(used < limit);
    }

    #[test]
    fn no_more_is_taken_than_is_checked_for() {
        type Large = [u8; 1 << 17];
        type Medium = [u8; 1 << 10];
        const LARGE: usize = size_of::<Large>();
        check::<u8>(1);
        check::<Large>(LARGE);
        check::<Medium>(1 << 10);
        check::<[bool; 1 << 17]>(LARGE);
        check::<[[bool; 1 << 10]; 128]>(LARGE);
        check::<Option<Large>>(LARGE);
        check::<Option<Option<Option<Large>>>>(LARGE);
        check::<(Large, u8)>(LARGE);
        check::<(u8, Large)>(LARGE);
        check::<(Large, Large, Large, Large, Large, Large, Large, Large)>(8 * LARGE);
        check::<(u8, u8, u8, u8, u8, u8, u8, Large)>(LARGE);
        check::<Result<Large, Large>>(LARGE);
        check::<Option<(u8, Option<(u8, Large)>)>>(LARGE);
        check::<Option<(u8, Option<(u8, Medium)>)>>(1 << 10);
        check::<Box<Large>>(LARGE);
        check::<Box<Option<(u8, Large)>>>(LARGE);
    }
}
