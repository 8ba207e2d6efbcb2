//! Callbacks, as the caller sees them.
//!
//! A call that asks for a callback is [suspended](Suspended): no domain runs while the closure does, so that it may call
//! any other. The caller copies the request and checks it before it uses it.

#![expect(unsafe_code, reason = "it copies from and to domain memory")]

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

use crate::backend::pku::Memory;
use crate::inside::callback::{MOST, function};
use crate::inside::request::{Reply, Request};
use crate::keys::Caller;
use crate::service;
use crate::sys::{self, Inaccessible};
use crate::transfer::{InvalidResult, vec_with_room};

/// The closures that code in a domain can call, see [`Domain::call_with`](crate::Domain::call_with).
pub type Callbacks<'a, 'b> = &'a mut [&'b mut dyn FnMut(&mut CallbackArguments<'_>) -> u64];

/// A callback, as code in a domain calls it.
#[derive(Debug, Clone, Copy)]
pub struct Callback {
    index: usize,
}

impl Callback {
    /// Returns the address of a C function that takes up to six integers or pointers and returns an integer. An `int` is
    /// the low half of that.
    ///
    /// Calling it outside the domain aborts the program.
    #[must_use]
    pub fn pointer(self) -> *const c_void {
        function(self.index)
    }
}

/// Returns the callbacks of a call that has `count` of them.
///
/// # Panics
///
/// If there are more than 64.
pub(crate) fn pointers(count: usize) -> Vec<Callback> {
    assert!(count <= MOST, "a call can have {MOST} callbacks, and not {count}");
    (0..count).map(|index| Callback { index }).collect()
}

/// The arguments of a callback: hostile until they are checked.
///
/// They are the contents of six registers; arguments that the code did not pass are arbitrary. Never dereference one as a
/// pointer: use [`read`](Self::read) and [`write`](Self::write), which refuse all memory but the domain's own.
///
/// They belong to the thread that made the call.
pub struct CallbackArguments<'a> {
    words: [u64; 6],
    memory: &'a mut Memory,
    caller: Caller,
    /// The rights to the memory are this thread's.
    _not_send: PhantomData<*const ()>,
}

impl<'a> CallbackArguments<'a> {
    pub(crate) const fn new(suspended: &Suspended, memory: &'a mut Memory, caller: Caller) -> Self {
        Self { words: suspended.words, memory, caller, _not_send: PhantomData }
    }

    /// Returns an argument, counted from 0.
    ///
    /// # Panics
    ///
    /// If `index` is above 5.
    #[must_use]
    pub const fn word(&self, index: usize) -> u64 {
        self.words[index]
    }

    /// Copies bytes out of the domain's stack or heap. What code in the domain passes on from the caller's memory, such as a
    /// pointer into its input, is not there: have it copy that first.
    ///
    /// # Errors
    ///
    /// [`InvalidResult::OutOfBounds`] if they are not all in one of the two; [`InvalidResult::Inaccessible`];
    /// [`InvalidResult::NoMemory`]; [`InvalidResult::NoKey`].
    pub fn read(&mut self, address: u64, length: usize) -> Result<Vec<u8>, InvalidResult> {
        self.check(address, length)?;
        let mut bytes = vec_with_room(length)?;
        let target = &mut bytes.spare_capacity_mut()[..length];
        self.with_memory(|| sys::copy_from(address as usize, target))?;
        // SAFETY: the bytes were copied.
        unsafe { bytes.set_len(length) };
        Ok(bytes)
    }

    /// Copies bytes into the domain's stack or heap.
    ///
    /// # Errors
    ///
    /// [`InvalidResult::OutOfBounds`] if they do not all fit into one of the two; [`InvalidResult::Inaccessible`], after
    /// a part of them may have been copied; [`InvalidResult::NoKey`].
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), InvalidResult> {
        self.check(address, bytes.len())?;
        // SAFETY: the range is in the domain's memory, where nothing runs and no value of the caller's is.
        self.with_memory(|| unsafe { sys::copy_to(bytes.as_ptr(), address as usize, bytes.len()) })
    }

    fn check(&self, address: u64, length: usize) -> Result<(), InvalidResult> {
        if is_within(self.memory, address, length) {
            Ok(())
        } else {
            Err(InvalidResult::OutOfBounds { address, length: length as u64 })
        }
    }

    /// Runs a function that uses the domain's memory, after giving that its key again.
    fn with_memory(&mut self, function: impl FnOnce() -> Result<(), Inaccessible>) -> Result<(), InvalidResult> {
        let _lease = self.memory.acquire_again(self.caller).map_err(|_| InvalidResult::NoKey)?;
        Ok(function()?)
    }
}

impl fmt::Debug for CallbackArguments<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallbackArguments").field("words", &format_args!("{:#x?}", self.words)).finish_non_exhaustive()
    }
}

fn is_within(memory: &Memory, address: u64, length: usize) -> bool {
    let start = address as usize;
    start.checked_add(length).is_some_and(|end| {
        memory.readable().iter().any(|range| range.start <= start && start < range.end && end <= range.end)
    })
}

/// A call that waits for its callback.
#[derive(Debug)]
pub(crate) struct Suspended {
    request: u64,
    /// Invariant: the call has that callback.
    pub(crate) index: usize,
    words: [u64; 6],
}

impl Suspended {
    /// Copies a request and checks it; `None` if it is invalid or cannot be read. The calling thread has rights to the domain's memory.
    pub(crate) fn read(request: u64, memory: &Memory, count: usize) -> Option<Self> {
        let Request { number, words } = service::read(request, memory)?;
        let index = usize::try_from(number).ok().filter(|index| *index < count)?;
        Some(Self { request, index, words })
    }

    /// Returns what the domain resumes with.
    pub(crate) const fn reply(&self, value: u64) -> Reply {
        Reply { stack: self.request, value }
    }
}
