//! Asking the caller for a system call.
//!
//! Code in a domain cannot keep records that the caller can rely on. So functions of the C library that change mappings,
//! or open and close descriptors, ask the caller to make the system call, which checks it first.

#![expect(unsafe_code, reason = "it leaves the domain")]

use std::ffi::c_int;

use super::request::{self, SERVICE};
use crate::memory::locals;

macro_rules! services {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What code in a domain can ask its caller for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u64)]
        pub(crate) enum Service {
            $($(#[$doc])* $name,)*
        }

        impl Service {
            const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

services! {
    /// mmap(2).
    Map,
    /// munmap(2).
    Unmap,
    /// mprotect(2).
    Protect,
    /// mremap(2), as far as nothing moves. `EAGAIN` if code in the domain is to move the contents.
    Remap,
    /// madvise(2).
    Advise,
    /// mlock2(2).
    Lock,
    /// munlock(2).
    Unlock,
    /// Recording a descriptor.
    Claim,
    /// Removing a descriptor from the record.
    Release,
    /// close(2).
    Close,
    /// dup3(2).
    Duplicate,
    /// Whether this process is a copy that code in the domain has made.
    IsCopy,
}

impl Service {
    /// Returns the service that a request asks for.
    pub(crate) fn of(number: u64) -> Option<Self> {
        Self::ALL.get(usize::try_from(number.checked_sub(SERVICE)?).ok()?).copied()
    }
}

/// Encodes an answer as the kernel does: errors are negative.
pub(crate) fn encode(answer: Result<u64, c_int>) -> u64 {
    answer.unwrap_or_else(|errno| i64::from(-errno) as u64)
}

/// Asks for a service.
pub(super) fn ask(service: Service, words: [u64; 6]) -> Result<u64, c_int> {
    if locals::context().is_null() {
        return Err(libc::EPERM);
    }
    let [a, b, c, d, e, f] = words;
    // SAFETY: the thread-locals are a domain's, so this runs in one.
    let answer = unsafe { request::call(a, b, c, d, e, f, SERVICE + service as u64) };
    match answer as i64 {
        error @ -4095..0 => Err(-error as c_int),
        _ => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_services() {
        for service in Service::ALL {
            assert_eq!(Service::of(SERVICE + *service as u64), Some(*service));
        }
        for number in [0, 63, SERVICE - 1, SERVICE + Service::ALL.len() as u64, u64::MAX] {
            assert_eq!(Service::of(number), None);
        }
    }
}
