//! Asking the caller for a callback in the middle of a call.
//!
//! A callback's C function leaves the domain through the gate as if the call had ended. Its result is the address of a
//! [`Request`] on the domain's stack. The caller checks it, runs the closure, and enters the domain again at
//! [`RESUME`], which continues on that stack.

#![expect(unsafe_code, reason = "it saves and restores registers around a callback")]

use std::arch::naked_asm;
use std::ffi::c_void;

use pkru::domain::Entry;
use pkru::gate;

use super::abort::{AbortReason, abort_call};
use crate::memory::locals;

/// The most callbacks that a call can have.
pub(crate) const MOST: usize = 64;

/// What a call with callbacks keeps for code in the domain, which can read it.
#[derive(Debug)]
pub(crate) struct Head {
    call: u64,
    count: usize,
    key: u64,
    stack: u64,
}

impl Head {
    /// `call` is the address of the call, `count` the number of its callbacks, `key` the number of the domain's key,
    /// and `stack` the end of the stack that the domain starts on.
    pub(crate) const fn new(call: u64, count: usize, key: u64, stack: u64) -> Self {
        Self { call, count, key, stack }
    }

    pub(super) const fn call(&self) -> u64 {
        self.call
    }
}

/// Begins a call with callbacks.
pub(super) fn begin(head: &Head) {
    locals::set_call((&raw const *head).cast());
}

/// Ends it.
pub(super) fn end() {
    locals::set_call(std::ptr::null());
}

/// A request as it lies on the domain's stack, followed by the saved registers.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Request {
    pub(crate) index: u64,
    /// The six argument registers.
    pub(crate) words: [u64; 6],
}

/// What a suspended call resumes with. It lies in the caller's memory.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Reply {
    /// The domain's stack pointer, as its request gave it.
    pub(crate) stack: u64,
    pub(crate) value: u64,
}

/// The entry point at which a suspended call continues. Its argument is the address of a [`Reply`].
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

/// Returns the address of the C function of a callback.
pub(crate) fn function(index: usize) -> *const c_void {
    (thunks as *const () as usize + index * THUNK) as *const c_void
}

/// The size of one of the [`thunks`] in bytes.
const THUNK: usize = 16;

/// The callbacks' functions: each loads its number and jumps to [`ask`].
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

/// Saves the callee-saved registers, and the arguments in the order of [`Request`].
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
    assert!(locals::says_in_domain(), "a callback was called outside the call that it belongs to");
    // SAFETY: `ask` passes its own stack.
    let index = unsafe { (*request).index } as usize;
    let head = locals::call().cast::<Head>();
    // SAFETY: the pointer is null, or the running call's.
    let Some(head) = (unsafe { head.as_ref() }).filter(|head| index < head.count) else {
        abort_call(AbortReason::Callback { index })
    };
    // SAFETY: this is the domain that was entered with this head.
    unsafe { gate::suspend(head.key, request as u64, head.stack) }
}
