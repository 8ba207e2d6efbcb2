//! Statics that are filled in advance, and libraries whose data is given to a domain.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::ffi::{c_char, c_int, c_void};

use pkru_userspace::{Access, Domain, Error};
use support::{build, contain, domain, key_fault, mistake, suite, works};

suite! {
    a_table_that_is_filled_at_first_use,
    state_in_a_static_of_the_program,
    a_librarys_data_can_be_given_to_a_domain,
    a_librarys_data_follows_the_domains_key,
    a_program_exits_while_a_domain_has_a_library,
    libraries_that_cannot_be_given,
    a_builder_that_fails_leaves_its_libraries_alone,
}

unsafe extern "C" {
    fn helper_table(index: u8) -> u32;
    fn helper_count() -> u64;
}

#[link(name = "libsqlite3.so.0", kind = "dylib", modifiers = "+verbatim")]
unsafe extern "C" {
    fn sqlite3_open(name: *const c_char, database: *mut *mut c_void) -> c_int;
    fn sqlite3_close(database: *mut c_void) -> c_int;
    fn sqlite3_initialize() -> c_int;
}

fn a_table_that_is_filled_at_first_use() {
    let mut cold = domain("cold");
    // SAFETY: the function has no preconditions.
    let look = || unsafe { helper_table(3) };
    let violation = cold.call(look).unwrap_err();
    assert_eq!(key_fault(&violation).access, Access::Write);
    let text = violation.to_string();
    for part in ["table of", "Builder::warm_up", "Globals::Writable"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("Builder::library"), "the static is in the program, not in a library: {text}");
    // SAFETY: as above.
    let mut warm = build(Domain::builder("warm").warm_up(|| unsafe { helper_table(0) }));
    assert_eq!(warm.call(look).unwrap(), 3u32.wrapping_mul(2_654_435_761));
}

fn state_in_a_static_of_the_program() {
    let mut domain = domain("counter");
    // SAFETY: the function has no preconditions.
    let count = || unsafe { helper_count() };
    let before = count();
    let violation = domain.call(count).unwrap_err();
    assert!(violation.target().unwrap().name().unwrap().contains("calls"), "{violation}");
    assert_eq!(count(), before + 1, "control");
}

fn open_and_close() -> i32 {
    let mut database = std::ptr::null_mut();
    // SAFETY: the name is a C string, and `database` is writable.
    unsafe { sqlite3_open(c":memory:".as_ptr(), &raw mut database) + sqlite3_close(database) }
}

fn a_librarys_data_can_be_given_to_a_domain() {
    let mut without = domain("without");
    let violation = without.call(open_and_close).unwrap_err();
    let target = violation.target().expect("the target is a static");
    assert!(target.library().to_string_lossy().contains("libsqlite3"), "{violation}");
    assert!(violation.to_string().contains("give the domain libsqlite3.so.0's data (Builder::library)"), "{violation}");

    // SAFETY: this process uses the library only in that domain.
    let mut domain = build(unsafe { Domain::builder("sqlite").library("libsqlite3.so") });
    assert_eq!(domain.call(open_and_close).unwrap(), 0);
    contain(&mut domain, mistake);
    assert_eq!(domain.call(open_and_close).unwrap(), 0, "the violation has reset its statics");

    // Another domain cannot get the library's data, and cannot use the library.
    // SAFETY: as above.
    let error = unsafe { Domain::builder("second").library("libsqlite3.so.0") }.build().unwrap_err();
    assert!(matches!(error, Error::LibraryInUse { .. }), "{error}");
    let fault = key_fault(&without.call(open_and_close).unwrap_err());
    assert_eq!(Some(fault.key), domain.key());
    drop(domain);
    // SAFETY: the function has no preconditions. The dropped domain has given the library's data back.
    assert_eq!(unsafe { sqlite3_initialize() }, 0);
    assert_eq!(open_and_close(), 0);
}

fn a_librarys_data_follows_the_domains_key() {
    // SAFETY: this process uses the library only in that domain.
    let mut domain = build(unsafe { Domain::builder("sqlite").library("libsqlite3.so") });
    assert_eq!(domain.call(open_and_close).unwrap(), 0);
    let mut others: Vec<_> = (0..20).map(|_| Domain::builder("other").build().unwrap()).collect();
    others.iter_mut().for_each(works);
    assert_eq!(domain.key(), None, "the other domains hold all keys");
    assert_eq!(domain.call(open_and_close).unwrap(), 0);
    assert!(others[3].call(open_and_close).is_err());
}

fn a_program_exits_while_a_domain_has_a_library() {
    drop(domain("first"));
    // The loader runs the library's destructors, which write its data. No thread has rights to it.
    let status = support::in_child(|| {
        // SAFETY: this process uses the library only in that domain.
        let mut domain = unsafe { Domain::builder("sqlite").library("libsqlite3.so") }.build().unwrap();
        assert_eq!(domain.call(open_and_close).unwrap(), 0);
        let mut others: Vec<_> = (0..20).map(|_| Domain::builder("other").build().unwrap()).collect();
        others.iter_mut().for_each(works);
        assert_eq!(domain.key(), None, "the other domains hold all keys");
        std::mem::forget((domain, others));
        std::process::exit(7);
    });
    assert!(libc::WIFEXITED(status), "{status:#x}");
    assert_eq!(libc::WEXITSTATUS(status), 7);
}

fn libraries_that_cannot_be_given() {
    drop(domain("first"));
    for (name, expected) in [
        ("libc.so.6", "cannot be given to a domain"),
        ("ld-linux-x86-64.so.2", "cannot be given to a domain"),
        ("libnothing.so", "no library with the file name `libnothing.so`"),
        ("libsqlite", "no library with the file name `libsqlite`"),
    ] {
        // SAFETY: no domain is built.
        let error = unsafe { Domain::builder("greedy").library(name) }.build().unwrap_err();
        let text = error.to_string();
        assert!(text.contains(expected), "{text}");
    }
}

fn a_builder_that_fails_leaves_its_libraries_alone() {
    drop(domain("first"));
    for _ in 0..2 {
        // SAFETY: no domain is built.
        let builder = unsafe { Domain::builder("failing").library("libsqlite3.so").library("libnothing.so") };
        assert!(matches!(builder.build(), Err(Error::NoLibrary { .. })));
    }
    // SAFETY: this process uses the library only in that domain.
    let mut domain = unsafe { Domain::builder("sqlite").library("libsqlite3.so") }.build().unwrap();
    assert_eq!(domain.call(open_and_close).unwrap(), 0);
}
