//! Signals: actions, masks, sending, and the alternate stack.

#![expect(unsafe_code, reason = "it makes system calls")]

use std::arch::asm;
use std::ffi::c_int;
use std::io;
use std::mem;
use std::ops::Range;
use std::ptr;

use super::assembly::restorer;
use super::memory::page_size;
use super::threads::process_id;

/// The action of a signal, as the kernel defines it.
///
/// # References
///
/// Linux 6.12, `arch/x86/include/uapi/asm/signal.h`, `struct sigaction`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Action {
    /// `SIG_DFL`, `SIG_IGN` or the address of a function.
    pub(crate) handler: usize,
    pub(crate) flags: u64,
    /// Set by [`set_action`].
    restorer: usize,
    /// The signals to block while the handler runs. Bit 0 is signal 1.
    pub(crate) mask: u64,
}

impl Action {
    pub(crate) const DEFAULT: Self = Self::new(libc::SIG_DFL, 0, 0);

    pub(crate) const fn new(handler: usize, flags: u64, mask: u64) -> Self {
        Self { handler, flags, restorer: 0, mask }
    }

    /// Returns whether the action is to call a function.
    pub(crate) const fn is_function(&self) -> bool {
        !matches!(self.handler, libc::SIG_DFL | libc::SIG_IGN)
    }
}

/// The signals that a fault raises, and the one that abort(3) raises.
pub(crate) const FAULTS: [c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGABRT];

/// The signals by which the kernel ends a process that writes to a closed pipe or exceeds a limit.
pub(crate) const LIMITS: [c_int; 3] = [libc::SIGPIPE, libc::SIGXCPU, libc::SIGXFSZ];

/// Returns whether a signal is one of [`FAULTS`]; async-signal-safe.
#[inline]
pub(crate) fn is_fault(signal: c_int) -> bool {
    const SET: u64 = set_of(&FAULTS);
    SET & 1 << (signal - 1) != 0
}

/// Returns whether a signal is one of [`LIMITS`]; async-signal-safe.
#[inline]
pub(crate) fn is_limit(signal: c_int) -> bool {
    const SET: u64 = set_of(&LIMITS);
    SET & 1 << (signal - 1) != 0
}

const fn set_of(signals: &[c_int]) -> u64 {
    let (mut set, mut index) = (0, 0);
    while index < signals.len() {
        set |= 1 << (signals[index] - 1);
        index += 1;
    }
    set
}

/// Returns whether a signal ends or stops a process that neither handles nor ignores it (signal(7)).
pub(crate) const fn ends_process(signal: c_int) -> bool {
    let is_harmless = matches!(signal, libc::SIGCHLD | libc::SIGCONT | libc::SIGURG | libc::SIGWINCH);
    signal > 0 && signal <= 64 && !is_harmless
}

/// The size of the kernel's signal sets in bytes.
const SET: usize = 8;

/// Returns the action of a signal; async-signal-safe.
pub(crate) fn action(signal: c_int) -> io::Result<Action> {
    let mut action = Action::DEFAULT;
    // SAFETY: `action` has the kernel's layout and is writable.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, ptr::null::<Action>(), &raw mut action, SET) };
    if result == 0 { Ok(action) } else { Err(io::Error::last_os_error()) }
}

/// Sets the action of a signal, bypassing the C library; async-signal-safe.
///
/// # Safety
///
/// The handler may be called at any instruction.
pub(crate) unsafe fn set_action(signal: c_int, action: Action) -> io::Result<()> {
    /// Linux 6.12, `arch/x86/include/uapi/asm/signal.h`.
    const SA_RESTORER: u64 = 0x0400_0000;
    let action = Action { flags: action.flags | SA_RESTORER, restorer: restorer as *const () as usize, ..action };
    // SAFETY: `action` has the kernel's layout, and the caller guarantees that the handler may be called.
    let result =
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &raw const action, ptr::null_mut::<Action>(), SET) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets the signal mask of the calling thread and returns the old one; async-signal-safe.
fn set_mask(mask: u64) -> u64 {
    let mut old = 0u64;
    // It cannot fail with these arguments.
    // SAFETY: both sets have the kernel's size and outlive the call.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, &raw mut old, SET) };
    old
}

/// Blocks every signal in the calling thread until it is dropped.
pub(crate) struct BlockedSignals {
    before: u64,
}

impl BlockedSignals {
    pub(crate) fn new() -> Self {
        Self { before: set_mask(u64::MAX) }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        set_mask(self.before);
    }
}

/// Changes the signal mask like sigprocmask(2), with the kernel's signal sets. Returns an error number, 0 on success.
pub(crate) fn change_mask(how: c_int, mask: Option<u64>, old: *mut u64) -> c_int {
    let new = mask.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: the function has no requirements.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: errno is a thread-local of the calling code, and nothing else refers to it meanwhile.
    let errno = unsafe { &mut *errno };
    // pthread_sigmask does not change errno.
    let before = *errno;
    // SAFETY: the kernel checks `old`, and writes 8 bytes to it if it is not null.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, new, old, SET) };
    let error = mem::replace(errno, before);
    if result == 0 { 0 } else { error }
}

/// Returns whether the calling thread can write memory, and overwrites some of it; async-signal-safe. A stack grows by
/// this as by any other access.
///
/// `memory` begins at a multiple of 8 and is not empty.
pub(crate) fn is_writable(memory: Range<usize>) -> bool {
    let first_page = memory.start & !(page_size() - 1);
    let mut pages = (first_page..memory.end).step_by(page_size());
    // The kernel writes the mask, or says that it cannot.
    pages.all(|page| change_mask(libc::SIG_BLOCK, None, page.max(memory.start) as *mut u64) == 0)
}

/// Unblocks signals in the calling thread. A fault whose signal is blocked kills the process.
pub(crate) fn unblock(signals: &[c_int]) -> io::Result<()> {
    // SAFETY: `sigset_t` is a C struct of integers, for which all zeros are valid.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: the set is writable.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in signals {
        // SAFETY: as above.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    // SAFETY: the set outlives the call.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Sends a signal to the calling thread; async-signal-safe.
pub(crate) fn resend(signal: c_int) {
    // SAFETY: gettid touches no memory.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    // SAFETY: tgkill touches no memory.
    unsafe { libc::syscall(libc::SYS_tgkill, process_id(), thread, signal) };
}

/// Sends a signal with a value to a thread of this process. Returns `false` if it fails, as for a thread that has
/// ended.
pub(crate) fn send_value(thread: c_int, signal: c_int, value: usize) -> bool {
    /// `siginfo_t` of a queued signal (Linux 6.12, `include/uapi/asm-generic/siginfo.h`).
    #[repr(C)]
    struct Queued {
        signal: c_int,
        errno: c_int,
        code: c_int,
        padding: c_int,
        process: u32,
        user: u32,
        value: usize,
        rest: [usize; 12],
    }
    const { assert!(size_of::<Queued>() == size_of::<libc::siginfo_t>()) };
    let info = Queued {
        signal,
        errno: 0,
        code: libc::SI_QUEUE,
        padding: 0,
        process: process_id(),
        user: 0,
        value,
        rest: [0; 12],
    };
    // SAFETY: the struct has the kernel's layout and outlives the call.
    unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, process_id(), thread, signal, &raw const info) == 0 }
}

/// A thread's alternate signal stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AlternateStack {
    pub(crate) start: usize,
    pub(crate) size: usize,
    /// `SS_DISABLE` if there is none.
    pub(crate) flags: c_int,
}

impl AlternateStack {
    pub(crate) const NONE: Self = Self { start: 0, size: 0, flags: libc::SS_DISABLE };

    /// Returns the addresses of the stack, if there is one.
    pub(crate) fn addresses(&self) -> Option<Range<usize>> {
        (self.flags & libc::SS_DISABLE == 0).then(|| self.start..self.start + self.size)
    }

    /// Returns the stack that the kernel describes like this.
    pub(crate) fn of_kernel(stack: &libc::stack_t) -> Self {
        Self { start: stack.ss_sp.addr(), size: stack.ss_size, flags: stack.ss_flags }
    }

    pub(crate) const fn for_kernel(self) -> libc::stack_t {
        libc::stack_t { ss_sp: ptr::without_provenance_mut(self.start), ss_flags: self.flags, ss_size: self.size }
    }
}

/// Makes the kernel start at the top of the stack even if the stack pointer lies in it. A domain can set the stack
/// pointer to an address there. (Linux 6.12, `include/uapi/linux/signal.h`.)
pub(crate) const SS_AUTODISARM: c_int = 1 << 31;

/// Sets the calling thread's alternate signal stack; async-signal-safe.
///
/// # Safety
///
/// The memory stays mapped, and nothing else uses it, until another stack is set.
pub(crate) unsafe fn set_alternate_stack(stack: Range<usize>) -> io::Result<()> {
    restore_alternate_stack(AlternateStack { start: stack.start, size: stack.len(), flags: SS_AUTODISARM })
}

/// Does the same in a signal handler that runs on the thread's present alternate stack. The kernel refuses that with
/// EPERM while the stack pointer lies there, so it is moved to the new stack meanwhile.
///
/// # Safety
///
/// As for [`set_alternate_stack`]. Every signal is blocked.
pub(crate) unsafe fn replace_alternate_stack(stack: Range<usize>) -> io::Result<()> {
    let end = stack.end & !15;
    let new = AlternateStack { start: stack.start, size: stack.len(), flags: SS_AUTODISARM }.for_kernel();
    let result: i64;
    // SAFETY: no code runs on the new stack, because no signal arrives. The stack pointer is restored.
    unsafe {
        asm!(
            "xchg rsp, {stack}",
            "syscall",
            "mov rsp, {stack}",
            stack = inout(reg) end => _,
            inout("rax") libc::SYS_sigaltstack => result,
            in("rdi") &raw const new,
            in("rsi") 0,
            out("rcx") _,
            out("r11") _,
        );
    }
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-result as c_int)) }
}

/// Sets the calling thread's alternate signal stack to the program's; async-signal-safe.
pub(crate) fn restore_alternate_stack(stack: AlternateStack) -> io::Result<()> {
    let new = stack.for_kernel();
    // SAFETY: `new` outlives the call, and whoever provided the stack keeps its memory mapped.
    match unsafe { libc::syscall(libc::SYS_sigaltstack, &raw const new, ptr::null_mut::<libc::stack_t>()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the calling thread's alternate signal stack; async-signal-safe.
pub(crate) fn alternate_stack() -> io::Result<AlternateStack> {
    let mut stack = AlternateStack::NONE.for_kernel();
    // SAFETY: `stack` is writable, and with a null pointer the call changes nothing.
    match unsafe { libc::syscall(libc::SYS_sigaltstack, ptr::null::<libc::stack_t>(), &raw mut stack) } {
        0 => Ok(AlternateStack::of_kernel(&stack)),
        _ => Err(io::Error::last_os_error()),
    }
}
