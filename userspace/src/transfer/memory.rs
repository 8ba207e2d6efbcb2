//! A domain's memory, as the caller reads results from it.

#![expect(unsafe_code, reason = "it copies from domain memory")]

use std::alloc::Layout;
use std::cell::Cell;
use std::fmt;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr;

use super::plain::{Block, Plain};
use super::stack::{SMALL, Stack, StackLimit, apart};
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
    /// The caller's memory is too short for it.
    NoMemory,
    /// No protection key was free to access the domain's memory.
    NoKey,
    /// Its vectors are nested too deep, more than 128, or it takes more of the caller's stack than there is.
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
            Self::NoMemory => f.write_str("the caller has too little memory for it"),
            Self::NoKey => f.write_str("no protection key was free to access the domain's memory"),
            Self::TooDeep => f.write_str("it is nested too deep, or its parts are too large, for the caller's stack"),
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
    stack: Stack,
}

impl<'a> DomainMemory<'a> {
    /// `ranges` are the addresses that results may lie in.
    #[inline]
    pub(crate) fn new(ranges: &'a [Range<usize>], limit: StackLimit) -> Self {
        let size = ranges.iter().map(Range::len).sum();
        Self { ranges, budget: Cell::new(size), depth: Cell::new(0), stack: Stack::new(limit) }
    }

    /// Copies the wire at an address and calls a function with it, which makes a result of it.
    ///
    /// # Errors
    ///
    /// The function's, [`InvalidResult::Inaccessible`], and [`InvalidResult::TooDeep`].
    #[inline]
    pub(crate) fn receive<W: Plain, T>(
        &self,
        mailbox: usize,
        from_wire: impl FnOnce(&W) -> Result<T, InvalidResult>,
    ) -> Result<T, InvalidResult> {
        let receive = || {
            let mut wire = MaybeUninit::<W>::uninit();
            // This is the only copy: what is checked is what is used.
            sys::copy_value_from(mailbox, &mut wire)?;
            // SAFETY: it was copied, and any bytes are a value of a plain type.
            from_wire(unsafe { wire.assume_init_ref() })
        };
        self.with_room(size_of::<T>() + size_of::<W>(), receive)
    }

    /// Calls a function that makes values of this size on the stack.
    ///
    /// # Errors
    ///
    /// The function's, and [`InvalidResult::TooDeep`] if the stack has no room for them.
    #[inline]
    pub(super) fn with_room<R>(
        &self,
        size: usize,
        receive: impl FnOnce() -> Result<R, InvalidResult>,
    ) -> Result<R, InvalidResult> {
        if size <= SMALL {
            receive()
        } else if self.stack.has_room(size) {
            apart(receive)
        } else {
            Err(InvalidResult::TooDeep)
        }
    }

    /// Copies the elements of a block that the domain has allocated for its result.
    ///
    /// # Errors
    ///
    /// [`InvalidResult::OutOfBounds`], [`InvalidResult::Inaccessible`], [`InvalidResult::TooLarge`] and
    /// [`InvalidResult::NoMemory`].
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
        let mut values = vec_with_room(length)?;
        if bytes > 0 {
            self.ranges.iter().find(inside).ok_or(out_of_bounds)?;
            sys::copy_from(address, &mut values.spare_capacity_mut()[..length])?;
        }
        // SAFETY: all elements were copied if they have a size, and any bytes are a value.
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

    /// Reads the elements of a vector, which may be vectors again. Each takes `size` bytes.
    pub(super) fn descend<R>(
        &self,
        size: usize,
        receive: impl FnOnce() -> Result<R, InvalidResult>,
    ) -> Result<R, InvalidResult> {
        const LIMIT: u32 = 128;
        let depth = self.depth.get();
        if depth >= LIMIT || !self.stack.has_room(size) {
            return Err(InvalidResult::TooDeep);
        }
        self.depth.set(depth + 1);
        let result = apart(receive);
        self.depth.set(depth);
        result
    }
}

/// Returns an empty vector with room for `length` elements.
///
/// # Errors
///
/// [`InvalidResult::NoMemory`].
pub(crate) fn vec_with_room<T>(length: usize) -> Result<Vec<T>, InvalidResult> {
    let mut values = Vec::new();
    values.try_reserve_exact(length).map_err(|_| InvalidResult::NoMemory)?;
    Ok(values)
}

/// Makes a box of what a function returns.
///
/// # Errors
///
/// The function's, [`InvalidResult::NoMemory`], and [`InvalidResult::TooDeep`].
pub(super) fn boxed<T>(
    memory: &DomainMemory<'_>,
    receive: impl FnOnce() -> Result<T, InvalidResult>,
) -> Result<Box<T>, InvalidResult> {
    let layout = Layout::new::<MaybeUninit<T>>();
    let place: *mut MaybeUninit<T> = if layout.size() == 0 {
        ptr::dangling_mut()
    } else {
        // SAFETY: the size is not 0.
        unsafe { std::alloc::alloc(layout) }.cast()
    };
    if place.is_null() {
        return Err(InvalidResult::NoMemory);
    }
    // SAFETY: it was just allocated with this layout if it has a size, and its contents need no initialisation.
    let mut place = unsafe { Box::from_raw(place) };
    memory.with_room(size_of::<T>(), || {
        place.write(receive()?);
        Ok(())
    })?;
    // SAFETY: it was just written.
    Ok(unsafe { place.assume_init() })
}

/// Makes an array of what a function returns for the elements of another.
///
/// # Errors
///
/// The function's.
pub(super) fn array<W, T, const N: usize>(
    wires: &[W; N],
    mut receive: impl FnMut(&W) -> Result<T, InvalidResult>,
) -> Result<[T; N], InvalidResult> {
    /// An array whose first elements exist.
    struct Partial<T, const N: usize> {
        values: MaybeUninit<[T; N]>,
        count: usize,
    }
    impl<T, const N: usize> Partial<T, N> {
        const fn start(&mut self) -> *mut T {
            self.values.as_mut_ptr().cast()
        }
    }
    impl<T, const N: usize> Drop for Partial<T, N> {
        fn drop(&mut self) {
            // SAFETY: so many elements exist, and nothing uses them after this.
            unsafe { ptr::slice_from_raw_parts_mut(self.start(), self.count).drop_in_place() };
        }
    }
    let mut partial = Partial::<T, N> { values: MaybeUninit::uninit(), count: 0 };
    for wire in wires {
        let value = receive(wire)?;
        let place = partial.start().wrapping_add(partial.count);
        // SAFETY: there is one place for each of the N wires.
        unsafe { place.write(value) };
        partial.count += 1;
    }
    partial.count = 0;
    // SAFETY: all elements exist, and the guard forgets them.
    Ok(unsafe { partial.values.as_ptr().read() })
}
