//! Writes from a domain to memory that is not its own are stopped; the same writes outside a domain land.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a sequence of C calls is one thing here")]

mod common;

use std::cell::Cell;
use std::ffi::c_void;
use std::hint::black_box;
use std::sync::atomic::AtomicU64;

use common::{contain, domain, key_fault};
use pkru_userspace::{Access, ViolationKind};

const OLD: u64 = 0x0123_4567_89ab_cdef;
const NEW: u64 = 0xfeed_face_dead_beef;

/// A way to write a word, and its name.
type Way = (&'static str, fn(*mut u64));

const WAYS: [Way; 3] = [("store", store), ("memcpy", by_memcpy), ("slice", by_slice)];

fn store(target: *mut u64) {
    // SAFETY: none in a domain: this is the mistake. Outside, the tests own the target.
    unsafe { target.write_volatile(NEW) };
}

fn by_memcpy(target: *mut u64) {
    // SAFETY: as in `store`.
    unsafe { libc::memcpy(target.cast(), (&raw const NEW_WORD).cast(), black_box(8)) };
}

static NEW_WORD: u64 = NEW;

fn by_slice(target: *mut u64) {
    // SAFETY: as in `store`.
    let slice = unsafe { std::slice::from_raw_parts_mut(black_box(target), black_box(1)) };
    slice[0] = NEW;
}

/// Checks that no way of writing gets to `target` from a domain, and that each does outside.
fn check(target: *mut u64) {
    let mut domain = need!(domain("writer"));
    let read = || {
        // SAFETY: the tests own the target, and nothing else uses it.
        unsafe { target.read_volatile() }
    };
    for (way, write) in WAYS {
        let old = read();
        let violation = contain(&mut domain, || write(target));
        let fault = key_fault(&violation);
        assert_eq!((fault.address, fault.access), (target as u64, Access::Write), "{way}");
        assert_eq!((violation.address(), violation.domain()), (Some(target as u64), "writer"));
        assert_eq!(read(), old, "{way}: nothing was written");
        write(target);
        assert_eq!(read(), NEW, "{way}: control");
        // SAFETY: the tests own the target.
        unsafe { target.write_volatile(old) };
    }
}

#[test]
fn the_callers_heap() {
    let mut word = Box::new(OLD);
    check(&raw mut *word);
}

#[test]
fn the_callers_stack() {
    let mut word = OLD;
    check(&raw mut word);
}

#[test]
fn initialised_static_data() {
    static DATA: AtomicU64 = AtomicU64::new(OLD);
    check(DATA.as_ptr());
}

#[test]
fn zeroed_static_data() {
    static DATA: AtomicU64 = AtomicU64::new(0);
    check(DATA.as_ptr());
}

#[test]
fn the_callers_thread_locals() {
    thread_local! { static WORD: Cell<u64> = const { Cell::new(OLD) } }
    check(WORD.with(Cell::as_ptr));
}

#[test]
fn memory_mapped_after_the_domain_was_made() {
    let mut domain = need!(domain("early"));
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping touches nothing that exists.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    let violation = contain(&mut domain, || store(page.cast()));
    assert_eq!(key_fault(&violation).address, page as u64);
    check(page.cast());
}

#[test]
fn a_librarys_data() {
    // glibc's `environ`, a pointer in the library's data.
    unsafe extern "C" {
        static mut environ: *mut *mut std::ffi::c_char;
    }
    check((&raw mut environ).cast());
}

#[test]
fn the_thread_control_block() {
    let base: *mut u64;
    // SAFETY: the ABI puts the thread pointer at FS:0.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) base) };
    let mut domain = need!(domain("writer"));
    let violation = contain(&mut domain, || store(base));
    assert_eq!(key_fault(&violation).address, base as u64);
    // SAFETY: the word holds its own address.
    assert_eq!(unsafe { base.read() }, base as u64);
}

#[test]
fn another_domain() {
    let mut one = need!(domain("one"));
    let mut other = need!(domain("other"));
    let target = other.call(|| std::ptr::from_mut(Box::leak(Box::new(OLD))) as usize).unwrap() as *mut u64;
    for (way, write) in WAYS {
        let violation = contain(&mut one, || write(target));
        let fault = key_fault(&violation);
        assert_eq!((fault.address, fault.key), (target as u64, other.key().unwrap()), "{way}");
        // SAFETY: the word is on the other domain's heap, which this thread may read.
        assert_eq!(unsafe { target.read_volatile() }, OLD, "{way}");
    }
    // Control: the owner writes it.
    other.call(|| store(target)).unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { target.read_volatile() }, NEW);
}

#[test]
fn another_domain_cannot_be_read() {
    let mut one = need!(domain("one"));
    let mut other = need!(domain("other"));
    let target = other.call(|| std::ptr::from_mut(Box::leak(Box::new(OLD))) as usize).unwrap() as *const u64;
    // SAFETY: none: this is the mistake; for the owner it is its own word.
    let read = || unsafe { target.read_volatile() };
    let fault = key_fault(&one.call(read).unwrap_err());
    assert_eq!((fault.key, fault.access), (other.key().unwrap(), Access::Read));
    assert_eq!(other.call(read).unwrap(), OLD, "control");
}

#[test]
fn the_callers_memory_can_be_read() {
    let mut domain = need!(domain("reader"));
    let text = String::from("in the caller's heap");
    let stack = [1u32, 2, 3];
    assert_eq!(domain.call(|| text.len() as u32 + stack.iter().sum::<u32>()).unwrap(), 26);
}

#[test]
fn read_only_data_and_code() {
    static CONSTANT: u64 = OLD;
    let mut domain = need!(domain("writer"));
    for target in [&raw const CONSTANT as u64, store as *const () as u64] {
        let violation = contain(&mut domain, || store(target as *mut u64));
        assert_eq!((violation.address(), violation.access()), (Some(target), Some(Access::Write)));
    }
    assert_eq!(black_box(CONSTANT), OLD);
}

#[test]
fn a_system_call_given_the_address() {
    let mut domain = need!(domain("reader"));
    let mut buffer = [0x5a_u8; 64];
    let target: *mut c_void = buffer.as_mut_ptr().cast();
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let file = std::os::fd::AsRawFd::as_raw_fd(&zero);
    let read = || {
        // SAFETY: none in a domain: the kernel refuses. Outside, the buffer is the test's.
        let count = unsafe { libc::read(file, target, 64) };
        // SAFETY: errno is the calling code's own.
        (count as i64, if count < 0 { unsafe { *libc::__errno_location() } } else { 0 })
    };
    assert_eq!(domain.call(read).unwrap(), (-1, libc::EFAULT));
    assert!(buffer.iter().all(|byte| *byte == 0x5a));
    assert_eq!(read(), (64, 0), "control");
    assert!(buffer.iter().all(|byte| *byte == 0));
}

#[test]
fn errno_is_the_domains_own() {
    let mut domain = need!(domain("errno"));
    // SAFETY: errno is the calling code's own.
    let errno = || unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { errno().write(77) };
    // SAFETY: as above.
    let inside = || unsafe {
        libc::close(-1);
        errno().read()
    };
    assert_eq!(domain.call(inside).unwrap(), libc::EBADF);
    // SAFETY: as above.
    assert_eq!(unsafe { errno().read() }, 77, "the caller's errno is as it was");
    assert_eq!(inside(), libc::EBADF);
    // SAFETY: as above.
    assert_eq!(unsafe { errno().read() }, libc::EBADF, "control");
}

#[test]
fn thread_locals_are_the_domains_own() {
    thread_local! { static COUNT: Cell<u32> = const { Cell::new(5) } }
    let mut domain = need!(domain("counter"));
    COUNT.set(100);
    let count = || {
        COUNT.set(COUNT.get() + 1);
        COUNT.get()
    };
    assert_eq!(domain.call(count).unwrap(), 6, "a domain starts as a new thread does");
    assert_eq!(domain.call(count).unwrap(), 7, "and keeps its own");
    assert_eq!(COUNT.get(), 100);
    assert_eq!(count(), 101, "control");
}

#[test]
fn thread_locals_with_destructors_work() {
    use std::cell::RefCell;
    struct Noisy(Vec<u32>);
    impl Drop for Noisy {
        fn drop(&mut self) {
            DROPPED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }
    static DROPPED: AtomicU64 = AtomicU64::new(0);
    thread_local! { static LIST: RefCell<Noisy> = const { RefCell::new(Noisy(Vec::new())) } }
    let mut domain = need!(domain("destructors"));
    let push = || {
        LIST.with_borrow_mut(|list| list.0.push(7));
        LIST.with_borrow(|list| list.0.len() as u32)
    };
    assert_eq!([domain.call(push).unwrap(), domain.call(push).unwrap()], [1, 2]);
    std::thread::spawn(push).join().unwrap();
    assert_eq!(DROPPED.load(std::sync::atomic::Ordering::Relaxed), 1, "outside a domain destructors run");
}

#[test]
fn the_signal_stack_where_the_kernel_allows_that() {
    use pkru_userspace::capability::{SignalFrame, detect};
    let mut domain = need!(domain("writer"));
    let mut stack: libc::stack_t = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // The kernel's word: the C library's function says what the program has set.
    // SAFETY: the struct is writable.
    unsafe { libc::syscall(libc::SYS_sigaltstack, std::ptr::null::<libc::stack_t>(), &raw mut stack) };
    let write = || store(stack.ss_sp.cast());
    match detect().unwrap().signal_frame {
        SignalFrame::OnAnyStack => {
            assert!(matches!(contain(&mut domain, write).kind(), ViolationKind::Key(_)));
        }
        // Before Linux 6.12 it must be open to domains, or no signal could be taken in one.
        SignalFrame::OnWritableStack => domain.call(write).unwrap(),
    }
}
