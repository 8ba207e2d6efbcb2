//! The signal handler: it reads the frame, asks [`decide`](super::decide) what to do, and does it.
//!
//! A handler starts with the kernel's initial rights, which allow key 0 alone, and with the FS base of the interrupted
//! code. So the entry is a few instructions that touch no memory and allow all keys; the rest is Rust that uses no
//! thread-local before the FS base is the caller's.

#![expect(unsafe_code, reason = "it is the signal handler")]

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

use pkru::gate::{Context, Gate};
use pkru::instructions::{rdfsbase, wrfsbase};

use super::decide::{CallFacts, Decision, Facts, Grantee, decide};
use super::forward::{self, Origin};
use super::trap::{Interrupted, Running, Trap};
use super::{frame, panics};
use crate::inside::abort::AbortReason;
use crate::keys::{self, statics};
use crate::sys::{self, FAULTS};
use crate::thread::{self, Thread};

/// Allows all keys, with registers alone, and continues in Rust. The arguments are in RDI, RSI and RDX.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn entry(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void) {
    naked_asm!(
        "mov r8, rdx",
        "xor eax, eax",
        "xor ecx, ecx",
        "xor edx, edx",
        "wrpkru",
        // A domain may have jumped to the write.
        "test eax, eax",
        "jne 2f",
        // Linux leaves AC as it was. A misaligned access here would end the process.
        "pushfq",
        "and dword ptr [rsp], ~0x40000",
        "popfq",
        "mov rdx, r8",
        "jmp {handle}",
        "2: ud2",
        handle = sym handle,
    )
}

unsafe extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void) {
    // SAFETY: the kernel passes a valid frame, and nothing else uses it while the handler runs.
    let context = unsafe { &mut *frame.cast::<libc::ucontext_t>() };
    // SAFETY: the kernel passed the arguments.
    let at = unsafe { frame::read(signal, info, context) };
    // SAFETY: the frame is that of this signal.
    let call = unsafe { Call::interrupted_by(&at, frame) };
    let facts = Facts { call: call.as_ref().map(|call| call.facts), statics_key: statics::key() };
    match decide(&at, &facts) {
        Decision::Rewind { reason } => {
            if let Some(call) = &call {
                // SAFETY: the signal struck in this call.
                unsafe { rewind(context, call, at, reason) };
            }
            return;
        }
        Decision::SkipPanicWrite => {
            if let Some(call) = &call {
                call.skip_panic_write(context, &at);
            }
        }
        // SAFETY: the arguments are the kernel's; FS base and rights are the program's.
        Decision::Forward => unsafe { forward(signal, info, frame, &at, call.as_ref()) },
        Decision::Grant { key, to, acknowledge } => {
            match (to, &call) {
                (Grantee::Interrupted, _) => frame::grant(context, key),
                (Grantee::Caller, Some(call)) => call.context().grant_to_caller(key),
                (Grantee::Caller, None) | (Grantee::Nobody, _) => {}
            }
            if acknowledge {
                statics::acknowledge();
            }
        }
        Decision::Resume => {}
        Decision::Exit { status } => sys::exit_with(status),
        Decision::Default => {
            // SAFETY: the default action calls nothing.
            let _ = unsafe { sys::set_action(signal, sys::Action::DEFAULT) };
        }
    }
    if let Some(call) = &call {
        // SAFETY: it was in force when the signal struck.
        unsafe { wrfsbase(call.fs_base) };
    }
}

/// The call of a domain that a signal has interrupted. While this exists the FS base is the caller's.
struct Call {
    running: NonNull<Context>,
    /// The FS base that was in force.
    fs_base: u64,
    facts: CallFacts,
    skip: Option<panics::Skip>,
}

impl Call {
    /// Finds the call, and sets the caller's FS base.
    ///
    /// # Safety
    ///
    /// The frame is that of the signal.
    unsafe fn interrupted_by(at: &Interrupted, frame: *mut c_void) -> Option<Self> {
        let running = keys::running_on(frame.addr())?;
        // SAFETY: the process has domains, so it can read the FS base.
        let fs_base = unsafe { rdfsbase() };
        // SAFETY: the call is running, so its context is alive.
        let caller = unsafe { running.as_ref() }.caller_fs_base();
        // SAFETY: the caller had this FS base, and has its thread-locals there.
        unsafe { wrfsbase(caller) };
        // SAFETY: every context that this crate enters is the head of a `Running`, which lives while its call runs.
        let call = unsafe { running.cast::<Running>().as_ref() };
        let is_fault = FAULTS.contains(&at.signal);
        // SAFETY: the signal struck in this call.
        let skip = unsafe { panics::recognize(at, call.learning.get()) };
        let facts = CallFacts {
            is_leaving: fs_base == caller,
            is_copy: is_fault && !thread::current().is_some_and(Thread::is_original),
            is_panic_write: skip.is_some(),
        };
        Some(Self { running, fs_base, facts, skip })
    }

    fn context(&self) -> &Context {
        // SAFETY: the call is running, so its context is alive.
        unsafe { self.running.as_ref() }
    }

    fn running(&self) -> &Running {
        // SAFETY: as in `interrupted_by`.
        unsafe { self.running.cast::<Running>().as_ref() }
    }

    fn skip_panic_write(&self, context: &mut libc::ucontext_t, at: &Interrupted) {
        if let Some(skip) = self.skip {
            panics::skip(context, at, skip);
            self.running().in_panic.set(true);
        }
    }
}

/// Makes the caller of a domain resume when the handler returns.
///
/// # Safety
///
/// The frame is that of a signal that struck in this call.
unsafe fn rewind(context: &mut libc::ucontext_t, call: &Call, at: Interrupted, reason: Option<AbortReason>) {
    let in_panic = call.running().in_panic.replace(false);
    call.running().trap.set(Some(Trap { at, reason, in_panic }));
    // SAFETY: the signal struck in this call, and sigreturn resumes as the result says. Its FS base is in force, which
    // the C library's return from a handler does not use.
    let rewind = unsafe { Gate::Pkru.rewind(call.running) };
    if !frame::write(context, rewind) {
        // The kernel's frames have changed since the capability check: there is no way back to the caller.
        sys::exit_with(libc::EXIT_FAILURE);
    }
}

/// Does what the program wants on a signal.
///
/// # Safety
///
/// The arguments are the kernel's; FS base and rights are the program's, or more.
unsafe fn forward(
    signal: c_int,
    info: *mut libc::siginfo_t,
    frame: *mut c_void,
    at: &Interrupted,
    call: Option<&Call>,
) {
    let Some(call) = call else {
        let from = Origin { stack: at.stack as usize, rights: at.rights, key: None };
        // SAFETY: the caller answers for the arguments.
        unsafe { forward::forward(signal, info, frame, &from) };
        return;
    };
    let context = call.context();
    let from =
        Origin { stack: context.caller_stack() as usize, rights: context.caller_rights(), key: Some(context.key()) };
    // A fault in the program's handler is not the domain's.
    // SAFETY: the signal struck in this call.
    unsafe { Gate::Pkru.hide(call.running) };
    // SAFETY: the caller answers for the arguments.
    unsafe { forward::forward(signal, info, frame, &from) };
    // SAFETY: the call resumes when this returns.
    unsafe { Gate::Pkru.show(call.running) };
}
