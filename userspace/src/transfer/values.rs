//! The standard types that can leave a domain.

use super::Transfer;
use super::memory::{DomainMemory, InvalidResult, array, boxed};
use super::plain::{Block, Pair, Plain as _};
use crate::inside::exported::export;

macro_rules! plain {
    ($($type:ty),*) => {
        $(
            impl Transfer for $type {
                type Wire = Self;

                #[inline]
                fn into_wire(self) -> Self {
                    self
                }

                #[inline]
                fn from_wire(wire: &Self, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
                    Ok(*wire)
                }

                #[inline]
                fn vec_into_wires(values: Vec<Self>) -> Vec<Self> {
                    values
                }

                #[inline]
                fn vec_from_wires(wires: Vec<Self>, _: &DomainMemory<'_>) -> Result<Vec<Self>, InvalidResult> {
                    Ok(wires)
                }
            }
        )*
    };
}

plain!((), u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize, f32, f64);

impl<T: Transfer> Transfer for Vec<T> {
    type Wire = Block;

    fn into_wire(self) -> Block {
        let wires = T::vec_into_wires(self);
        let block = Block { address: wires.as_ptr() as u64, length: wires.len() as u64 };
        export(wires);
        block
    }

    fn from_wire(wire: &Block, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        let wires: Vec<T::Wire> = memory.copy_block(*wire)?;
        // A value can be larger than its wire.
        memory.charge(wires.len() * size_of::<T>().saturating_sub(size_of::<T::Wire>()))?;
        memory.descend(size_of::<T>(), || T::vec_from_wires(wires, memory))
    }
}

impl Transfer for String {
    type Wire = Block;

    fn into_wire(self) -> Block {
        self.into_bytes().into_wire()
    }

    fn from_wire(wire: &Block, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        Self::from_utf8(memory.copy_block(*wire)?).map_err(|_| InvalidResult::NotUtf8)
    }
}

impl<T: Transfer> Transfer for Box<T> {
    type Wire = T::Wire;

    fn into_wire(self) -> T::Wire {
        (*self).into_wire()
    }

    fn from_wire(wire: &T::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        /// What an allocator takes for a block beside its contents.
        const OVERHEAD: usize = 32;
        memory.charge(size_of::<T>() + OVERHEAD)?;
        boxed(memory, || T::from_wire(wire, memory))
    }
}

impl Transfer for bool {
    type Wire = u8;

    fn into_wire(self) -> u8 {
        self.into()
    }

    fn from_wire(wire: &u8, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        match *wire {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(InvalidResult::BadValue { of: "bool", value: value.into() }),
        }
    }
}

impl Transfer for char {
    type Wire = u32;

    fn into_wire(self) -> u32 {
        self.into()
    }

    fn from_wire(wire: &u32, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        Self::from_u32(*wire).ok_or(InvalidResult::BadValue { of: "char", value: (*wire).into() })
    }
}

impl<T: Transfer> Transfer for Option<T> {
    type Wire = Pair<u8, T::Wire>;

    fn into_wire(self) -> Self::Wire {
        match self {
            None => Pair(0, T::Wire::zeroed()),
            Some(value) => Pair(1, value.into_wire()),
        }
    }

    fn from_wire(Pair(tag, wire): &Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        match *tag {
            0 => Ok(None),
            1 => T::from_wire(wire, memory).map(Some),
            value => Err(InvalidResult::BadValue { of: "tag of an Option", value: value.into() }),
        }
    }
}

impl<T: Transfer, E: Transfer> Transfer for Result<T, E> {
    type Wire = Pair<u8, Pair<T::Wire, E::Wire>>;

    fn into_wire(self) -> Self::Wire {
        match self {
            Ok(value) => Pair(0, Pair(value.into_wire(), E::Wire::zeroed())),
            Err(error) => Pair(1, Pair(T::Wire::zeroed(), error.into_wire())),
        }
    }

    fn from_wire(Pair(tag, Pair(value, error)): &Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        match *tag {
            0 => T::from_wire(value, memory).map(Ok),
            1 => E::from_wire(error, memory).map(Err),
            value => Err(InvalidResult::BadValue { of: "tag of a Result", value: value.into() }),
        }
    }
}

impl<A: Transfer, B: Transfer> Transfer for (A, B) {
    type Wire = Pair<A::Wire, B::Wire>;

    fn into_wire(self) -> Self::Wire {
        Pair(self.0.into_wire(), self.1.into_wire())
    }

    fn from_wire(Pair(a, b): &Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        Ok((A::from_wire(a, memory)?, B::from_wire(b, memory)?))
    }
}

/// Parts within pairs, as a pattern.
macro_rules! pairs {
    ($last:ident) => { $last };
    ($first:ident $($other:ident)+) => { Pair($first, pairs!($($other)+)) };
}

/// A tuple crosses as its first part and the tuple of the others.
macro_rules! tuples {
    ($first:ident $second:ident) => {};
    ($first:ident $($other:ident)+) => {
        impl<$first: Transfer, $($other: Transfer),+> Transfer for ($first, $($other),+) {
            type Wire = Pair<$first::Wire, <($($other),+) as Transfer>::Wire>;

            fn into_wire(self) -> Self::Wire {
                #[allow(non_snake_case, reason = "each part is called as its type is")]
                let ($first, $($other),+) = self;
                Pair($first.into_wire(), ($($other),+).into_wire())
            }

            fn from_wire(wire: &Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
                // Not by way of the tuple of the others, whose parts would be moved once more.
                #[allow(non_snake_case, reason = "each part is called as its type is")]
                let pairs!($first $($other)+) = wire;
                Ok(($first::from_wire($first, memory)?, $($other::from_wire($other, memory)?),+))
            }
        }

        tuples!($($other)+);
    };
}

tuples!(A B C D E F G H);

impl<T: Transfer, const N: usize> Transfer for [T; N] {
    type Wire = [T::Wire; N];

    fn into_wire(self) -> Self::Wire {
        self.map(T::into_wire)
    }

    fn from_wire(wire: &Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        array(wire, |wire| T::from_wire(wire, memory))
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

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
            T::from_wire(&wire, &DomainMemory::new(std::slice::from_ref(&range), |_| 0))
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
            fn into_wire(self) -> Block {
                self.0.into_wire()
            }
            fn from_wire(wire: &Block, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
                Transfer::from_wire(wire, memory).map(Node)
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
    fn what_was_received_before_an_error_is_dropped() {
        thread_local! { static DROPS: std::cell::Cell<u32> = const { std::cell::Cell::new(0) } }
        #[derive(Debug)]
        struct Counted(bool);
        impl Drop for Counted {
            fn drop(&mut self) {
                DROPS.set(DROPS.get() + 1);
            }
        }
        impl Transfer for Counted {
            type Wire = u8;
            fn into_wire(self) -> u8 {
                self.0.into()
            }
            fn from_wire(wire: &u8, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
                Transfer::from_wire(wire, memory).map(Self)
            }
        }
        let arena = Arena::new();
        assert!(arena.receive::<[Counted; 3]>([0, 1, 7]).is_err());
        assert_eq!(DROPS.replace(0), 2);
        assert!(arena.receive::<Box<Counted>>(2).is_err());
        assert_eq!(DROPS.get(), 0);
        drop((arena.receive::<[Counted; 3]>([0, 1, 1]).unwrap(), arena.receive::<Box<Counted>>(1).unwrap()));
        assert_eq!(DROPS.get(), 4);
        assert_eq!(arena.receive::<Box<()>>(()), Ok(Box::new(())));
        assert_eq!(arena.receive::<[(); 5]>([(); 5]), Ok([(); 5]));
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
        let wire = value.clone().into_wire();
        // The blocks lie anywhere on this test's heap, and are never freed.
        let everywhere = std::slice::from_ref(&(1..usize::MAX));
        let back = Transfer::from_wire(&wire, &DomainMemory::new(everywhere, |_| 0));
        assert_eq!(back, Ok(value));
    }
}
