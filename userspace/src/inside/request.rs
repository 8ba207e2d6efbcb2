//! Asking the caller for something in the middle of a call.
//!
//! Code in the domain leaves through the gate as if the call had ended. Its result is the address of a [`Request`] on its
//! stack. The caller checks it, does what it asks for, and enters the domain again at [`RESUME`], which continues on that
//! stack.

#![expect(unsafe_code, reason = "it saves and restores registers around a request")]

use std::arch::naked_asm;

use pkru::domain::Entry;
use pkru::gate;

use crate::memory::locals;

/// A request as it lies on the domain's stack, followed by the saved registers.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Request {
    /// What is asked for: the number of a callback, or [`SERVICE`] and more.
    pub(crate) number: u64,
    /// The six argument registers.
    pub(crate) words: [u64; 6],
}

/// The number of the first service. Callbacks have lower numbers.
pub(crate) const SERVICE: u64 = 1 << 32;

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

/// The body of a naked function that asks the caller for the number in RAX. It saves the callee-saved registers, and the
/// arguments in the order of [`Request`], and passes the request's address to a function that does not return.
macro_rules! ask {
    ($suspend:path) => {
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
            suspend = sym $suspend,
        )
    };
}

pub(super) use ask;

/// Asks the caller for a service with six arguments, and returns its answer.
///
/// # Safety
///
/// The calling code runs in a domain.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn call(_: u64, _: u64, _: u64, _: u64, _: u64, _: u64, _number: u64) -> u64 {
    // The seventh argument lies above the return address.
    naked_asm!("mov rax, [rsp + 8]", "jmp {ask}", ask = sym ask_for_service)
}

#[unsafe(naked)]
unsafe extern "C" fn ask_for_service() {
    ask!(suspend)
}

/// Leaves the domain with a request.
///
/// # Safety
///
/// The calling code runs in a domain, on the stack of the running call, and the request lies there.
pub(super) unsafe extern "C" fn suspend(request: *const Request) -> ! {
    // SAFETY: the record lives as long as the domain, outside it. If code in the domain has overwritten the pointer, this
    // faults there.
    let context = unsafe { &*locals::context() };
    // SAFETY: the gate has entered this domain with this record.
    unsafe { gate::suspend(context.key().number().into(), request as u64, context.stack()) }
}
