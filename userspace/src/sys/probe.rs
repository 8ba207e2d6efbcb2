//! Experiments in a forked child, and what the kernel reports of itself.
//!
//! A child is a copy of the process: what an experiment breaks, takes or registers goes away with it.

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
    /// With this number, below [`FIRST_ERROR`]. In an experiment that answers yes or no, 1 is yes.
    Done(u8),
    /// The kernel refused a step, with this error number.
    Refused(c_int),
    /// A signal killed the child.
    Killed(c_int),
}

/// The exit status of a child whose error number is 0. Linux's numbers go up to 133.
const FIRST_ERROR: u8 = 16;

/// Runs a function in a forked child without ties to this process's handlers.
///
/// The child sends no SIGCHLD and runs no atfork handlers.
///
/// # Safety
///
/// The function makes only async-signal-safe calls, and does not return to code that relies on this process's state.
pub(crate) unsafe fn fork_probe(function: impl FnOnce() -> io::Result<u8>) -> io::Result<Outcome> {
    // SAFETY: a clone without flags is a fork; the child runs `function` and exits.
    let child = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        // SAFETY: prctl with these arguments touches no memory: no core file of an experiment that is killed.
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

/// Answers how many keys the kernel still has for this process.
pub(crate) fn keys_left() -> io::Result<Outcome> {
    // SAFETY: the experiment makes system calls only.
    unsafe { fork_probe(take_all_keys) }
}

/// Answers how many keys the kernel had for this process when it began.
pub(crate) fn keys_in_all() -> io::Result<Outcome> {
    let experiment = || {
        free_all_keys();
        take_all_keys()
    };
    // SAFETY: the experiment makes system calls only.
    unsafe { fork_probe(experiment) }
}

/// Frees every key of the process but key 0, whatever it tags; for a child.
pub(crate) fn free_all_keys() {
    for key in ProtectionKey::all().filter(|key| *key != ProtectionKey::DEFAULT) {
        // SAFETY: the call changes no memory; a key that the process does not have is refused.
        unsafe { libc::syscall(libc::SYS_pkey_free, c_int::from(key.number())) };
    }
}

fn take_all_keys() -> io::Result<u8> {
    let mut count = 0;
    loop {
        match pkey_alloc() {
            Ok(_) => count += 1,
            // Also the answer of a CPU without keys.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => return Ok(count),
            Err(error) => return Err(error),
        }
    }
}

/// Answers whether a program can read and write the FS base with instructions.
pub(crate) fn fsgsbase() -> io::Result<Outcome> {
    let experiment = || {
        // The handler of the program, or of this crate, is for faults of the program's own.
        // SAFETY: the default action calls nothing.
        unsafe { set_action(libc::SIGILL, Action::DEFAULT) }?;
        // SAFETY: where the kernel has not switched it on, the child is killed, which is the answer.
        let base = unsafe { rdfsbase() };
        // SAFETY: it is the base that is there, and the child is killed if it cannot.
        unsafe { wrfsbase(base) };
        // SAFETY: the instruction has just worked.
        let after = unsafe { rdfsbase() };
        Ok(u8::from(base == after && base as usize == thread_pointer()))
    };
    // SAFETY: the experiment makes system calls, and executes instructions that leave the thread as it was.
    unsafe { fork_probe(experiment) }
}

/// Answers whether PKRU stands at this offset of a signal frame's XSAVE area, and is loaded from there on return.
///
/// The CPU must have PKU switched on.
pub(crate) fn pkru_in_signal_frame(offset: usize) -> io::Result<Outcome> {
    let experiment = || {
        let flags = libc::SA_SIGINFO as u64;
        let action = Action::new(change_pkru as *const () as usize, flags, 0);
        // SAFETY: the handler is called once, by the signal that is sent below.
        unsafe { set_action(libc::SIGUSR1, action) }?;
        unblock(&[libc::SIGUSR1])?;
        // SAFETY: the caller has found PKU.
        let before = unsafe { rdpkru() };
        // The two values for the frame differ in key 15 from what is there now, and the first is not 0, which XSAVE
        // may leave out. A static may have key 15; none is written until the old rights are back.
        let mut order = ChangePkru { offset, seen: 0, new: before ^ 1 << 30 };
        // SAFETY: only writes to pages with key 15 are denied or allowed by this, and what follows writes to the stack.
        unsafe { wrpkru(before ^ 1 << 31) };
        let value = libc::sigval { sival_ptr: (&raw mut order).cast() };
        // SAFETY: the handler gets a pointer that lives until it has returned, which is before this call returns.
        let sent = unsafe { libc::sigqueue(process_id() as libc::pid_t, libc::SIGUSR1, value) };
        // SAFETY: as above.
        let after = unsafe { rdpkru() };
        // SAFETY: these are the rights with which the child began.
        unsafe { wrpkru(before) };
        // SAFETY: the handler has written the field, which the compiler cannot know.
        let seen = unsafe { (&raw const order.seen).read_volatile() };
        if sent != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(u8::from(seen == before ^ 1 << 31 && after == order.new))
    };
    // SAFETY: the experiment makes system calls, and changes registers of the child.
    unsafe { fork_probe(experiment) }
}

/// What [`change_pkru`] is to do. It is on the stack, because a handler begins with rights to key 0 only, and a static
/// may have another.
struct ChangePkru {
    offset: usize,
    /// The rights that were found in the frame.
    seen: u32,
    /// The rights to leave there.
    new: u32,
}

/// A signal handler that reads and changes PKRU in its frame, as the signal's value says.
unsafe extern "C" fn change_pkru(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the signal's information.
    let info = unsafe { &*info };
    // SAFETY: the signal was sent with a value.
    let value = unsafe { info.si_value() };
    // SAFETY: the value is a pointer to an order, whose sender waits.
    let order = unsafe { &mut *value.sival_ptr.cast::<ChangePkru>() };
    // SAFETY: the kernel passes the frame's context.
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    let place = context.uc_mcontext.fpregs.cast::<u8>().wrapping_add(order.offset).cast::<u32>();
    // SAFETY: CPUID says that the XSAVE area, which is in the frame, reaches so far.
    order.seen = unsafe { place.read_unaligned() };
    // SAFETY: as above.
    unsafe { place.write_unaligned(order.new) };
}

/// No restartable-sequences area was registered.
pub(crate) const RSEQ_NONE: u8 = 0;

/// One was, and can be unregistered.
pub(crate) const RSEQ_GIVEN_UP: u8 = 1;

/// One was, and stays.
const RSEQ_STAYS: u8 = 2;

/// Answers with one of these what is registered for the calling thread.
pub(crate) fn rseq() -> io::Result<Outcome> {
    // Before the fork: another thread may hold the loader's lock at that moment, and in the child for ever.
    let area = rseq_area();
    let experiment = || match register_rseq() {
        Ok(()) => Ok(RSEQ_NONE),
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Err(error),
        // The kernel has one area for a thread, so there is one already.
        Err(_) => {
            area.map_or(Ok(()), unregister_rseq)?;
            Ok(if register_rseq().is_ok() { RSEQ_GIVEN_UP } else { RSEQ_STAYS })
        }
    };
    // SAFETY: the experiment makes system calls only.
    unsafe { fork_probe(experiment) }
}

/// Answers whether the kernel hands a thread's system calls to the thread on request.
///
/// # References
///
/// Linux 6.12, `Documentation/admin-guide/syscall-user-dispatch.rst`.
pub(crate) fn syscall_user_dispatch() -> io::Result<Outcome> {
    const PR_SET_SYSCALL_USER_DISPATCH: c_int = 59;
    const ON: usize = 1;
    const ALLOW: u8 = 0;
    const BLOCK: u8 = 1;
    // Not on the stack, which is used for other things after the experiment has returned.
    static SELECTOR: AtomicU8 = AtomicU8::new(ALLOW);
    let experiment = || {
        // The system call of the handler is let through by its address.
        let handler = answer_yes as *const () as usize;
        // SAFETY: the selector never goes away, and says until further notice that all calls are let through.
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
        // Only now: a seccomp filter might have sent the signal for the call above.
        // SAFETY: the handler uses nothing but registers.
        unsafe { set_action(libc::SIGSYS, Action::new(handler, libc::SA_SIGINFO as u64, 0)) }?;
        unblock(&[libc::SIGSYS])?;
        SELECTOR.store(BLOCK, Ordering::SeqCst);
        // SAFETY: the call touches no memory. It is not to be made: the handler is called in its place.
        unsafe { libc::syscall(libc::SYS_getppid) };
        SELECTOR.store(ALLOW, Ordering::SeqCst);
        Ok(0)
    };
    // SAFETY: the experiment makes system calls only.
    unsafe { fork_probe(experiment) }
}

/// Answers whether a mapping can be sealed, so that it cannot be unmapped.
///
/// # References
///
/// Linux 6.12, `Documentation/userspace-api/mseal.rst`.
pub(crate) fn mseal() -> io::Result<Outcome> {
    const SYS_MSEAL: libc::c_long = 462;
    let experiment = || {
        let page = map_reserved(page_size())?;
        // SAFETY: the page was just mapped, and nothing wants to unmap it but the test below.
        if unsafe { libc::syscall(SYS_MSEAL, page.as_ptr(), page_size(), 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: nothing uses the page.
        let unmapped = unsafe { unmap(page, page_size()) };
        Ok(u8::from(unmapped.is_err_and(|error| error.raw_os_error() == Some(libc::EPERM))))
    };
    // SAFETY: the experiment makes system calls only.
    unsafe { fork_probe(experiment) }
}

/// Answers whether there is memory that the kernel's own accesses on behalf of a process do not reach.
///
/// # References
///
/// memfd_secret(2).
pub(crate) fn memfd_secret() -> io::Result<Outcome> {
    let experiment = || {
        // SAFETY: the call touches no memory.
        let file = unsafe { libc::syscall(libc::SYS_memfd_secret, 0) } as c_int;
        if file < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        if unsafe { libc::ftruncate(file, page_size() as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let page = unsafe { libc::mmap(ptr::null_mut(), page_size(), protection, libc::MAP_SHARED, file, 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the page was just mapped.
        unsafe { page.cast::<u64>().write_volatile(1) };
        let mut copy = 0u64;
        let to = libc::iovec { iov_base: (&raw mut copy).cast(), iov_len: size_of_val(&copy) };
        let from = libc::iovec { iov_base: page, iov_len: size_of_val(&copy) };
        // SAFETY: a word is read from the page, or refused, into a variable of that size.
        let read =
            unsafe { libc::process_vm_readv(process_id() as libc::pid_t, &raw const to, 1, &raw const from, 1, 0) };
        match io::Error::last_os_error() {
            _ if read >= 0 => Ok(0),
            error if error.raw_os_error() == Some(libc::EFAULT) => Ok(1),
            error => Err(error),
        }
    };
    // SAFETY: the experiment makes system calls, and writes to memory of its own.
    unsafe { fork_probe(experiment) }
}

/// Returns the kernel's release, as `uname -r` prints it.
pub(crate) fn kernel_release() -> io::Result<String> {
    // SAFETY: utsname is a C struct of characters, for which zero is a value.
    let mut names: libc::utsname = unsafe { mem::zeroed() };
    // SAFETY: the struct is writable.
    if unsafe { libc::uname(&raw mut names) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel ends each name with a zero.
    let release = unsafe { CStr::from_ptr(names.release.as_ptr()) };
    Ok(release.to_string_lossy().into_owned())
}
