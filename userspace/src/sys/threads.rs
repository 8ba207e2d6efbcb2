//! Threads and the process.

#![expect(unsafe_code, reason = "it makes system calls")]

use std::ffi::{c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::AtomicU32;

use super::copy::copy_value_from;

/// Returns the `pthread_t` of the calling thread. It is the same in a forked child.
pub(crate) fn thread_handle() -> usize {
    // SAFETY: pthread_self has no requirements.
    unsafe { libc::pthread_self() as usize }
}

/// Returns the addresses of the calling thread's stack, without its guard; `None` if they cannot be found. The stack of
/// the first thread is counted with the size that it may grow to.
///
/// # References
///
/// pthread_getattr_np(3); glibc 2.36, `nptl/pthread_getattr_np.c`.
pub(crate) fn own_stack() -> Option<Range<usize>> {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: pthread_self has no requirements.
    let thread = unsafe { libc::pthread_self() };
    // SAFETY: the attributes are writable.
    if unsafe { libc::pthread_getattr_np(thread, attributes.as_mut_ptr()) } != 0 {
        return None;
    }
    let (mut start, mut size, mut guard) = (std::ptr::null_mut(), 0, 0);
    // SAFETY: the attributes are initialised, and the other places are writable.
    let found = unsafe { libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut start, &raw mut size) } == 0;
    // The guard may lie within.
    // SAFETY: as above.
    let found = found && unsafe { libc::pthread_attr_getguardsize(attributes.as_ptr(), &raw mut guard) } == 0;
    // SAFETY: the attributes are initialised.
    unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    found.then(|| start.addr() + guard.min(size)..start.addr() + size)
}

/// Starts a thread that ends at once. It does not run code of std, which ends the program where it cannot set up a thread.
///
/// With the first thread, glibc installs its handler of SIGSETXID, the signal that makes all threads change their user.
///
/// # References
///
/// glibc 2.36, `nptl/pthread_create.c`, `late_init`.
pub(crate) fn start_a_thread() -> io::Result<()> {
    extern "C" fn end(_: *mut c_void) -> *mut c_void {
        std::ptr::null_mut()
    }
    let mut thread = 0;
    // SAFETY: `thread` is writable, and the function has no requirements.
    match unsafe { libc::pthread_create(&raw mut thread, std::ptr::null(), end, std::ptr::null_mut()) } {
        0 => {}
        error => return Err(io::Error::from_raw_os_error(error)),
    }
    // SAFETY: the thread was just started, and nothing else joins it.
    unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
    Ok(())
}

/// Returns the thread IDs of the process's threads.
pub(crate) fn threads() -> io::Result<Vec<c_int>> {
    let entries = std::fs::read_dir("/proc/self/task")?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Returns the signals that a thread of this process blocks or waits for, one bit for each from signal 1. `None` if the
/// thread has ended.
///
/// # References
///
/// proc(5), `/proc/pid/status` and `/proc/pid/syscall`. While a thread is in sigwait(3) the kernel does not count the
/// signals that it waits for as blocked (Linux 6.12, `kernel/signal.c`, `do_sigtimedwait`).
pub(crate) fn closed_signals(thread: c_int) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).ok()?;
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?;
    let blocked = u64::from_str_radix(blocked.trim(), 16).ok()?;
    // The number of the system call that the thread is in, and its arguments; or "running".
    let call = std::fs::read_to_string(format!("/proc/self/task/{thread}/syscall")).unwrap_or_default();
    let mut words = call.split(' ');
    let waits = words.next().is_some_and(|number| number.parse() == Ok(libc::SYS_rt_sigtimedwait));
    let set = words.next().filter(|_| waits).and_then(|set| usize::from_str_radix(set.strip_prefix("0x")?, 16).ok());
    let mut awaited = MaybeUninit::new(0u64);
    if let Some(set) = set {
        // If the thread has ended meanwhile, its stack may be gone.
        let _ = copy_value_from(set, &mut awaited);
    }
    // SAFETY: it was initialised.
    Some(blocked | unsafe { awaited.assume_init() })
}

/// Wakes one thread that waits for a word: futex(2).
pub(crate) fn wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE does not follow the address.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1) };
}

/// Returns whether this process has a thread with this ID.
pub(crate) fn thread_exists(thread: c_int) -> bool {
    // SAFETY: with signal 0, tgkill only checks that the thread exists.
    unsafe { libc::syscall(libc::SYS_tgkill, process_id(), thread, 0) == 0 }
}

/// Creates a key of thread-specific data. Its destructor runs after those of thread-locals.
///
/// # References
///
/// pthread_key_create(3).
pub(crate) fn thread_key(destructor: unsafe extern "C" fn(*mut c_void)) -> Option<libc::pthread_key_t> {
    let mut key = 0;
    // SAFETY: `key` is writable, and the destructor is called only with values from `set_for_thread`.
    (unsafe { libc::pthread_key_create(&raw mut key, Some(destructor)) } == 0).then_some(key)
}

/// Deletes a key of thread-specific data that no thread has set.
pub(crate) fn delete_thread_key(key: libc::pthread_key_t) {
    // SAFETY: `thread_key` created the key, and no thread has a value.
    unsafe { libc::pthread_key_delete(key) };
}

/// Sets the calling thread's value of a key. Returns `false` if it fails.
pub(crate) fn set_for_thread(key: libc::pthread_key_t, value: *const c_void) -> bool {
    // SAFETY: `thread_key` created the key.
    unsafe { libc::pthread_setspecific(key, value) == 0 }
}

/// Returns the process ID; async-signal-safe.
pub(crate) fn process_id() -> u32 {
    // SAFETY: getpid has no requirements.
    unsafe { libc::getpid() as u32 }
}

/// Ends the process without running exit handlers: exit_group(2); async-signal-safe.
///
/// It does not call `_exit`, which this crate replaces.
pub(crate) fn exit_with(status: c_int) -> ! {
    loop {
        // SAFETY: exit_group runs no code of the process.
        unsafe { libc::syscall(libc::SYS_exit_group, status) };
    }
}

/// Returns whether the calling thread has a shadow stack.
///
/// # References
///
/// Linux 6.12, `Documentation/arch/x86/shstk.rst`.
pub(crate) fn has_shadow_stack() -> bool {
    const ARCH_SHSTK_STATUS: c_int = 0x5005;
    const ARCH_SHSTK_SHSTK: u64 = 1;
    let mut features = 0u64;
    // Kernels without shadow stacks fail with EINVAL.
    // SAFETY: the word is writable.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SHSTK_STATUS, &raw mut features) };
    result == 0 && features & ARCH_SHSTK_SHSTK != 0
}

/// Returns a word that differs from process to process, and that is hard to guess from outside.
pub(crate) fn random_word() -> u64 {
    // The kernel's 16 random bytes. glibc uses the first eight for its own canary.
    let bytes = auxiliary(libc::AT_RANDOM) as *const [u64; 2];
    if bytes.is_null() {
        return 0;
    }
    // SAFETY: the kernel has put 16 bytes there, on the first thread's stack, which stays mapped.
    unsafe { bytes.read_unaligned()[1] }
}

/// Returns an entry of the auxiliary vector, or 0 if there is none.
pub(crate) fn auxiliary(entry: libc::c_ulong) -> libc::c_ulong {
    // SAFETY: getauxval has no requirements.
    unsafe { libc::getauxval(entry) }
}

/// Registers a function that exit(3) calls before those registered earlier.
pub(crate) fn at_exit(function: extern "C" fn()) -> io::Result<()> {
    // SAFETY: `function` is a safe function.
    match unsafe { libc::atexit(function) } {
        0 => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
    }
}

/// Writes a message to standard error and aborts the program.
pub(crate) fn abort_with(message: &[u8]) -> ! {
    // SAFETY: the message is readable. If it cannot be written, the program aborts without it.
    unsafe { libc::write(libc::STDERR_FILENO, message.as_ptr().cast(), message.len()) };
    // SAFETY: abort has no requirements.
    unsafe { libc::abort() }
}

/// Sets the calling code's `errno`.
pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: the function has no requirements.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: errno is a thread-local of the calling code. In a domain it is the domain's own.
    unsafe { place.write(errno) };
}

/// Calls a function, and restores the calling code's `errno` afterwards.
pub(crate) fn keep_errno<R>(function: impl FnOnce() -> R) -> R {
    // SAFETY: the function has no requirements.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: errno is a thread-local of the calling code.
    let before = unsafe { place.read() };
    let result = function();
    // SAFETY: as above.
    unsafe { place.write(before) };
    result
}
