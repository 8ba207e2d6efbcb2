//! System calls that fail when a test wants them to.
//!
//! A seccomp filter hands the calls of a thread, and of those that it starts, to a supervisor in the same process. The
//! supervisor counts them and lets some fail.
//!
//! # References
//!
//! seccomp(2), seccomp_unotify(2).

use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use libc::{c_char, c_int, c_long};

/// The system calls that this fails, and how. Those that cannot fail with valid arguments are not among them.
const CALLS: &[(c_long, c_int)] = &[
    (libc::SYS_mmap, libc::ENOMEM),
    (libc::SYS_munmap, libc::ENOMEM),
    (libc::SYS_pkey_mprotect, libc::ENOMEM),
    (libc::SYS_pkey_alloc, libc::EPERM),
    (libc::SYS_madvise, libc::EAGAIN),
    (libc::SYS_mlock2, libc::ENOMEM),
    (libc::SYS_munlock, libc::ENOMEM),
    (libc::SYS_clone, libc::EAGAIN),
    (libc::SYS_clone3, libc::EAGAIN),
    (libc::SYS_wait4, libc::EINTR),
    (libc::SYS_timer_create, libc::EAGAIN),
    (libc::SYS_timer_settime, libc::EAGAIN),
    (libc::SYS_rt_sigaction, libc::EPERM),
    (libc::SYS_sigaltstack, libc::EPERM),
    (libc::SYS_rseq, libc::EPERM),
    (libc::SYS_rt_tgsigqueueinfo, libc::EAGAIN),
    (libc::SYS_tgkill, libc::EAGAIN),
    (libc::SYS_openat, libc::EMFILE),
    (libc::SYS_getdents64, libc::ENOMEM),
    (libc::SYS_fcntl, libc::EMFILE),
    (libc::SYS_dup3, libc::EMFILE),
    (libc::SYS_sysinfo, libc::EPERM),
];

/// The most calls that are recorded.
pub const MOST: usize = 8192;

/// What the supervisor and the test share: also with the test's parent, if it lies in shared memory.
#[derive(Debug)]
pub struct Calls {
    /// Whether calls are counted, and fail.
    pub is_on: AtomicBool,
    /// What the test is doing, for the record.
    pub step: AtomicUsize,
    /// The calls from this one on fail, counted from 0.
    pub first: AtomicUsize,
    /// How many fail.
    pub failures: AtomicUsize,
    /// How many there were.
    pub count: AtomicUsize,
    /// The step and the number of each.
    pub record: [(AtomicUsize, AtomicUsize); MOST],
}

/// Memory whose bytes may all be zero.
///
/// # Safety
///
/// Zeros are a value of the type.
pub unsafe trait Zeroes: Sync + 'static {}

// SAFETY: it consists of integers.
unsafe impl Zeroes for Calls {}
// SAFETY: as above.
unsafe impl<const N: usize> Zeroes for [AtomicUsize; N] {}

/// Makes zeros that forked children share.
pub fn shared<T: Zeroes>() -> &'static T {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: the kernel chooses a free address.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<T>(), protection, flags, -1, 0) };
    assert_ne!(place, libc::MAP_FAILED);
    // SAFETY: the memory is large enough, aligned to a page, never unmapped, and zero.
    unsafe { &*place.cast::<T>() }
}

impl Calls {
    /// Has the calling thread's system calls counted from now on, and those of the threads that it starts. There is no way
    /// back, but [`is_on`](Self::is_on) can be cleared.
    pub fn supervise(&'static self) {
        let (sender, listener) = mpsc::channel();
        let program = std::env::current_exe().expect("the program has a file");
        let program = CString::new(program.into_os_string().into_encoded_bytes()).expect("a path has no NUL");
        // Before the filter, which it would inherit.
        std::thread::spawn(move || {
            let listener = listener.recv().expect("the test sends it");
            loop {
                self.answer(listener, &program);
            }
        });
        sender.send(install_filter()).expect("the supervisor waits for it");
    }

    /// Answers one call. It allocates nothing: the thread that waits may hold the allocator's lock.
    fn answer(&self, listener: c_int, program: &CStr) {
        // SAFETY: the struct consists of integers, and the kernel wants zeros.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes the struct.
        if unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) } != 0 {
            // A signal, or the thread has ended.
            return;
        }
        let number = c_long::from(call.data.nr);
        let errno = CALLS.iter().find(|(known, _)| *known == number).map_or(0, |(_, errno)| *errno);
        let mut answer = libc::seccomp_notif_resp { id: call.id, val: 0, error: 0, flags: 0 };
        if opens(&call, program) {
            // Reading its symbols would take most of the time of a test.
            answer.error = -libc::ENOENT;
        } else if self.is_to_fail(number, call.data.args) {
            answer.error = -errno;
        } else {
            answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
        }
        // SAFETY: the kernel reads the struct. It fails if the thread has ended meanwhile.
        unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const answer) };
    }

    fn is_to_fail(&self, number: c_long, arguments: [u64; 6]) -> bool {
        let is_left_alone = match number {
            // Its allocator maps memory that can be written. The stack of a thread that cannot be started may stay.
            libc::SYS_mmap => arguments[2] != libc::PROT_NONE as u64 || arguments[3] & libc::MAP_STACK as u64 != 0,
            // It registers the area of a new thread, and ends the program where that fails.
            libc::SYS_rseq => arguments[2] == 0 && arguments[3] != 0,
            // Questions about a descriptor cannot fail.
            libc::SYS_fcntl => !matches!(arguments[1] as c_int, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC),
            _ => false,
        };
        if !self.is_on.load(Ordering::Relaxed) || is_left_alone {
            return false;
        }
        let index = self.count.fetch_add(1, Ordering::Relaxed);
        if let Some((step, call)) = self.record.get(index) {
            step.store(self.step.load(Ordering::Relaxed), Ordering::Relaxed);
            call.store(number as usize, Ordering::Relaxed);
        }
        let first = self.first.load(Ordering::Relaxed);
        (first..first.saturating_add(self.failures.load(Ordering::Relaxed))).contains(&index)
    }
}

/// Returns whether a thread of this process opens a file by this path.
fn opens(call: &libc::seccomp_notif, path: &CStr) -> bool {
    if c_long::from(call.data.nr) != libc::SYS_openat {
        return false;
    }
    // SAFETY: with signal 0 the call only checks that the thread exists.
    let is_here = unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), call.pid, 0) } == 0;
    // SAFETY: the thread waits for an answer, and has passed a path that ends with a NUL.
    is_here && unsafe { CStr::from_ptr(call.data.args[1] as *const c_char) } == path
}

/// Installs the filter on the calling thread. Returns the supervisor's descriptor.
fn install_filter() -> c_int {
    const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let instruction = |code, jt, k| libc::sock_filter { code, jt, jf: 0, k };
    // The system call number is the first word of `struct seccomp_data`.
    let mut filter = vec![instruction(LOAD_WORD, 0, 0)];
    for (index, (call, _)) in CALLS.iter().enumerate() {
        filter.push(instruction(JUMP_EQUAL, (CALLS.len() - index) as u8, *call as u32));
    }
    filter.push(instruction(RETURN, 0, libc::SECCOMP_RET_ALLOW));
    filter.push(instruction(RETURN, 0, libc::SECCOMP_RET_USER_NOTIF));
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // Once the supervisor has a call, only a fatal signal interrupts it.
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the call touches no memory.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the program lives across the call.
    let listener =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    assert!(listener >= 0, "cannot install the filter: {}", std::io::Error::last_os_error());
    listener as c_int
}
