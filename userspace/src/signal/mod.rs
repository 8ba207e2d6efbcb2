//! Signals: the handler that ends a call whose code has faulted, and what it leaves alone.
//!
//! A handler starts with the kernel's initial rights, which allow key 0 alone, and with the FS base of whatever was
//! interrupted. So the entry is a few instructions that touch no memory and open the rights; the rest is Rust that uses
//! no thread-local. For a fault in a domain it writes the rewind's state into the signal frame, and sigreturn resumes
//! there with the caller's rights in one step. Any other signal goes to the program's own handler, see [`deliver`].
//!
//! Whether a domain was interrupted is told by the stack that the frame lies on: each thread has one that the kernel
//! uses for nothing else, and the slot of a key says on which thread it was pinned. No register that the domain could
//! have set is asked.
//!
//! # References
//!
//! Linux 6.12, `arch/x86/kernel/signal.c`.

pub(crate) mod actions;
mod deliver;
mod frame;
pub(crate) mod panics;

use std::arch::naked_asm;
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr::NonNull;

use pkru::gate::{Context, Gate};
use pkru::instructions::{rdfsbase, wrfsbase};
use pkru::rights::Access;
use pkru::{KeyRights, ProtectionKey};

use crate::report::Report;
use crate::thread::{self, Thread};
use crate::{Error, globals, keys, sys};
use deliver::Interrupted;

/// A call that runs in a domain, as the handler sees it. Domains can read it and not write it.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Running {
    /// First, so that the gate's pointer to it leads to the whole.
    pub(crate) context: Context,
    /// The domain's own stack.
    pub(crate) stack: Range<usize>,
    /// Written by the handler, when it ends the call.
    pub(crate) trap: Cell<Option<Trap>>,
    /// Written by the handler, when code in the domain has begun to panic.
    pub(crate) in_panic: Cell<bool>,
    /// The call is a trial that panics, so that the handler learns how that goes.
    pub(crate) learning: Cell<bool>,
}

/// What the handler notes of a fault.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trap {
    pub(crate) signal: c_int,
    /// The kernel's reason, `si_code`.
    pub(crate) code: c_int,
    /// The address of the fault, where the signal has one.
    pub(crate) address: u64,
    pub(crate) instruction: u64,
    /// The stack pointer.
    pub(crate) stack: u64,
    /// The page fault's error code, where it was one.
    pub(crate) error_code: u32,
    /// The page's key, where a key denied the access.
    pub(crate) key: Option<ProtectionKey>,
    /// The rights in force.
    pub(crate) rights: KeyRights,
    pub(crate) report: Option<Report>,
    /// Code in the domain was panicking.
    pub(crate) in_panic: bool,
}

/// The signals that a fault raises, and the one by which code aborts.
pub(crate) const FAULTS: [c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGABRT];

/// The signal that says that a call has taken too long: one of those that are never blocked.
pub(crate) const DEADLINE: c_int = libc::SIGFPE;

/// Installs the handler, also in the place of the program's own. Called once.
pub(crate) fn install(pkru_offset: usize) -> Result<(), Error> {
    frame::set_pkru_offset(pkru_offset);
    actions::adopt().map_err(Error::system("install the signal handlers"))
}

/// Opens the rights, with registers alone, and goes on in Rust. The arguments are in RDI, RSI and RDX.
#[unsafe(naked)]
unsafe extern "C" fn entry(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void) {
    naked_asm!(
        "mov r8, rdx",
        "xor eax, eax",
        "xor ecx, ecx",
        "xor edx, edx",
        "wrpkru",
        // A domain may have jumped to the write.
        "test eax, eax",
        "jne 2f",
        // Linux leaves AC as it was, and a misaligned access here would be the end.
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
    // SAFETY: the kernel passes a valid frame, and nobody else uses it while the handler runs.
    let context = unsafe { &mut *frame.cast::<libc::ucontext_t>() };
    // SAFETY: the kernel passes a valid description of the signal.
    let description = unsafe { &*info };
    let running = keys::running_on(frame as usize);
    if let Some(key) = globals::key().filter(|_| is_invitation(signal, description)) {
        match running {
            Some(running) => {
                // SAFETY: the call is running, so its context is alive.
                let call = unsafe { running.as_ref() };
                // SAFETY: the process has domains, so it can read the FS base.
                if unsafe { rdfsbase() } != call.caller_fs_base() {
                    call.grant_to_caller(key);
                }
                // Else the gate is on its way out, and compares what it has loaded of the caller's rights: the thread
                // gets these when it faults.
            }
            None => frame::grant(context, key),
        }
        globals::follow();
        return;
    }
    let Some(running) = running else {
        // SAFETY: these are the kernel's own arguments, and no domain was interrupted.
        unsafe { outside(signal, info, frame) };
        return;
    };
    // SAFETY: the process has domains, so it can read the FS base.
    let interrupted = unsafe { rdfsbase() };
    // SAFETY: the call is running, so its context is alive.
    let callers = unsafe { running.as_ref() }.caller_fs_base();
    // SAFETY: the caller had this FS base, and has its thread-locals there.
    unsafe { wrfsbase(callers) };
    let goes_on = if ends_call(signal, description) {
        // SAFETY: the signal struck this context's call on this thread.
        unsafe { end_call(signal, info, context, running) }
    } else {
        // SAFETY: as above.
        unsafe { hand_on(signal, info, frame, running) };
        true
    };
    if goes_on {
        // SAFETY: it was in force when the signal struck.
        unsafe { wrfsbase(interrupted) };
    }
}

/// Does what is to be done on a signal that has interrupted no domain.
///
/// # Safety
///
/// The arguments are those that the kernel passed; FS base is the program's.
unsafe fn outside(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void) {
    // SAFETY: the caller answers for the arguments.
    let context = unsafe { &*frame.cast::<libc::ucontext_t>() };
    // SAFETY: as above.
    if is_deadline(signal, unsafe { &*info }) {
        // Of a call that has just ended, or has not begun.
        return;
    }
    // SAFETY: as above.
    let denied = unsafe { denying_key(signal, info) };
    if let Some(key) = globals::key().filter(|key| denied == Some(*key)) {
        // A thread that has not heard of the statics' key.
        frame::grant(context, key);
        return;
    }
    let from = deliver::outside(context);
    if from.rights.get(ProtectionKey::DEFAULT).allow(Access::Write) || !FAULTS.contains(&signal) {
        // SAFETY: these are the kernel's own arguments; FS base and rights are the program's.
        unsafe { deliver::deliver(signal, info, frame, &from) };
    } else {
        // A domain's rights, but no call of this thread's: the program's handler could not run with what is in force.
        // SAFETY: the default action calls nothing. The fault happens again, and ends the process.
        let _ = unsafe { sys::set_action(signal, sys::Action::DEFAULT) };
    }
}

/// Has the caller of a domain go on when the handler returns; `true` if the domain shall go on after all.
///
/// # Safety
///
/// The arguments are those that the kernel passed for a signal that struck in the call that is running. FS base is the
/// caller's.
unsafe fn end_call(
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: &mut libc::ucontext_t,
    running: NonNull<Context>,
) -> bool {
    // SAFETY: every context that is entered by this crate is the head of a `Running`, alive while its call runs.
    let call = unsafe { running.cast::<Running>().as_ref() };
    // SAFETY: the caller answers for the arguments.
    let trap = Trap { in_panic: call.in_panic.get(), ..unsafe { trap(signal, info, context) } };
    if !thread::current().is_some_and(Thread::is_original) {
        // Code in the domain has duplicated the process: the copy must not go on as the program, but it may end as it
        // wants to.
        sys::exit_with(if let Some(Report::Exit { status }) = trap.report { status } else { libc::EXIT_FAILURE });
    }
    // SAFETY: the frame is that of the page fault.
    if panics::is_bookkeeping(&trap, call.learning.get()) && unsafe { panics::pass_over(context, trap.address) } {
        call.in_panic.set(true);
        return true;
    }
    call.in_panic.set(false);
    call.trap.set(Some(trap));
    // SAFETY: the signal struck this context's call on this thread, and sigreturn resumes as it says. The FS base is in
    // force, which the C library's return from a handler does not use.
    let rewind = unsafe { Gate::Pkru.rewind(running) };
    if !frame::write(context, rewind) {
        // No way back to the caller: the kernel's frames have changed since the capability check.
        sys::exit_with(libc::EXIT_FAILURE);
    }
    false
}

/// Runs the program's handler in the middle of a domain's call.
///
/// # Safety
///
/// As for [`end_call`].
unsafe fn hand_on(signal: c_int, info: *mut libc::siginfo_t, frame: *mut c_void, running: NonNull<Context>) {
    // SAFETY: the call is running, so its context is alive.
    let context = unsafe { running.as_ref() };
    let from = Interrupted {
        stack: context.caller_stack() as usize,
        rights: context.caller_rights(),
        key: Some(context.key()),
    };
    // What goes wrong in the program's handler is not the domain's doing.
    // SAFETY: the signal struck this context's call on this thread.
    unsafe { Gate::Pkru.hide(running) };
    // SAFETY: these are the kernel's own arguments; FS base and rights are the caller's.
    unsafe { deliver::deliver(signal, info, frame, &from) };
    // SAFETY: it goes on when this returns.
    unsafe { Gate::Pkru.show(running) };
}

/// Whether a signal that struck in a domain is about the code there: a fault, one that it has sent itself, or its
/// deadline.
fn ends_call(signal: c_int, info: &libc::siginfo_t) -> bool {
    if !FAULTS.contains(&signal) {
        return false;
    }
    // SAFETY: a signal that a process has sent has its number; in others the field is not looked at.
    let sender = || unsafe { info.si_pid() } as u32;
    match info.si_code {
        libc::SI_USER | libc::SI_QUEUE | libc::SI_TKILL => sender() == sys::process_id(),
        libc::SI_TIMER => is_deadline(signal, info),
        _ => true,
    }
}

/// The value that a deadline's timer sends: nothing else has this address to give.
pub(crate) fn deadline_value() -> usize {
    entry as *const () as usize
}

/// Whether a signal says that a call of this thread has taken too long.
fn is_deadline(signal: c_int, info: &libc::siginfo_t) -> bool {
    // SAFETY: a signal that a timer has sent has its value; in others the code differs.
    signal == DEADLINE
        && info.si_code == libc::SI_TIMER
        && unsafe { info.si_value() }.sival_ptr.addr() == deadline_value()
}

/// Whether a signal tells this thread of the key that the program's statics have.
fn is_invitation(signal: c_int, info: &libc::siginfo_t) -> bool {
    // SAFETY: a signal that was queued has a value; in others the code differs.
    signal == globals::INVITATION
        && info.si_code == libc::SI_QUEUE
        && unsafe { info.si_value() }.sival_ptr.addr() == globals::invitation_value()
}

/// Returns the key that denied an access, if that is what the signal is about.
///
/// # Safety
///
/// The pointer is the one that the kernel passed.
unsafe fn denying_key(signal: c_int, info: *const libc::siginfo_t) -> Option<ProtectionKey> {
    /// The offset of `si_pkey` in `siginfo_t`, and the code that says that it is there
    /// (Linux 6.12, `include/uapi/asm-generic/siginfo.h`).
    const SI_PKEY: usize = 0x20;
    const SEGV_PKUERR: c_int = 4;
    // SAFETY: the caller answers for the pointer.
    if signal != libc::SIGSEGV || unsafe { &*info }.si_code != SEGV_PKUERR {
        return None;
    }
    // SAFETY: with this code the field is there.
    let key = unsafe { info.wrapping_byte_add(SI_PKEY).cast::<u32>().read() };
    ProtectionKey::new(key as u8)
}

/// Notes what the fault was.
///
/// # Safety
///
/// The pointer is the one that the kernel passed.
unsafe fn trap(signal: c_int, info: *const libc::siginfo_t, context: &libc::ucontext_t) -> Trap {
    let register = |index| frame::register(context, index);
    // SAFETY: the caller answers for the pointer.
    let description = unsafe { &*info };
    let code = description.si_code;
    // SAFETY: a signal of these that the CPU raised has an address; in others the field is some other number.
    let address = unsafe { description.si_addr() } as u64;
    let instruction = register(libc::REG_RIP);
    let report = if signal == libc::SIGILL {
        Report::decode(instruction, [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(register))
    } else {
        None
    };
    Trap {
        signal,
        code,
        address,
        instruction,
        stack: register(libc::REG_RSP),
        error_code: register(libc::REG_ERR) as u32,
        // SAFETY: the caller answers for the pointer.
        key: unsafe { denying_key(signal, info) },
        rights: frame::rights(context),
        report,
        in_panic: false,
    }
}
