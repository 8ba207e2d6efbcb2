//! Threads and the process.

#![expect(unsafe_code, reason = "it makes system calls")]

use std::ffi::{c_int, c_void};
use std::io;

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

/// Returns an entry of the auxiliary vector, 0 if there is none.
pub(crate) fn auxiliary(entry: libc::c_ulong) -> libc::c_ulong {
    // SAFETY: getauxval reads the process's own vector.
    unsafe { libc::getauxval(entry) }
}

/// Has a function called when the program exits, before those that are registered already.
pub(crate) fn at_exit(function: extern "C" fn()) -> io::Result<()> {
    // SAFETY: the function may be called at any time.
    match unsafe { libc::atexit(function) } {
        0 => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
    }
}

/// Sets the calling code's `errno`.
pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: errno is a thread-local of the calling code; in a domain, the domain's own.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { place.write(errno) };
}
