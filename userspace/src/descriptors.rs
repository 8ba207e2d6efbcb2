//! Which descriptors are a domain's: those that code in it has opened.
//!
//! The records lie outside the domains. A domain claims a descriptor after it has opened it, and closes by its caller what
//! it has claimed. Nobody can check a claim: code that means to escape can claim any descriptor, or close it by a system
//! call. A mistake, such as a double close, claims nothing.
//!
//! A descriptor can be closed without this crate seeing that, as by fclose(3), and its number can be the program's by then.
//! So a descriptor that is to be closed must refer to the file that it referred to when it was claimed. And whatever
//! the program opens and closes through the C library is no domain's afterwards.

#![expect(unsafe_code, reason = "it follows a pointer to a table that is made once")]

use std::ffi::c_int;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use crate::sys::{self, File};
use crate::trusted::trusted;

/// The number of descriptors that can be a domain's.
const MOST: usize = 1 << 16;

trusted! {
    /// The table, null until the first claim. Not a `OnceLock`, which stays locked in a child that is forked while it is
    /// made.
    static OWNERS: AtomicPtr<Owners> = AtomicPtr::new(ptr::null_mut());
    /// The number of the next domain that opens a descriptor.
    static NEXT: AtomicU32 = AtomicU32::new(1);
}

/// The number of the domain that each descriptor belongs to, 0 if none.
type Owners = [AtomicU32; MOST];

fn owners() -> Option<&'static Owners> {
    // SAFETY: the pointer is null, or leads to a table that is never freed.
    unsafe { OWNERS.load(Ordering::Acquire).as_ref() }
}

/// Makes the table, if there is none.
fn make_owners() {
    if owners().is_none() {
        // SAFETY: zero is a valid number.
        let new = Box::into_raw(unsafe { Box::<Owners>::new_zeroed().assume_init() });
        if OWNERS.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            // SAFETY: another thread was faster, and nothing else knows this table.
            drop(unsafe { Box::from_raw(new) });
        }
    }
}

fn owner(descriptor: c_int) -> Option<&'static AtomicU32> {
    owners()?.get(usize::try_from(descriptor).ok()?)
}

/// Notes that the program has opened or closed a descriptor, so that it is no domain's.
pub(crate) fn forget(descriptor: c_int) {
    if let Some(owner) = owner(descriptor)
        && owner.load(Ordering::Relaxed) != 0
    {
        owner.store(0, Ordering::Relaxed);
    }
}

/// Does so for all descriptors of a range.
pub(crate) fn forget_all(first: u32, last: u32) {
    let Some(owners) = owners() else { return };
    let last = (last as usize).min(owners.len() - 1);
    for owner in owners.get(first as usize..=last).unwrap_or_default() {
        owner.store(0, Ordering::Relaxed);
    }
}

fn errno(error: &io::Error) -> c_int {
    error.raw_os_error().unwrap_or(libc::EINVAL)
}

/// What is returned to code in the domain, or the `errno` value.
type Answer = Result<u64, c_int>;

/// The descriptors of one domain.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    /// The domain's number in the table, 0 until its first claim.
    number: u32,
    own: Vec<(c_int, File)>,
}

impl Descriptors {
    /// Records a descriptor that code in the domain has opened.
    pub(crate) fn claim(&mut self, descriptor: c_int) -> Answer {
        let file = sys::file_of(descriptor).map_err(|error| errno(&error))?;
        make_owners();
        let owner = owner(descriptor).ok_or(libc::EMFILE)?;
        if self.number == 0 {
            self.number = NEXT.fetch_add(1, Ordering::Relaxed);
        }
        self.own.retain(|(own, _)| *own != descriptor);
        self.own.push((descriptor, file));
        owner.store(self.number, Ordering::Relaxed);
        Ok(descriptor as u64)
    }

    /// Removes a descriptor from the record. Returns whether it was the domain's, and still is the same file.
    pub(crate) fn release(&mut self, descriptor: c_int) -> bool {
        let Some(index) = self.own.iter().position(|(own, _)| *own == descriptor) else { return false };
        let (_, file) = self.own.swap_remove(index);
        let is_own = owner(descriptor)
            .is_some_and(|it| it.compare_exchange(self.number, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok());
        is_own && sys::file_of(descriptor).is_ok_and(|now| now == file)
    }

    /// close(2).
    pub(crate) fn close(&mut self, descriptor: c_int) -> Answer {
        if !self.release(descriptor) {
            return Err(if sys::is_open(descriptor) { libc::EPERM } else { libc::EBADF });
        }
        sys::close(descriptor).map(|()| 0).map_err(|error| errno(&error))
    }

    /// dup2(2) and dup3(2): the new descriptor is the domain's own, or free.
    pub(crate) fn duplicate(&mut self, descriptor: c_int, to: c_int, flags: c_int) -> Answer {
        if to < 0 || !sys::is_open(descriptor) {
            return Err(libc::EBADF);
        }
        if flags & !libc::O_CLOEXEC != 0 {
            return Err(libc::EINVAL);
        }
        if descriptor == to {
            return Ok(to as u64);
        }
        let new = if self.release(to) {
            // On failure it is open still.
            sys::duplicate_to(descriptor, to, flags).inspect_err(|_| {
                let _ = self.claim(to);
            })
        } else {
            // It takes the descriptor only if it is free, whatever other threads do.
            sys::duplicate_from(descriptor, to, flags & libc::O_CLOEXEC == 0)
        };
        let new = new.map_err(|error| if errno(&error) == libc::EINVAL { libc::EBADF } else { errno(&error) })?;
        if new != to {
            // The call has just made it, and nobody knows it.
            let _ = sys::close(new);
            return Err(libc::EPERM);
        }
        self.claim(to)
    }

    /// Closes all of them.
    pub(crate) fn close_all(&mut self) {
        while let Some((descriptor, _)) = self.own.last().copied() {
            if self.release(descriptor) {
                sys::do_not_linger(descriptor);
                // Whatever it returns, the descriptor is closed.
                let _ = sys::close(descriptor);
            }
        }
    }
}
