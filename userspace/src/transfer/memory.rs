//! A domain's memory, as the caller reads results from it.

#![expect(unsafe_code, reason = "it copies from domain memory")]

use std::cell::Cell;
use std::fmt;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::plain::{Block, Plain};
use crate::sys::{self, Inaccessible};

/// What is wrong with a result that comes from a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InvalidResult {
    /// It refers to memory that is not the domain's.
    OutOfBounds {
        /// The start of that memory.
        address: u64,
        /// Its size in bytes.
        length: u64,
    },
    /// It lies on a page that the caller cannot read: code in the domain has changed the page's protection or unmapped it.
    Inaccessible {
        /// The address.
        address: u64,
    },
    /// Its parts take more memory together than the domain has.
    TooLarge,
    /// No protection key was free to access the domain's memory.
    NoKey,
    /// Its vectors are nested too deep: more than 128, or fewer if their elements are large.
    TooDeep,
    /// The type has no such value or tag.
    BadValue {
        /// The type.
        of: &'static str,
        /// The value.
        value: u64,
    },
    /// Its text is not UTF-8.
    NotUtf8,
}

impl fmt::Display for InvalidResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfBounds { address, length } => {
                write!(f, "memory at {address:#x}, {length} bytes long, is not the domain's")
            }
            Self::Inaccessible { address } => {
                write!(f, "{address:#x} is in the domain's memory, but on a page that is not accessible any more")
            }
            Self::TooLarge => f.write_str("its parts take more memory than the domain has"),
            Self::NoKey => f.write_str("no protection key was free to access the domain's memory"),
            Self::TooDeep => f.write_str("its vectors are nested too deep"),
            Self::BadValue { of, value } => write!(f, "{value:#x} is not a valid {of}"),
            Self::NotUtf8 => f.write_str("its text is not UTF-8"),
        }
    }
}

impl std::error::Error for InvalidResult {}

impl From<Inaccessible> for InvalidResult {
    fn from(Inaccessible { address }: Inaccessible) -> Self {
        Self::Inaccessible { address: address as u64 }
    }
}

/// A domain's memory, as the caller reads it: it checks every range and copies.
#[derive(Debug)]
pub struct DomainMemory<'a> {
    ranges: &'a [Range<usize>],
    /// How many bytes the result may still take in the caller's memory.
    budget: Cell<usize>,
    /// How many vectors are being read, one within the other.
    depth: Cell<u32>,
    /// How many bytes of the caller's stack deeply nested vectors may still take.
    stack: Cell<usize>,
}

impl<'a> DomainMemory<'a> {
    /// `ranges` are the addresses that results may lie in.
    #[inline]
    pub(crate) fn new(ranges: &'a [Range<usize>]) -> Self {
        /// Reading takes eight to ten times the size of the parts, and a thread of std has a stack of 2 MiB.
        const STACK: usize = 64 * 1024;
        let size = ranges.iter().map(Range::len).sum();
        Self { ranges, budget: Cell::new(size), depth: Cell::new(0), stack: Cell::new(STACK) }
    }

    /// Copies the wire at an address.
    ///
    /// # Errors
    ///
    /// [`InvalidResult::Inaccessible`].
    #[inline]
    pub(crate) fn copy_value<W: Plain>(&self, address: usize) -> Result<W, InvalidResult> {
        let mut value = MaybeUninit::uninit();
        sys::copy_value_from(address, &mut value)?;
        // SAFETY: it was copied, and any bytes are a value of a plain type.
        Ok(unsafe { value.assume_init() })
    }

    /// Copies the elements of a block that the domain has allocated for its result.
    ///
    /// # Errors
    ///
    /// [`InvalidResult::OutOfBounds`], [`InvalidResult::Inaccessible`] and [`InvalidResult::TooLarge`].
    pub(super) fn copy_block<W: Plain>(&self, block: Block) -> Result<Vec<W>, InvalidResult> {
        let out_of_bounds = InvalidResult::OutOfBounds {
            address: block.address,
            length: block.length.saturating_mul(size_of::<W>() as u64),
        };
        let length = usize::try_from(block.length).map_err(|_| out_of_bounds)?;
        let bytes = length.checked_mul(size_of::<W>()).ok_or(out_of_bounds)?;
        // Values of size 0 can be any number, and each costs the caller time.
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
        sys::copy_from(address, &mut values.spare_capacity_mut()[..length])?;
        // SAFETY: all elements were copied, and any bytes are a value.
        unsafe { values.set_len(length) };
        Ok(values)
    }

    /// Counts memory that a part of the result takes in the caller's memory.
    ///
    /// # Errors
    ///
    /// [`InvalidResult::TooLarge`] if all parts together take more than the domain has.
    pub(super) fn charge(&self, bytes: usize) -> Result<(), InvalidResult> {
        let left = self.budget.get().checked_sub(bytes).ok_or(InvalidResult::TooLarge)?;
        self.budget.set(left);
        Ok(())
    }

    /// Reads the elements of a vector, which may be vectors again. Each takes `part` bytes.
    pub(super) fn descend<R>(
        &self,
        part: usize,
        receive: impl FnOnce() -> Result<R, InvalidResult>,
    ) -> Result<R, InvalidResult> {
        const LIMIT: u32 = 128;
        /// Types that do not contain themselves nest no deeper.
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
