//! How results cross from a domain to its caller.
//!
//! Whatever comes out of a domain is hostile until checked. So a result crosses in two steps. In the domain
//! [`Transfer::into_wire`] turns it into plain words, its *wire*, and leaves what they refer to in the domain's memory.
//! The caller copies the wire once and builds a value of its own with [`Transfer::from_wire`], which checks every
//! address, length and tag, and copies everything.
//!
//! Arguments need no transfer: a closure that runs in a domain reads what it captures in place.

mod memory;
mod plain;
mod stack;
mod values;

pub(crate) use memory::vec_with_room;
pub use memory::{DomainMemory, InvalidResult};
pub use plain::{Block, Pair, Plain};

/// A result that can leave a domain.
///
/// # Examples
///
/// A type of your own crosses as a tuple of its fields:
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
///     fn into_wire(self) -> Self::Wire {
///         (self.width, self.pixels).into_wire()
///     }
///
///     fn from_wire(wire: &Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
///         let (width, pixels) = Transfer::from_wire(wire, memory)?;
///         Ok(Self { width, pixels })
///     }
/// }
/// ```
///
/// An enum crosses as its variant's number and an `Option` for each variant that has fields:
///
/// ```
/// # use pkru_userspace::transfer::{DomainMemory, InvalidResult, Transfer};
/// enum Token {
///     End,
///     Word(String),
/// }
///
/// impl Transfer for Token {
///     type Wire = <(u8, Option<String>) as Transfer>::Wire;
///
///     fn into_wire(self) -> Self::Wire {
///         match self {
///             Self::End => (0u8, None),
///             Self::Word(word) => (1, Some(word)),
///         }
///         .into_wire()
///     }
///
///     fn from_wire(wire: &Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
///         match Transfer::from_wire(wire, memory)? {
///             (0u8, None) => Ok(Self::End),
///             (1, Some(word)) => Ok(Self::Word(word)),
///             (variant, _) => Err(InvalidResult::BadValue { of: "Token", value: variant.into() }),
///         }
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot leave a domain",
    label = "the result of this function must be `Transfer`",
    note = "results can be `()`, integers, floats, `bool`, `char`, `String`, `Vec`, `Box`, `Option`, `Result`, arrays and tuples of up to eight",
    note = "in place of a reference or a buffer return a `String` or a `Vec`, and in place of a pointer into the domain's memory a `usize`",
    note = "for a type of your own implement `Transfer` by its fields, as that trait's documentation shows",
    note = "an error of another crate can cross as text: `.map_err(|error| error.to_string())`; an `io::Error` as its `raw_os_error()`, \
            because its text comes from the C library, which writes a static for it",
    note = "a function that does not return needs a type: `let result: Result<(), Violation> = domain.call(…)`",
    note = "docs/when-it-does-not-compile.md has an example of each"
)]
pub trait Transfer: Sized {
    /// The type that is copied out of the domain.
    type Wire: Plain;

    /// In the domain: turns the value into its wire.
    fn into_wire(self) -> Self::Wire;

    /// In the caller: builds a value from a wire, which the domain may have forged.
    ///
    /// # Errors
    ///
    /// If the wire is that of no value of this type, or refers to memory that is not the domain's.
    fn from_wire(wire: &Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult>;

    /// In the domain: turns values into their wires. Types that are their own wires override it to do nothing.
    #[must_use]
    fn vec_into_wires(values: Vec<Self>) -> Vec<Self::Wire> {
        values.into_iter().map(Self::into_wire).collect()
    }

    /// In the caller: builds values from wires. Types that are their own wires override it to do nothing.
    ///
    /// # Errors
    ///
    /// As for [`from_wire`](Self::from_wire).
    fn vec_from_wires(wires: Vec<Self::Wire>, memory: &DomainMemory<'_>) -> Result<Vec<Self>, InvalidResult> {
        let mut values = vec_with_room(wires.len())?;
        for wire in &wires {
            values.push(Self::from_wire(wire, memory)?);
        }
        Ok(values)
    }
}
