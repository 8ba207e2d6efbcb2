//! Failures of C and C++ code. Each is a violation of its own kind, and the domain works afterwards.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::ffi::{c_char, c_int, c_void};
use std::hint::black_box;

use pkru_userspace::{Domain, HeapError, ViolationKind};
use support::{contain, domain, suite, works};

suite! {
    a_stack_overflow_in_c,
    a_local_array_larger_than_the_stack,
    an_array_written_past_its_end,
    a_failed_assertion,
    a_jump_out_of_the_domain,
    a_c_plus_plus_exception_that_nobody_catches,
    new_without_memory,
    a_check_of_the_c_librarys,
    an_invalid_free_names_its_caller,
}

unsafe extern "C" {
    fn helper_recurse(depth: u64) -> u64;
    fn helper_take_stack(size: usize) -> u64;
    fn helper_smash(size: usize) -> u64;
    fn helper_assert(value: c_int);
    fn helper_with_place(function: unsafe extern "C" fn(*mut c_void), argument: *mut c_void) -> c_int;
    fn helper_jump();
    fn helper_jump_inside() -> c_int;
}

#[link(name = "libstdc++.so.6", kind = "dylib", modifiers = "+verbatim")]
unsafe extern "C-unwind" {
    /// `std::__throw_bad_alloc()`
    #[link_name = "_ZSt17__throw_bad_allocv"]
    fn throw_bad_alloc() -> !;
    /// `operator new(unsigned long)`
    #[link_name = "_Znwm"]
    fn operator_new(size: usize) -> *mut c_void;
}

fn a_stack_overflow_in_c() {
    let mut domain = domain("deep");
    let violation = contain(&mut domain, || {
        // SAFETY: deliberately unsound: the mistake under test.
        black_box(unsafe { helper_recurse(0) });
    });
    assert!(matches!(violation.kind(), ViolationKind::StackOverflow { .. }), "{violation}");
}

fn a_local_array_larger_than_the_stack() {
    let mut domain = domain("wide");
    for size in [1 << 20, 3 << 20, 64 << 20, 512 << 20] {
        let violation = contain(&mut domain, || {
            // SAFETY: deliberately unsound: the mistake under test.
            black_box(unsafe { helper_take_stack(size) });
        });
        assert!(matches!(violation.kind(), ViolationKind::StackOverflow { .. }), "{size}: {violation}");
    }
    // SAFETY: the stack has enough room.
    assert_eq!(domain.call(|| unsafe { helper_take_stack(64 * 1024) }).unwrap(), 1, "control");
}

fn an_array_written_past_its_end() {
    let mut domain = domain("smash");
    let violation = contain(&mut domain, || {
        // SAFETY: deliberately unsound: the mistake under test.
        black_box(unsafe { helper_smash(64) });
    });
    assert_eq!(*violation.kind(), ViolationKind::StackSmashed);
    // SAFETY: within its bounds.
    assert_eq!(domain.call(|| unsafe { helper_smash(16) }).unwrap(), 0x5a, "control");
}

fn a_failed_assertion() {
    let mut domain = domain("assert");
    // SAFETY: deliberately unsound: the mistake under test.
    let violation = contain(&mut domain, || unsafe { helper_assert(41) });
    let ViolationKind::Assertion { message: Some(message) } = violation.kind() else { panic!("{violation}") };
    assert!(message.starts_with("`value == 42` at ") && message.contains(".c:"), "{violation}");
    // SAFETY: the assertion holds.
    domain.call(|| unsafe { helper_assert(42) }).expect("control");
}

fn a_jump_out_of_the_domain() {
    struct Attempt {
        domain: Domain,
        violation: Option<ViolationKind>,
    }
    unsafe extern "C" fn attempt(argument: *mut c_void) {
        // SAFETY: the test passes an `Attempt`.
        let attempt = unsafe { &mut *argument.cast::<Attempt>() };
        // SAFETY: deliberately unsound: the mistake under test.
        attempt.violation =
            attempt.domain.call(|| unsafe { helper_jump() }).err().map(|violation| violation.kind().clone());
    }
    unsafe extern "C" fn outside(_: *mut c_void) {
        // SAFETY: the frame that filled the jump buffer is still active.
        unsafe { helper_jump() }
    }
    let mut attempt_of = Attempt { domain: domain("jumper"), violation: None };
    // SAFETY: the argument is of the type that the function expects.
    let jumped = unsafe { helper_with_place(attempt, (&raw mut attempt_of).cast()) };
    assert_eq!(jumped, 0, "the jump left the domain");
    assert!(matches!(attempt_of.violation, Some(ViolationKind::Jump { .. })), "{:?}", attempt_of.violation);
    works(&mut attempt_of.domain);
    // SAFETY: as above.
    assert_eq!(unsafe { helper_with_place(outside, std::ptr::null_mut()) }, 1, "control");
    // SAFETY: the function has no preconditions.
    assert_eq!(attempt_of.domain.call(|| unsafe { helper_jump_inside() }).unwrap(), 7, "jumps within the domain work");
}

fn a_c_plus_plus_exception_that_nobody_catches() {
    let mut domain = domain("throw");
    // SAFETY: deliberately unsound: the mistake under test.
    let violation = contain(&mut domain, || unsafe { throw_bad_alloc() });
    assert_eq!(*violation.kind(), ViolationKind::Exception, "{violation}");
}

fn new_without_memory() {
    let mut domain = domain("new");
    let violation = contain(&mut domain, || {
        // SAFETY: deliberately unsound: nothing catches the std::bad_alloc that it throws.
        black_box(unsafe { operator_new(1 << 40) });
    });
    assert_eq!(*violation.kind(), ViolationKind::Exception, "{violation}");
}

fn a_check_of_the_c_librarys() {
    unsafe extern "C" {
        fn __strcpy_chk(to: *mut c_char, from: *const c_char, size: usize) -> *mut c_char;
    }
    let mut domain = domain("fortify");
    let violation = contain(&mut domain, || {
        let mut room = [0 as c_char; 32];
        // SAFETY: deliberately unsound: the size argument is 4, the string is longer.
        unsafe { __strcpy_chk(room.as_mut_ptr(), c"more than four".as_ptr(), black_box(4)) };
    });
    assert_eq!(*violation.kind(), ViolationKind::Abort, "{violation}");
}

fn an_invalid_free_names_its_caller() {
    #[inline(never)]
    fn culprit(block: *mut c_void) {
        // SAFETY: deliberately unsound: the mistake under test.
        unsafe { libc::free(black_box(block).byte_add(16)) };
        black_box(0);
    }
    let mut domain = domain("free");
    // SAFETY: deliberately unsound: the mistake under test.
    let violation = contain(&mut domain, || culprit(unsafe { libc::malloc(64) }));
    assert!(matches!(violation.kind(), ViolationKind::InvalidFree(HeapError::NotABlock { .. })), "{violation}");
    assert!(violation.symbol().unwrap().name().unwrap().contains("culprit"), "{violation}");
}
