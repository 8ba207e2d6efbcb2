//! Threads and signals.

use std::ffi::{c_int, c_void};
use std::io;
use std::mem;
use std::ops::Range;
use std::ptr;
use std::time::Duration;

/// What happens on a signal, as the kernel has it.
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
    /// The signals to block meanwhile, one bit each from signal 1.
    pub(crate) mask: u64,
}

/// The bytes of the kernel's signal sets.
const SET: usize = 8;

impl Action {
    pub(crate) const DEFAULT: Self = Self::new(libc::SIG_DFL, 0, 0);

    pub(crate) const fn new(handler: usize, flags: u64, mask: u64) -> Self {
        Self { handler, flags, restorer: 0, mask }
    }

    /// Whether it is a function that is called.
    pub(crate) const fn is_function(&self) -> bool {
        !matches!(self.handler, libc::SIG_DFL | libc::SIG_IGN)
    }
}

/// Where a signal handler returns to.
#[unsafe(naked)]
unsafe extern "C" fn restorer() {
    // rt_sigreturn. Unwinders know it by these very bytes.
    std::arch::naked_asm!("mov rax, 15", "syscall")
}

/// Returns the action of a signal; async-signal-safe.
pub(crate) fn action(signal: c_int) -> io::Result<Action> {
    let mut action = Action::DEFAULT;
    // SAFETY: the struct is the kernel's, and writable.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, ptr::null::<Action>(), &raw mut action, SET) };
    if result == 0 { Ok(action) } else { Err(io::Error::last_os_error()) }
}

/// Sets the action of a signal, without regard to what the C library knows of it; async-signal-safe.
///
/// # Safety
///
/// The handler is one that may be called at any instruction.
pub(crate) unsafe fn set_action(signal: c_int, action: Action) -> io::Result<()> {
    /// (Linux 6.12, `arch/x86/include/uapi/asm/signal.h`.)
    const SA_RESTORER: u64 = 0x0400_0000;
    let action = Action { flags: action.flags | SA_RESTORER, restorer: restorer as *const () as usize, ..action };
    // SAFETY: the struct is the kernel's; the caller answers for the handler.
    let result =
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &raw const action, ptr::null_mut::<Action>(), SET) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets which signals are blocked in the calling thread, and returns those that were; async-signal-safe.
pub(crate) fn set_mask(mask: u64) -> u64 {
    let mut old = 0u64;
    // SAFETY: both sets are the kernel's size, and live across the call, which cannot fail with these arguments.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, &raw mut old, SET) };
    old
}

/// Every signal is blocked in the calling thread until this is dropped.
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

/// sigprocmask(2) with the kernel's sets; returns an error number.
pub(crate) fn change_mask(how: c_int, mask: Option<u64>, old: *mut u64) -> c_int {
    let new = mask.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: errno is a thread-local of the calling code.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; nothing else refers to it.
    let errno = unsafe { &mut *errno };
    // pthread_sigmask leaves it alone.
    let before = *errno;
    // SAFETY: the kernel writes 8 bytes to `old`, if it is not null, or refuses.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, new, old, SET) };
    let error = mem::replace(errno, before);
    if result == 0 { 0 } else { error }
}

/// Sends the calling thread a signal; async-signal-safe.
pub(crate) fn resend(signal: c_int) {
    // SAFETY: the call touches no memory.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_tgkill, process_id(), thread, signal) };
}

/// Returns the number of the calling thread; async-signal-safe. Each rewind asks, so this does not go by the C library.
#[inline]
pub(crate) fn thread_id() -> c_int {
    let number: i64;
    // SAFETY: the call touches no memory, and the kernel changes these two registers beside the result.
    unsafe {
        std::arch::asm!(
            "syscall",
            inout("rax") libc::SYS_gettid => number,
            out("rcx") _,
            out("r11") _,
            options(nostack, nomem)
        );
    }
    number as c_int
}

/// Returns what the C library calls the calling thread; in the child of a fork it is the same.
pub(crate) fn thread_handle() -> usize {
    // SAFETY: the call touches no memory.
    unsafe { libc::pthread_self() as usize }
}

/// Starts a thread that ends at once. The C library takes the first as the occasion to install the handler of a signal
/// by which all threads change their user.
///
/// # References
///
/// glibc 2.36, `nptl/pthread_create.c`, `late_init`.
pub(crate) fn start_a_thread() -> io::Result<()> {
    let thread = std::thread::Builder::new().spawn(|| ())?;
    // It does not panic.
    drop(thread.join());
    Ok(())
}

/// Returns the numbers of the process's threads.
pub(crate) fn threads() -> io::Result<Vec<c_int>> {
    let entries = std::fs::read_dir("/proc/self/task")?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Returns whether a thread of this process has not ended.
pub(crate) fn thread_exists(thread: c_int) -> bool {
    // SAFETY: signal 0 is not sent.
    unsafe { libc::syscall(libc::SYS_tgkill, process_id(), thread, 0) == 0 }
}

/// Sends a thread of this process a signal with a value; `false` if there is no such thread.
pub(crate) fn send_value(thread: c_int, signal: c_int, value: usize) -> bool {
    /// `siginfo_t` as the kernel takes it for this (Linux 6.12, `include/uapi/asm-generic/siginfo.h`).
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
    // SAFETY: the struct lives across the call.
    unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, process_id(), thread, signal, &raw const info) == 0 }
}

/// A thread's alternate signal stack, as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AlternateStack {
    pub(crate) start: usize,
    pub(crate) size: usize,
    /// `SS_DISABLE` if there is none.
    pub(crate) flags: c_int,
}

/// Take the stack from its top even if the stack pointer lies in it already, where a domain may have put it.
/// (Linux 6.12, `include/uapi/linux/signal.h`.)
pub(crate) const SS_AUTODISARM: c_int = 1 << 31;

impl AlternateStack {
    pub(crate) const NONE: Self = Self { start: 0, size: 0, flags: libc::SS_DISABLE };

    /// The addresses, if there is one.
    pub(crate) fn addresses(&self) -> Option<Range<usize>> {
        (self.flags & libc::SS_DISABLE == 0).then(|| self.start..self.start + self.size)
    }

    pub(crate) const fn for_kernel(self) -> libc::stack_t {
        libc::stack_t { ss_sp: ptr::without_provenance_mut(self.start), ss_flags: self.flags, ss_size: self.size }
    }
}

/// Sets the calling thread's alternate signal stack; async-signal-safe.
///
/// # Safety
///
/// The memory stays mapped, for nothing else, until another stack is set.
pub(crate) unsafe fn set_alternate_stack(stack: Range<usize>) -> io::Result<()> {
    restore_alternate_stack(AlternateStack { start: stack.start, size: stack.len(), flags: SS_AUTODISARM })
}

/// Sets the calling thread's alternate signal stack to what the program has asked for; async-signal-safe.
pub(crate) fn restore_alternate_stack(stack: AlternateStack) -> io::Result<()> {
    let new = stack.for_kernel();
    // SAFETY: `new` lives across the call. Whoever asked for the stack answers for the memory.
    match unsafe { libc::syscall(libc::SYS_sigaltstack, &raw const new, ptr::null_mut::<libc::stack_t>()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the calling thread's alternate signal stack; async-signal-safe.
pub(crate) fn alternate_stack() -> AlternateStack {
    let mut stack = AlternateStack::NONE.for_kernel();
    // SAFETY: `stack` is writable, and nothing is changed.
    unsafe { libc::syscall(libc::SYS_sigaltstack, ptr::null::<libc::stack_t>(), &raw mut stack) };
    AlternateStack { start: stack.ss_sp as usize, size: stack.ss_size, flags: stack.ss_flags }
}

/// A POSIX timer of the kernel's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timer(c_int);

/// Makes a timer that sends the calling thread a signal, with a value that tells it apart.
pub(crate) fn create_timer(signal: c_int, value: usize) -> io::Result<Timer> {
    // SAFETY: the call touches no memory.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    // SAFETY: sigevent is a C struct for which zero is a value.
    let mut event: libc::sigevent = unsafe { mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = signal;
    event.sigev_value.sival_ptr = ptr::without_provenance_mut(value);
    event.sigev_notify_thread_id = thread as c_int;
    let mut timer = 0;
    // SAFETY: both structs live across the call.
    match unsafe { libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } {
        0 => Ok(Timer(timer)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Arms a timer to expire after this time, and every millisecond from then on, or disarms it.
pub(crate) fn set_timer(timer: Timer, after: Option<Duration>) -> io::Result<()> {
    let after = after.unwrap_or_default();
    let seconds = libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX);
    let value = libc::timespec { tv_sec: seconds, tv_nsec: after.subsec_nanos().into() };
    let new = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 }, it_value: value };
    // SAFETY: the struct lives across the call.
    match unsafe { libc::syscall(libc::SYS_timer_settime, timer.0, 0, &raw const new, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Disarms a timer; returns the time that was left, if it was armed. Async-signal-safe.
pub(crate) fn pause_timer(timer: Timer) -> Option<Duration> {
    // SAFETY: itimerspec is a C struct of integers, for which zero is a value.
    let mut old: libc::itimerspec = unsafe { mem::zeroed() };
    // SAFETY: as above.
    let new: libc::itimerspec = unsafe { mem::zeroed() };
    // SAFETY: both structs live across the call.
    if unsafe { libc::syscall(libc::SYS_timer_settime, timer.0, 0, &raw const new, &raw mut old) } != 0 {
        return None;
    }
    let left = Duration::new(old.it_value.tv_sec as u64, old.it_value.tv_nsec as u32);
    (!left.is_zero()).then_some(left)
}

/// Deletes a timer.
pub(crate) fn delete_timer(timer: Timer) {
    // SAFETY: the call touches no memory. It fails for no timer that was created.
    unsafe { libc::syscall(libc::SYS_timer_delete, timer.0) };
}

/// Makes a thread-specific value whose destructor runs after those of thread-locals.
pub(crate) fn thread_key(destructor: unsafe extern "C" fn(*mut c_void)) -> Option<libc::pthread_key_t> {
    let mut key = 0;
    // SAFETY: the key is writable; the destructor is called with what `set_for_thread` has set.
    (unsafe { libc::pthread_key_create(&raw mut key, Some(destructor)) } == 0).then_some(key)
}

/// Sets the calling thread's value.
pub(crate) fn set_for_thread(key: libc::pthread_key_t, value: *const c_void) -> bool {
    // SAFETY: the key was made by `thread_key`.
    unsafe { libc::pthread_setspecific(key, value) == 0 }
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

/// Ends this process and nothing else: exit_group(2); async-signal-safe. The C library's function of that purpose is
/// replaced by this crate's.
pub(crate) fn exit_with(status: c_int) -> ! {
    loop {
        // SAFETY: the call leaves without running anything of the process's.
        unsafe { libc::syscall(libc::SYS_exit_group, status) };
    }
}

/// Has functions called around each fork that the C library makes: before it, and after it in the parent and in the
/// child.
pub(crate) fn around_forks(
    before: extern "C" fn(),
    in_parent: extern "C" fn(),
    in_child: extern "C" fn(),
) -> io::Result<()> {
    // SAFETY: the functions may be called at any time.
    match unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Has a function called when the program exits, before those that are registered already.
pub(crate) fn at_exit(function: extern "C" fn()) -> io::Result<()> {
    // SAFETY: the function may be called at any time.
    match unsafe { libc::atexit(function) } {
        0 => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
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
/// The kernel writes that area whenever it returns to the thread, with the rights in force; in a domain, which cannot
/// write it, that write would kill the process.
///
/// # References
///
/// Linux 6.12, `kernel/rseq.c`; glibc 2.35 manual, "Restartable Sequences".
pub(crate) fn unregister_rseq(area: usize) -> io::Result<()> {
    const UNREGISTER: c_int = 1;
    const SIGNATURE: u32 = 0x5305_3053;
    /// The size that every glibc so far has registered, if the kernel does not ask for more.
    const LENGTH: u32 = 32;
    const AT_RSEQ_FEATURE_SIZE: libc::c_ulong = 27;
    let wanted = (auxiliary(AT_RSEQ_FEATURE_SIZE) as u32).next_multiple_of(LENGTH);
    let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
    for length in [LENGTH, wanted] {
        // SAFETY: the arguments are those with which glibc registered the area; without it nothing is written there any
        // more.
        if unsafe { libc::syscall(libc::SYS_rseq, area, length, UNREGISTER, SIGNATURE) } == 0 {
            return Ok(());
        }
        refused = io::Error::last_os_error();
    }
    match refused.raw_os_error() {
        // The kernel has no such call.
        Some(libc::ENOSYS) => Ok(()),
        // Nothing is registered, because the thread has undone it itself; or something is, in a way that is not known
        // here. An area of another address is refused with EINVAL in the first case too, if its length is wrong.
        _ => match super::probe::register_rseq() {
            Ok(()) => super::probe::unregister_own_rseq(),
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
            Err(_) => Err(refused),
        },
    }
}
