//! Wires: types for which any bytes are a value.

#![expect(unsafe_code, reason = "it defines an unsafe trait and implements it")]

use std::mem::MaybeUninit;

/// A type for which any bytes are a value.
///
/// # Safety
///
/// Every pattern of `size_of::<Self>()` bytes is a value, and nothing relies on pointers in it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no wire",
    note = "the wire of your own type can be that of a tuple: `type Wire = <(u32, String) as Transfer>::Wire`"
)]
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
        )*
    };
}

plain!((), u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize, f32, f64);

// SAFETY: an array is its elements.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// The wire of a vector: the address of its elements' wires, and their number.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Block {
    pub(super) address: u64,
    pub(super) length: u64,
}

// SAFETY: two integers.
unsafe impl Plain for Block {}

/// The wire of a type with two parts or two variants.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Pair<A, B>(pub(super) A, pub(super) B);

// SAFETY: with `repr(C)` it is its fields and padding.
unsafe impl<A: Plain, B: Plain> Plain for Pair<A, B> {}
