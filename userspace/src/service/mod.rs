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
    let value = encode(answer(Service::of(number)?, words, memory));
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
    }
}
