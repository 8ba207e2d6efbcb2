//! What a domain may read, and which state is its own. Writes are in `tests/tests/containment_matrix.rs`.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::cell::Cell;
use std::sync::atomic::AtomicU64;

use pkru_userspace::Access;
use support::{domain, key_fault, suite};

suite! {
    another_domain_cannot_be_read,
    the_callers_memory_can_be_read,
    errno_is_the_domains_own,
    thread_locals_are_the_domains_own,
    thread_locals_with_destructors_work,
}

const OLD: u64 = 0x0123_4567_89ab_cdef;

fn another_domain_cannot_be_read() {
    let mut one = domain("one");
    let mut other = domain("other");
    let target = other.call(|| std::ptr::from_mut(Box::leak(Box::new(OLD))) as usize).unwrap() as *const u64;
    // SAFETY: deliberately unsound in the other domain. The owner may read its word.
    let read = || unsafe { target.read_volatile() };
    let fault = key_fault(&one.call(read).unwrap_err());
    assert_eq!((fault.key, fault.access), (other.key().unwrap(), Access::Read));
    assert_eq!(other.call(read).unwrap(), OLD, "control");
}

fn the_callers_memory_can_be_read() {
    let mut domain = domain("reader");
    let text = String::from("in the caller's heap");
    let stack = [1u32, 2, 3];
    assert_eq!(domain.call(|| text.len() as u32 + stack.iter().sum::<u32>()).unwrap(), 26);
}

fn errno_is_the_domains_own() {
    let mut domain = domain("errno");
    // SAFETY: the function has no preconditions.
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
    assert_eq!(unsafe { errno().read() }, 77, "the caller's errno is unchanged");
    assert_eq!(inside(), libc::EBADF);
    // SAFETY: as above.
    assert_eq!(unsafe { errno().read() }, libc::EBADF, "control");
}

fn thread_locals_are_the_domains_own() {
    thread_local! { static COUNT: Cell<u32> = const { Cell::new(5) } }
    let mut domain = domain("counter");
    COUNT.set(100);
    let count = || {
        COUNT.set(COUNT.get() + 1);
        COUNT.get()
    };
    assert_eq!(domain.call(count).unwrap(), 6, "a domain starts with the initial values, like a new thread");
    assert_eq!(domain.call(count).unwrap(), 7, "a domain keeps its thread-locals between calls");
    assert_eq!(COUNT.get(), 100);
    assert_eq!(count(), 101, "control");
}

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
    let mut domain = domain("destructors");
    let push = || {
        LIST.with_borrow_mut(|list| list.0.push(7));
        LIST.with_borrow(|list| list.0.len() as u32)
    };
    assert_eq!([domain.call(push).unwrap(), domain.call(push).unwrap()], [1, 2]);
    std::thread::spawn(push).join().unwrap();
    assert_eq!(DROPPED.load(std::sync::atomic::Ordering::Relaxed), 1, "outside a domain destructors run");
}
