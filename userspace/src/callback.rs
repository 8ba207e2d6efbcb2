//! Callbacks: code in a domain asks its caller for something in the middle of a call.
//!
//! A callback's C function leaves the domain through the gate as if the call had ended, with the address of a request
//! on the domain's stack as its result. The caller copies the request, checks it, runs the closure, and enters the
//! domain again at a place that takes its stack up where it was left. So the gate knows nothing of callbacks, and while
//! the closure runs no domain does: it may call any other.

use std::arch::naked_asm;
use std::ffi::c_void;
use std::fmt;

use pkru::domain::Entry;
use pkru::gate;

use crate::platform::Memory;
use crate::report::{self, Report};
use crate::thread::Thread;
use crate::tls;
use crate::transfer::InvalidResult;

/// The most callbacks that a call can have.
const MOST: usize = 64;

/// The closures that code in a domain can call, see [`Domain::call_with`](crate::Domain::call_with).
pub type Callbacks<'a, 'b> = &'a mut [&'b mut dyn FnMut(&mut CallbackArguments<'_>) -> u64];

/// What code in a domain calls to have a closure of its caller's run.
#[derive(Debug, Clone, Copy)]
pub struct Callback {
    index: usize,
}

impl Callback {
    /// Returns the address of a C function that takes up to six integers or pointers and returns one; an `int` is its
    /// low half.
    ///
    /// To call it outside a domain aborts the program.
    #[must_use]
    pub fn pointer(self) -> *const c_void {
        (thunks as *const () as usize + self.index * THUNK) as *const c_void
    }
}

/// Returns the callbacks of a call that has so many.
///
/// # Panics
///
/// If they are more than there are functions for.
pub(crate) fn pointers(count: usize) -> Vec<Callback> {
    assert!(count <= MOST, "a call can have {MOST} callbacks, and not {count}");
    (0..count).map(|index| Callback { index }).collect()
}

/// What code in a domain has called a callback with: hostile until it is checked.
///
/// The words are whatever it has put into six registers; C code that calls with fewer leaves anything in the others.
/// One that stands for a pointer must not be used as one: what it points to is read with [`read`](Self::read) and
/// written with [`write`](Self::write), which refuse everything but the domain's own memory.
pub struct CallbackArguments<'a> {
    words: [u64; 6],
    memory: &'a mut Memory,
    thread: &'a Thread,
}

impl<'a> CallbackArguments<'a> {
    pub(crate) const fn new(suspended: &Suspended, memory: &'a mut Memory, thread: &'a Thread) -> Self {
        Self { words: suspended.words, memory, thread }
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

    /// Copies bytes out of the domain's stack or heap.
    ///
    /// # Errors
    ///
    /// [`InvalidResult::OutOfBounds`] if they are not all in one of those.
    pub fn read(&mut self, address: u64, length: usize) -> Result<Vec<u8>, InvalidResult> {
        self.check(address, length)?;
        let mut bytes = vec![0; length];
        let target = bytes.as_mut_ptr();
        // SAFETY: the range is in the domain's memory, which this thread can use while the key is pinned; nothing runs
        // in the domain.
        self.with_memory(|| unsafe { std::ptr::copy_nonoverlapping(address as *const u8, target, length) })?;
        Ok(bytes)
    }

    /// Copies bytes into the domain's stack or heap.
    ///
    /// # Errors
    ///
    /// [`InvalidResult::OutOfBounds`] if they do not all fit into one of those.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), InvalidResult> {
        self.check(address, bytes.len())?;
        // SAFETY: as in `read`; and no Rust value of the caller's is there.
        self.with_memory(|| unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) })
    }

    fn check(&self, address: u64, length: usize) -> Result<(), InvalidResult> {
        if is_within(self.memory, address, length) {
            Ok(())
        } else {
            Err(InvalidResult::OutOfBounds { address, length: length as u64 })
        }
    }

    /// Runs something that uses the domain's memory, which may have lost its key since the call was suspended.
    fn with_memory(&mut self, function: impl FnOnce()) -> Result<(), InvalidResult> {
        let _pin = self.memory.pin_again(self.thread).map_err(|_| InvalidResult::NoKey)?;
        function();
        Ok(())
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

/// What a call with callbacks keeps for code in the domain, which can read it.
#[derive(Debug)]
pub(crate) struct Head {
    call: u64,
    count: usize,
    key: u64,
    stack: u64,
}

impl Head {
    pub(crate) const fn new(call: u64, count: usize, memory: &Memory) -> Self {
        Self { call, count, key: memory.key_in_call(), stack: memory.stack_end() }
    }

    pub(crate) const fn call(&self) -> u64 {
        self.call
    }
}

/// In a domain: a call with callbacks begins.
pub(crate) fn begin(head: &Head) {
    tls::set_current_call((&raw const *head).cast());
}

/// In a domain: it ends.
pub(crate) fn end() {
    tls::set_current_call(std::ptr::null());
}

/// A request as it lies on the domain's stack, followed by the saved registers.
#[derive(Clone, Copy)]
#[repr(C)]
struct Request {
    index: u64,
    words: [u64; 6],
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
    /// Copies a request and checks it; `None` if it is none. The calling thread can read the domain's memory.
    pub(crate) fn read(request: u64, memory: &Memory, count: usize) -> Option<Self> {
        if !is_within(memory, request, size_of::<Request>()) {
            return None;
        }
        // SAFETY: the range is in the domain's memory, where nothing runs; any bytes are a request.
        let Request { index, words } = unsafe { (request as *const Request).read_unaligned() };
        let index = usize::try_from(index).ok().filter(|index| *index < count)?;
        Some(Self { request, index, words })
    }

    /// Returns what the domain goes on with.
    pub(crate) const fn reply(&self, value: u64) -> Reply {
        Reply { stack: self.request, value }
    }
}

/// What a suspended call is resumed with; the domain reads it.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Reply {
    /// Where the domain's stack pointer was, as the domain has said.
    stack: u64,
    value: u64,
}

/// The entry point at which a suspended call goes on. Its argument is the address of a [`Reply`].
pub(crate) const RESUME: Entry = resume;

#[unsafe(naked)]
unsafe extern "C" fn resume(reply: u64) -> u64 {
    naked_asm!(
        "mov rsp, [rdi]",
        "mov rax, [rdi + 8]",
        "add rsp, {request}",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        request = const size_of::<Request>(),
    )
}

/// The bytes of one of the [`thunks`].
const THUNK: usize = 16;

/// The callbacks' functions: each says its number, and goes on to [`ask`].
#[unsafe(naked)]
unsafe extern "C" fn thunks() {
    naked_asm!(
        ".set pkru_callback, 0",
        ".rept {most}",
        ".p2align 4",
        "mov eax, pkru_callback",
        "jmp {ask}",
        ".set pkru_callback, pkru_callback + 1",
        ".endr",
        most = const MOST,
        ask = sym ask,
    )
}

/// Saves the registers that the caller of a callback wants back, and its arguments, in the order of [`Request`].
#[unsafe(naked)]
unsafe extern "C" fn ask() {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push r9",
        "push r8",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "push rax",
        "mov rdi, rsp",
        "call {suspend}",
        "ud2",
        suspend = sym suspend,
    )
}

unsafe extern "C" fn suspend(request: *const Request) -> ! {
    assert!(tls::is_in_domain(), "a callback was called outside the call that it belongs to");
    // SAFETY: `ask` passes its own stack.
    let index = unsafe { (*request).index } as usize;
    let head = tls::current_call().cast::<Head>();
    // SAFETY: the pointer is null, or the running call's.
    let Some(head) = (unsafe { head.as_ref() }).filter(|head| index < head.count) else {
        report::end_call(Report::Callback { index })
    };
    // SAFETY: this is the domain that was entered with this head.
    unsafe { gate::suspend(head.key, request as u64, head.stack) }
}
