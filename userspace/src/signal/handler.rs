//! The signal handler. It reads the frame, calls [`decide`](super::decide), and applies the decision.
//!
//! A handler starts with the kernel's initial rights, which allow key 0 only, and with the FS base of the interrupted
//! code. The entry is a few instructions that touch no memory and allow all keys. The rest is Rust, which uses no
//! thread-local until the FS base is the caller's.

#![expect(unsafe_code, reason = "it is the signal handler")]

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

use pkru::gate::{Context, Gate};
use pkru::instructions::{rdfsbase, wrfsbase};

use super::decide::{CallFacts, Decision, Facts, Grantee, decide};
use super::forward::{self, Origin};
use super::frame::SignalContext;
use super::trap::{Interrupted, Running, Trap};
use super::{frame, panics};
use crate::inside::abort::AbortReason;
use crate::keys::{self, statics};
use crate::sys::{self, FAULTS};
use crate::thread::{self, Thread};

/// Allows all keys and continues in Rust. Uses registers only. The arguments are in RDI, RSI and RDX.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn entry(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void) {
    naked_asm!(
        "mov r8, rdx",
        "xor eax, eax",
        "xor ecx, ecx",
        "xor edx, edx",
        "wrpkru",
        // A domain may have jumped to WRPKRU with other values.
        "test eax, eax",
        "jne 2f",
        // Linux leaves the flag AC as it was. With it, a misaligned access here would end the process.
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
    let context = unsafe { &mut *frame.cast::<SignalContext>() };
    // SAFETY: the kernel passes the arguments.
    let at = unsafe { frame::read(signal, info, context) };
    // SAFETY: the kernel passes the frame of this signal.
    let call = unsafe { Call::interrupted_by(&at, frame) };
    let facts = Facts { call: call.as_ref().map(|call| call.facts), statics_key: statics::key() };
    match decide(&at, &facts) {
        Decision::Rewind { reason } => {
            if let Some(call) = &call {
                // SAFETY: the signal interrupted this call.
                unsafe { rewind(context, call, at, reason) };
            }
            return;
        }
        Decision::SkipPanicWrite => {
            if let Some(call) = &call {
                call.skip_panic_write(context, &at);
            }
        }
        // SAFETY: the kernel passes the arguments, the FS base is the program's, and the rights allow all keys.
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
            // SAFETY: the default action calls no function.
            let _ = unsafe { sys::set_action(signal, sys::Action::DEFAULT) };
        }
    }
    if let Some(call) = &call {
        // SAFETY: this was the FS base when the signal arrived.
        unsafe { wrfsbase(call.fs_base) };
    }
}

/// The call that a signal has interrupted. While it exists, the FS base is the caller's.
struct Call {
    running: NonNull<Context>,
    /// The FS base when the signal arrived.
    fs_base: u64,
    facts: CallFacts,
    skip: Option<panics::Skip>,
}

impl Call {
    /// Finds the interrupted call and sets the caller's FS base.
    ///
    /// # Safety
    ///
    /// The kernel passed the frame of this signal.
    unsafe fn interrupted_by(at: &Interrupted, frame: *mut c_void) -> Option<Self> {
        let running = keys::running_on(frame.addr())?;
        // SAFETY: the process has domains, so FSGSBASE is enabled.
        let fs_base = unsafe { rdfsbase() };
        // SAFETY: the call is running, so its context is alive.
        let caller = unsafe { running.as_ref() }.caller_fs_base();
        // SAFETY: this is the FS base that the calling thread had outside the domain.
        unsafe { wrfsbase(caller) };
        // SAFETY: every context that this crate enters is the first field of a `Running`, which outlives its call.
        let call = unsafe { running.cast::<Running>().as_ref() };
        let is_fault = FAULTS.contains(&at.signal);
        // SAFETY: the signal interrupted this call.
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

    fn skip_panic_write(&self, context: &mut SignalContext, at: &Interrupted) {
        if let Some(skip) = self.skip {
            panics::skip(context, at, skip);
            self.running().in_panic.set(true);
        }
    }
}

/// Changes the frame so that the caller of a domain resumes when the handler returns.
///
/// # Safety
///
/// The frame is that of a signal that interrupted this call.
unsafe fn rewind(context: &mut SignalContext, call: &Call, at: Interrupted, reason: Option<AbortReason>) {
    let in_panic = call.running().in_panic.replace(false);
    call.running().trap.set(Some(Trap { at, reason, in_panic }));
    // SAFETY: the signal interrupted this call, and sigreturn resumes with the returned state, whose FS base is in
    // force already.
    let rewind = unsafe { Gate::Pkru.rewind(call.running) };
    if !frame::write(context, rewind) {
        // The frame has no PKRU, unlike at the capability check, so the caller cannot resume.
        sys::exit_with(libc::EXIT_FAILURE);
    }
}

/// Performs the program's action for a signal.
///
/// # Safety
///
/// The kernel passed the arguments. The FS base is the program's, and the rights include the program's.
unsafe fn forward(
    signal: c_int,
    info: *mut libc::siginfo_t,
    frame: *mut c_void,
    at: &Interrupted,
    call: Option<&Call>,
) {
    let Some(call) = call else {
        let from = Origin { stack: at.stack as usize, rights: at.rights, key: None };
        // SAFETY: the caller guarantees this for the arguments, the FS base and the rights.
        unsafe { forward::forward(signal, info, frame, &from) };
        return;
    };
    let context = call.context();
    let from =
        Origin { stack: context.caller_stack() as usize, rights: context.caller_rights(), key: Some(context.key()) };
    // A fault in the program's handler must not count as the domain's.
    // SAFETY: the signal interrupted this call.
    unsafe { Gate::Pkru.hide(call.running) };
    // SAFETY: the caller guarantees this for the arguments, the FS base and the rights.
    unsafe { forward::forward(signal, info, frame, &from) };
    // SAFETY: the call was hidden above, and resumes when the handler returns.
    unsafe { Gate::Pkru.show(call.running) };
}
