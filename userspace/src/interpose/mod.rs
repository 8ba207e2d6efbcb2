//! Functions of the C library that this crate replaces in the whole program.
//!
//! An executable that links this crate exports these symbols, and the loader binds the calls of every library to them.
//! Outside domains they call the C library's functions.
//!
//! In a program that a sanitizer instruments (`cfg(instrumented)`) they are not exported. The loader would call them
//! before the sanitizer is ready for the instrumented code in them, and they would hide the sanitizer's own. Such a
//! program has no domains.
//!
//! The functions only dispatch: what they do in a domain is in [`inside::libc`](crate::inside::libc).
//!
//! | module | functions | why |
//! |---|---|---|
//! | [`malloc`] | the malloc family | In a domain they allocate from the domain's heap. |
//! | [`thread_exit`] | `__cxa_thread_atexit_impl` | In a domain it registers nothing. |
//! | [`signals`] | `sigaction`, `signal` and its variants, `sigaltstack`, `sigprocmask`, `pthread_sigmask` | The program's handlers run with the program's rights. |
//! | [`signals`] | `pthread_kill` | In a domain the C library's would fault with all signals blocked. |
//! | [`signals`] | `raise` | In a domain a signal that would end the program ends the call. |
//! | [`old_signals`] | `sigset`, `sigignore`, `sighold`, `sigblock`, `sigsetmask` | As for `sigaction` and `sigprocmask`. |
//! | [`endings`] | `abort`, `exit` and `longjmp` with their variants, `__stack_chk_fail`, `__assert_fail`, C++'s `terminate`, `pthread_exit` | In a domain they end the call. |
//! | [`processes`] | `fork`, `_Fork`, `execve` and its variants, `posix_spawn`, `posix_spawnp`, `system`, `popen` | In a domain they fail with EPERM. |
//! | [`mappings`] | `mmap`, `munmap`, `mprotect`, `mremap`, `madvise`, `mlock`, `munlock` | In a domain its caller changes the domain's own memory. |
//! | [`descriptors`] | `open`, `socket`, `dup`, `pipe` and others that open a descriptor, `close`, `dup2`, `fclose`, … | In a domain they close and replace its own descriptors only. |
//! | [`attributes`] | `chdir`, `setuid`, `setrlimit`, `setpriority`, `alarm`, `setitimer`, … | In a domain they fail with EPERM. |
//! | [`kills`] | `kill`, `tgkill`, `sigqueue` and others | In a domain they fail with EPERM for other processes and threads. |
//!
//! `refused` defines functions that fail with EPERM, for [`attributes`] and [`processes`].

#![cfg_attr(
    instrumented,
    allow(dead_code, non_snake_case, reason = "nothing calls what is not exported, and the C library names it")
)]

pub(crate) mod attributes;
pub(crate) mod descriptors;
pub(crate) mod endings;
pub(crate) mod kills;
pub(crate) mod malloc;
pub(crate) mod mappings;
pub(crate) mod old_signals;
pub(crate) mod processes;
mod refused;
pub(crate) mod signals;
pub(crate) mod thread_exit;

use std::ffi::{CStr, c_int};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sys;
use crate::trusted::trusted;

macro_rules! next {
    ($($function:ident = $name:literal,)*) => {
        /// A function of the C or C++ library that this crate replaces. Its address is looked up at its first call.
        #[allow(non_camel_case_types, reason = "they are named after the functions")]
        #[derive(Debug, Clone, Copy)]
        pub(crate) enum Next {
            $($function,)*
        }

        impl Next {
            const ALL: &[Self] = &[$(Self::$function,)*];
        }

        const NAMES: &[&CStr] = &[$($name,)*];
    };
}

next! {
    abort = c"abort",
    exit = c"exit",
    _exit = c"_exit",
    _Exit = c"_Exit",
    quick_exit = c"quick_exit",
    __stack_chk_fail = c"__stack_chk_fail",
    __assert_fail = c"__assert_fail",
    terminate = c"_ZSt9terminatev",
    terminate_with = c"_ZN10__cxxabiv111__terminateEPFvvE",
    longjmp = c"longjmp",
    _longjmp = c"_longjmp",
    siglongjmp = c"siglongjmp",
    __longjmp_chk = c"__longjmp_chk",
    posix_spawn = c"posix_spawn",
    posix_spawnp = c"posix_spawnp",
    fork = c"fork",
    system = c"system",
    pthread_kill = c"pthread_kill",
    raise = c"raise",
    pthread_exit = c"pthread_exit",
    _Fork = c"_Fork",
    popen = c"popen",
    execve = c"execve",
    execv = c"execv",
    execvp = c"execvp",
    execvpe = c"execvpe",
    fexecve = c"fexecve",
    execveat = c"execveat",
    execl = c"execl",
    execlp = c"execlp",
    execle = c"execle",
    setfsuid = c"setfsuid",
    setfsgid = c"setfsgid",
    sethostname = c"sethostname",
    setdomainname = c"setdomainname",
    personality = c"personality",
    pthread_setschedparam = c"pthread_setschedparam",
    pthread_setschedprio = c"pthread_setschedprio",
    pthread_setaffinity_np = c"pthread_setaffinity_np",
    posix_madvise = c"posix_madvise",
    brk = c"brk",
    sbrk = c"sbrk",
    open = c"open",
    open64 = c"open64",
    openat = c"openat",
    openat64 = c"openat64",
    __open_2 = c"__open_2",
    __open64_2 = c"__open64_2",
    __openat_2 = c"__openat_2",
    __openat64_2 = c"__openat64_2",
    creat = c"creat",
    creat64 = c"creat64",
    dup = c"dup",
    socket = c"socket",
    accept = c"accept",
    accept4 = c"accept4",
    eventfd = c"eventfd",
    epoll_create = c"epoll_create",
    epoll_create1 = c"epoll_create1",
    timerfd_create = c"timerfd_create",
    inotify_init = c"inotify_init",
    inotify_init1 = c"inotify_init1",
    memfd_create = c"memfd_create",
    pidfd_open = c"pidfd_open",
    shm_open = c"shm_open",
    posix_openpt = c"posix_openpt",
    mkstemp = c"mkstemp",
    mkstemp64 = c"mkstemp64",
    mkostemp = c"mkostemp",
    mkostemp64 = c"mkostemp64",
    mkstemps = c"mkstemps",
    mkstemps64 = c"mkstemps64",
    mkostemps = c"mkostemps",
    mkostemps64 = c"mkostemps64",
    pipe = c"pipe",
    pipe2 = c"pipe2",
    socketpair = c"socketpair",
    signalfd = c"signalfd",
    fcntl = c"fcntl",
    fcntl64 = c"fcntl64",
    fopen = c"fopen",
    fopen64 = c"fopen64",
    tmpfile = c"tmpfile",
    tmpfile64 = c"tmpfile64",
    opendir = c"opendir",
    fclose = c"fclose",
    closedir = c"closedir",
    close = c"close",
    dup2 = c"dup2",
    dup3 = c"dup3",
    close_range = c"close_range",
    closefrom = c"closefrom",
    chdir = c"chdir",
    fchdir = c"fchdir",
    chroot = c"chroot",
    setuid = c"setuid",
    seteuid = c"seteuid",
    setreuid = c"setreuid",
    setresuid = c"setresuid",
    setgid = c"setgid",
    setegid = c"setegid",
    setregid = c"setregid",
    setresgid = c"setresgid",
    setgroups = c"setgroups",
    setsid = c"setsid",
    setpgid = c"setpgid",
    setrlimit = c"setrlimit",
    setrlimit64 = c"setrlimit64",
    setpriority = c"setpriority",
    nice = c"nice",
    sched_setaffinity = c"sched_setaffinity",
    sched_setscheduler = c"sched_setscheduler",
    sched_setparam = c"sched_setparam",
    unshare = c"unshare",
    setns = c"setns",
    setitimer = c"setitimer",
    timer_create = c"timer_create",
    timer_delete = c"timer_delete",
    prlimit = c"prlimit",
    prlimit64 = c"prlimit64",
    alarm = c"alarm",
    ualarm = c"ualarm",
    kill = c"kill",
    killpg = c"killpg",
    tgkill = c"tgkill",
    sigqueue = c"sigqueue",
    pidfd_send_signal = c"pidfd_send_signal",
    pthread_sigqueue = c"pthread_sigqueue",
    malloc_usable_size = c"malloc_usable_size",
    __cxa_thread_atexit_impl = c"__cxa_thread_atexit_impl",
}

/// Stands for the address of a function that no library defines.
const ABSENT: usize = usize::MAX;

/// The functions that this crate replaces and does not call itself.
const OTHERS: &[&CStr] = &[
    c"malloc",
    c"calloc",
    c"realloc",
    c"reallocarray",
    c"free",
    c"memalign",
    c"aligned_alloc",
    c"posix_memalign",
    c"valloc",
    c"pvalloc",
    c"sigaction",
    c"signal",
    c"bsd_signal",
    c"sysv_signal",
    c"__sysv_signal",
    c"sigaltstack",
    c"pthread_sigmask",
    c"sigprocmask",
    c"sigset",
    c"sigignore",
    c"sighold",
    c"sigblock",
    c"sigsetmask",
    c"mmap",
    c"mmap64",
    c"munmap",
    c"mprotect",
    c"mremap",
    c"madvise",
    c"mlock",
    c"mlock2",
    c"mlockall",
    c"munlock",
    c"munlockall",
    c"pkey_alloc",
    c"pkey_free",
    c"pkey_mprotect",
    c"shmat",
    c"shmdt",
    c"remap_file_pages",
];

/// Returns the names of all functions that this crate replaces.
pub(crate) fn names() -> Vec<&'static CStr> {
    [NAMES, OTHERS].concat()
}

trusted! {
    /// Their addresses, 0 until found.
    static ADDRESSES: [AtomicUsize; NAMES.len()] = [const { AtomicUsize::new(0) }; NAMES.len()];
}

/// Finds all of them now.
///
/// Code in a domain cannot store an address here. In a forked child, a lookup can wait forever for the loader's lock.
pub(crate) fn find_all() {
    for next in Next::ALL {
        let _ = next.find();
    }
}

/// Sets `errno` and returns -1.
fn fail(errno: c_int) -> c_int {
    sys::set_errno(errno);
    -1
}

impl Next {
    /// Returns the function's address, or `None` if no library defines it.
    pub(crate) fn find(self) -> Option<usize> {
        let place = &ADDRESSES[self as usize];
        let found = match place.load(Ordering::Relaxed) {
            0 => {
                let name = NAMES[self as usize];
                let found = match sys::lookup_next(name) {
                    Some(found) => found.as_ptr() as usize,
                    // The C++ library may be loaded later.
                    None if name.to_bytes().starts_with(b"_Z") => return None,
                    None => ABSENT,
                };
                place.store(found, Ordering::Relaxed);
                found
            }
            found => found,
        };
        (found != ABSENT).then_some(found)
    }

    /// Returns the function's address.
    ///
    /// # Panics
    ///
    /// If no library defines the function.
    pub(crate) fn get(self) -> usize {
        self.find().unwrap_or_else(|| panic!("the C library has no {}", NAMES[self as usize].to_string_lossy()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::ffi::CString;

    use object::{Object, ObjectSymbol};

    #[test]
    fn every_function_that_the_program_exports_is_named() {
        let program = std::fs::read("/proc/self/exe").unwrap();
        let program = object::File::parse(&*program).unwrap();
        let exported = program.dynamic_symbols().filter(|symbol| symbol.is_definition() && symbol.is_global());
        let exported: BTreeSet<_> = exported.map(|symbol| CString::new(symbol.name().unwrap()).unwrap()).collect();
        let replaced: BTreeSet<_> =
            exported.into_iter().filter(|name| crate::sys::lookup_next(name).is_some()).collect();
        let named: BTreeSet<_> = super::names().into_iter().map(CString::from).collect();
        assert!(replaced.len() > 50, "the program exports only {replaced:?}");
        assert!(replaced.is_subset(&named), "not named: {:?}", replaced.difference(&named).collect::<Vec<_>>());
    }
}
