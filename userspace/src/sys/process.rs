//! Threads, signals, and a forked child for experiments.

use std::ffi::{c_int, c_void};
use std::io;
use std::mem;
use std::ops::Range;
use std::ptr;

/// A signal handler as the kernel calls it with `SA_SIGINFO`.
pub(crate) type Handler = unsafe extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// What was to happen on a signal.
#[derive(Clone, Copy)]
pub(crate) enum SignalAction {
    Default,
    Ignore,
    /// A handler that takes the signal's number alone.
    Simple(unsafe extern "C" fn(c_int)),
    Full(Handler),
}

/// Replaces the action of a signal and returns the one before. All signals are blocked while the handler runs, and it runs on
/// the alternate stack.
///
/// # Safety
///
/// The handler is one that may be called at any instruction.
pub(crate) unsafe fn replace_action(signal: c_int, handler: Handler) -> io::Result<SignalAction> {
    // SAFETY: sigaction is a C struct for which zero is a value.
    let mut new: libc::sigaction = unsafe { mem::zeroed() };
    new.sa_sigaction = handler as usize;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the mask is writable.
    unsafe { libc::sigfillset(&raw mut new.sa_mask) };
    // SAFETY: as for `new`.
    let mut old: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: both structs live across the call; the caller answers for the handler.
    if unsafe { libc::sigaction(signal, &raw const new, &raw mut old) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(match old.sa_sigaction {
        libc::SIG_DFL => SignalAction::Default,
        libc::SIG_IGN => SignalAction::Ignore,
        // SAFETY: it is neither of the two special values, so it is a function of the kind that the flag says.
        address if old.sa_flags & libc::SA_SIGINFO != 0 => SignalAction::Full(unsafe {
            mem::transmute::<usize, unsafe extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void)>(address)
        }),
        // SAFETY: as above.
        address => SignalAction::Simple(unsafe { mem::transmute::<usize, unsafe extern "C" fn(c_int)>(address) }),
    })
}

/// Restores the default action of a signal; async-signal-safe.
pub(crate) fn default_action(signal: c_int) {
    // SAFETY: SIG_DFL takes one argument and leaves nothing behind; a failure leaves nothing to do.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Sends the calling thread a signal; async-signal-safe.
pub(crate) fn resend(signal: c_int) {
    // SAFETY: raise touches no memory of ours.
    unsafe { libc::raise(signal) };
}

/// A thread's alternate signal stack.
pub(crate) struct AlternateStack {
    /// The lowest address; `None` for no alternate stack.
    pub(crate) start: Option<ptr::NonNull<u8>>,
    pub(crate) size: usize,
}

/// Sets the calling thread's alternate signal stack.
///
/// # Safety
///
/// The memory stays mapped, for nothing else, until another stack is set.
pub(crate) unsafe fn set_alternate_stack(stack: &AlternateStack) -> io::Result<()> {
    /// Take the stack from its top even if the stack pointer lies in it already, where a domain may have put it.
    /// (Linux 6.12, `include/uapi/linux/signal.h`.)
    const SS_AUTODISARM: c_int = 1 << 31;
    let new = libc::stack_t {
        ss_sp: stack.start.map_or(ptr::null_mut(), |start| start.as_ptr().cast()),
        ss_flags: if stack.start.is_some() { SS_AUTODISARM } else { libc::SS_DISABLE },
        ss_size: stack.size,
    };
    // SAFETY: `new` lives across the call; the caller answers for the memory.
    match unsafe { libc::sigaltstack(&raw const new, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the calling thread's alternate signal stack, if it has one; async-signal-safe.
pub(crate) fn alternate_stack() -> Option<Range<usize>> {
    let mut stack = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: `stack` is writable, and nothing is changed.
    let result = unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) };
    let start = stack.ss_sp as usize;
    (result == 0 && stack.ss_flags & libc::SS_DISABLE == 0).then(|| start..start + stack.ss_size)
}

/// Lets signals reach the calling thread. One that a fault raises kills the process where it is blocked.
pub(crate) fn unblock(signals: &[c_int]) -> io::Result<()> {
    // SAFETY: a signal set is a C struct of integers, for which zero is a value.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: the set is writable.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in signals {
        // SAFETY: as above.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    // SAFETY: the set lives across the call.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Returns the smallest alternate stack that holds a signal frame on this CPU, in bytes.
pub(crate) fn minimum_signal_stack() -> usize {
    const AT_MINSIGSTKSZ: libc::c_ulong = 51;
    (auxiliary(AT_MINSIGSTKSZ) as usize).max(libc::MINSIGSTKSZ)
}

/// Returns an entry of the auxiliary vector, 0 if there is none.
pub(crate) fn auxiliary(entry: libc::c_ulong) -> libc::c_ulong {
    // SAFETY: getauxval reads the process's own vector.
    unsafe { libc::getauxval(entry) }
}

/// Returns the number of this process; async-signal-safe.
pub(crate) fn process_id() -> u32 {
    // SAFETY: the call touches no memory.
    unsafe { libc::getpid() as u32 }
}

/// Ends this process and nothing else; async-signal-safe.
pub(crate) fn exit_now() -> ! {
    // SAFETY: _exit leaves without running anything of the process's.
    unsafe { libc::_exit(libc::EXIT_FAILURE) }
}

/// Has a function called in the child of each fork that the C library makes.
pub(crate) fn in_forked_children(function: extern "C" fn()) -> io::Result<()> {
    // SAFETY: the function may be called at any time in a child.
    match unsafe { libc::pthread_atfork(None, None, Some(function)) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Returns the calling thread's restartable-sequences area, if glibc registered one.
pub(crate) fn rseq_area() -> Option<usize> {
    let (offset, size) = (super::lookup(c"__rseq_offset")?, super::lookup(c"__rseq_size")?);
    // SAFETY: glibc defines the symbol as an `unsigned int`.
    if unsafe { size.cast::<u32>().read() } == 0 {
        return None;
    }
    // SAFETY: glibc defines the symbol as a `ptrdiff_t`.
    let offset = unsafe { offset.cast::<isize>().read() };
    Some(crate::tls::thread_pointer().wrapping_add_signed(offset))
}

/// Unregisters a restartable-sequences area of the calling thread; async-signal-safe.
///
/// The kernel writes that area whenever it returns to the thread, with the rights in force; in a domain, which cannot write
/// it, that write would kill the process.
///
/// # References
///
/// Linux 6.12, `kernel/rseq.c`; glibc 2.35 manual, "Restartable Sequences".
pub(crate) fn unregister_rseq(area: usize) -> io::Result<()> {
    const UNREGISTER: c_int = 1;
    const SIGNATURE: u32 = 0x5305_3053;
    const LENGTH: u32 = 32;
    // SAFETY: the arguments are those with which glibc registered the area; without it nothing is written there any more.
    let result = unsafe { libc::syscall(libc::SYS_rseq, area, LENGTH, UNREGISTER, SIGNATURE) };
    match result {
        0 => Ok(()),
        // EINVAL: it is not registered, because the thread did it itself or the kernel has no such call.
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) => Ok(()),
            error => Err(error),
        },
    }
}

/// Runs a function in a forked child without ties to this process's handlers, and returns whether it exited with 0.
///
/// The child sends no SIGCHLD and runs no atfork handlers.
///
/// # Safety
///
/// The function makes only async-signal-safe calls, and does not return to code that relies on this process's state.
pub(crate) unsafe fn fork_probe(function: impl FnOnce() -> bool) -> io::Result<bool> {
    // SAFETY: a clone without flags is a fork; the child runs `function` and exits.
    let child = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        // SAFETY: prctl with these arguments touches no memory: no core file of an experiment that is killed.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
        let status = c_int::from(!function());
        // SAFETY: _exit leaves without running anything of this process's.
        unsafe { libc::_exit(status) }
    }
    let mut status = 0;
    loop {
        // SAFETY: `status` is writable.
        let waited = unsafe { libc::waitpid(child as libc::pid_t, &raw mut status, libc::__WALL) };
        if waited == child as libc::pid_t {
            return Ok(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
