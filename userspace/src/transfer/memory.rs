//! A domain's memory, as the caller reads results from it.

#![expect(unsafe_code, reason = "it copies from domain memory")]

use std::cell::Cell;
use std::fmt;
use std::ops::Range;

use super::plain::{Block, Plain};

/// What is wrong with a result that came out of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InvalidResult {
    /// It refers to memory that is not the domain's.
    OutOfBounds {
        /// Where that begins.
        address: u64,
        /// The number of bytes.
        length: u64,
    },
    /// It takes more memory, all parts together, than the domain has; parts of it must overlap.
    TooLarge,
    /// The domain's memory could not be given its key back.
    NoKey,
    /// It is nested too deep; the most is 128 vectors within each other, and fewer where their elements are large.
    TooDeep,
    /// The type has no such tag or value.
    BadValue {
        /// The type.
        of: &'static str,
        /// The value.
        value: u64,
    },
    /// Text that is not UTF-8.
    NotUtf8,
}

impl fmt::Display for InvalidResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfBounds { address, length } => {
                write!(f, "{length} bytes at {address:#x}, which are not in the domain's memory")
            }
            Self::TooLarge => f.write_str("more bytes than the domain's memory has"),
            Self::NoKey => f.write_str("memory of a domain that could not be given its protection key back"),
            Self::TooDeep => f.write_str("too many vectors within each other"),
            Self::BadValue { of, value } => write!(f, "{value:#x} as a {of}"),
            Self::NotUtf8 => f.write_str("text that is not UTF-8"),
        }
    }
}

impl std::error::Error for InvalidResult {}

/// A domain's memory, as its caller reads it: with a check of every range, and copying.
#[derive(Debug)]
pub struct DomainMemory<'a> {
    ranges: &'a [Range<usize>],
    /// How many bytes the result may still take, in the caller.
    budget: Cell<usize>,
    /// How many vectors are being received, each within the one before.
    depth: Cell<u32>,
    /// How many bytes of the caller's stack vectors may take that lie deep within others.
    stack: Cell<usize>,
}

impl<'a> DomainMemory<'a> {
    /// # Safety
    ///
    /// The ranges are mapped and readable by the calling thread, and nothing writes them meanwhile.
    #[inline]
    pub(crate) unsafe fn new(ranges: &'a [Range<usize>]) -> Self {
        /// Receiving takes some eight to ten times as much as the parts themselves, and a thread of std has 2 MiB.
        const STACK: usize = 64 * 1024;
        let size = ranges.iter().map(Range::len).sum();
        Self { ranges, budget: Cell::new(size), depth: Cell::new(0), stack: Cell::new(STACK) }
    }

    /// Copies values out of a block that the domain has allocated for its result.
    ///
    /// # Errors
    ///
    /// [`InvalidResult::OutOfBounds`] and [`InvalidResult::TooLarge`].
    pub(super) fn copy_block<W: Plain>(&self, block: Block) -> Result<Vec<W>, InvalidResult> {
        let out_of_bounds = InvalidResult::OutOfBounds {
            address: block.address,
            length: block.length.saturating_mul(size_of::<W>() as u64),
        };
        let length = usize::try_from(block.length).map_err(|_| out_of_bounds)?;
        let bytes = length.checked_mul(size_of::<W>()).ok_or(out_of_bounds)?;
        // Values without bytes could be any number; they cost the caller time all the same.
        self.charge(bytes.max(length))?;
        let address = block.address as usize;
        let inside =
            |range: &&Range<usize>| address >= range.start && address < range.end && range.end - address >= bytes;
        if bytes == 0 {
            return Ok(vec![W::zeroed(); length]);
        }
        self.ranges.iter().find(inside).ok_or(out_of_bounds)?;

        let mut values = Vec::<W>::new();
        values.try_reserve_exact(length).map_err(|_| InvalidResult::TooLarge)?;
        let target = values.as_mut_ptr().cast::<u8>();
        // SAFETY: the source is in the domain's memory, which can be read and is not written meanwhile; the target has
        // room.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, target, bytes) };
        // SAFETY: all elements were copied, and any bytes are a value.
        unsafe { values.set_len(length) };
        Ok(values)
    }

    /// Counts memory that a part of the result takes in the caller.
    ///
    /// # Errors
    ///
    /// [`InvalidResult::TooLarge`] if all parts together take more than the domain has.
    pub(super) fn charge(&self, bytes: usize) -> Result<(), InvalidResult> {
        let left = self.budget.get().checked_sub(bytes).ok_or(InvalidResult::TooLarge)?;
        self.budget.set(left);
        Ok(())
    }

    /// Receives the parts of a vector, which may be vectors again; each takes so many bytes.
    pub(super) fn descend<R>(
        &self,
        part: usize,
        receive: impl FnOnce() -> Result<R, InvalidResult>,
    ) -> Result<R, InvalidResult> {
        const LIMIT: u32 = 128;
        /// So deep types nest that do not contain themselves.
        const USUAL: u32 = 8;
        let (depth, stack) = (self.depth.get(), self.stack.get());
        let left = if depth < USUAL { Some(stack) } else { stack.checked_sub(part) };
        let Some(left) = left.filter(|_| depth < LIMIT) else { return Err(InvalidResult::TooDeep) };
        self.depth.set(depth + 1);
        self.stack.set(left);
        let result = receive();
        self.depth.set(depth);
        self.stack.set(stack);
        result
    }
}
