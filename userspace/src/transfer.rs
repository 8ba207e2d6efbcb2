//! How results cross from a domain to its caller.
//!
//! Whatever comes out of a domain is hostile until checked. So a result crosses in two halves. In the domain
//! [`Transfer::lend`] turns it into plain words, its *wire*, and leaves what they refer to in the domain's memory. The
//! caller copies the wire once and then builds a value of its own with [`Transfer::receive`], which checks every
//! address, length and tag, and copies everything.
//!
//! Arguments need no such thing: a closure that runs in a domain reads what it has captured in place.

use std::alloc::Layout;
use std::cell::Cell;
use std::fmt;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::tls;

/// A type of which any bytes are a value.
///
/// # Safety
///
/// Every pattern of `size_of::<Self>()` bytes is a value, and values hold no pointers that anything relies on.
pub unsafe trait Plain: Copy + 'static {
    /// Returns the value whose bytes are all zero.
    #[must_use]
    fn zeroed() -> Self {
        // SAFETY: any bytes are a value.
        unsafe { MaybeUninit::zeroed().assume_init() }
    }
}

macro_rules! plain {
    ($($type:ty),*) => {
        $(
            // SAFETY: any bytes are a value of it.
            unsafe impl Plain for $type {}

            impl Transfer for $type {
                type Wire = Self;

                #[inline]
                fn lend(self) -> Self {
                    self
                }

                #[inline]
                fn receive(wire: Self, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
                    Ok(wire)
                }
            }
        )*
    };
}

plain!((), u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize, f32, f64);

// SAFETY: an array is its elements.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// A result that can leave a domain.
///
/// # Examples
///
/// A type of your own crosses by the wires of its fields, an enum for instance as an `Option` for each variant:
///
/// ```
/// use pkru_userspace::transfer::{DomainMemory, InvalidResult, Transfer};
///
/// struct Image {
///     width: u32,
///     pixels: Vec<u8>,
/// }
///
/// impl Transfer for Image {
///     type Wire = <(u32, Vec<u8>) as Transfer>::Wire;
///
///     fn lend(self) -> Self::Wire {
///         (self.width, self.pixels).lend()
///     }
///
///     fn receive(wire: Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
///         let (width, pixels) = Transfer::receive(wire, memory)?;
///         Ok(Self { width, pixels })
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot leave a domain",
    label = "the result of this function must be `Transfer`",
    note = "results are integers, `bool`, `char`, `String`, `Vec`, `Box`, `Option`, `Result`, arrays and tuples of up to eight such; \
            references cannot leave, so return a `String` or a `Vec`; \
            a pointer into the domain's memory, for a later call, leaves as a `usize`; \
            for a type of your own implement `Transfer` by its fields, as that trait's documentation shows"
)]
pub trait Transfer: Sized {
    /// What is copied out of the domain.
    type Wire: Plain;

    /// In the domain: gives the value up for its wire.
    fn lend(self) -> Self::Wire;

    /// In the caller: builds a value from a wire that the domain may have forged.
    ///
    /// # Errors
    ///
    /// If no value of this type can have this wire, or it refers to memory that is not the domain's.
    fn receive(wire: Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult>;
}

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
    pub(crate) fn copy_block<W: Plain>(&self, block: Block) -> Result<Vec<W>, InvalidResult> {
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
    fn charge(&self, bytes: usize) -> Result<(), InvalidResult> {
        let left = self.budget.get().checked_sub(bytes).ok_or(InvalidResult::TooLarge)?;
        self.budget.set(left);
        Ok(())
    }

    /// Receives the parts of a vector, which may be vectors again; each takes so many bytes.
    fn descend<R>(&self, part: usize, receive: impl FnOnce() -> Result<R, InvalidResult>) -> Result<R, InvalidResult> {
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

/// The wire of a vector: where its elements' wires lie, and how many there are.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Block {
    address: u64,
    length: u64,
}

// SAFETY: two integers.
unsafe impl Plain for Block {}

/// A block that code in a domain has lent to its caller.
struct Lent {
    start: *mut u8,
    layout: Layout,
}

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: it is the block of a vector that was forgotten, with that vector's layout.
        unsafe { std::alloc::dealloc(self.start, self.layout) };
    }
}

/// In a domain: has the vector's block freed when the next call begins. The caller has copied it by then. What a wire
/// says is not asked: wires can be copied, and received twice or never.
fn note_lent<W>(wires: Vec<W>) {
    let layout = Layout::array::<W>(wires.capacity()).expect("a vector has a layout");
    let mut wires = std::mem::ManuallyDrop::new(wires);
    // SAFETY: the pointer is null, or in a domain leads to its heap, which nothing else uses at this moment.
    let Some(heap) = (unsafe { tls::current_heap().as_ref() }) else { return };
    // A vector that was forged of other memory of the domain's is none of the heap's.
    if layout.size() == 0 || !heap.contains(wires.as_ptr().addr()) {
        return;
    }
    let root = heap.root().cast::<Vec<Lent>>();
    let list = if root.is_null() { Box::into_raw(Box::default()) } else { root };
    if root.is_null() {
        // SAFETY: as above; the allocation is over.
        if let Some(heap) = unsafe { tls::current_heap().as_mut() } {
            heap.set_root(list.cast());
        }
    }
    // SAFETY: it is a list that this function has made, and this thread alone runs in the domain.
    unsafe { &mut *list }.push(Lent { start: wires.as_mut_ptr().cast(), layout });
}

/// In a domain, at the beginning of a call: frees what the last one has lent.
#[inline]
pub(crate) fn free_lent() {
    // SAFETY: as in `note_lent`.
    let Some(heap) = (unsafe { tls::current_heap().as_mut() }) else { return };
    // What failed in an earlier call is not why this one aborts.
    heap.note_failed(0);
    let list = heap.root().cast::<Vec<Lent>>();
    if !list.is_null() {
        free_all(list);
    }
}

#[cold]
fn free_all(list: *mut Vec<Lent>) {
    // SAFETY: as in `note_lent`.
    unsafe { &mut *list }.clear();
}

impl<T: Transfer> Transfer for Vec<T> {
    type Wire = Block;

    fn lend(self) -> Block {
        let wires: Vec<T::Wire> = self.into_iter().map(T::lend).collect();
        let block = Block { address: wires.as_ptr() as u64, length: wires.len() as u64 };
        note_lent(wires);
        block
    }

    fn receive(wire: Block, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        let wires: Vec<T::Wire> = memory.copy_block(wire)?;
        // A value can be larger than its wire.
        memory.charge(wires.len() * size_of::<T>().saturating_sub(size_of::<T::Wire>()))?;
        let part = size_of::<T>() + size_of::<T::Wire>();
        memory.descend(part, || wires.into_iter().map(|wire| T::receive(wire, memory)).collect())
    }
}

impl Transfer for String {
    type Wire = Block;

    fn lend(self) -> Block {
        self.into_bytes().lend()
    }

    fn receive(wire: Block, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        Self::from_utf8(memory.copy_block(wire)?).map_err(|_| InvalidResult::NotUtf8)
    }
}

impl<T: Transfer> Transfer for Box<T> {
    type Wire = T::Wire;

    fn lend(self) -> T::Wire {
        (*self).lend()
    }

    fn receive(wire: T::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        /// What an allocator takes for a block beside its contents.
        const OVERHEAD: usize = 32;
        memory.charge(size_of::<T>() + OVERHEAD)?;
        T::receive(wire, memory).map(Self::new)
    }
}

impl Transfer for bool {
    type Wire = u8;

    fn lend(self) -> u8 {
        self.into()
    }

    fn receive(wire: u8, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        match wire {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(InvalidResult::BadValue { of: "bool", value: value.into() }),
        }
    }
}

impl Transfer for char {
    type Wire = u32;

    fn lend(self) -> u32 {
        self.into()
    }

    fn receive(wire: u32, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        Self::from_u32(wire).ok_or(InvalidResult::BadValue { of: "char", value: wire.into() })
    }
}

/// The wire of a type with two parts or two variants.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Pair<A, B>(A, B);

// SAFETY: with `repr(C)` it is its fields and padding.
unsafe impl<A: Plain, B: Plain> Plain for Pair<A, B> {}

impl<T: Transfer> Transfer for Option<T> {
    type Wire = Pair<u8, T::Wire>;

    fn lend(self) -> Self::Wire {
        match self {
            None => Pair(0, T::Wire::zeroed()),
            Some(value) => Pair(1, value.lend()),
        }
    }

    fn receive(Pair(tag, wire): Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        match tag {
            0 => Ok(None),
            1 => T::receive(wire, memory).map(Some),
            value => Err(InvalidResult::BadValue { of: "tag of an Option", value: value.into() }),
        }
    }
}

impl<T: Transfer, E: Transfer> Transfer for Result<T, E> {
    type Wire = Pair<u8, Pair<T::Wire, E::Wire>>;

    fn lend(self) -> Self::Wire {
        match self {
            Ok(value) => Pair(0, Pair(value.lend(), E::Wire::zeroed())),
            Err(error) => Pair(1, Pair(T::Wire::zeroed(), error.lend())),
        }
    }

    fn receive(Pair(tag, Pair(value, error)): Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        match tag {
            0 => T::receive(value, memory).map(Ok),
            1 => E::receive(error, memory).map(Err),
            value => Err(InvalidResult::BadValue { of: "tag of a Result", value: value.into() }),
        }
    }
}

impl<A: Transfer, B: Transfer> Transfer for (A, B) {
    type Wire = Pair<A::Wire, B::Wire>;

    fn lend(self) -> Self::Wire {
        Pair(self.0.lend(), self.1.lend())
    }

    fn receive(Pair(a, b): Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        Ok((A::receive(a, memory)?, B::receive(b, memory)?))
    }
}

/// A tuple crosses as its first part and the tuple of the others.
macro_rules! tuples {
    ($first:ident $second:ident) => {};
    ($first:ident $($other:ident)+) => {
        impl<$first: Transfer, $($other: Transfer),+> Transfer for ($first, $($other),+) {
            type Wire = Pair<$first::Wire, <($($other),+) as Transfer>::Wire>;

            fn lend(self) -> Self::Wire {
                #[allow(non_snake_case, reason = "each part is called as its type is")]
                let ($first, $($other),+) = self;
                Pair($first.lend(), ($($other),+).lend())
            }

            fn receive(Pair(first, others): Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
                let first = $first::receive(first, memory)?;
                #[allow(non_snake_case, reason = "each part is called as its type is")]
                let ($($other),+) = Transfer::receive(others, memory)?;
                Ok((first, $($other),+))
            }
        }

        tuples!($($other)+);
    };
}

tuples!(A B C D E F G H);

impl<T: Transfer, const N: usize> Transfer for [T; N] {
    type Wire = [T::Wire; N];

    fn lend(self) -> Self::Wire {
        self.map(T::lend)
    }

    fn receive(wire: Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        let values: Vec<T> = wire.into_iter().map(|wire| T::receive(wire, memory)).collect::<Result<_, _>>()?;
        Ok(Self::try_from(values).unwrap_or_else(|_| unreachable!("there is one value for each of the N wires")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stand-in for a domain's memory.
    struct Arena(Vec<u64>);

    impl Arena {
        fn new() -> Self {
            Self((0..64).collect())
        }

        fn range(&self) -> Range<usize> {
            let bytes = self.0.as_ptr_range();
            bytes.start as usize..bytes.end as usize
        }

        fn receive<T: Transfer>(&self, wire: T::Wire) -> Result<T, InvalidResult> {
            let range = self.range();
            // SAFETY: the range is the vector's, which nothing writes.
            T::receive(wire, &unsafe { DomainMemory::new(std::slice::from_ref(&range)) })
        }

        fn block(&self, first: usize, length: u64) -> Block {
            Block { address: &raw const self.0[first] as u64, length }
        }
    }

    #[test]
    fn a_block_inside_is_copied() {
        let arena = Arena::new();
        assert_eq!(arena.receive::<Vec<u64>>(arena.block(3, 4)), Ok(vec![3, 4, 5, 6]));
        assert_eq!(arena.receive::<Vec<u64>>(arena.block(0, 64)).unwrap().len(), 64);
        assert_eq!(arena.receive::<Vec<u64>>(Block { address: 0, length: 0 }), Ok(vec![]));
    }

    #[test]
    fn a_block_that_leaves_the_memory_is_refused() {
        let arena = Arena::new();
        let Range { start, end } = arena.range();
        for (address, length) in [
            (start as u64 - 1, 1),
            (end as u64 - 7, 1),
            (end as u64, 1),
            (0, 1),
            (u64::MAX, 1),
            (start as u64 + 8, 64),
            (start as u64, u64::MAX / 8),
            (start as u64, u64::MAX),
            (start as u64, 1 << 61),
        ] {
            let result = arena.receive::<Vec<u64>>(Block { address, length });
            assert!(result.is_err(), "{length} words at {address:#x}");
        }
    }

    #[test]
    fn parts_that_overlap_cannot_add_up_to_more_than_the_memory() {
        let mut arena = Arena::new();
        let whole = arena.block(0, 64);
        for pair in arena.0.chunks_mut(2) {
            pair.copy_from_slice(&[whole.address, 32]);
        }
        assert_eq!(arena.receive::<Vec<Vec<u64>>>(arena.block(0, 32)), Err(InvalidResult::TooLarge));
        assert_eq!(arena.receive::<Vec<()>>(Block { address: 0, length: u64::MAX }), Err(InvalidResult::TooLarge));
        assert_eq!(arena.receive::<Vec<()>>(Block { address: 0, length: 3 }), Ok(vec![(); 3]));
    }

    #[test]
    fn a_value_that_takes_more_than_its_wire_is_counted_as_it_is() {
        let arena = Arena::new();
        let bytes = Block { length: 512, ..arena.block(0, 0) };
        assert_eq!(arena.receive::<Vec<u8>>(bytes).unwrap().len(), 512);
        assert_eq!(arena.receive::<Vec<Box<u8>>>(bytes), Err(InvalidResult::TooLarge));
    }

    #[test]
    fn a_value_within_itself_ends() {
        #[derive(Debug, PartialEq)]
        struct Node(Vec<Self>);
        impl Transfer for Node {
            type Wire = Block;
            fn lend(self) -> Block {
                self.0.lend()
            }
            fn receive(wire: Block, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
                Transfer::receive(wire, memory).map(Node)
            }
        }
        let mut arena = Arena(vec![0; 4096]);
        let itself = arena.block(0, 1);
        arena.0[..2].copy_from_slice(&[itself.address, 1]);
        assert_eq!(arena.receive::<Node>(itself), Err(InvalidResult::TooDeep));
    }

    #[test]
    fn tags_and_values_that_do_not_exist_are_refused() {
        let arena = Arena::new();
        assert_eq!(arena.receive::<bool>(1), Ok(true));
        assert_eq!(arena.receive::<bool>(2), Err(InvalidResult::BadValue { of: "bool", value: 2 }));
        assert!(arena.receive::<char>(0xd800).is_err());
        assert!(arena.receive::<Option<u8>>(Pair(2, 0)).is_err());
        assert!(arena.receive::<Result<u8, bool>>(Pair(3, Pair(0, 0))).is_err());
        assert!(arena.receive::<Result<u8, bool>>(Pair(1, Pair(0, 9))).is_err());
        assert!(arena.receive::<[bool; 3]>([0, 1, 7]).is_err());
    }

    #[test]
    fn text_is_checked() {
        let mut arena = Arena::new();
        arena.0[0] = u64::from_le_bytes(*b"r\xc3\xbccksp.");
        let text = |length| Block { length, ..arena.block(0, 0) };
        assert_eq!(arena.receive::<String>(text(8)), Ok("rücksp.".into()));
        assert_eq!(arena.receive::<String>(text(2)), Err(InvalidResult::NotUtf8));
    }

    #[test]
    fn values_survive_the_trip() {
        let first = (Some(3u8), Ok::<_, bool>(String::from("text")), [true, false], vec![vec!['ä'], vec![]]);
        let value = (first, 2u8, 3u16, 4u32, 5u64, -6i128, Box::new(7.5), (8u8, ()));
        let wire = value.clone().lend();
        // What is lent lies anywhere on this test's heap; it is never freed.
        let everywhere = std::slice::from_ref(&(1..usize::MAX));
        // SAFETY: the wire refers to what was just lent.
        let memory = unsafe { DomainMemory::new(everywhere) };
        let back = Transfer::receive(wire, &memory);
        assert_eq!(back, Ok(value));
    }
}
