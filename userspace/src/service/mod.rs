//! Services: system calls that a caller makes for code in its domain.
//!
//! The code asks for them by [`inside::service`](crate::inside::service). Its request is hostile until it is checked: it may
//! lie anywhere, and ask for anything. Each service checks its own arguments against the records of the domain, which lie
//! outside it. A policy that decides which system calls a domain may make would stand here.

#![expect(unsafe_code, reason = "it copies requests from domain memory")]

use std::ffi::c_int;
use std::mem::MaybeUninit;

use crate::backend::pku::Memory;
use crate::inside::request::{Reply, Request};
use crate::inside::service::{Service, encode};
use crate::sys;
use crate::thread::{self, Thread};

/// Copies a request; `None` if it is not in the domain's memory, or cannot be read. The calling thread has rights to that
/// memory.
pub(crate) fn read(request: u64, memory: &Memory) -> Option<Request> {
    let start = request as usize;
    let end = start.checked_add(size_of::<Request>())?;
    memory.readable().iter().find(|range| range.start <= start && end <= range.end)?;
    let mut copy = MaybeUninit::<Request>::uninit();
    sys::copy_value_from(start, &mut copy).ok()?;
    // SAFETY: it was copied, and any bytes are a request.
    Some(unsafe { copy.assume_init() })
}

/// Provides what a request asks for, and returns what the domain resumes with; `None` if it asks for no service. The
/// domain's key is pinned.
pub(crate) fn provide(request: u64, memory: &mut Memory) -> Option<Reply> {
    let Request { number, words } = read(request, memory)?;
    let service = Service::of(number)?;
    // The caller's errno is not the domain's.
    let value = encode(sys::keep_errno(|| answer(service, words, memory)));
    Some(Reply { stack: request, value })
}

fn answer(service: Service, words: [u64; 6], memory: &mut Memory) -> Result<u64, c_int> {
    match service {
        Service::Map => memory.map(words),
        Service::Unmap => memory.unmap(words),
        Service::Protect => memory.protect(words),
        Service::Remap => memory.remap(words),
        Service::Advise => memory.advise(words),
        Service::Lock => memory.lock(words),
        Service::Unlock => memory.unlock(words),
        Service::IsCopy => Ok(is_in_copy().into()),
        // Its descriptors are its own, and the record is not.
        _ if is_in_copy() => in_copy(service, words),
        Service::Claim => memory.descriptors.claim(words[0] as c_int),
        Service::Release => Ok(memory.descriptors.release(words[0] as c_int).into()),
        Service::Close => memory.descriptors.close(words[0] as c_int),
        Service::Duplicate => memory.descriptors.duplicate(words[0] as c_int, words[1] as c_int, words[2] as c_int),
    }
}

/// Returns whether this process is a copy that code in the domain has made, such as the child of vfork(2).
fn is_in_copy() -> bool {
    !thread::current().is_some_and(Thread::is_original)
}

fn in_copy(service: Service, [descriptor, to, flags, ..]: [u64; 6]) -> Result<u64, c_int> {
    let result = match service {
        Service::Close => sys::close(descriptor as c_int).map(|()| 0),
        Service::Duplicate if descriptor == to => Ok(to as c_int),
        Service::Duplicate => sys::duplicate_to(descriptor as c_int, to as c_int, flags as c_int),
        _ => Ok(descriptor as c_int),
    };
    result.map(|value| value as u64).map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL))
}
