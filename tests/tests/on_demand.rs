//! Pages that the program fills on demand in its own signal handlers, used by code in a domain.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::ffi::c_void;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};

use pkru_userspace::{Domain, ViolationKind};
use support::signals::install;
use support::{contain, domain, in_child, suite, works};

suite! {
    pages_that_the_program_fills,
    a_page_that_is_closed_again,
    a_jump_to_data,
    a_handler_that_fills_nothing,
    a_handler_that_gives_up,
    faults_about_which_no_handler_is_asked,
    stds_handler_is_not_asked,
    addresses_that_the_builder_was_told,
    the_guard_of_the_callers_stack,
}

const PAGE: usize = 4096;

/// The pages that [`fill`] fills, and how often it did.
static START: AtomicUsize = AtomicUsize::new(0);
static PAGES: AtomicUsize = AtomicUsize::new(0);
static FILLED: AtomicUsize = AtomicUsize::new(0);
/// How often a handler was asked.
static ASKED: AtomicUsize = AtomicUsize::new(0);

fn address(info: *mut libc::siginfo_t) -> usize {
    ASKED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the kernel passes a valid pointer.
    unsafe { (*info).si_addr() }.addr()
}

extern "C" fn fill(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    let (page, start) = (address(info) & !(PAGE - 1), START.load(Ordering::Relaxed));
    if !(start..start + PAGES.load(Ordering::Relaxed) * PAGE).contains(&page) {
        // SAFETY: the call ends the process.
        unsafe { libc::_exit(9) };
    }
    // SAFETY: the page is the test's.
    unsafe {
        libc::mprotect(page as *mut c_void, PAGE, libc::PROT_READ | libc::PROT_WRITE);
        (page as *mut u8).write(77);
    }
    FILLED.fetch_add(1, Ordering::Relaxed);
}

/// Maps pages without access.
fn closed_pages(count: usize) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses the address.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), count * PAGE, libc::PROT_NONE, flags, -1, 0) }.addr();
    START.store(start, Ordering::Relaxed);
    PAGES.store(count, Ordering::Relaxed);
    start
}

fn read(address: usize) -> u8 {
    // SAFETY: the address is mapped, or the fault is the mistake under test.
    unsafe { (address as *const u8).read_volatile() }
}

fn pages_that_the_program_fills() {
    let start = closed_pages(16);
    install(libc::SIGSEGV, fill, 0);
    assert_eq!(read(start), 77, "control: before the first domain");
    let mut domain = domain("reader");
    assert_eq!(read(start + PAGE), 77, "control: with domains");
    for page in 0..8 {
        assert_eq!(domain.call(|| read(start + page * PAGE)).unwrap(), 77);
    }
    assert_eq!(FILLED.load(Ordering::Relaxed), 8);
    let sum = domain.call(|| (8..16).map(|page| u32::from(read(start + page * PAGE))).sum::<u32>());
    assert_eq!((sum.unwrap(), FILLED.load(Ordering::Relaxed)), (8 * 77, 16));
    // A domain may not write there, filled or not.
    let start = closed_pages(2);
    // SAFETY: deliberately unsound: the mistake under test.
    let write = |page: usize| unsafe { ((start + page * PAGE) as *mut u8).write_volatile(1) };
    assert!(matches!(contain(&mut domain, || write(0)).kind(), ViolationKind::Key(_)));
    assert_eq!((domain.call(|| read(start)).unwrap(), FILLED.load(Ordering::Relaxed)), (77, 17));
    assert!(matches!(contain(&mut domain, || write(0)).kind(), ViolationKind::Key(_)));
    write(1);
}

fn a_page_that_is_closed_again() {
    let start = closed_pages(1);
    install(libc::SIGSEGV, fill, 0);
    let mut domain = domain("reader");
    for round in 1..6 {
        assert_eq!((domain.call(|| read(start)).unwrap(), FILLED.load(Ordering::Relaxed)), (77, round));
        // SAFETY: the page is the test's.
        assert_eq!(unsafe { libc::mprotect(start as *mut c_void, PAGE, libc::PROT_NONE) }, 0);
    }
}

fn a_jump_to_data() {
    static DATA: [u8; 1] = [0xc3];
    install(libc::SIGSEGV, fill, 0);
    closed_pages(1);
    let mut domain = domain("jumper");
    // SAFETY: deliberately unsound: the mistake under test.
    let jump = || unsafe { std::mem::transmute::<*const u8, extern "C" fn()>(black_box(DATA.as_ptr()))() };
    let violation = contain(&mut domain, jump);
    assert!(matches!(violation.kind(), ViolationKind::Unmapped { .. }), "{violation}");
    assert_eq!(ASKED.load(Ordering::Relaxed), 0);
    assert_eq!(in_child(jump), 9 << 8, "control");
}

fn a_handler_that_fills_nothing() {
    extern "C" fn nothing(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
        address(info);
    }
    let start = closed_pages(1);
    install(libc::SIGSEGV, nothing, 0);
    let mut domain = domain("reader");
    for round in 1..4 {
        let violation = contain(&mut domain, || {
            black_box(read(start));
        });
        assert!(matches!(violation.kind(), ViolationKind::Unmapped { .. }), "{violation}");
        assert_eq!(ASKED.load(Ordering::Relaxed), round, "it is asked once each time");
    }
}

fn a_handler_that_gives_up() {
    extern "C" fn default(signal: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
        address(info);
        // SAFETY: the default action is no function.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let start = closed_pages(1);
    install(libc::SIGSEGV, default, 0);
    let mut domain = domain("reader");
    for round in 1..4 {
        contain(&mut domain, || {
            black_box(read(start));
        });
        assert_eq!(ASKED.load(Ordering::Relaxed), round, "it stays installed");
    }
    assert_eq!(
        in_child(|| {
            black_box(read(start));
        }),
        libc::SIGSEGV,
        "control"
    );
}

fn faults_about_which_no_handler_is_asked() {
    let start = closed_pages(1);
    install(libc::SIGSEGV, fill, 0);
    let mut domain = domain("reader");
    let unmapped = closed_pages(1);
    // SAFETY: the page is the test's.
    assert_eq!(unsafe { libc::munmap(unmapped as *mut c_void, PAGE) }, 0);
    let mut local = 0u8;
    let address = (&raw mut local).addr();
    let mistakes: [(&str, &dyn Fn()); 5] = [
        ("null", &|| {
            black_box(read(0x120));
        }),
        ("unmapped", &|| {
            black_box(read(unmapped));
        }),
        // SAFETY: deliberately unsound: the mistake under test.
        ("key", &|| unsafe { (address as *mut u8).write_volatile(1) }),
        ("not canonical", &|| {
            black_box(read(1 << 63));
        }),
        ("own guard page", &|| {
            let here = 0u8;
            let below = (&raw const here).addr() - (2 << 20);
            read(below);
        }),
    ];
    PAGES.store(0, Ordering::Relaxed);
    for (what, mistake) in mistakes {
        contain(&mut domain, mistake);
        assert_eq!(ASKED.load(Ordering::Relaxed), 0, "{what}");
        // Outside, `fill` ends the process if it is asked about other pages.
        if !matches!(what, "key" | "own guard page") {
            assert_eq!(in_child(mistake), 9 << 8, "control: {what}");
        }
    }
    START.store(start, Ordering::Relaxed);
    PAGES.store(1, Ordering::Relaxed);
    assert_eq!(domain.call(|| read(start)).unwrap(), 77, "control");
}

fn stds_handler_is_not_asked() {
    let start = closed_pages(1);
    let mut domain = domain("reader");
    for _ in 0..2 {
        let violation = contain(&mut domain, || {
            black_box(read(start));
        });
        assert!(matches!(violation.kind(), ViolationKind::Unmapped { .. }), "{violation}");
    }
    // With std's handler asked, the fault would be the default's by now.
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: the struct is writable.
    let action = unsafe {
        libc::sigaction(libc::SIGSEGV, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    assert_ne!(action.sa_sigaction, libc::SIG_DFL);
}

fn addresses_that_the_builder_was_told() {
    // A file of one page, mapped as two. The handler extends it.
    static FILE: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn extend(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
        address(info);
        // SAFETY: the descriptor is the test's.
        unsafe { libc::ftruncate(FILE.load(Ordering::Relaxed) as i32, 2 * PAGE as i64) };
    }
    // SAFETY: the name is NUL-terminated.
    let file = unsafe { libc::memfd_create(c"file".as_ptr(), 0) };
    FILE.store(file as usize, Ordering::Relaxed);
    // SAFETY: the descriptor is the test's.
    assert_eq!(unsafe { libc::ftruncate(file, PAGE as i64) }, 0);
    // SAFETY: the kernel chooses the address.
    let start =
        unsafe { libc::mmap(std::ptr::null_mut(), 2 * PAGE, libc::PROT_READ, libc::MAP_SHARED, file, 0).addr() };
    install(libc::SIGBUS, extend, 0);
    let mut untold = domain("untold");
    let violation = contain(&mut untold, || {
        black_box(read(start + PAGE));
    });
    assert_eq!(*violation.kind(), ViolationKind::Bus { address: (start + PAGE) as u64 });
    assert_eq!(ASKED.load(Ordering::Relaxed), 0);
    let builder = Domain::builder("told").filled_on_demand(start..start + 2 * PAGE);
    let mut told = support::build(builder);
    assert_eq!((told.call(|| read(start + PAGE)).unwrap(), ASKED.load(Ordering::Relaxed)), (0, 1));
    works(&mut told);
}

fn the_guard_of_the_callers_stack() {
    install(libc::SIGSEGV, fill, 0);
    closed_pages(1);
    std::thread::spawn(|| {
        let mut attributes = std::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
        let (mut start, mut size) = (std::ptr::null_mut(), 0);
        // SAFETY: the attributes are writable, and initialised by the first call.
        unsafe {
            assert_eq!(libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()), 0);
            assert_eq!(libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut start, &raw mut size), 0);
        }
        let guard = start.addr() - 1;
        let mut domain = domain("reader");
        contain(&mut domain, || {
            black_box(read(guard));
        });
        assert_eq!(ASKED.load(Ordering::Relaxed), 0);
        assert_eq!(
            in_child(|| {
                black_box(read(guard));
            }),
            9 << 8,
            "control"
        );
    })
    .join()
    .unwrap();
}
