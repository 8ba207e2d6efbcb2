//! The functions that a call enters.

#![expect(unsafe_code, reason = "it reads the call that the caller passes by address")]

use pkru::domain::Entry;

use super::callback::{self, Head};
use super::{exported, libc};
use crate::memory::locals;
use crate::transfer::Transfer;

/// What the code in the domain is handed. It lies in the caller's memory, which the domain can read.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Call<'a, F> {
    pub(crate) function: &'a F,
    /// Where to leave the result's wire, in the domain's memory.
    pub(crate) mailbox: usize,
}

/// Runs a closure and leaves its result in the mailbox. The argument is the address of a [`Call`].
pub(crate) unsafe extern "C" fn run<F: Fn() -> R, R: Transfer>(call: u64) -> u64 {
    // SAFETY: `Domain::call` passes the address of its own value.
    let call = unsafe { &*(call as *const Call<'_, F>) };
    let heap = locals::heap();
    // SAFETY: this runs in a domain.
    unsafe { exported::free_exported(heap) };
    let wire = (call.function)().into_wire();
    libc::check_heap(heap);
    // SAFETY: the mailbox is in the domain's memory, page-aligned and large enough, and above the stack in use.
    unsafe { (call.mailbox as *mut R::Wire).write(wire) };
    0
}

/// The same for a call with callbacks. The argument is the address of a [`Head`].
unsafe extern "C" fn run_with_callbacks<F: Fn() -> R, R: Transfer>(head: u64) -> u64 {
    // SAFETY: `Domain::call_with` passes the address of its own value.
    let head = unsafe { &*(head as *const Head) };
    callback::begin(head);
    // SAFETY: as above.
    let result = unsafe { run::<F, R>(head.call()) };
    callback::end();
    result
}

/// Returns the entry point for a call of this closure with callbacks.
pub(crate) fn with_callbacks<F: Fn() -> R, R: Transfer>(_: &F) -> Entry {
    run_with_callbacks::<F, R>
}

/// Returns whether a function of this name is an entry point. The compiler inlines closures into them.
///
/// With Rust's v0 mangling the name has the type arguments at its end.
pub(crate) fn is_entry(name: &str) -> bool {
    let path = name.split_once("::<").map_or(name, |(path, _)| path);
    matches!(path.strip_prefix(concat!(module_path!(), "::")), Some("run" | "run_with_callbacks"))
}

#[cfg(test)]
mod tests {
    use super::is_entry;

    #[test]
    fn entry_points_have_these_names() {
        assert!(is_entry("pkru_userspace::inside::entry::run"));
        assert!(is_entry("pkru_userspace::inside::entry::run_with_callbacks"));
        assert!(is_entry("pkru_userspace::inside::entry::run::<first_call::main::{closure#1}, ()>"));
        assert!(!is_entry("pkru_userspace::inside::entry::runner"));
        assert!(!is_entry("first_call::main::run::<()>"));
    }
}
