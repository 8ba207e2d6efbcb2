//! The callbacks of a call, as code in the domain calls them.
//!
//! A callback's C function [asks](super::request) the caller to run the closure.

#![expect(unsafe_code, reason = "it reads the call that the caller passes by address")]

use std::arch::naked_asm;
use std::ffi::c_void;

use super::abort::{AbortReason, abort_call};
use super::libc;
use super::request::{self, Request};
use crate::memory::locals;

/// The most callbacks that a call can have.
pub(crate) const MOST: usize = 64;

/// What a call with callbacks keeps for code in the domain, which can read it.
#[derive(Debug)]
pub(crate) struct Head {
    call: u64,
    count: usize,
}

impl Head {
    /// `call` is the address of the call, and `count` the number of its callbacks.
    pub(crate) const fn new(call: u64, count: usize) -> Self {
        Self { call, count }
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

#[unsafe(naked)]
unsafe extern "C" fn ask() {
    request::ask!(suspend)
}

unsafe extern "C" fn suspend(request: *const Request) -> ! {
    assert!(locals::says_in_domain(), "a callback was called outside the call that it belongs to");
    // SAFETY: `ask` passes its own stack.
    let index = unsafe { (*request).number } as usize;
    let head = locals::call().cast::<Head>();
    // SAFETY: the pointer is null, or the running call's.
    if unsafe { head.as_ref() }.is_none_or(|head| index >= head.count) {
        abort_call(AbortReason::Callback { index });
    }
    // The arguments are accepted as a result is.
    libc::check_heap(locals::heap());
    // SAFETY: this is the running call's stack.
    unsafe { request::suspend(request) }
}
