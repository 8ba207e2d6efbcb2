//! Running the program's own handlers.
//!
//! A signal is taken on this crate's stack, with every signal blocked. The program's handler then runs as it would
//! without this crate: with its thread-locals and rights, and the mask and stack that it asked for. If a domain was
//! interrupted, the stack is the caller's, below the call.

#![expect(unsafe_code, reason = "it calls the program's handlers")]

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};
use std::mem::offset_of;

use pkru::{AccessRights, KeyRights, ProtectionKey};

use super::{actions, frame};
use crate::rights;
use crate::sys::{self, Action, FAULTS};
use crate::thread::{self, Thread};

/// Where the mask stands in a frame.
const MASK: usize = offset_of!(libc::ucontext_t, uc_sigmask);

/// What a signal has interrupted, as the program's handler sees it.
pub(super) struct Origin {
    /// The program's stack pointer. Below it and the red zone the stack is free.
    pub(super) stack: usize,
    pub(super) rights: KeyRights,
    /// The key that the interrupted call of a domain pins.
    pub(super) key: Option<ProtectionKey>,
}

/// Does what the program wants on a signal.
///
/// # Safety
///
/// The arguments are those that the kernel passed; rights and FS base are the program's, or more.
pub(super) unsafe fn forward(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void, from: &Origin) {
    let action = actions::get(signal);
    if !action.is_function() {
        // SAFETY: the kernel passes a valid description of the signal.
        default(signal, &action, unsafe { (*info).si_code } <= 0);
        return;
    }
    // Calls that the handler makes have deadlines of their own.
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
    // SAFETY: the kernel passes a valid frame, and its set is 64 bits.
    let interrupted_mask = unsafe { context.wrapping_byte_add(MASK).cast::<u64>().read() };
    let own = if action.flags & libc::SA_NODEFER as u64 == 0 { bit(signal) } else { 0 };
    // A handler can call domains too.
    let faults = FAULTS.iter().fold(0, |all, signal| all | bit(*signal));
    sys::set_mask((interrupted_mask | action.mask | own) & !faults);
    let rights = from.rights.with(ProtectionKey::DEFAULT, AccessRights::READ_WRITE);
    // SAFETY: these are the rights with which the program ran, which let it use its own stack and this one.
    unsafe { rights::write(rights) };
    // SAFETY: the handler gets what the kernel passed, on a stack of the program's.
    unsafe { call(action.handler, signal, info, context, stack) };
    sys::set_mask(u64::MAX);
    match (thread, thread::current()) {
        (Some(thread), _) => thread.end_handler(),
        // The handler has made its thread ready to enter domains. The frame holds the state from before.
        (None, Some(thread)) => {
            // SAFETY: the kernel passes a valid frame.
            let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
            context.uc_stack = thread.kernels_stack();
            if let Some(key) = thread::signal_stack_key() {
                frame::grant(context, key);
            }
        }
        (None, None) => {}
    }
    if let (Some(left), Some(timer)) = (deadline, thread::current().and_then(|thread| thread.timer().get())) {
        // It cannot fail for a timer that exists.
        let _ = sys::set_timer(timer, Some(left));
    }
}

const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

/// Does what the kernel would do where there is no handler.
fn default(signal: c_int, action: &Action, sent: bool) {
    let is_ignored = action.handler == libc::SIG_IGN;
    if !FAULTS.contains(&signal) {
        // The program has taken its handler away since the signal was taken, and the kernel knows.
        if !is_ignored {
            sys::resend(signal);
        }
        return;
    }
    if sent && is_ignored {
        return;
    }
    // On return the instruction faults again, or the signal is sent again, and the kernel acts on it. After a breakpoint
    // the next instruction would run.
    // SAFETY: the default action calls nothing.
    let _ = unsafe { sys::set_action(signal, Action::DEFAULT) };
    if sent || signal == libc::SIGTRAP {
        sys::resend(signal);
    }
}

/// Returns the stack pointer to call a handler with; 0 for the stack that this runs on.
fn stack_for(action: &Action, thread: Option<&Thread>, from: &Origin, frame: usize) -> usize {
    /// The bytes below the stack pointer that code may use without moving it.
    const RED_ZONE: usize = 128;
    /// More than a frame takes.
    const FRAME: usize = 32 * 1024;
    let below = from.stack.wrapping_sub(RED_ZONE) & !15;
    let wants_alternate = action.flags & libc::SA_ONSTACK as u64 != 0;
    match thread {
        Some(thread) => match thread.programs_stack().get().addresses().filter(|_| wants_alternate) {
            Some(stack) if !stack.contains(&from.stack) => stack.end & !15,
            _ => below,
        },
        // The kernel has chosen between the program's own stacks, but as if the handler wanted the alternate one.
        None if wants_alternate || from.stack.wrapping_sub(frame) < FRAME => 0,
        None => below,
    }
}

/// Calls a handler on a stack, or on this one if that is 0.
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
