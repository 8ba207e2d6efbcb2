//! Calling a handler of the program's as the kernel would.
//!
//! The kernel calls this crate for every signal, with the frame on the stack that suits this crate. If the signal
//! interrupted the program's own code, the frame is moved to where the kernel would have put it for the program's
//! handler. The handler then returns to the interrupted code through that frame, or leaves it by a jump, and nothing of
//! this crate lies between them.
//!
//! # References
//!
//! Linux 6.12, `arch/x86/kernel/signal.c` (`get_sigframe`), `arch/x86/kernel/signal_64.c` (`struct rt_sigframe`).

#![expect(unsafe_code, reason = "it writes signal frames and calls the program's handlers")]

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};
use std::mem::offset_of;

use super::actions;
use super::frame::{self, SignalContext};
use crate::sys::{self, Action, FAULTS};
use crate::thread::{self, Thread};

/// A handler to call.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Delivery {
    pub(super) signal: u64,
    pub(super) info: *mut libc::siginfo_t,
    pub(super) context: *mut c_void,
    pub(super) handler: usize,
    /// The signal mask of the handler.
    pub(super) mask: u64,
    /// The start of the frame: the handler's first stack pointer.
    pub(super) frame: usize,
    /// Whether to set the alternate stack as it was when the signal arrived: 1 or 0.
    pub(super) arm: u64,
}

/// The layout of a frame, from the lowest address up. The state of the FPU follows somewhere above.
#[repr(C)]
struct Frame {
    /// Where the handler returns to.
    back: usize,
    context: SignalContext,
    info: libc::siginfo_t,
}

/// A stack that a frame can be moved to.
struct Place {
    /// The first address above the frame.
    top: usize,
    /// The lowest address of the stack, if it is known.
    bottom: usize,
}

/// The bytes below the stack pointer that code may use without moving it.
pub(super) const RED_ZONE: usize = 128;

/// Prepares the call of a handler of the program's. Returns `None` if there is none to call: what the frame resumes may
/// then be another state.
///
/// # Safety
///
/// The kernel passed `info` and `context` for the signal, which has interrupted the program's code with the stack
/// pointer `stack`. Every signal is blocked.
pub(super) unsafe fn prepare(
    signal: c_int,
    action: &Action,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
    stack: usize,
) -> Option<Delivery> {
    let here = context.wrapping_byte_sub(offset_of!(Frame, context)).cast::<Frame>();
    if here.wrapping_byte_add(offset_of!(Frame, info)).addr() != info.addr() {
        sys::abort_with(b"pkru-userspace: the kernel's signal frame has another layout\n");
    }
    let thread = thread::current();
    // SAFETY: the caller guarantees this.
    if let Some(delivery) = unsafe { deliver(signal, action, here, thread, stack) } {
        return Some(delivery);
    }
    // The stack has no room for the frame. The kernel then sends SIGSEGV instead.
    // SAFETY: nothing else uses the kernel's frame.
    unsafe { overflow(here) };
    let action = actions::get(libc::SIGSEGV);
    if signal != libc::SIGSEGV && action.is_function() && wants_alternate(&action) {
        // SAFETY: as above.
        let delivery = unsafe { deliver(libc::SIGSEGV, &action, here, thread, stack) };
        if delivery.is_some() {
            return delivery;
        }
    }
    // SAFETY: the default action calls no function.
    let _ = unsafe { sys::set_action(libc::SIGSEGV, Action::DEFAULT) };
    sys::resend(libc::SIGSEGV);
    None
}

/// Moves a frame to where the handler of this action expects it. Returns `None` if there is no room for it.
///
/// # Safety
///
/// As for [`prepare`].
unsafe fn deliver(
    signal: c_int,
    action: &Action,
    here: *mut Frame,
    thread: Option<&Thread>,
    stack: usize,
) -> Option<Delivery> {
    // SAFETY: the kernel passes a valid frame, and nothing changes it meanwhile.
    let interrupted = unsafe { &(*here).context };
    let own = if action.flags & libc::SA_NODEFER as u64 == 0 { bit(signal) } else { 0 };
    let mask = interrupted.mask | action.mask | own;
    let frame = match place(action, thread, interrupted, here.addr(), stack) {
        None => here,
        // SAFETY: the frame is the kernel's, and the place is where the kernel would have put it.
        Some(to) => unsafe { move_frame(here, &to) }?,
    };
    if thread.is_none() {
        // SAFETY: it is a frame, and nothing else uses it.
        unsafe { (*frame).back = BACK.addr() };
    }
    Some(Delivery {
        signal: signal as u64,
        info: frame.wrapping_byte_add(offset_of!(Frame, info)).cast(),
        context: frame.wrapping_byte_add(offset_of!(Frame, context)).cast(),
        handler: action.handler,
        // The handler may call domains, where the signals of faults must not be blocked.
        mask: if thread.is_some() { mask & !faults() } else { mask },
        frame: frame.addr(),
        arm: thread.is_some_and(|thread| thread.signal_stack().contains(&here.addr())).into(),
    })
}

fn wants_alternate(action: &Action) -> bool {
    action.flags & libc::SA_ONSTACK as u64 != 0
}

pub(super) const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

/// Returns the set of the signals of faults.
pub(super) fn faults() -> u64 {
    FAULTS.iter().fold(0, |all, signal| all | bit(*signal))
}

/// Returns the stack that the kernel would have put the frame on; `None` if it lies there.
fn place(
    action: &Action,
    thread: Option<&Thread>,
    interrupted: &SignalContext,
    frame: usize,
    stack: usize,
) -> Option<Place> {
    let below = Place { top: stack.wrapping_sub(RED_ZONE), bottom: 0 };
    match thread {
        Some(thread) => {
            if !thread.signal_stack().contains(&frame) {
                return None;
            }
            let alternate = thread.programs_stack().get().addresses().filter(|_| wants_alternate(action));
            match alternate.filter(|alternate| !alternate.contains(&stack)) {
                Some(alternate) => Some(Place { top: alternate.end, bottom: alternate.start }),
                None => Some(below),
            }
        }
        // The kernel uses the thread's alternate stack, if it has one, whatever the program asked for.
        None => {
            let alternate = sys::AlternateStack::of_kernel(&interrupted.stack).addresses()?;
            let is_moved = alternate.contains(&frame) && !alternate.contains(&stack);
            (is_moved && !wants_alternate(action)).then_some(below)
        }
    }
}

/// Copies a frame to a stack. Returns `None` if there is no room.
///
/// # Safety
///
/// The frame is the kernel's. Below the top of the place nothing is in use.
unsafe fn move_frame(from: *mut Frame, to: &Place) -> Option<*mut Frame> {
    // SAFETY: the frame is the kernel's, and nothing changes it meanwhile.
    let context = unsafe { &(*from).context };
    let state = context.machine.fpregs.cast::<u8>();
    // SAFETY: the caller guarantees this.
    let size = unsafe { frame::state_size(context) };
    let new_state = to.top.checked_sub(size)? & !63;
    // The handler is entered as a function: its stack pointer is 8 below a multiple of 16.
    let start = (new_state.checked_sub(size_of::<Frame>())? & !15).checked_sub(8)?;
    if start < to.bottom || !sys::is_writable(start..to.top) {
        return None;
    }
    let frame = start as *mut Frame;
    // SAFETY: the target is writable and free, and lies on another stack.
    unsafe { from.copy_to_nonoverlapping(frame, 1) };
    if size != 0 {
        // SAFETY: as above; the kernel's state has this size.
        unsafe { state.copy_to_nonoverlapping(new_state as *mut u8, size) };
        // SAFETY: the frame was just written.
        unsafe { (*frame).context.machine.fpregs = new_state as *mut _ };
    }
    Some(frame)
}

/// Makes a frame that of the SIGSEGV which the kernel sends if it cannot write a frame.
///
/// # Safety
///
/// The frame is the kernel's, and nothing else uses it.
unsafe fn overflow(frame: *mut Frame) {
    const SI_KERNEL: c_int = 0x80;
    // SAFETY: `siginfo_t` is a C struct of integers, for which all zeros are valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    info.si_signo = libc::SIGSEGV;
    info.si_code = SI_KERNEL;
    // SAFETY: the caller guarantees this for the frame.
    unsafe { (*frame).info = info };
    // SAFETY: as above.
    unsafe { (*frame).context.mask &= !bit(libc::SIGSEGV) };
}

/// In a thread that enters no domains: where handlers return to. It returns to the interrupted code as the kernel's
/// restorer does.
///
/// The handler may have made the thread ready for domains. The frame then still has the thread's old alternate stack.
const BACK: *const u8 = (back as *const u8).wrapping_add(NOP);

/// The size in bytes of the first instruction of [`back`]. It is there for unwinders, which look for the function of a
/// return address one byte before it.
const NOP: usize = 1;

/// The code at [`BACK`]. RSP is the address of the context.
///
/// The description says that the interrupted code is the caller: each register is where the context has it.
#[unsafe(naked)]
unsafe extern "C" fn back() {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_signal_frame",
        // DW_CFA_def_cfa_expression: the stack pointer in the context.
        ".cfi_escape 0x0f, 4, 0x77, 0xa0, 0x01, 0x06",
        // DW_CFA_expression: the places of R8 to R15, RDI, RSI, RBP, RBX, RDX, RAX, RCX, RSP and RIP.
        ".cfi_escape 0x10, 8, 2, 0x77, 0x28",
        ".cfi_escape 0x10, 9, 2, 0x77, 0x30",
        ".cfi_escape 0x10, 10, 2, 0x77, 0x38",
        ".cfi_escape 0x10, 11, 3, 0x77, 0xc0, 0x00",
        ".cfi_escape 0x10, 12, 3, 0x77, 0xc8, 0x00",
        ".cfi_escape 0x10, 13, 3, 0x77, 0xd0, 0x00",
        ".cfi_escape 0x10, 14, 3, 0x77, 0xd8, 0x00",
        ".cfi_escape 0x10, 15, 3, 0x77, 0xe0, 0x00",
        ".cfi_escape 0x10, 5, 3, 0x77, 0xe8, 0x00",
        ".cfi_escape 0x10, 4, 3, 0x77, 0xf0, 0x00",
        ".cfi_escape 0x10, 6, 3, 0x77, 0xf8, 0x00",
        ".cfi_escape 0x10, 3, 3, 0x77, 0x80, 0x01",
        ".cfi_escape 0x10, 1, 3, 0x77, 0x88, 0x01",
        ".cfi_escape 0x10, 0, 3, 0x77, 0x90, 0x01",
        ".cfi_escape 0x10, 2, 3, 0x77, 0x98, 0x01",
        ".cfi_escape 0x10, 7, 3, 0x77, 0xa0, 0x01",
        ".cfi_escape 0x10, 16, 3, 0x77, 0xa8, 0x01",
        "nop",
        "mov rdi, rsp",
        "call {returning}",
        "mov eax, {sigreturn}",
        "syscall",
        ".cfi_endproc",
        returning = sym returning,
        sigreturn = const libc::SYS_rt_sigreturn,
    )
}

// The description has these numbers.
const _: () = {
    const REGISTERS: usize = offset_of!(SignalContext, machine);
    assert!(REGISTERS + 8 * libc::REG_R8 as usize == 0x28);
    assert!(REGISTERS + 8 * libc::REG_RSP as usize == 160 && REGISTERS + 8 * libc::REG_RIP as usize == 168);
};

unsafe extern "C" fn returning(context: *mut SignalContext) {
    let Some(thread) = thread::current() else { return };
    // SAFETY: `back` passes the frame's context, and nothing else uses it.
    let context = unsafe { &mut *context };
    context.stack = thread.kernels_stack();
    if let Some(key) = thread::signal_stack_key() {
        frame::grant(context, key);
    }
}
