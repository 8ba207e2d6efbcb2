//! The signal handler. It reads the frame, calls [`decide`](super::decide), and applies the decision.
//!
//! A handler starts with the kernel's initial rights, which allow key 0 only, and with the FS base of the interrupted
//! code. The entry allows all keys by a few instructions that touch no memory. The rest is Rust, which uses no
//! thread-local until the FS base is the caller's.

#![expect(unsafe_code, reason = "it is the signal handler")]

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};
use std::mem::offset_of;
use std::ptr::NonNull;

use pkru::gate::{Context, Gate};
use pkru::instructions::{rdfsbase, wrfsbase};

use super::decide::{CallFacts, Decision, Facts, Grantee, decide};
use super::delivery::Delivery;
use super::forward::{self, Origin};
use super::frame::SignalContext;
use super::trap::{Interrupted, Running, Trap};
use super::{actions, frame, on_demand, panics, stacks};
use crate::inside::abort::AbortReason;
use crate::keys::{self, lent, statics};
use crate::sys;
use crate::thread::{self, Thread};

/// Allows all keys, runs [`handle`], and then returns to the interrupted code or calls the program's handler.
///
/// In a thread that enters domains the frame lies on the thread's signal stack, which has `SS_AUTODISARM`. `handle` runs
/// there. In other threads it runs on one of the [`stacks`]. There the thread's own stacks are used only as the kernel
/// would: the program's handler finds the frame above it and nothing else.
///
/// The arguments are in RDI, RSI and RDX. The stack pointer is the start of the frame.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn entry(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void) {
    naked_asm!(
        ".cfi_startproc",
        "mov r8, rdx",
        "xor eax, eax",
        "xor ecx, ecx",
        "xor edx, edx",
        "wrpkru",
        // A domain may have jumped to WRPKRU with other values.
        "test eax, eax",
        "jne 9f",
        // Linux leaves the flag AC as it was. With it, a misaligned access here would end the process.
        "pushfq",
        "and dword ptr [rsp], ~0x40000",
        "popfq",
        "mov rdx, r8",
        "mov r9, rsp",
        "mov r10, -1",
        "bt dword ptr [rdx + {stack_flags}], {autodisarm}",
        "jc 4f",
        // Takes one of the stacks: R10 is its number.
        "lea r11, [rip + {taken}]",
        "2: xor r10d, r10d",
        "3: lock bts dword ptr [r11], r10d",
        "jnc 3f",
        "inc r10d",
        "cmp r10d, {count}",
        "jb 3b",
        "pause",
        "jmp 2b",
        "3: lea eax, [r10 + 1]",
        "shl rax, {shift}",
        "mov rsp, [rip + {stacks}]",
        "add rsp, rax",
        "4: and rsp, -16",
        "push r10",
        "push r9",
        "sub rsp, {room}",
        // The frame starts at the word there, and its first word is the return address.
        ".cfi_escape 0x0f, 6, 0x77, 0x80 | {room}, 0x00, 0x06, 0x23, 0x08",
        "mov rcx, rsp",
        "call {handle}",
        "mov r10, [rsp + {room} + 8]",
        "lea r11, [rip + {taken}]",
        "test al, al",
        "jnz 6f",
        "mov rsp, [rsp + {room}]",
        ".cfi_remember_state",
        ".cfi_def_cfa rsp, 8",
        "test r10, r10",
        "js 5f",
        "lock btr dword ptr [r11], r10d",
        "5: ret",
        // Calls the program's handler. Its frame may lie elsewhere, and this stack is free once RSP is there.
        ".cfi_restore_state",
        "6: mov ebx, [rsp + {signal}]",
        "mov r12, [rsp + {info}]",
        "mov r13, [rsp + {context}]",
        "mov r14, [rsp + {handler}]",
        "mov r15, [rsp + {mask}]",
        "mov ebp, [rsp + {arm}]",
        "mov rsp, [rsp + {frame}]",
        ".cfi_def_cfa rsp, 8",
        "test r10, r10",
        "js 7f",
        "lock btr dword ptr [r11], r10d",
        // Arms the signal stack as it was when the signal arrived: sigaltstack(&context.stack, NULL).
        "7: test ebp, ebp",
        "jz 8f",
        "lea rdi, [r13 + {stack}]",
        "xor esi, esi",
        "mov eax, {sigaltstack}",
        "syscall",
        // rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8).
        "8: push r15",
        "mov edi, {set_mask}",
        "mov rsi, rsp",
        "xor edx, edx",
        "mov r10d, 8",
        "mov eax, {sigprocmask}",
        "syscall",
        "pop r15",
        "mov edi, ebx",
        "mov rsi, r12",
        "mov rdx, r13",
        "xor ebp, ebp",
        "xor eax, eax",
        "jmp r14",
        "9: ud2",
        ".cfi_endproc",
        stack_flags = const offset_of!(SignalContext, stack) + offset_of!(libc::stack_t, ss_flags),
        stack = const offset_of!(SignalContext, stack),
        autodisarm = const sys::SS_AUTODISARM.trailing_zeros(),
        taken = sym stacks::TAKEN,
        stacks = sym stacks::STACKS,
        count = const stacks::COUNT,
        shift = const stacks::SHIFT,
        room = const ROOM,
        handle = sym handle,
        signal = const offset_of!(Delivery, signal),
        info = const offset_of!(Delivery, info),
        context = const offset_of!(Delivery, context),
        handler = const offset_of!(Delivery, handler),
        mask = const offset_of!(Delivery, mask),
        arm = const offset_of!(Delivery, arm),
        frame = const offset_of!(Delivery, frame),
        sigaltstack = const libc::SYS_sigaltstack,
        sigprocmask = const libc::SYS_rt_sigprocmask,
        set_mask = const libc::SIG_SETMASK,
    )
}

/// The bytes that [`entry`] reserves for a [`Delivery`].
const ROOM: usize = 64;

// The stack stays aligned. The description of the frame has the number as a signed LEB128 of two bytes.
const _: () = assert!(size_of::<Delivery>() <= ROOM && ROOM.is_multiple_of(16) && ROOM < 128);

/// Acts on a signal. Returns whether `delivery` was written: the program's handler is to be called.
unsafe extern "C" fn handle(
    signal: c_int,
    info: *mut libc::siginfo_t,
    frame: *mut c_void,
    delivery: *mut Delivery,
) -> bool {
    // SAFETY: the kernel passes a valid frame, and nothing else uses it while the handler runs.
    let context = unsafe { &mut *frame.cast::<SignalContext>() };
    // SAFETY: the kernel passes the arguments.
    let at = unsafe { frame::read(signal, info, context) };
    // SAFETY: the kernel passes the frame of this signal.
    let call = unsafe { Call::interrupted_by(&at, frame) };
    let facts = Facts {
        call: call.as_ref().map(|call| call.facts),
        statics_key: statics::key(),
        lent_key: lent::key(),
        is_default: sys::is_limit(signal) && actions::is_default(signal),
    };
    match decide(&at, &facts) {
        Decision::Rewind { reason } => {
            if let Some(call) = &call {
                // SAFETY: the signal interrupted this call.
                unsafe { rewind(context, call, &at, reason) };
            }
            return false;
        }
        Decision::SkipPanicWrite => {
            if let Some(call) = &call {
                call.skip_panic_write(context, &at);
            }
        }
        Decision::Forward => {
            // SAFETY: the kernel passes the arguments, the FS base is the program's, and the rights allow all keys.
            if let Some(to) = unsafe { forward(signal, info, frame, &at, call.as_ref()) } {
                // SAFETY: `entry` passes a place for it.
                unsafe { delivery.write(to) };
                return true;
            }
        }
        Decision::Ask => {
            if let Some(call) = &call {
                // SAFETY: as above.
                unsafe { ask(signal, info, frame, &at, call) };
            }
        }
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
        Decision::FailCopy { resume } => frame::fail_copy(context, resume, at.address),
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
    false
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
        let is_about_code = sys::is_fault(at.signal) || sys::is_limit(at.signal);
        // SAFETY: the signal interrupted this call.
        let skip = unsafe { panics::recognize(at, call.learning.get()) };
        let facts = CallFacts {
            is_leaving: fs_base == caller,
            is_copy: is_about_code && !thread::current().is_some_and(Thread::is_original),
            is_panic_write: skip.is_some(),
            is_asked: on_demand::is_asked(at, call, thread::current().map_or(0, Thread::own_stack_start)),
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
unsafe fn rewind(context: &mut SignalContext, call: &Call, at: &Interrupted, reason: Option<AbortReason>) {
    let in_panic = call.running().in_panic.replace(false);
    call.running().trap.set(Some(Trap { at: *at, reason, in_panic }));
    // SAFETY: the signal interrupted this call, and sigreturn resumes with the returned state, whose FS base is in
    // force already.
    let rewind = unsafe { Gate::Pkru.rewind(call.running) };
    if !frame::write(context, rewind) {
        // The frame has no PKRU, unlike at the capability check, so the caller cannot resume.
        sys::exit_with(libc::EXIT_FAILURE);
    }
}

/// Has the program's handler fill a page that a domain has used.
///
/// # Safety
///
/// As for [`forward()`], and the signal interrupted this call.
unsafe fn ask(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void, at: &Interrupted, call: &Call) {
    call.running().asked.0.set(at.instruction);
    call.running().asked.1.set(at.address);
    let before = actions::get(signal);
    // SAFETY: the caller guarantees this.
    unsafe { forward(signal, info, frame, at, Some(call)) };
    // A handler that wants to end the program leaves that to the kernel. The fault is about to end the call only.
    if actions::is_default(signal) && before.flags & libc::SA_RESETHAND as u64 == 0 {
        actions::set(signal, before);
    }
}

/// Performs the program's action for a signal. Returns what [`entry`] has to do for it.
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
) -> Option<Delivery> {
    let Some(call) = call else {
        let from = Origin { stack: at.stack as usize, rights: at.rights, key: None };
        // SAFETY: the caller guarantees this for the arguments, the FS base and the rights.
        return unsafe { forward::forward(signal, info, frame, &from) };
    };
    let context = call.context();
    let from =
        Origin { stack: context.caller_stack() as usize, rights: context.caller_rights(), key: Some(context.key()) };
    // A fault in the program's handler must not count as the domain's.
    // SAFETY: the signal interrupted this call.
    unsafe { Gate::Pkru.hide(call.running) };
    // SAFETY: the caller guarantees this for the arguments, the FS base and the rights.
    let delivery = unsafe { forward::forward(signal, info, frame, &from) };
    debug_assert!(delivery.is_none(), "a handler that interrupts a call is called while the call is hidden");
    // SAFETY: the call was hidden above, and resumes when the handler returns.
    unsafe { Gate::Pkru.show(call.running) };
    None
}
