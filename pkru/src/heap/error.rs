//! What is wrong with a pointer, or with the heap itself.

use core::fmt;
use core::num::NonZeroUsize;

use super::ground::GRANULE;

/// The error of a heap's functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeapError {
    /// The pointer that was freed or resized is outside this heap.
    Foreign {
        /// The pointer's address.
        address: usize,
    },
    /// The pointer that was freed or resized is inside the heap, but does not point to a block.
    NotABlock {
        /// The pointer's address.
        address: usize,
    },
    /// The block that was freed or resized is already free.
    DoubleFree {
        /// The block's address.
        address: usize,
    },
    /// The heap is damaged.
    Corrupt(Corruption),
}

/// Damage that code has done to the heap it uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Corruption {
    /// What was overwritten.
    pub damage: Damage,
    /// The address of the block that it belongs to, or of the bytes that were overwritten.
    pub block: usize,
    /// The size in bytes of the block. It is the size that was asked for, or up to 31 bytes more for a freed block.
    pub size: Option<usize>,
    /// A code address where the block was freed ([`Damage::Freed`]) or else allocated, if it was recorded. It comes from
    /// the heap's memory, so it is hostile.
    pub site: Option<usize>,
}

/// What was overwritten in a heap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// The bytes behind a block.
    Behind,
    /// The bytes before a block, where the heap keeps its size.
    Before,
    /// A block that was free.
    Freed,
    /// The heap's own records.
    Records,
}

/// Where damage was found, in one word: the address of a block or of the heap, and in the bits that its alignment leaves
/// what was damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault(NonZeroUsize);

impl Fault {
    const DAMAGES: [Damage; 4] = [Damage::Behind, Damage::Before, Damage::Freed, Damage::Records];

    #[cold]
    pub(super) fn new(damage: Damage, block: usize) -> Self {
        let code = Self::DAMAGES.iter().position(|other| *other == damage).unwrap_or(0);
        // No block is at address 0.
        Self(NonZeroUsize::new(block & !(GRANULE - 1) | code).unwrap_or(NonZeroUsize::MAX))
    }

    pub(super) fn damage(self) -> Damage {
        Self::DAMAGES[self.0.get() % GRANULE % Self::DAMAGES.len()]
    }

    pub(super) fn block(self) -> usize {
        self.0.get() & !(GRANULE - 1)
    }
}

impl fmt::Display for HeapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign { address } => write!(f, "{address:#x} is not in the domain's heap"),
            Self::NotABlock { address } => write!(f, "{address:#x} is not a block of the domain's heap"),
            Self::DoubleFree { address } => write!(f, "the block at {address:#x} is already free"),
            Self::Corrupt(corruption) => corruption.fmt(f),
        }
    }
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { damage, block, size, site } = self;
        f.write_str(match damage {
            Damage::Behind => "the bytes behind ",
            Damage::Before => "the bytes before ",
            Damage::Freed => "freed memory: ",
            Damage::Records => "the heap's own records",
        })?;
        if *damage == Damage::Records {
            write!(f, " at {block:#x} were overwritten")?;
        } else {
            match size {
                // The size that was asked for is not kept for a free block.
                Some(size) if *damage == Damage::Freed => write!(f, "the block of at most {size} bytes at {block:#x}")?,
                Some(size) => write!(f, "the {size}-byte block at {block:#x}")?,
                None => write!(f, "the block at {block:#x}")?,
            }
            f.write_str(if *damage == Damage::Freed { " was overwritten" } else { " were overwritten" })?;
        }
        match (site, damage) {
            (Some(site), Damage::Freed) => write!(f, " after it was freed at {site:#x}"),
            (Some(site), _) => write!(f, "; it was allocated at {site:#x}"),
            // What an earlier call has done may be seen when the block is used again.
            (None, Damage::Freed) => f.write_str(", perhaps by an earlier call"),
            (None, _) => Ok(()),
        }
    }
}

impl core::error::Error for HeapError {}
