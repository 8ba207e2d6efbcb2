//! Running the program's own handlers.
//!
//! The kernel delivers a signal on this crate's stack, with every signal blocked. The program's handler then runs as it
//! would without this crate: with the program's thread-locals and rights, and with the signal mask and stack that the
//! program has set. If the signal interrupted a domain, the handler runs on the caller's stack, below the call.

#![expect(unsafe_code, reason = "it calls the program's handlers")]

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};

use pkru::{AccessRights, KeyRights, ProtectionKey};

use super::frame::SignalContext;
use super::{actions, frame};
use crate::rights;
use crate::sys::{self, Action, FAULTS};
use crate::thread::{self, Thread};

/// The program's state when a signal arrived.
pub(super) struct Origin {
    /// The program's stack pointer. The stack is free below the red zone, which begins there.
    pub(super) stack: usize,
    pub(super) rights: KeyRights,
    /// The key that the interrupted call pins, if the signal interrupted a domain.
    pub(super) key: Option<ProtectionKey>,
}

/// Performs the program's action for a signal.
///
/// # Safety
///
/// The kernel passed the arguments. The FS base is the program's, and the rights include the program's.
pub(super) unsafe fn forward(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void, from: &Origin) {
    let action = actions::get(signal);
    if !action.is_function() {
        // SAFETY: the kernel passes a valid `siginfo_t`.
        default(signal, &action, unsafe { (*info).si_code } <= 0);
        return;
    }
    // Calls that the handler makes have their own deadlines.
    let deadline = thread::current().and_then(|thread| thread.timer().get()).and_then(sys::pause_timer);
    if action.flags & libc::SA_RESETHAND as u64 != 0 {
        actions::reset(signal);
    }
    let here = (&raw const action).addr();
    let thread = thread::current();
    let stack = stack_for(&action, thread, from, context.addr());
    if let Some(thread) = thread {
        thread.begin_handler(from.stack, here, from.key);
    }
    // SAFETY: the kernel passes a valid frame.
    let interrupted_mask = unsafe { (*context.cast::<SignalContext>()).mask };
    let own = if action.flags & libc::SA_NODEFER as u64 == 0 { bit(signal) } else { 0 };
    // The handler may call domains, where these signals must not be blocked.
    let faults = FAULTS.iter().fold(0, |all, signal| all | bit(*signal));
    sys::set_mask((interrupted_mask | action.mask | own) & !faults);
    let rights = from.rights.with(ProtectionKey::DEFAULT, AccessRights::READ_WRITE);
    // SAFETY: these are the program's rights, with which it can use its own stack and this one.
    unsafe { rights::write(rights) };
    // SAFETY: the program set this handler for this signal, and the arguments are the kernel's.
    unsafe { call(action.handler, signal, info, context, stack) };
    sys::set_mask(u64::MAX);
    match (thread, thread::current()) {
        (Some(thread), _) => thread.end_handler(),
        // The handler has made this thread ready for domains. The frame still holds the old state.
        (None, Some(thread)) => {
            // SAFETY: the kernel passes a valid frame.
            let context = unsafe { &mut *context.cast::<SignalContext>() };
            context.stack = thread.kernels_stack();
            if let Some(key) = thread::signal_stack_key() {
                frame::grant(context, key);
            }
        }
        (None, None) => {}
    }
    if let (Some(left), Some(timer)) = (deadline, thread::current().and_then(|thread| thread.timer().get())) {
        // This cannot fail for a timer that exists.
        let _ = sys::set_timer(timer, Some(left));
    }
}

const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

/// Performs the default action for a signal, or ignores it. `sent` says whether a process sent it.
fn default(signal: c_int, action: &Action, sent: bool) {
    let is_ignored = action.handler == libc::SIG_IGN;
    if !FAULTS.contains(&signal) {
        // The program has removed its handler since the signal arrived, and has set the kernel's action too.
        if !is_ignored {
            sys::resend(signal);
        }
        return;
    }
    if sent && is_ignored {
        return;
    }
    // After the handler returns, the instruction faults again and the kernel performs the default action. A signal that
    // was sent, or a breakpoint, does not repeat, so it is sent again.
    // SAFETY: the default action calls no function.
    let _ = unsafe { sys::set_action(signal, Action::DEFAULT) };
    if sent || signal == libc::SIGTRAP {
        sys::resend(signal);
    }
}

/// Returns the stack pointer to call a handler with, or 0 for the current stack.
fn stack_for(action: &Action, thread: Option<&Thread>, from: &Origin, frame: usize) -> usize {
    /// The bytes below the stack pointer that code may use without moving it.
    const RED_ZONE: usize = 128;
    /// More bytes than a frame takes.
    const FRAME: usize = 32 * 1024;
    let below = from.stack.wrapping_sub(RED_ZONE) & !15;
    let wants_alternate = action.flags & libc::SA_ONSTACK as u64 != 0;
    match thread {
        Some(thread) => match thread.programs_stack().get().addresses().filter(|_| wants_alternate) {
            Some(stack) if !stack.contains(&from.stack) => stack.end & !15,
            _ => below,
        },
        // The kernel has put the frame on the program's alternate stack if there is one, whatever the program asked
        // for.
        None if wants_alternate || from.stack.wrapping_sub(frame) < FRAME => 0,
        None => below,
    }
}

/// Calls a handler on a stack, or on the current one if `stack` is 0.
#[unsafe(naked)]
unsafe extern "C" fn call(
    handler: usize,
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
    stack: usize,
) {
    naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "mov rax, rdi",
        "mov edi, esi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "test r8, r8",
        "cmovnz rsp, r8",
        "and rsp, -16",
        "call rax",
        "mov rsp, rbp",
        "pop rbp",
        "ret",
    )
}
