//! Experiments in a forked child, and the kernel's release.
//!
//! The child is a copy of the process. What an experiment breaks, allocates or registers is gone when the child ends.

#![expect(unsafe_code, reason = "it makes system calls in a forked child")]

use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

use pkru::ProtectionKey;
use pkru::instructions::{rdfsbase, rdpkru, wrfsbase, wrpkru};

use super::assembly::{ANSWER_YES_SIZE, answer_yes, thread_pointer};
use super::memory::{map_reserved, page_size, pkey_alloc, unmap};
use super::rseq::{register_rseq, rseq_area, unregister_rseq};
use super::signals::{Action, set_action, unblock};
use super::threads::{exit_with, process_id};

/// How an experiment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It returned this number, below [`FIRST_ERROR`]. In a yes-or-no experiment, 1 is yes.
    Done(u8),
    /// A system call failed with this error number.
    Refused(c_int),
    /// A signal killed the child.
    Killed(c_int),
}

/// The exit status for error number 0; for number N it is N more. Linux's error numbers end at 133.
const FIRST_ERROR: u8 = 16;

/// Runs a function in a forked child and returns the outcome.
///
/// The child runs no fork handlers, and sends no SIGCHLD when it ends.
///
/// # Safety
///
/// The function makes only async-signal-safe calls: other threads may have held locks when the child was forked.
pub(crate) unsafe fn fork_probe(function: impl FnOnce() -> io::Result<u8>) -> io::Result<Outcome> {
    // SAFETY: clone without flags is fork, and the child only runs `function` and exits.
    let child = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        // No core file if a signal kills the child.
        // SAFETY: PR_SET_DUMPABLE touches no memory.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
        let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        exit_with(function().map_or_else(|error| c_int::from(FIRST_ERROR) + errno(error), c_int::from))
    }
    let mut status = 0;
    loop {
        // SAFETY: `status` is writable.
        let waited = unsafe { libc::waitpid(child as libc::pid_t, &raw mut status, libc::__WALL) };
        if waited == child as libc::pid_t {
            return Ok(match libc::WEXITSTATUS(status) as u8 {
                _ if !libc::WIFEXITED(status) => Outcome::Killed(libc::WTERMSIG(status)),
                number @ ..FIRST_ERROR => Outcome::Done(number),
                error => Outcome::Refused(c_int::from(error - FIRST_ERROR)),
            });
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Counts the keys that this process can still allocate.
pub(crate) fn keys_left() -> io::Result<Outcome> {
    // SAFETY: the experiment only makes system calls.
    unsafe { fork_probe(take_all_keys) }
}

/// Counts the keys that a process can allocate.
pub(crate) fn keys_in_all() -> io::Result<Outcome> {
    let experiment = || {
        free_all_keys();
        take_all_keys()
    };
    // SAFETY: the experiment only makes system calls.
    unsafe { fork_probe(experiment) }
}

/// Frees every key but key 0, whatever it tags. For a child.
pub(crate) fn free_all_keys() {
    for key in ProtectionKey::all().filter(|key| *key != ProtectionKey::DEFAULT) {
        // SAFETY: pkey_free touches no memory, and fails with EINVAL if the key is not allocated.
        unsafe { libc::syscall(libc::SYS_pkey_free, c_int::from(key.number())) };
    }
}

fn take_all_keys() -> io::Result<u8> {
    let mut count = 0;
    loop {
        match pkey_alloc() {
            Ok(_) => count += 1,
            // On a CPU without keys, too.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => return Ok(count),
            Err(error) => return Err(error),
        }
    }
}

/// Tests whether the instructions RDFSBASE and WRFSBASE work.
pub(crate) fn fsgsbase() -> io::Result<Outcome> {
    let experiment = || {
        // Neither the program's handler nor this crate's may run if the instruction is invalid.
        // SAFETY: the default action calls no function.
        unsafe { set_action(libc::SIGILL, Action::DEFAULT) }?;
        // SAFETY: if the kernel has not enabled the instruction, it raises SIGILL, which ends the child.
        let base = unsafe { rdfsbase() };
        // SAFETY: the value is the current FS base.
        unsafe { wrfsbase(base) };
        // SAFETY: the instruction is enabled, because it worked above.
        let after = unsafe { rdfsbase() };
        Ok(u8::from(base == after && base as usize == thread_pointer()))
    };
    // SAFETY: the experiment only makes system calls, and leaves the FS base as it was.
    unsafe { fork_probe(experiment) }
}

/// Tests whether PKRU lies at this offset in the XSAVE area of a signal frame, and whether sigreturn(2) loads it from
/// there.
///
/// The caller has found PKU enabled.
pub(crate) fn pkru_in_signal_frame(offset: usize) -> io::Result<Outcome> {
    let experiment = || {
        let flags = libc::SA_SIGINFO as u64;
        let action = Action::new(change_pkru as *const () as usize, flags, 0);
        // SAFETY: only the signal sent below calls the handler, with the value that it expects.
        unsafe { set_action(libc::SIGUSR1, action) }?;
        unblock(&[libc::SIGUSR1])?;
        // SAFETY: the caller has found PKU enabled.
        let before = unsafe { rdpkru() };
        // Both test values differ from the rights in force in key 15 only. The first must not be 0, which XSAVE may
        // omit. Statics may have key 15, so none is written until the old rights are restored.
        let mut order = ChangePkru { offset, seen: 0, new: before ^ 1 << 30 };
        // SAFETY: this changes access to key 15 only, and the code up to the next WRPKRU writes only to the stack.
        unsafe { wrpkru(before ^ 1 << 31) };
        let value = libc::sigval { sival_ptr: (&raw mut order).cast() };
        // SAFETY: the signal is unblocked, so the handler runs before this call returns, while `order` is alive.
        let sent = unsafe { libc::sigqueue(process_id() as libc::pid_t, libc::SIGUSR1, value) };
        // SAFETY: the caller has found PKU enabled.
        let after = unsafe { rdpkru() };
        // SAFETY: these are the rights that the child started with.
        unsafe { wrpkru(before) };
        // Volatile, because the compiler does not see the handler's write.
        // SAFETY: the field is initialised and aligned.
        let seen = unsafe { (&raw const order.seen).read_volatile() };
        if sent != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(u8::from(seen == before ^ 1 << 31 && after == order.new))
    };
    // SAFETY: the experiment only makes system calls, and restores PKRU.
    unsafe { fork_probe(experiment) }
}

/// The input and output of [`change_pkru`]. It lies on the stack: a handler starts with rights to key 0 only, and a
/// static may have another key.
struct ChangePkru {
    offset: usize,
    /// The rights found in the frame.
    seen: u32,
    /// The rights to write to the frame.
    new: u32,
}

/// A signal handler that reads and changes PKRU in its frame. The signal's value is the address of a [`ChangePkru`].
unsafe extern "C" fn change_pkru(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t`.
    let info = unsafe { &*info };
    // SAFETY: the signal was sent with a value.
    let value = unsafe { info.si_value() };
    // SAFETY: the value points to a `ChangePkru`, whose owner waits for the handler to return.
    let order = unsafe { &mut *value.sival_ptr.cast::<ChangePkru>() };
    // SAFETY: the kernel passes a valid `ucontext_t`.
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    let place = context.uc_mcontext.fpregs.cast::<u8>().wrapping_add(order.offset).cast::<u32>();
    // SAFETY: the frame contains the XSAVE area, and CPUID says that the area contains this offset.
    order.seen = unsafe { place.read_unaligned() };
    // SAFETY: as above.
    unsafe { place.write_unaligned(order.new) };
}

/// No area is registered.
pub(crate) const RSEQ_NONE: u8 = 0;

/// An area is registered, and can be unregistered.
pub(crate) const RSEQ_UNREGISTERED: u8 = 1;

/// An area is registered, and cannot be unregistered.
const RSEQ_STAYS: u8 = 2;

/// Tests which restartable-sequences area the calling thread has: [`RSEQ_NONE`], [`RSEQ_UNREGISTERED`] or [`RSEQ_STAYS`].
pub(crate) fn rseq() -> io::Result<Outcome> {
    // Before the fork: if another thread holds the loader's lock then, it stays locked in the child.
    let area = rseq_area();
    let experiment = || match register_rseq() {
        Ok(()) => Ok(RSEQ_NONE),
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Err(error),
        // The kernel keeps one area for each thread, so one is registered already.
        Err(_) => {
            area.map_or(Ok(()), unregister_rseq)?;
            Ok(if register_rseq().is_ok() { RSEQ_UNREGISTERED } else { RSEQ_STAYS })
        }
    };
    // SAFETY: the experiment only makes system calls.
    unsafe { fork_probe(experiment) }
}

/// Tests Syscall User Dispatch: whether a thread can have its system calls raise SIGSYS.
///
/// # References
///
/// Linux 6.12, `Documentation/admin-guide/syscall-user-dispatch.rst`.
pub(crate) fn syscall_user_dispatch() -> io::Result<Outcome> {
    const PR_SET_SYSCALL_USER_DISPATCH: c_int = 59;
    const ON: usize = 1;
    const ALLOW: u8 = 0;
    const BLOCK: u8 = 1;
    // Not on the stack: the kernel reads it after the experiment has returned, too.
    static SELECTOR: AtomicU8 = AtomicU8::new(ALLOW);
    let experiment = || {
        // The kernel allows system calls from the code of the handler.
        let handler = answer_yes as *const () as usize;
        // SAFETY: the selector is a static, and it allows all calls until BLOCK is stored below.
        let result = unsafe {
            libc::prctl(
                PR_SET_SYSCALL_USER_DISPATCH,
                ON,
                handler,
                ANSWER_YES_SIZE,
                SELECTOR.as_ptr().expose_provenance(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // Only now, because a seccomp filter may raise SIGSYS for the call above.
        // SAFETY: the handler uses registers only.
        unsafe { set_action(libc::SIGSYS, Action::new(handler, libc::SA_SIGINFO as u64, 0)) }?;
        unblock(&[libc::SIGSYS])?;
        SELECTOR.store(BLOCK, Ordering::SeqCst);
        // SIGSYS arrives instead, and the handler exits.
        // SAFETY: getppid touches no memory.
        unsafe { libc::syscall(libc::SYS_getppid) };
        SELECTOR.store(ALLOW, Ordering::SeqCst);
        Ok(0)
    };
    // SAFETY: the experiment only makes system calls.
    unsafe { fork_probe(experiment) }
}

/// Tests whether a mapping can be sealed against munmap(2).
///
/// # References
///
/// Linux 6.12, `Documentation/userspace-api/mseal.rst`.
pub(crate) fn mseal() -> io::Result<Outcome> {
    const SYS_MSEAL: libc::c_long = 462;
    let experiment = || {
        let page = map_reserved(page_size())?;
        // SAFETY: the page was just mapped, and mseal changes no contents.
        if unsafe { libc::syscall(SYS_MSEAL, page.as_ptr(), page_size(), 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: nothing uses the page.
        let unmapped = unsafe { unmap(page, page_size()) };
        Ok(u8::from(unmapped.is_err_and(|error| error.raw_os_error() == Some(libc::EPERM))))
    };
    // SAFETY: the experiment only makes system calls.
    unsafe { fork_probe(experiment) }
}

/// Tests whether process_vm_readv(2) fails on memory from memfd_secret(2).
///
/// # References
///
/// memfd_secret(2).
pub(crate) fn memfd_secret() -> io::Result<Outcome> {
    let experiment = || {
        // SAFETY: memfd_secret touches no memory.
        let file = unsafe { libc::syscall(libc::SYS_memfd_secret, 0) } as c_int;
        if file < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the file is empty and not mapped yet.
        if unsafe { libc::ftruncate(file, page_size() as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses a free address, so no existing mapping changes.
        let page = unsafe { libc::mmap(ptr::null_mut(), page_size(), protection, libc::MAP_SHARED, file, 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the page was just mapped writable.
        unsafe { page.cast::<u64>().write_volatile(1) };
        let mut copy = 0u64;
        let to = libc::iovec { iov_base: (&raw mut copy).cast(), iov_len: size_of_val(&copy) };
        let from = libc::iovec { iov_base: page, iov_len: size_of_val(&copy) };
        // SAFETY: both vectors describe one word, and only `copy` is written.
        let read =
            unsafe { libc::process_vm_readv(process_id() as libc::pid_t, &raw const to, 1, &raw const from, 1, 0) };
        match io::Error::last_os_error() {
            _ if read >= 0 => Ok(0),
            error if error.raw_os_error() == Some(libc::EFAULT) => Ok(1),
            error => Err(error),
        }
    };
    // SAFETY: the experiment only makes system calls, and writes only to a page that it maps.
    unsafe { fork_probe(experiment) }
}

/// Returns the kernel's release, as `uname -r` prints it.
pub(crate) fn kernel_release() -> io::Result<String> {
    // SAFETY: `utsname` is a C struct of characters, for which all zeros are valid.
    let mut names: libc::utsname = unsafe { mem::zeroed() };
    // SAFETY: the struct is writable.
    if unsafe { libc::uname(&raw mut names) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel terminates each name with a NUL.
    let release = unsafe { CStr::from_ptr(names.release.as_ptr()) };
    Ok(release.to_string_lossy().into_owned())
}
