//! Functions of the C library that open and close descriptors, as they act in a domain.

use std::ffi::c_int;

use super::service::{Service, ask};
use crate::sys;

fn returned(answer: Result<u64, c_int>) -> c_int {
    answer.map_or_else(
        |errno| {
            sys::set_errno(errno);
            -1
        },
        |value| value as c_int,
    )
}

/// Has a descriptor recorded that code in the domain has opened; -1 if there is none. Closes it on failure.
pub(crate) fn claim(descriptor: c_int) -> c_int {
    if descriptor < 0 {
        return descriptor;
    }
    let answer = ask(Service::Claim, [descriptor as u64, 0, 0, 0, 0, 0]);
    if answer.is_err() {
        // It is new, and this domain's.
        let _ = sys::close(descriptor);
    }
    returned(answer)
}

/// Has a descriptor recorded, as far as that is possible.
pub(crate) fn record(descriptor: c_int) {
    let _ = ask(Service::Claim, [descriptor as u64, 0, 0, 0, 0, 0]);
}

/// Has a descriptor removed from the record that a function of the C library is about to close.
pub(crate) fn release(descriptor: c_int) {
    // It may be unknown, or this a copy of the process.
    let _ = ask(Service::Release, [descriptor as u64, 0, 0, 0, 0, 0]);
}

/// close(2).
pub(crate) fn close(descriptor: c_int) -> c_int {
    returned(ask(Service::Close, [descriptor as u64, 0, 0, 0, 0, 0]))
}

/// dup2(2), and dup3(2) for different descriptors.
pub(crate) fn duplicate(descriptor: c_int, to: c_int, flags: c_int) -> c_int {
    returned(ask(Service::Duplicate, [descriptor as u64, to as u64, flags as u64, 0, 0, 0]))
}

/// Returns whether this process is a copy, such as the child of vfork(2), with descriptors and attributes of its own.
pub(crate) fn is_in_copy() -> bool {
    ask(Service::IsCopy, [0; 6]) == Ok(1)
}
