//! The program's actions for signals.
//!
//! The kernel delivers a signal to this crate, with every signal blocked. The program's handler then runs as it would
//! without this crate: with the program's thread-locals and rights, and with the signal mask and stack that the program
//! has set. If the signal interrupted the program's code, it is [delivered](super::delivery) anew. If it interrupted a
//! domain, this module calls the handler, on the caller's stack below the call.

#![expect(unsafe_code, reason = "it calls the program's handlers")]

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};

use pkru::{AccessRights, KeyRights, ProtectionKey};

use super::actions;
use super::delivery::{self, Delivery, RED_ZONE, bit, faults};
use super::frame::SignalContext;
use crate::rights;
use crate::sys::{self, Action};
use crate::thread::{self, Thread};

/// The program's state when a signal arrived.
pub(super) struct Origin {
    /// The program's stack pointer. The stack is free below the red zone, which begins there.
    pub(super) stack: usize,
    pub(super) rights: KeyRights,
    /// The key that the interrupted call pins, if the signal interrupted a domain.
    pub(super) key: Option<ProtectionKey>,
}

/// Performs the program's action for a signal. Returns the handler that remains to be called, if any.
///
/// # Safety
///
/// The kernel passed the arguments. The FS base is the program's, and the rights include the program's.
pub(super) unsafe fn forward(
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
    from: &Origin,
) -> Option<Delivery> {
    let action = actions::get(signal);
    if !action.is_function() {
        // SAFETY: the kernel passes a valid `siginfo_t`.
        default(signal, &action, unsafe { (*info).si_code } <= 0);
        return None;
    }
    // Calls that the handler makes have their own deadlines.
    let timer = thread::current().and_then(|thread| thread.timer().get());
    let deadline = timer.and_then(sys::pause_timer);
    if action.flags & libc::SA_RESETHAND as u64 != 0 {
        actions::reset(signal);
    }
    let rights = from.rights.with(ProtectionKey::DEFAULT, AccessRights::READ_WRITE);
    if rights == from.rights && from.key.is_none() && deadline.is_none() {
        // SAFETY: the caller guarantees this.
        let delivery = unsafe { delivery::prepare(signal, &action, info, context, from.stack) };
        // SAFETY: the program ran with these rights, and code that it can run is all that follows.
        unsafe { rights::write(rights) };
        return delivery;
    }
    let here = (&raw const action).addr();
    let thread = thread::current();
    let stack = thread.map_or(0, |thread| stack_for(&action, thread, from));
    if let Some(thread) = thread {
        thread.begin_handler(from.stack, here, from.key);
    }
    // SAFETY: the kernel passes a valid frame.
    let interrupted_mask = unsafe { (*context.cast::<SignalContext>()).mask };
    let own = if action.flags & libc::SA_NODEFER as u64 == 0 { bit(signal) } else { 0 };
    // The handler may call domains, where the signals of faults must not be blocked.
    let mask = (interrupted_mask | action.mask | own) & !faults();
    // SAFETY: these are the program's rights, with which it can use its own stack and this one.
    unsafe { rights::write(rights) };
    // SAFETY: the program set this handler for this signal, and the arguments are the kernel's.
    unsafe { call(action.handler, signal, info, context, stack, mask) };
    if let Some(thread) = thread {
        thread.end_handler();
    }
    if let (Some(left), Some(timer)) = (deadline, timer) {
        // This cannot fail for a timer that exists.
        let _ = sys::set_timer(timer, Some(left));
    }
    None
}

/// Performs the default action for a signal, or ignores it. `sent` says whether a process sent it.
fn default(signal: c_int, action: &Action, sent: bool) {
    let is_ignored = action.handler == libc::SIG_IGN;
    if !sys::is_fault(signal) {
        // The program has removed its handler since the signal arrived, or never had one.
        if !is_ignored {
            // SAFETY: the default action calls no function.
            let _ = unsafe { sys::set_action(signal, Action::DEFAULT) };
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

/// Returns the stack pointer to call a handler with.
fn stack_for(action: &Action, thread: &Thread, from: &Origin) -> usize {
    let wants_alternate = action.flags & libc::SA_ONSTACK as u64 != 0;
    match thread.programs_stack().get().addresses().filter(|_| wants_alternate) {
        Some(stack) if !stack.contains(&from.stack) => stack.end & !15,
        _ => from.stack.wrapping_sub(RED_ZONE) & !15,
    }
}

/// Calls a handler with a signal mask, on a stack, or on the current one if `stack` is 0. Every signal is blocked before and
/// afterwards.
///
/// The mask is set on that stack. A signal that is pending arrives at once, and its handler runs below the stack pointer
/// that it has interrupted: on the signal stack there is no room for it.
#[unsafe(naked)]
unsafe extern "C" fn call(
    handler: usize,
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
    stack: usize,
    mask: u64,
) {
    naked_asm!(
        ".cfi_startproc",
        // 0x1b: a difference to this place, of four bytes.
        ".cfi_personality 0x1b, {refuse}",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "test r8, r8",
        "cmovnz rsp, r8",
        "and rsp, -16",
        "push r9",
        "push rdi",
        "push rsi",
        "push rdx",
        "push rcx",
        // rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8).
        "mov edi, {set_mask}",
        "lea rsi, [rsp + 32]",
        "xor edx, edx",
        "mov r10d, 8",
        "mov eax, {sigprocmask}",
        "syscall",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "pop rax",
        // Keeps the stack aligned.
        "push rax",
        "call rax",
        "push -1",
        "mov edi, {set_mask}",
        "mov rsi, rsp",
        "xor edx, edx",
        "mov r10d, 8",
        "mov eax, {sigprocmask}",
        "syscall",
        "mov rsp, rbp",
        "pop rbp",
        ".cfi_def_cfa rsp, 8",
        "ret",
        ".cfi_endproc",
        refuse = sym refuse,
        set_mask = const libc::SIG_SETMASK,
        sigprocmask = const libc::SYS_rt_sigprocmask,
    )
}

/// Ends an unwinding that would leave a handler. A backtrace does not ask.
///
/// The next frames are those of a domain, on its stack. Code in the domain can have written what an unwinder would run.
extern "C" fn refuse(_: c_int, _: c_int, _: u64, _: *mut c_void, _: *mut c_void) -> c_int {
    /// `_URC_FATAL_PHASE1_ERROR` (Itanium C++ ABI, "Exception Handling", section "Reason Codes").
    const FATAL: c_int = 3;
    FATAL
}
